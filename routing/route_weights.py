"""Weights of the adapters that a router has chosen, from their scores."""

import math
from collections.abc import Sequence

UNITS = 32
"""Softmax weights are multiples of 1/32, so that like prompts share a mix, and with it its caches."""


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """softmax(score / temperature); sums to 1. `scores` is not empty, `temperature` above 0."""
    top = max(scores)
    powers = [math.exp((score - top) / temperature) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def rounded(shares: Sequence[float]) -> list[float]:
    """Multiples of 1/32 that sum to 1, by largest remainder, the first one on a tie; some may be 0."""
    exact = [share * UNITS for share in shares]
    units = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: units[index] - exact[index])
    for index in by_remainder[: UNITS - sum(units)]:
        units[index] += 1
    return [each / UNITS for each in units]


def mass_count(shares: Sequence[float], mass: float) -> int:
    """How many of the first shares reach `mass`, all of them if they do not."""
    total = 0.0
    for count, share in enumerate(shares, 1):
        total += share
        if total >= mass - 1e-9:
            return count
    return len(shares)
