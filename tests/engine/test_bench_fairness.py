"""The fairness benchmark on a tiny model: what it counts, and that the flooded engine is shared."""

import json
from pathlib import Path

import pytest

from server.engine.bench_fairness import OTHER, Options, Run, main, run

SMALL = ("--device", "cpu", "--rows", "4", "--flood", "12", "--flood-tokens", "40", "--other-tokens", "10")


def silent(_: str) -> None:
    """Progress that nobody reads."""


@pytest.mark.slow
def test_the_document(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = main([*SMALL, "--model", str(tiny_model), "--prompt", "20", "--delay", "4"])
    assert json.loads(capsys.readouterr().out) == document
    flood, uncached, together, alone = (document["runs"][n] for n in ("flood", "uncached", "one_tenant", "alone"))
    assert 0.4 <= document["share"] <= 0.7
    assert len(document["intervals"]) == 10
    assert document["same_texts"] == flood["requests"] == together["requests"] == 12 + alone["requests"]
    assert 2 <= flood["yielded"] == flood["preemptions"] <= 12
    assert together["preemptions"] == together["recomputed"] == alone["preemptions"] == alone["recomputed"] == 0
    assert 0 < flood["recomputed"] <= flood["yielded"] * 16, "at most the last block, and its start is cached"
    assert uncached["recomputed"] >= uncached["yielded"] * 20
    assert flood["first_token"]["other"]["max"] < flood["seconds"]
    assert "flood" not in alone["first_token"]


@pytest.mark.slow
def test_a_random_model_and_weights() -> None:
    ticks = iter(range(1_000_000))
    options = Options(device="cpu", rows=4, flood=10, flood_tokens=24, other_tokens=10, prompt=4, delay=3, weight=3.0)
    document = run(options, silent, clock=lambda: float(next(ticks)))
    assert document["due"] == 0.75
    assert 0.6 <= document["share"] <= 0.9


def test_shares_are_of_what_was_served_within() -> None:
    done = Run(served=[(1.0, OTHER, 10.0), (2.0, "flood", 30.0), (2.5, OTHER, 10.0), (3.0, "flood", 5.0)])
    assert done.share(0.0, 2.0) == 0.25
    assert done.share(1.0, 2.5) == 0.25
    assert done.share(2.5, 3.0) == 0.0
    assert done.share(3.0, 9.0) is None
