"""What it costs that the server chooses: the figures, and the whole measurement at its smallest."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loadtests.routing import MODES, check, figures, main
from loadtests.streamed import Answered, AnswerError, Round


def answered(*names: str, first: float = 0.1, cached: bool = False, route_ms: float = 1.0) -> Answered:
    route: dict[str, Any] = {"cached": cached, "route_ms": route_ms, "adapters": [{"name": name} for name in names]}
    return Answered(first, 10, route)


def test_ratios_are_of_the_same_round() -> None:
    seconds = {"named": [1.0, 2.0, 4.0], "auto": [1.25, 2.0, 5.0], "cached": [1.0, 2.0, 4.0]}
    played = {mode: [Round(each, (answered("a"),)) for each in seconds[mode]] for mode in MODES}
    alone = {
        "named": [answered("a", first=0.1), answered("a", first=0.3), answered("a", first=0.2)],
        "auto": [answered("a", first=0.11), answered("a", first=0.31), answered("a", first=0.2)],
        "cached": [answered("a", first=0.1), answered("a", first=0.3), answered("a", first=0.2)],
    }
    found = figures(played, alone)
    assert found["auto"]["to_named"] == pytest.approx(0.8)
    assert found["auto"]["to_named_rounds"] == [0.8, 1.0, 0.8]
    assert found["auto"]["alone_first_token_above_named_ms"] == pytest.approx(10)
    assert found["named"]["tokens_per_second"] == [10.0, 5.0, 2.5]
    assert found["cached"]["to_named"] == 1


def test_a_mode_that_is_not_what_it_says_is_an_error() -> None:
    check("auto", [answered("a", "b")], [answered("b", "a")])
    check("cached", [answered("a", cached=True)], [answered("a")])
    with pytest.raises(AnswerError, match="instead of"):
        check("named", [answered("a")], [answered("b")])
    with pytest.raises(AnswerError, match="the adapters"):
        check("auto", [answered()], [answered()])
    with pytest.raises(AnswerError, match="a decision was remembered"):
        check("auto", [answered("a", cached=True)], [answered("a")])
    with pytest.raises(AnswerError, match="not remembered"):
        check("cached", [answered("a")], [answered("a")])


@pytest.mark.parametrize(
    "arguments", [["--adapters", "0"], ["--adapters", "2", "--requests", "100"], ["--tokens", "x"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "/nowhere", *arguments])
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_measurement(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = os.environ.get("LORAMUX_DATA_DIR") or Path.home() / ".local" / "share" / "loramux"
    size = ["--adapters", "4", "--requests", "4", "--at-once", "2", "--tokens", "2", "--rounds", "1", "--top-k", "2"]
    encoder = ["--encoder", str(Path(root) / "models" / "all-minilm-l6-v2")]
    document = main(["--model", str(smollm2), *encoder, *size, "--out", str(tmp_path / "new" / "result.json")])
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == document
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    found = document["top_k_2"]
    assert found["named"]["to_named"] == 1.0
    assert document["lowest_auto_to_named"] == found["auto"]["to_named"] > 0
    for mode in ("auto", "cached"):
        assert found[mode]["route_ms"]["count"] == found[mode]["alone_route_ms"]["count"] == 4
