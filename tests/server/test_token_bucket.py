"""Budgets that refill: never more than they allow, never less, whatever the order of events."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.token_bucket import TokenBucket

RATES = st.floats(0.01, 1e5)
GAPS = st.one_of(st.just(0.0), st.floats(1e-6, 1e-2), st.floats(0.01, 100.0))
START = st.floats(0.0, 1e7)
SHARES = st.floats(0.0, 1.0)
"""Of the capacity."""


@given(RATES, RATES, START, st.lists(st.tuples(GAPS, SHARES), max_size=60))
def test_no_window_has_more_than_the_capacity_and_the_rate(
    rate: float, capacity: float, now: float, asked: list[tuple[float, float]]
) -> None:
    bucket = TokenBucket(rate, capacity, now)
    taken: list[tuple[float, float]] = []
    for gap, share in asked:
        now += gap
        if bucket.wait(share * capacity, now) == 0:
            bucket.take(share * capacity, now)
            taken.append((now, share * capacity))
    for first in range(len(taken)):
        total = 0.0
        for time, amount in taken[first:]:
            total += amount
            assert total <= (capacity + rate * (time - taken[first][0])) * (1 + 1e-6) + 1e-6


@given(RATES, RATES, st.lists(st.tuples(GAPS, SHARES), max_size=60))
def test_who_stays_within_the_rate_is_never_refused(
    rate: float, capacity: float, asked: list[tuple[float, float]]
) -> None:
    bucket, now = TokenBucket(rate, capacity, 0.0), 0.0
    for gap, share in asked:
        now += gap
        amount = min(capacity, gap * rate) * share
        assert bucket.wait(amount, now) == 0
        bucket.take(amount, now)


@given(RATES, RATES, START, st.lists(st.tuples(GAPS, SHARES), max_size=40))
def test_who_waits_as_told_is_served(
    rate: float, capacity: float, now: float, asked: list[tuple[float, float]]
) -> None:
    bucket = TokenBucket(rate, capacity, now)
    for gap, share in asked:
        now += gap
        wait = bucket.wait(share * capacity, now)
        assert wait <= capacity / rate * (1 + 1e-6) + 1e-6
        later = now + wait + 1e-6  # the clock's own resolution far from its start
        assert bucket.wait(share * capacity, later) == 0
        if wait:
            assert bucket.wait(share * capacity, now + wait * 0.99 - 1e-6) > 0
        bucket.take(share * capacity, later)
        now = later


@settings(max_examples=30)
@given(st.integers(1, 1000), st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 10_000), SHARES), max_size=400))
def test_the_level_is_that_of_exact_arithmetic(rate: int, capacity: int, asked: list[tuple[int, float]]) -> None:
    """Times in milliseconds: no drift however many operations, and asking changes nothing."""
    bucket, exact, now = TokenBucket(rate, capacity, 0.0), Fraction(capacity), 0
    for gap, share in asked:
        now += gap
        amount = round(share * 2 * capacity)
        for moment in range(3):
            bucket.level((now - gap + gap * moment / 2) / 1000)
        bucket.take(amount, now / 1000)
        exact = min(Fraction(capacity), exact + Fraction(gap, 1000) * rate) - amount
        assert bucket.level(now / 1000) == pytest.approx(float(exact), abs=1e-6)


@given(RATES, RATES, SHARES, SHARES, GAPS, GAPS)
def test_what_is_given_back_was_never_taken(
    rate: float, capacity: float, before: float, share: float, gap: float, later: float
) -> None:
    untouched, bucket = TokenBucket(rate, capacity, 0.0), TokenBucket(rate, capacity, 0.0)
    for each in (untouched, bucket):
        each.take(before * capacity, 0.0)
    bucket.take(share * capacity, 0.0)
    bucket.give_back(share * capacity, gap)
    assert bucket.level(gap + later) == pytest.approx(untouched.level(gap + later), rel=1e-6, abs=1e-6)


def test_debts_are_paid_off() -> None:
    bucket = TokenBucket(rate=10, capacity=100, now=0.0)
    bucket.take(150, 0.0)
    assert bucket.level(0.0) == -50
    assert bucket.wait(1, 0.0) == pytest.approx(5.1)
    assert bucket.wait(1, 5.1) == 0


def test_more_than_the_capacity_never_comes() -> None:
    assert TokenBucket(1, 10, 0.0).wait(11, 0.0) == float("inf")


def test_a_clock_that_goes_back_gives_nothing_twice() -> None:
    bucket = TokenBucket(1, 10, 100.0)
    bucket.take(10, 100.0)
    assert bucket.level(50.0) == 0
    bucket.take(1, 50.0)
    assert bucket.level(101.0) == 0


def test_another_size_keeps_what_was_taken() -> None:
    bucket = TokenBucket(1, 10, 0.0)
    bucket.take(8, 0.0)
    bucket.resize(2, 100, 0.0)
    assert bucket.level(0.0) == 92
    assert bucket.level(3.0) == 98
    bucket.resize(2, 10, 3.0)
    assert bucket.level(3.0) == 10
