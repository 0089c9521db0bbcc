"""Weights of tenants: they divide what is served, and no weight that is stored spoils the counters."""

from math import inf, isfinite, nan

import pytest
from fair_server import Server, bound

from server.engine.fairness import INPUT_PRICE, LEAST_WEIGHT, MOST_WEIGHT, OUTPUT_PRICE, REBASE, FairQueue
from server.engine.sequence import Request, SamplingParams, Sequence


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.5, 0.1), (40.0, 60.0)])
def test_weights_divide_what_is_served(weights: tuple[float, float]) -> None:
    server = Server(10)
    for tenant, weight in zip("ab", weights, strict=True):
        server.submit(tenant, *[(6, 10)] * 400, weight=weight)
    for _ in server.steps_while_both_wait("a", "b"):
        spread = server.served["a"] / weights[0] - server.served["b"] / weights[1]
        assert abs(spread) <= bound(10, 6, 10) / min(weights)
    assert server.served["b"] / server.served["a"] == pytest.approx(weights[1] / weights[0], rel=0.1)


def test_the_weight_is_that_of_the_last_request() -> None:
    queue = FairQueue()
    first, second = (Sequence.of(Request(str(w), (0,) * 6, SamplingParams(), weight=w)) for w in (1.0, 3.0))
    queue.push(first)
    assert queue.weight("default") == 1
    queue.push(second)
    queue.started(first)
    assert queue.counters == {"default": 6 * INPUT_PRICE / 3}
    assert queue.weight("default") == 3


@pytest.mark.parametrize("weight", [0.0, -1.0, inf, nan])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"the weight of tenant 'team' is .*, expected a number above 0"):
        Request("r", (0,), SamplingParams(), tenant="team", weight=weight)


@pytest.mark.parametrize(
    ("weight", "counted"), [(1e-320, LEAST_WEIGHT), (1e-3, 1e-3), (1e3, 1e3), (1e300, MOST_WEIGHT)]
)
def test_counters_stay_finite_whatever_the_weight(weight: float, counted: float) -> None:
    queue = FairQueue()
    sequences = [
        Sequence.of(Request(str(w), (0,) * 4000, SamplingParams(), tenant=str(w), weight=w)) for w in (1, weight)
    ]
    for sequence in sequences:
        queue.push(sequence)
        queue.started(sequence)
        queue.charge(sequence, 1 << 20, OUTPUT_PRICE)
    assert queue.weight(str(weight)) == counted
    assert all(isfinite(counter) for counter in queue.counters.values())
    for tenant, other in (("1", str(weight)), (str(weight), "1")):
        assert isfinite(queue.excess(tenant, other))
        assert isfinite(queue.expected(tenant))


def test_small_steps_are_not_lost_in_large_sums() -> None:
    """Years of a light tenant's service beside a heavy one: counters remain comparable to a token."""
    queue = FairQueue()
    light, heavy, gone = (
        Sequence.of(Request(name, (0,), SamplingParams(), tenant=name, weight=weight))
        for name, weight in (("light", LEAST_WEIGHT), ("heavy", MOST_WEIGHT), ("gone", 1.0))
    )
    for sequence in (light, heavy, gone):
        queue.push(sequence)
        queue.started(sequence)
    queue.stopped(gone)
    for _ in range(5000):
        queue.charge(light, 1 << 20, OUTPUT_PRICE)
        queue.counters["heavy"] += (1 << 21) / LEAST_WEIGHT
    before = queue.counters["heavy"]
    queue.charge(heavy, 1, OUTPUT_PRICE)
    assert (queue.counters["heavy"] - before) * MOST_WEIGHT == pytest.approx(OUTPUT_PRICE, rel=1e-3)
    assert max(queue.counters.values()) <= 4 * REBASE + 2 * (1 << 21) / LEAST_WEIGHT
    assert "gone" not in queue.counters
    assert queue.weight("gone") == 1.0


def test_counting_anew_changes_no_difference() -> None:
    queue = FairQueue()
    sequences = [Sequence.of(Request(name, (0,), SamplingParams(), tenant=name)) for name in "abc"]
    for sequence in sequences:
        queue.push(sequence)
    queue.counters |= {"a": REBASE - 10.0, "b": REBASE - 500.0, "c": REBASE - 3.0, "richer": REBASE, "poorer": 7.0}
    queue.charge(sequences[0], 10, OUTPUT_PRICE)
    assert queue.counters == {"a": 510.0, "b": 0.0, "c": 497.0, "richer": 500.0}
