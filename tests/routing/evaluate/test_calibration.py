"""The threshold between prompts that an adapter is for and the others."""

from collections.abc import Sequence

import numpy as np
import pytest

from routing.evaluate.calibration import calibrate, unrelated_prompts
from routing.evaluate.retrieval import EmbeddedTask


class Cosines:
    """Embeds the number in a text as a vector of that cosine with the first axis."""

    def embed(self, texts: Sequence[str], /) -> np.ndarray:
        cosines = np.array([float(text) for text in texts])
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)


def at(*cosines: float) -> EmbeddedTask:
    own = Cosines().embed([str(cosine) for cosine in cosines])
    return EmbeddedTask("a", "c", np.array([[1, 0]], dtype=np.float32), own)


def test_one_in_twenty_unrelated_prompts_passes() -> None:
    foreign = [str(0.1 + 0.01 * i) for i in range(20)]
    found = calibrate(Cosines(), [at(0.9, 0.8, 0.27, 0.1)], unrelated=foreign)
    assert 0.28 < found.min_score < 0.29
    assert (found.accepted, found.refused, found.unrelated, found.related) == (0.05, 0.5, 20, 4)
    assert found.related_median == pytest.approx(0.535, abs=1e-3)


def test_equal_scores_of_unrelated_prompts_are_all_refused() -> None:
    found = calibrate(Cosines(), [at(0.9)], unrelated=["0.5"] * 20)
    assert 0.5 < found.min_score <= 0.502
    assert (found.accepted, found.refused) == (0.0, 0.0)


def test_all_may_pass_if_that_is_asked_for() -> None:
    found = calibrate(Cosines(), [at(0.9)], unrelated=["0.5", "0.6"], most_accepted=1.0)
    assert (found.accepted, found.refused) == (1.0, 0.0)


def test_the_prompts_of_the_package_are_many_and_different() -> None:
    prompts = unrelated_prompts()
    assert len(prompts) == len(set(prompts)) == 60
    assert all(prompt == prompt.strip() and len(prompt) < 120 for prompt in prompts)
