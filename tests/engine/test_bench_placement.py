"""The simulation of placement: what it counts, that it repeats itself, and what placement is worth in a small form."""

import json
import random

import pytest

from server.engine.bench_placement import Options, main, measure, share_of_prefixes, talks, workload
from server.engine.conversations import Talk, conversations
from server.engine.placement import Placement
from server.engine.placement_simulation import Arrival, EngineSize, Placed, SimulatedEngine, clairvoyant_hits, simulate

SMALL = Options(engines=4, rows=16, requests=2500, warm=0.2)


def arrivals(*digests: str, seconds: float = 0.5) -> list[Arrival]:
    return [Arrival(float(at), digest, seconds) for at, digest in enumerate(digests)]


def test_an_adapter_stays_until_a_page_is_needed() -> None:
    outcome = simulate(arrivals(*"abacab"), 1, EngineSize(4, 2, 0.1), choose=lambda *_: 0)
    assert outcome.hits == [False, False, True, False, True, False]  # c drives b out, then b drives c out
    assert outcome.waits == [0.0] * 6
    assert outcome.imbalances == [1.0] * 6


def test_rows_and_pages_are_waited_for() -> None:
    moves: list[tuple[str, str]] = []
    engine = SimulatedEngine(EngineSize(2, 1, 0.0), moved=lambda *move: moves.append(move))
    for number, digest in enumerate("aabb"):
        engine.add(number, Arrival(0.0, digest, 1.0))
    started = engine.start()
    assert [(each.number, each.hit) for each in started] == [(0, False), (1, True)]
    assert engine.start() == []
    for each in started:
        engine.end(each.arrival)
    assert [each.number for each in engine.start()] == [2, 3]
    assert moves == [("a", "device"), ("a", "host"), ("b", "device")]
    assert engine.requests == 2


def test_one_that_finds_no_page_does_not_hold_up_others() -> None:
    engine = SimulatedEngine(EngineSize(3, 1, 0.0), moved=lambda *_: None)
    for number, digest in enumerate("aba"):
        engine.add(number, Arrival(0.0, digest, 1.0))
    assert [each.number for each in engine.start()] == [0, 2]


def test_what_is_loaded_takes_longer_and_loads_count_in_flight() -> None:
    outcome = simulate(arrivals("a", "a", seconds=5.0), 2, EngineSize(4, 4, 1.0), choose=lambda _, loads: loads[0])
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
    outcome = simulate(traffic, 3, EngineSize(8, 6, 0.05), Placed(placement).choose, placement)
    assert len(outcome.hits) == len(outcome.waits) == len(traffic)
    assert min(outcome.waits) >= 0.0
    assert [placement.load(engine) for engine in range(3)] == [0, 0, 0]
    assert not any(seen.using for seen in placement._seen)


def test_blocks_of_a_prompt_are_found_up_to_the_first_that_is_gone() -> None:
    engine = SimulatedEngine(EngineSize(8, 8, 0.5, blocks=5, block_seconds=1.0), moved=lambda *_: None)

    def cached(*blocks: int, prompt: int) -> tuple[int, float]:
        engine.add(0, Arrival(0.0, "a", 0.0, blocks, prompt))
        (started,) = engine.start()
        engine.end(started.arrival)
        return started.cached, started.seconds

    assert cached(1, 2, 3, prompt=2) == (0, 2.5)  # the adapter as well
    assert cached(1, 2, 3, 4, prompt=4) == (3, 1.0)  # its answer stayed
    assert cached(7, 8, prompt=2) == (0, 2.0)  # and drives the last one of before out
    assert cached(1, 2, 3, 4, prompt=4) == (3, 1.0)


def test_turns_of_a_conversation_begin_with_those_before() -> None:
    traffic = conversations(Talk(think=1.0), 500, rate=2.0, adapters=3, exponent=1.0, seed=1)
    assert len(traffic) == 500
    assert [each.at for each in traffic] == sorted(each.at for each in traffic)
    assert traffic == conversations(Talk(think=1.0), 500, rate=2.0, adapters=3, exponent=1.0, seed=1)
    ends: set[int] = set()
    continued = 0
    for each in traffic:
        assert 0 < each.prompt_blocks <= len(each.blocks)
        assert len(set(each.blocks)) == len(each.blocks)
        continued += any(block in ends for block in each.blocks[: each.prompt_blocks])
        ends.add(each.blocks[-1])
    assert 300 < continued < 450  # three of four are no first turn, less those whose question ends within a block
    shared = {each.digest: set(each.blocks) for each in traffic}
    for each in traffic:
        assert shared[each.digest] & set(each.blocks)  # its adapter's instructions
        assert not any(set(each.blocks) & blocks for digest, blocks in shared.items() if digest != each.digest)


def test_placement_finds_what_a_conversation_left() -> None:
    row = measure(SMALL, adapters=4, pages=4, load=0.5, traffic=talks)  # all adapters everywhere: KV alone decides
    assert share_of_prefixes(row) >= 0.9
    assert row["share_of_oracle"] >= 0.9
    assert row["placement"]["prefix_hits"] > 1.5 * row["least loaded"]["prefix_hits"]


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
    assert len(table) == 4 + len(document["rows"]) + len(document["talks"])
    assert document["options"]["seed"] == 0
