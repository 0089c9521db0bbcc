"""What `--model` may be."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from server.checkpoint import CheckpointError, locate


def test_a_folder(tmp_path: Path) -> None:
    assert locate(str(tmp_path), Path("/nowhere")) == tmp_path


def test_a_pulled_model(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "smollm2-135m"
    with pytest.raises(CheckpointError, match="loramux pull smollm2-135m"):
        locate("smollm2-135m", tmp_path)
    folder.mkdir(parents=True)
    assert locate("smollm2-135m", tmp_path) == folder


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: str(tmp_path / hub_id))
    assert locate("org/name", tmp_path) == tmp_path / "org" / "name"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (LocalEntryNotFoundError("long\nstory"), "cannot be reached"),
        (OSError("/secret/disk is full"), "the download failed"),
    ],
)
def test_a_hub_that_cannot_help(monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=problem) as refused:
        locate("org/name", Path("/nowhere"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    import httpx

    def fail(*_: object, **__: object) -> None:
        response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
        raise HfHubHTTPError("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="not for you" if status < 500 else "refused"):
        locate("org/name", Path("/nowhere"))


@pytest.mark.parametrize("model", ["/nowhere", "nowhere", "./a/b", "a/b/c", "a/", "~/x/y"])
def test_nothing(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(model, Path("/nowhere"))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="expected a folder"):
        locate(str(tmp_path / "file"), tmp_path)
