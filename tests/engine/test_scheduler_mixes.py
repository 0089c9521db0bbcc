"""The scheduler in simulation where mixes wait for pages: the others go on, and none waits for ever."""

import pytest
from scheduler_simulation import alone, request, simulate

from adapters_store.page_lease import PageLease
from server.engine.config import RequestError
from server.engine.plan import MISSING_MIXES
from server.engine.sequence import Request
from server.engine.starvation import STARVATION_STEPS


def test_a_mix_whose_pages_are_missing_is_passed_over() -> None:
    simulation = simulate(capacity=4)
    for item in (request("c", 4, "c", max_tokens=6), request("cd", 4, "c", "d"), request("ab", 4, "a", "b")):
        simulation.add(item)
    running = {chunk.sequence.request.id for chunk in simulation.step()}
    assert running == {"c", "ab"}
    assert simulation.sequences["cd"].skipped_steps == 1


def test_a_mix_that_cannot_be_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(capacity=4)
    good = [request("base", 5), request("a", 5, "a"), request("ab", 5, "a", "b")]
    acquire = simulation.pages.acquire

    def refuse(item: Request) -> PageLease | None:
        if "c" in item.mix.digests:
            raise RequestError("cannot be read")
        return acquire(item)

    monkeypatch.setattr(simulation.pages, "acquire", refuse)
    simulation.add(request("bad", 5, "a", "c"))
    for item in good:
        simulation.add(item)
    planned = simulation.step()
    assert simulation.endings == {"bad": ["error"]}
    assert {chunk.sequence.request.id for chunk in planned} == {"base", "a", "ab"}
    simulation.run()
    assert all(simulation.outputs[item.id] == alone(item) for item in good)


def test_a_big_mix_is_admitted_while_small_ones_keep_coming() -> None:
    simulation = simulate(num_blocks=400, capacity=5, sizes={"a": 1, "b": 1, "big": 5}, max_num_seqs=4)
    simulation.add(request("a-first", 2, "a", max_tokens=5))
    simulation.step()
    simulation.add(request("big", 6, "big", max_tokens=3))
    big = simulation.sequences["big"]
    while "big" in simulation.sequences and simulation.steps < 2 * STARVATION_STEPS:
        for adapter in "ab":
            simulation.add(request(f"{adapter}{simulation.steps}", 2, adapter, max_tokens=5))
        simulation.step()
        if big.first_scheduled is None and simulation.steps < STARVATION_STEPS:
            assert simulation.pages.leases, "small ones are served meanwhile"
    assert simulation.outputs["big"] == alone(request("big", 6, "big", max_tokens=3))
    assert big.skipped_steps == 0
    simulation.run()


def test_mixes_that_are_missing_are_not_tried_again_and_again() -> None:
    """With thousands waiting, each look at the pages counts: one for equal mixes, and a bounded number in all."""
    names = [f"m{number}" for number in range(MISSING_MIXES + 50)]
    simulation = simulate(num_blocks=400, capacity=1, sizes={"a": 1} | dict.fromkeys(names, 1))
    simulation.add(request("a", 2, "a", max_tokens=40))
    simulation.step()
    for name in names:
        simulation.add(request(f"{name}-1", 2, name))
        simulation.add(request(f"{name}-2", 2, name))
    simulation.add(request("base", (3, 4)))
    simulation.pages.tried.clear()
    chunks = simulation.step()
    assert {chunk.sequence.request.id for chunk in chunks} == {"a", "base"}
    assert len(simulation.pages.tried) == len(set(simulation.pages.tried)) == MISSING_MIXES
    simulation.run()


def test_pages_of_a_sequence_without_kv_are_given_back() -> None:
    simulation = simulate(num_blocks=4, block_size=4)
    simulation.add(request("full", 12, max_tokens=4))
    simulation.add(request("waits", 12, "a"))
    simulation.step()
    assert not simulation.pages.leases
    simulation.run()
    assert simulation.outputs["waits"] == alone(request("waits", 12, "a"))
