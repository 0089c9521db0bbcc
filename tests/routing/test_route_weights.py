"""Weights from scores."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.route_weights import UNITS, mass_count, rounded, softmax

scores = st.lists(st.floats(-1, 1), min_size=1, max_size=12)


@given(scores, st.floats(0.02, 1e3))
def test_softmax(values: list[float], temperature: float) -> None:
    shares = softmax(values, temperature)
    assert math.fsum(shares) == pytest.approx(1.0)
    for (one, a), (other, b) in itertools.pairwise(zip(values, shares, strict=True)):
        assert math.log(a / b) == pytest.approx((one - other) / temperature, abs=1e-6)


@given(scores, st.floats(1e-3, 1e3))
def test_rounded_weights_sum_to_one(values: list[float], temperature: float) -> None:
    shares = softmax(values, temperature)
    weights = rounded(shares)
    assert math.fsum(weights) == 1.0
    for weight, share in zip(weights, shares, strict=True):
        assert (weight * UNITS).is_integer()
        assert abs(weight - share) < 1 / UNITS + 1e-9


def test_the_largest_remainders_are_rounded_up() -> None:
    assert rounded([1 / 3, 1 / 3, 1 / 3]) == [11 / 32, 11 / 32, 10 / 32]
    assert rounded([0.5, 0.49, 0.01]) == [0.5, 0.5, 0.0]
    assert rounded([1.0]) == [1.0]
    assert rounded([1 / 64, 63 / 64]) == [1 / 32, 31 / 32]


def test_mass() -> None:
    assert [mass_count([0.5, 0.3, 0.2], mass) for mass in (0.1, 0.5, 0.51, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert mass_count([0.4, 0.3], 0.9) == 2
    assert mass_count([0.1] * 10, 1.0) == 10
