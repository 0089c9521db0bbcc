"""The scheduler in simulation: every request must get what it would get alone, whatever happens around it."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import SIZES, alone, finish, request, simulate, stops

from server.engine.sequence import Request
from server.engine.shares import PATIENCE


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request
    abort_after: int | None
    """Steps from arrival to abort."""


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Prompts share prefixes of two texts; cache keys follow the mixes."""
    found = []
    weights = {tenant: draw(st.sampled_from([1.0, 1.0, 0.25, 3.0])) for tenant in "xyz"}
    for number in range(draw(st.integers(1, 9))):
        text = [[1, 2, 3, 4, 5] * 4, [1, 2, 3, 9, 9] * 4][draw(st.integers(0, 1))]
        prompt = text[: draw(st.integers(1, 20))] + draw(st.lists(st.integers(1, 3), max_size=3))
        adapters = draw(st.sampled_from(["", "", "a", "b", "ab", "c", "d", "cd", "ad", "e"]))
        tenant = draw(st.sampled_from("xyz"))
        item = request(
            f"r{number}",
            tuple(prompt),
            *adapters,
            max_tokens=draw(st.integers(1, 12)),
            tenant=tenant,
            weight=weights[tenant],
            ignore_eos=draw(st.booleans()),
            penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
            scores=draw(st.booleans()),
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 12)))
        found.append(Arrival(draw(st.integers(0, 8)), item, abort_after))
    return found


@given(
    planned=arrivals(),
    block_size=st.sampled_from([1, 2, 4]),
    spare_blocks=st.integers(0, 6),
    spare_pages=st.integers(0, 2),
    max_num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 12),
    prefix_cache=st.booleans(),
    lookahead=st.booleans(),
    patience=st.sampled_from([1.0, 1.0, 8.0, PATIENCE]),
    quantum=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_every_request_gets_what_it_would_get_alone(
    planned: list[Arrival],
    block_size: int,
    spare_blocks: int,
    spare_pages: int,
    max_num_seqs: int,
    spare_tokens: int,
    prefix_cache: bool,
    lookahead: bool,
    patience: float,
    quantum: int,
) -> None:
    longest = max(len(arrival.request.prompt) + arrival.request.params.max_tokens for arrival in planned)
    simulation = simulate(
        -(-longest // block_size) + spare_blocks,
        block_size,
        capacity=5 + spare_pages,  # adapters c and d together
        sizes=SIZES | {"e": 1},
        broken=frozenset("e"),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_num_seqs + spare_tokens,
        prefix_cache=prefix_cache,
        lookahead=lookahead,
        patience=patience,
        quantum=quantum,
    )
    for step in range(1 + max(arrival.step + (arrival.abort_after or 0) for arrival in planned)):
        for arrival in planned:
            if arrival.step == step:
                simulation.add(arrival.request)
            lives = arrival.request.id in simulation.sequences
            if lives and arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                simulation.end(arrival.request.id, "abort")
        simulation.step()
    simulation.run()

    for arrival in planned:
        (ending,) = simulation.endings[arrival.request.id]
        expected, output = alone(arrival.request), simulation.outputs[arrival.request.id]
        if ending == "error":
            assert "e" in arrival.request.mix.digests
            assert output == []
        elif ending == "abort":
            assert arrival.abort_after is not None
            assert output == expected[: len(output)]
        else:
            assert output == expected
            assert ending == ("stop" if stops(arrival.request, expected[-1]) else "length")
            scores = arrival.request.params.prompt_logprobs is not None
            assert simulation.scored[arrival.request.id] == (arrival.request.prompt[1:] if scores else ())
    assert not simulation.pages.leases
    assert simulation.scheduler.blocks.num_used == 0


def test_preemption_recomputes_and_changes_nothing() -> None:
    simulation = simulate(num_blocks=9, block_size=2, max_num_seqs=4)
    requests = [request(f"r{number}", (5, 6, number + 1), max_tokens=14) for number in range(6)]
    finish(simulation, *requests)
    assert simulation.scheduler.preemptions > 0


def test_the_sequence_admitted_last_is_preempted_and_comes_back_first() -> None:
    simulation = simulate(num_blocks=4, block_size=2, max_num_seqs=4)
    first, second, third = (request(f"r{number}", (5, 6, number + 1), max_tokens=5) for number in range(3))
    for item in (first, second, third):
        simulation.add(item)
    simulation.step()
    old, young = simulation.sequences["r0"], simulation.sequences["r1"]
    assert simulation.scheduler.running == [old, young]
    while young in simulation.scheduler.running:
        simulation.step()
    assert simulation.scheduler.running == [old]
    assert next(iter(simulation.scheduler.waiting)) is young
    simulation.run()
    assert simulation.outputs["r1"] == alone(second)


def test_admission_leaves_blocks_for_those_that_run_to_grow() -> None:
    simulation = simulate(num_blocks=6, block_size=4, max_num_seqs=4)
    for name in ("x", "y"):
        simulation.add(request(name, 3, max_tokens=4))
    simulation.step()
    simulation.add(request("big", 15, max_tokens=1))
    for _ in range(3):  # x and y grow from one block to two
        assert {chunk.sequence.request.id for chunk in simulation.step()} == {"x", "y"}
    assert not {"x", "y"} & set(simulation.sequences)
    simulation.run()
    assert simulation.scheduler.preemptions == 0


def test_a_sequence_that_grows_may_preempt_itself() -> None:
    simulation = simulate(num_blocks=3, block_size=2, max_num_seqs=2, max_batch_tokens=8)
    simulation.add(request("old", (5, 6, 7), max_tokens=3))
    simulation.add(request("young", (8, 9), max_tokens=4))
    simulation.step()
    young = simulation.sequences["young"]
    assert len(simulation.scheduler.running) == 2
    chunks = simulation.step()  # the old one has room in its last block, the young one has not
    assert [chunk.sequence.request.id for chunk in chunks] == ["old"]
    assert young in set(simulation.scheduler.waiting)
    assert simulation.scheduler.preemptions == 1
    simulation.run()


def test_a_common_prefix_is_computed_once() -> None:
    simulation = simulate(block_size=4)
    prefix = tuple(range(1, 13))
    finish(simulation, request("first", (*prefix, 1)))
    simulation.add(request("second", (*prefix, 2)))
    (chunk,) = simulation.step()
    assert chunk.num_tokens == 1
    assert simulation.scheduler.blocks.hits == 12
    simulation.run()


def test_blocks_behind_a_cached_prefix_are_known_by_all_that_is_before_them() -> None:
    simulation = simulate(block_size=2)
    finish(simulation, request("head", (1, 2, 9)))
    finish(simulation, request("whole", (1, 2, 3, 4, 5, 6, 9)))
    assert simulation.scheduler.blocks.hits == 2
    finish(simulation, request("middle", (3, 4, 5, 6, 9)))
    assert simulation.scheduler.blocks.hits == 2
    finish(simulation, request("again", (1, 2, 3, 4, 5, 6, 7)))
    assert simulation.scheduler.blocks.hits == 2 + 6


def test_a_prompt_of_whole_blocks_computes_its_last_block_again() -> None:
    simulation = simulate(block_size=4)
    finish(simulation, request("first", 8))
    simulation.add(request("again", 8))
    sequence = simulation.sequences["again"]
    (chunk,) = simulation.step()
    assert chunk.num_tokens == 4
    assert sequence.num_cached == 4
    simulation.run()
    assert simulation.outputs["again"] == simulation.outputs["first"]


def test_the_prefix_of_another_mix_is_not_used() -> None:
    simulation = simulate(block_size=4)
    finish(simulation, request("base", 12), request("a", 12, "a"), request("b", 12, "b"))
    assert simulation.scheduler.blocks.hits == 0
    finish(simulation, request("a again", 12, "a"))
    assert simulation.scheduler.blocks.hits == 8


def test_equal_prompts_at_once() -> None:
    simulation = simulate(num_blocks=12, block_size=4, max_num_seqs=6)
    requests = [request(f"r{number}", 8, max_tokens=9) for number in range(6)]
    finish(simulation, *requests)
    assert len({tuple(output) for output in simulation.outputs.values()}) == 1


def test_a_long_prompt_takes_what_the_decodes_leave() -> None:
    simulation = simulate(num_blocks=200, max_num_seqs=4, max_batch_tokens=8)
    for name in ("x", "y", "z"):
        simulation.add(request(name, (5, 6), max_tokens=100))
    simulation.step()
    simulation.add(request("long", 150, max_tokens=1))
    for step in range(1, 11):
        assert len(simulation.step()) == 4
        assert simulation.sequences["long"].num_computed == 5 * step
    simulation.run()


def test_with_the_smallest_budget_a_prompt_still_moves() -> None:
    simulation = simulate(num_blocks=200, max_num_seqs=3, max_batch_tokens=3)
    finish(simulation, request("x", 1, max_tokens=50), request("y", 1, max_tokens=50), request("long", 40))


def test_aborting_during_prefill_keeps_what_was_computed_for_others() -> None:
    simulation = simulate(block_size=4, max_num_seqs=2, max_batch_tokens=10)
    simulation.add(request("gone", 30, "a"))
    simulation.step()
    simulation.step()
    simulation.end("gone", "abort")
    assert simulation.scheduler.blocks.num_used == 0
    assert not simulation.pages.leases
    simulation.add(request("next", 30, "a"))
    simulation.step()
    assert simulation.sequences["next"].num_cached == 20
    simulation.run()
    assert simulation.outputs["next"] == alone(request("next", 30, "a"))


def test_a_prompt_that_waits_for_kv_is_not_overtaken() -> None:
    simulation = simulate(num_blocks=6, block_size=4)
    simulation.add(request("full", 12, max_tokens=12))
    simulation.step()
    simulation.add(request("big", tuple(range(30, 50))))
    simulation.add(request("small", 1))
    while "full" in simulation.sequences:
        assert [chunk.sequence.request.id for chunk in simulation.step()] == ["full"]
    simulation.step()
    assert "big" in {sequence.request.id for sequence in simulation.scheduler.running}
    simulation.run()


def test_output_counts_for_a_tenants_turn() -> None:
    simulation = simulate(max_num_seqs=1)
    for tenant, max_tokens in (("long", 9), ("short", 1)):
        for number in range(4):
            simulation.add(request(f"{tenant}{number}", (1, 2), max_tokens=max_tokens, tenant=tenant))
    simulation.run()
    ended = [name[:-1] for name in simulation.endings]
    assert ended == ["long"] + ["short"] * 4 + ["long"] * 3  # 2 + 9 * 2 tokens' worth, against 2 + 1 * 2 each


def test_tenants_share_the_rows() -> None:
    simulation = simulate(num_blocks=400, max_num_seqs=2)
    for number in range(30):
        simulation.add(request(f"greedy{number}", (4, 5, 6, number % 20), max_tokens=3, tenant="greedy"))
    for number in range(3):
        simulation.add(request(f"modest{number}", (6, 5, 4, number), max_tokens=3, tenant="modest"))
    while any(name.startswith("modest") for name in simulation.sequences):
        simulation.step()
    ended = [name for name in simulation.endings if name.startswith("greedy")]
    assert len(ended) <= 6
    simulation.run()


def test_a_budget_smaller_than_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens \(3\) must be at least max_num_seqs \(4\)"):
        simulate(max_num_seqs=4, max_batch_tokens=3)
