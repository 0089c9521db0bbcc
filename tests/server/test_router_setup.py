"""What the settings say of the encoder's process."""

from pathlib import Path

import pytest

from server import router_setup
from server.checkpoint import CheckpointError
from server.config import RoutingSettings, ServeSettings, Settings


@pytest.mark.parametrize(
    ("engine", "encoder", "chosen"),
    [("auto", "auto", "auto"), ("cpu", "auto", "cpu"), ("cuda", "auto", "cuda"), ("cuda", "cpu", "cpu")],
)
def test_the_encoder_is_where_the_engine_is_unless_the_settings_say_otherwise(
    engine: str, encoder: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, float]] = []

    class Process:
        def __init__(self, _folder: Path, *, device: str, gpu_share: float, **_: object) -> None:
            started.append((device, gpu_share))

    monkeypatch.setattr(router_setup, "EncoderProcess", Process)
    monkeypatch.setattr(router_setup, "locate", lambda _name, _data_dir: tmp_path)
    serve, routing = ServeSettings(device=engine), RoutingSettings(device=encoder, gpu_share=0.1)
    router_setup.encoder_process(Settings(data_dir=tmp_path, serve=serve, routing=routing))
    assert started == [(chosen, 0.1)]


def test_of_an_encoder_that_is_not_here_the_message_says_that_it_is_the_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointError, match=r"the encoder is not here: .*'nothing' does not exist"):
        router_setup.encoder_process(Settings(data_dir=tmp_path, routing=RoutingSettings(encoder="nothing")))
    process, absent = router_setup.encoder_process(Settings(data_dir=tmp_path))
    assert process is None
    assert "loramux pull all-minilm-l6-v2" in absent
    assert absent in caplog.text
    caplog.clear()
    assert router_setup.encoder_process(Settings(data_dir=tmp_path, routing=RoutingSettings(encoder="none")))[0] is None
    assert not caplog.text  # as it was asked for
