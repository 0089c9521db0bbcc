"""Tenants that flood and tenants that wait: who yields, how often, and what each is served."""

from collections import Counter
from itertools import pairwise
from math import inf

import pytest
from contest import MODEST, Backlog, contest, difference, flood, text
from scheduler_simulation import request, simulate

from server.engine.shares import PATIENCE, QUANTUM


@pytest.mark.parametrize(
    ("modest", "lookahead"),
    [(MODEST, False), (MODEST, True), (Backlog("modest", 40, 6), False), (Backlog("modest", 3, 150), True)],
    ids=["like", "like, looking ahead", "prompts", "outputs"],
)
def test_a_flood_leaves_a_tenant_with_work_its_half(modest: Backlog, lookahead: bool) -> None:
    """64 long requests hold all rows when the other tenant comes: it gets 80 % of its half, and in each second too."""
    run = contest(max_num_seqs=16, lookahead=lookahead)
    run.add(*flood(64, 8, 96))
    for _ in range(10):
        run.step()
    assert len(run.simulation.scheduler.running) == 16
    start, marks = run.clock.now, [run.served()]
    while run.waits("flood"):
        run.step(modest)
        if run.clock.now - start >= len(marks):
            marks.append(run.served())
    assert len(marks) > 10
    for interval in (difference(before, after) for before, after in pairwise(marks)):
        assert 0.4 <= interval["modest"] / interval.total() <= 0.6
    while run.runs("flood"):
        run.step(modest)
    served = difference(marks[0], run.served())
    assert served["modest"] / served.total() >= 0.4
    assert 0 < run.simulation.scheduler.yielded <= 16
    run.finish()


def test_without_preemption_it_gets_nothing_until_the_first_long_ones_end() -> None:
    """What the test above would measure if nobody yielded."""
    run = contest(max_num_seqs=16, patience=inf)
    run.add(*flood(64, 8, 96))
    for _ in range(10):
        run.step()
    before = run.served()
    while not any(name.startswith("flood") for name in run.simulation.endings):
        run.step(MODEST)
    interval = difference(before, run.served())
    assert interval["modest"] / interval.total() < 0.1
    assert run.simulation.scheduler.yielded == 0


def test_a_newcomer_is_served_within_a_few_steps() -> None:
    run = contest(max_num_seqs=16)
    run.add(*flood(64, 8, 96))
    for _ in range(20):
        run.step()
    arrived = run.clock.now
    run.add(request("one", 8, tenant="modest"))
    one = run.simulation.sequences["one"]
    while one.first_scheduled is None:
        run.step()
    assert one.first_scheduled - arrived < 6 * 0.03
    assert run.simulation.scheduler.yielded == 1
    run.finish()


@pytest.mark.parametrize(
    ("weights", "lengths"),
    [((1, 3), (8, 30)), ((3, 1), (30, 8)), ((0.1, 0.3), (4, 120)), ((200, 200), (4, 120)), ((1, 1.5), (8, 30))],
)
def test_weights_divide_what_is_served(weights: tuple[float, float], lengths: tuple[int, int]) -> None:
    run = contest(max_num_seqs=8)
    backlogs = [Backlog(name, *lengths, weight) for name, weight in zip("ab", weights, strict=True)]
    backlogs[1].max_tokens += 7
    for _ in range(100):
        run.step(*backlogs)
    before = run.served()
    for _ in range(1200):
        run.step(*backlogs)
    served = difference(before, run.served())
    assert served["b"] / served["a"] == pytest.approx(weights[1] / weights[0], rel=0.2)
    assert run.simulation.scheduler.yielded <= len(run.simulation.endings) / 10
    run.finish()


def test_a_flood_of_three_times_the_weight_keeps_three_quarters() -> None:
    run = contest(max_num_seqs=16)
    run.add(*flood(64, 8, 96, weight=3.0))
    run.step()
    before = run.served()
    while run.waits("flood"):
        run.step(MODEST)
    served = difference(before, run.served())
    assert served["flood"] / served["modest"] == pytest.approx(3.0, rel=0.2)
    run.finish()


def test_an_idle_tenant_earns_no_credit() -> None:
    run = contest(max_num_seqs=8)
    run.add(request("early", 8, tenant="late"))
    for _ in range(500):
        run.step(Backlog("busy", 8, 60))
    before = run.served()
    for _ in range(400):
        run.step(Backlog("busy", 8, 60), Backlog("late", 8, 60))
        gained = difference(before, run.served())
        assert gained["late"] <= 1.2 * gained["busy"]
    assert gained["late"] >= 0.8 * gained["busy"]
    run.finish()


def test_nor_does_one_whose_requests_come_one_by_one() -> None:
    """It takes a row each time, from whoever was admitted last; the others keep all other rows."""
    run = contest(max_num_seqs=8)
    for _ in range(30):
        run.step(Backlog("busy", 8, 400))
    asked = 0
    for number in range(20):
        run.add(request(f"single{number}", (number, 1, 2), max_tokens=10, tenant="single"))
        while run.runs("single"):
            run.step(Backlog("busy", 8, 400))
            asked += 1
            rows = Counter(sequence.request.tenant for sequence in run.simulation.scheduler.running)
            assert rows["single"] <= 1
            assert rows.total() == 8 or not run.runs("single")
    assert 10 * 20 < asked < 20 * 20
    assert run.simulation.scheduler.yielded <= 20
    assert max(run.simulation.yields.values()) <= 1 + 400 // QUANTUM


def test_rows_return_to_the_flood_when_the_other_has_no_more_work() -> None:
    run = contest(max_num_seqs=8)
    run.add(*flood(40, 8, 60))
    for _ in range(5):
        run.step()
    run.add(*[request(f"r{number}", (number, 9), max_tokens=30, tenant="modest") for number in range(4)])
    while run.runs("modest"):
        run.step()
    yielded = run.simulation.scheduler.yielded
    assert yielded == 4
    run.step()
    assert len(run.simulation.scheduler.running) == 8
    run.finish()
    assert run.simulation.scheduler.yielded == yielded


def test_tenants_take_turns_where_rows_are_fewer() -> None:
    """Six tenants with endless requests and two rows: nobody waits for the end of another's."""
    run = contest(max_num_seqs=2, num_blocks=400)
    run.add(*[request(name, (number, 1), max_tokens=900, tenant=name) for number, name in enumerate("abcdef")])
    for _ in range(700):
        run.step()
    served = run.served()
    assert max(served.values()) - min(served.values()) <= 4 * (PATIENCE + 900)
    assert min(served.values()) >= 0.3 * max(served.values())
    run.finish()
    assert run.simulation.computed <= 1.2 * 6 * 900


@pytest.mark.parametrize("lookahead", [False, True])
def test_where_every_row_decodes_and_the_budget_is_spent(lookahead: bool) -> None:
    """The row that is taken gives its token back to the budget."""
    run = contest(max_num_seqs=8, max_batch_tokens=8, lookahead=lookahead)
    run.add(*flood(32, 2, 60))
    for _ in range(20):
        run.step()
    assert len(run.simulation.scheduler.running) == 8
    before = run.served()
    for _ in range(12):
        run.step(Backlog("modest", 5, 20))
    assert run.simulation.scheduler.yielded > 0
    while run.runs("flood"):
        run.step(Backlog("modest", 5, 20))
    served = difference(before, run.served())
    assert served["modest"] / served.total() >= 0.4
    run.finish()


@pytest.mark.parametrize("num_blocks", [130, 200])
def test_a_flood_that_holds_all_kv_yields_too(num_blocks: int) -> None:
    """26 blocks are one request of the flood: rows are free, blocks are not."""
    run = contest(max_num_seqs=16, num_blocks=num_blocks, block_size=4)
    run.add(*flood(40, 8, 96))
    for _ in range(60):
        run.step()
    assert len(run.simulation.scheduler.running) < 16
    before = run.served()
    while run.runs("flood"):
        run.step(MODEST)
    served = difference(before, run.served())
    assert served["modest"] / served.total() >= 0.4
    assert run.simulation.scheduler.preemptions <= len(run.simulation.endings)
    run.finish()


def test_what_is_freed_is_not_for_others_of_the_tenant_that_yields() -> None:
    """Its small request waits behind the one that was preempted for less than it held."""
    simulation = simulate(num_blocks=34, max_num_seqs=8, max_batch_tokens=200)
    for number in range(3):
        simulation.add(request(f"long{number}", text(number, 38), max_tokens=40, tenant="flood"))
    simulation.step()
    simulation.add(request("small", text(3, 17), tenant="flood"))
    simulation.step()
    simulation.add(request("claimant", text(4, 25), tenant="modest"))
    simulation.scheduler.waiting.counters["flood"] += 1000.0
    simulation.step()
    running = [sequence.request.id for sequence in simulation.scheduler.running]
    assert running == ["long0", "long1", "claimant"]
    assert [sequence.request.id for sequence in simulation.scheduler.waiting] == ["long2", "small"]
    simulation.run()


def test_nothing_yields_to_a_mix_whose_pages_are_missing() -> None:
    run = contest(max_num_seqs=2, capacity=3)
    run.add(*[request(f"flood{i}", (i, 7), "d", max_tokens=200, tenant="flood") for i in range(4)])
    run.step()
    run.add(request("c", 4, "c", tenant="modest"))
    for _ in range(50):
        run.step()
    assert run.simulation.scheduler.yielded == 0
    run.add(request("base", 4, tenant="modest"))
    run.step()
    assert "base" in {sequence.request.id for sequence in run.simulation.scheduler.running}
    assert run.simulation.scheduler.yielded == 1
    run.finish()
