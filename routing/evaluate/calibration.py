"""Which similarity tells a prompt that some adapter is for from one that none is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from routing.evaluate.retrieval import EmbeddedTask, Embedder, MakePrototypes, mean_prototype


@dataclass(frozen=True, slots=True)
class Calibration:
    """Above `min_score` lies at most the share `accepted` of `unrelated` prompts; `refused` of `related` ones do not.

    Scores are the best cosine similarity with any prototype. The medians show how far apart the two are.
    """

    min_score: float
    unrelated: int
    related: int
    accepted: float
    refused: float
    unrelated_median: float
    related_median: float


def unrelated_prompts() -> list[str]:
    """Everyday requests, one a line of `unrelated.txt`: none of them is a task that adapters are trained for here."""
    text = files("routing.evaluate").joinpath("unrelated.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def calibrate(
    encoder: Embedder,
    tasks: Sequence[EmbeddedTask],
    *,
    unrelated: Sequence[str] | None = None,
    most_accepted: float = 0.05,
    prototypes: MakePrototypes = mean_prototype,
) -> Calibration:
    """The smallest threshold, to three decimals, that at most `most_accepted` of the unrelated prompts pass.

    Args:
        encoder: embeds the unrelated prompts.
        tasks: prototypes come of their samples; their queries are the related prompts and should be validation rows.
    """
    matrix = np.concatenate([prototypes(task.samples) for task in tasks])
    foreign = best_scores(encoder.embed(unrelated_prompts() if unrelated is None else unrelated), matrix)
    own = np.concatenate([best_scores(task.queries, matrix) for task in tasks])
    # A prompt passes if it scores at least the threshold, so it lies just above the highest score to be refused.
    allowed = int(most_accepted * len(foreign))
    refused = np.sort(foreign)[::-1][allowed] if allowed < len(foreign) else -1.0
    threshold = min(1.0, float(np.floor(refused * 1000) + 1) / 1000)
    return Calibration(
        min_score=round(threshold, 3),
        unrelated=len(foreign),
        related=len(own),
        accepted=round(float((foreign >= threshold).mean()), 4),
        refused=round(float((own < threshold).mean()), 4),
        unrelated_median=round(float(np.median(foreign)), 4),
        related_median=round(float(np.median(own)), 4),
    )


def best_scores(queries: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """The highest inner product of each query, (queries,)."""
    return np.asarray((queries @ prototypes.T).max(1))
