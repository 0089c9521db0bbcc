"""Priorities: the order within a tenant's queue, without starvation, and nobody else's matter."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from scheduler_simulation import Simulation, request, simulate

from server.engine.fairness import PRIORITY_SECONDS, FairQueue
from server.engine.sequence import Sequence


def sequence(name: str, arrival: float = 0.0, priority: int = 0, tenant: str = "default") -> Sequence:
    return Sequence.of(replace(request(name, 3, tenant=tenant), priority=priority), arrival)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(-3, 3)), max_size=30))
def test_arrival_and_priority_make_the_order(arrivals: list[tuple[float, int]]) -> None:
    queue = FairQueue()
    for number, (arrival, priority) in enumerate(sorted(arrivals, key=lambda pair: pair[0])):
        queue.push(sequence(str(number), arrival, priority))
    order = list(queue.in_turn())
    assert order == list(queue)
    due = [s.arrival + PRIORITY_SECONDS * s.request.priority for s in order]
    assert due == sorted(due)
    for before, after in pairwise(order):
        if before.request.priority == after.request.priority:
            assert int(before.request.id) < int(after.request.id), "equals in the order of their arrival"


def test_sequences_without_adapters_have_the_same_order() -> None:
    queue = FairQueue()
    for number, priority in enumerate((0, 5, -1, 0)):
        queue.push(sequence(str(number), float(number), priority))
    plain = list(queue.in_turn(only_plain=lambda _: True))
    assert [s.request.id for s in plain] == [s.request.id for s in queue.in_turn()] == ["2", "0", "3", "1"]


def test_a_tenants_priorities_are_nobody_elses() -> None:
    """Turns between tenants go by tokens served, however urgent one calls its requests."""
    starts = {}
    for priority in (0, -1000):
        simulation = simulate(max_num_seqs=2)
        for number in range(6):
            simulation.add(replace(request(f"a{number}", 4, tenant="a"), priority=priority))
            simulation.add(request(f"b{number}", 4, tenant="b"))
        starts[priority] = order_of_starts(simulation)
    assert starts[0] == starts[-1000]


def test_what_runs_is_not_taken_for_what_is_urgent() -> None:
    simulation = simulate(max_num_seqs=1)
    simulation.add(request("slow", 4, max_tokens=20))
    simulation.step()
    simulation.add(replace(request("urgent", 4), priority=-1000))
    assert order_of_starts(simulation) == ["slow", "urgent"]
    assert simulation.scheduler.preemptions == 0


def test_what_can_wait_starts_in_a_flood_of_urgent_requests() -> None:
    """Two urgent requests come in each step, and one row takes one at a time: the third second is its turn."""
    simulation = simulate(max_num_seqs=1, num_blocks=1000)
    patient = replace(request("patient", 2, max_tokens=1), priority=3)
    simulation.add(patient)
    bound = int(3 * PRIORITY_SECONDS)
    for step in range(3 * bound):
        for number in range(2):
            simulation.add(request(f"{step} {number}", 2, max_tokens=1))
        simulation.step()
        if "patient" in simulation.outputs:
            break
    started = [name for name in simulation.outputs if name != "patient"]
    assert "patient" in simulation.outputs
    assert all(int(name.split()[0]) <= bound for name in started), "it was overtaken by one that came too late"


def test_what_was_preempted_goes_on_before_others_of_its_priority() -> None:
    queue = FairQueue()
    first, second = sequence("first", 0.0), sequence("second", 1.0)
    for own in (first, second):
        queue.push(own)
    queue.started(first)
    queue.push(sequence("third", 2.0))
    queue.push_front(first)
    queue.stopped(first)
    queue.push(sequence("urgent", 3.0, priority=-1))
    assert [s.request.id for s in queue] == ["urgent", "first", "second", "third"]


def order_of_starts(simulation: Simulation) -> list[str]:
    starts: list[str] = []
    while simulation.sequences:
        simulation.step()
        starts += [s.request.id for s in simulation.scheduler.running if s.request.id not in starts]
        starts += [name for name in simulation.outputs if name not in starts]
    return starts
