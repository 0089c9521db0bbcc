"""Prototypes of an adapter's samples."""

import numpy as np
import pytest

from routing.prototypes import SAMPLES_PER_CENTRE, prototypes


def around(centre: int, count: int, seed: int = 0, width: int = 8) -> np.ndarray:
    """`count` unit vectors near one axis."""
    noise = np.random.default_rng(seed).standard_normal((count, width)) * 0.05
    vectors = noise + np.eye(width)[centre]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("count", [1, 2, 20, 2 * SAMPLES_PER_CENTRE - 1])
def test_few_samples_have_their_normalised_mean(count: int) -> None:
    embeddings = around(0, count)
    found = prototypes(embeddings)
    mean = embeddings.mean(0)
    np.testing.assert_allclose(found, [mean / np.linalg.norm(mean)], atol=1e-6)
    assert found.dtype == np.float32


def test_many_samples_have_the_centres_of_their_kinds_beside_it() -> None:
    embeddings = np.concatenate([around(axis, SAMPLES_PER_CENTRE, seed=axis) for axis in (0, 3, 5)])
    found = prototypes(embeddings)
    assert found.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(found[0], embeddings.mean(0) / np.linalg.norm(embeddings.mean(0)), atol=1e-6)
    assert sorted(found[1:].argmax(1).tolist()) == [0, 3, 5]
    assert found[1:].max(1).min() > 0.97
    np.testing.assert_array_equal(found, prototypes(embeddings))


def test_at_most_so_many() -> None:
    embeddings = np.concatenate([around(axis, 50, seed=axis) for axis in range(6)])
    assert [len(prototypes(embeddings, most)) for most in (1, 2, 3, 4, 7)] == [1, 1, 3, 4, 7]


def test_equal_samples_are_one_kind() -> None:
    embeddings = np.repeat(around(1, 1), 50, axis=0)
    np.testing.assert_allclose(prototypes(embeddings), embeddings[:1], atol=1e-6)
    two = np.concatenate([embeddings, np.repeat(around(2, 1), 50, axis=0)])
    assert len(prototypes(two)) == 3


def test_samples_that_cancel_still_have_a_direction() -> None:
    one = around(0, 1)
    found = prototypes(np.concatenate([one, -one]))
    np.testing.assert_allclose(found, one, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (8,)])
def test_no_samples_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        prototypes(np.zeros(shape, np.float32))
