"""A linear map that forgets how prompts of one task differ and what prompts of all tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def whitening_head(groups: Sequence[np.ndarray], shrinkage: float) -> np.ndarray:
    """Within-task whitening after removal of the common direction, (width, width) float32, mean diagonal 1.

    The covariance of the embeddings around their task's mean is pooled over tasks, shrunk towards a multiple of the
    identity and inverted to the power one half (within-class covariance normalisation, Hatch et al. 2006); before it,
    the direction of the mean of all tasks is projected out (Mu and Viswanath 2018). Nothing in it names a task, which
    is why it serves tasks that it was not estimated on.

    Args:
        groups: embeddings (n, width) of one task in one query form each, n at least 1.
        shrinkage: in (0, 1], 1 leaves out the whitening.
    """
    means = np.stack([group.mean(0, dtype=np.float64) for group in groups])
    width = means.shape[1]
    common = means.mean(0)
    common /= max(float(np.linalg.norm(common)), 1e-12)
    projection = np.eye(width) - np.outer(common, common)
    apart = np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)]) @ projection
    covariance = apart.T @ apart / len(apart)
    variance = np.trace(covariance) / width
    if variance <= 0:  # one row a group: nothing is known of how prompts of one task differ
        covariance, variance = np.eye(width), 1.0
    covariance = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    head = (vectors * values**-0.5) @ vectors.T @ projection
    return np.asarray(head / np.diag(head).mean(), dtype=np.float32)
