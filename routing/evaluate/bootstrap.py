"""Means over tasks of several settings' scores, and confidence intervals that draw rows within each task anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
COVERED = (2.5, 97.5)
"""Percentiles of the interval."""


def by_task(scores: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """(settings, tasks): the means over the rows of each of `count` tasks, of scores (settings, rows).

    `places` (rows) is the number of each row's task.
    """
    return np.stack([scores[:, places == task].mean(1) for task in range(count)], axis=1)


def resampled(scores: np.ndarray, places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(settings, tasks, resamples): means over rows drawn with replacement within each task, the same for all settings.

    Arguments as `by_task`.
    """
    rng = np.random.default_rng(seed)
    means = []
    for task in range(count):
        own = scores[:, places == task]
        weights = rng.multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), RESAMPLES)
        means.append(own @ weights.T / own.shape[1])
    return np.stack(means, axis=1)


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """What lies between the percentiles `COVERED` of resampled values."""
    low, high = np.percentile(values, COVERED).tolist()
    return [low, high]
