"""What a tenant was served less than others while it waited: how long it is remembered."""

import pytest
from fair_server import Server

from server.engine.fairness import FairQueue
from server.engine.sequence import Request, SamplingParams, Sequence


def two_waiting() -> tuple[FairQueue, Sequence]:
    """A queue in which tenant t, with one request, was served 100 less than the other one."""
    queue = FairQueue()
    for tenant in ("t", "other", "other"):
        queue.push(Sequence.of(Request(tenant, (0,) * 5, SamplingParams(), tenant=tenant)))
    queue.counters |= {"t": 0.0, "other": 100.0}
    return queue, next(iter(queue))


def test_what_is_owed_stays_owed_when_the_last_request_starts() -> None:
    """And no more than that, however long nothing else waits."""
    queue, first = two_waiting()
    queue.started(first)
    queue.counters["other"] = 700.0
    queue.push(Sequence.of(Request("next", (0,), SamplingParams(), tenant="t")))
    assert queue.counters["t"] == 700.0 - 100.0


def test_what_was_served_meanwhile_pays_it_off() -> None:
    queue, first = two_waiting()
    queue.started(first)
    queue.counters |= {"other": 700.0, "t": 650.0}
    queue.push(Sequence.of(Request("next", (0,), SamplingParams(), tenant="t")))
    assert queue.counters["t"] == 650.0


@pytest.mark.parametrize("has_run", [False, True])
def test_what_is_owed_is_forgotten_when_the_last_request_leaves(has_run: bool) -> None:
    queue, first = two_waiting()
    if has_run:
        queue.started(first)
        queue.stopped(first)
    else:
        queue.remove(first)
    queue.push(Sequence.of(Request("next", (0,), SamplingParams(), tenant="t")))
    assert queue.counters["t"] == 100.0


def test_a_counter_that_stands_still_is_no_measure() -> None:
    """The last that waited has left; whoever comes is beside those that run."""
    server = Server(4)
    server.submit("stays", *[(5, 500)] * 3)
    server.step()
    server.submit("left", (1, 1))
    for _ in range(100):
        server.step()
    server.submit("new", (1, 1))
    assert server.queue.counters["new"] == server.queue.counters["stays"] > 500
