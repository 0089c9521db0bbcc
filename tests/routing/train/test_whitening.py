"""Whitening within tasks."""

import numpy as np

from routing.train.whitening import whitening_head


def drawn(count: int = 400) -> list[np.ndarray]:
    """Two tasks in four dimensions: a common offset, one noisy direction, one that tells them apart, one of nothing."""
    chance = np.random.default_rng(0)
    groups = []
    for sign in (-1, 1):
        noise = chance.normal(size=(count, 4)) * np.array([0.1, 5.0, 0.1, 0.1])
        groups.append((noise + np.array([10.0, 0, sign, 0])).astype(np.float32))
    return groups


def test_noise_within_tasks_is_levelled_and_the_common_direction_gone() -> None:
    groups = drawn()
    head = whitening_head(groups, 1e-9).astype(np.float64)
    after = [group @ head.T for group in groups]
    apart = np.concatenate([group - group.mean(0) for group in after])
    values = np.sort(np.linalg.eigvalsh(apart.T @ apart / len(apart)))
    assert values[0] < 1e-6 * values[1], "one direction, the common one, is projected out"
    np.testing.assert_allclose(values[1:], values[1:].mean(), rtol=0.05)
    assert np.linalg.norm((after[0].mean(0) + after[1].mean(0)) / 2) < 1e-3 * np.linalg.norm(after[0].mean(0))


def test_shrinkage_of_one_leaves_only_the_projection() -> None:
    groups = drawn()
    head = whitening_head(groups, 1.0)
    common = np.mean([group.mean(0) for group in groups], axis=0)
    common /= np.linalg.norm(common)
    expected = np.eye(4) - np.outer(common, common)
    np.testing.assert_allclose(head, expected / np.diag(expected).mean(), atol=1e-5)


def test_one_row_a_task_whitens_nothing() -> None:
    rows = [group[:1] for group in drawn()]
    np.testing.assert_allclose(whitening_head(rows, 0.1), whitening_head(rows, 1.0), atol=1e-6)
