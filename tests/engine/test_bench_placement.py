"""The simulation of placement: what it counts, that it repeats itself, and what placement is worth in a small form."""

import json
import random

import pytest

from server.engine.bench_placement import Options, main, measure, workload
from server.engine.placement import Placement
from server.engine.placement_simulation import Arrival, Placed, SimulatedEngine, clairvoyant_hits, simulate

SMALL = Options(engines=4, rows=16, requests=2500, warm=0.2)


def arrivals(*digests: str, seconds: float = 0.5) -> list[Arrival]:
    return [Arrival(float(at), digest, seconds) for at, digest in enumerate(digests)]


def test_an_adapter_stays_until_a_page_is_needed() -> None:
    outcome = simulate(arrivals(*"abacab"), 1, rows=4, pages=2, load_seconds=0.1, choose=lambda *_: 0)
    assert outcome.hits == [False, False, True, False, True, False]  # c drives b out, then b drives c out
    assert outcome.waits == [0.0] * 6
    assert outcome.imbalances == [1.0] * 6


def test_rows_and_pages_are_waited_for() -> None:
    moves: list[tuple[str, str]] = []
    engine = SimulatedEngine(rows=2, pages=1, load_seconds=0.0, moved=lambda *move: moves.append(move))
    for number, digest in enumerate("aabb"):
        engine.add(number, Arrival(0.0, digest, 1.0))
    started = engine.start()
    assert [(number, hit) for number, _, hit, _ in started] == [(0, False), (1, True)]
    assert engine.start() == []
    for _, arrival, _, _ in started:
        engine.end(arrival)
    assert [number for number, *_ in engine.start()] == [2, 3]
    assert moves == [("a", "device"), ("a", "host"), ("b", "device")]
    assert engine.requests == 2


def test_one_that_finds_no_page_does_not_hold_up_others() -> None:
    engine = SimulatedEngine(rows=3, pages=1, load_seconds=0.0, moved=lambda *_: None)
    for number, digest in enumerate("aba"):
        engine.add(number, Arrival(0.0, digest, 1.0))
    assert [number for number, *_ in engine.start()] == [0, 2]


def test_what_is_loaded_takes_longer_and_loads_count_in_flight() -> None:
    outcome = simulate(arrivals("a", "a", seconds=5.0), 2, 4, 4, load_seconds=1.0, choose=lambda _, loads: loads[0])
    assert outcome.hits == [False, False]  # the second one went to the other engine
    assert outcome.imbalances == [2.0, 1.0]


@pytest.mark.parametrize(
    ("digests", "pages", "hits"),
    [("abab", 1, 0.0), ("abab", 2, 0.5), ("abcabc", 2, 2 / 6), ("aaaa", 1, 0.75), ("abcdab", 3, 2 / 6)],
)
def test_the_bound_of_all_evictions(digests: str, pages: int, hits: float) -> None:
    assert clairvoyant_hits(digests, pages) == pytest.approx(hits)


def test_all_requests_end_and_nothing_is_left_of_them() -> None:
    placement = Placement(3, random.Random(0))
    traffic = workload(SMALL, 40, 0.9)
    outcome = simulate(traffic, 3, 8, 6, 0.05, Placed(placement).choose, placement)
    assert len(outcome.hits) == len(outcome.waits) == len(traffic)
    assert min(outcome.waits) >= 0.0
    assert [placement.load(engine) for engine in range(3)] == [0, 0, 0]
    assert not any(seen.using for seen in placement._seen)


def test_placement_finds_adapters_and_keeps_the_load_even() -> None:
    row = measure(SMALL, adapters=200, pages=16, load=0.7)
    assert row["share_of_oracle"] >= 0.9
    assert row["placement"]["hits"] > 1.3 * row["least loaded"]["hits"]
    assert row["placement"]["imbalance"] < row["random"]["imbalance"]
    assert row["clairvoyant"] > row["oracle"]["hits"]
    assert row == measure(SMALL, adapters=200, pages=16, load=0.7)


@pytest.mark.slow
def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = main(["--requests", "3000", "--rows", "16"])
    printed = capsys.readouterr().out
    *table, last = [line for line in printed.splitlines() if line]
    assert json.loads(last) == document
    assert len(table) == 2 + len(document["rows"])
    assert document["options"]["seed"] == 0
