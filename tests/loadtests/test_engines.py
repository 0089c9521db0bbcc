"""The comparison of servers with one and with several engines."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.engines import main, rows, summary


def run(rate: float, first: float, failed: int = 0) -> dict[str, Any]:
    latencies = {"ttft": {"p50": first}, "itl": {"p50": 2 * first}}
    return {"tokens_per_second": rate, "requests": 10, "statuses": {"ok": 10 - failed}, "all": latencies}


def test_medians_and_ratios() -> None:
    document = summary({1: [run(10, 5), run(12, 7), run(11, 6)], 2: [run(22, 3, failed=2), run(20, 3), run(24, 4)]})
    one, two = document["runs"]
    assert (one["tokens_per_second"], one["ratio"], one["ttft_p50_ms"], one["failed"]) == (11, 1.0, 6, 0)
    assert (two["tokens_per_second"], two["ratio"], two["itl_p50_ms"], two["failed"]) == (22, 2.0, 6, 2)
    assert one["spread"] == pytest.approx(2 / 11)
    assert rows(document)[2][:4] == ["2", "22.0", "18.2%", "2.00"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--requests", "9", "--at-once", "4", "--longest", "24", "--repeats", "1")
    serve = [f"--serve={each}" for each in ("--max-model-len=256", "--kv-memory=64MiB", "--page-memory=128MiB")]
    document = main(["--model", str(smollm2), *sizes, *serve, "--out", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert json.loads((tmp_path / "out" / "engines.json").read_text()) == document
    assert [(each["engines"], each["failed"]) for each in document["runs"]] == [(1, 0), (2, 0)]
    assert document["adapters"] == 3
    assert str(tmp_path) not in json.dumps(document)
