"""How good an answer is, by the metric of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from routing.evaluate.bleu import bleu
from routing.evaluate.rouge import rouge_1, rouge_l

Score = Callable[[str, Sequence[str]], float]
"""(answer, accepted answers, at least one) to [0, 1]."""


def normalise(text: str) -> str:
    """Lower-cased, without full stops and outer space, as LoraRetriever (arXiv 2402.09997) compares answers."""
    return text.lower().replace(".", "").strip()


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones, both normalised."""
    return float(normalise(answer) in map(normalise, references))


def exact_set(answer: str, references: Sequence[str]) -> float:
    """1 if the answer lists the same items as an accepted one, separated by commas, in whatever order."""
    return float(_items(answer) in map(_items, references))


def _items(text: str) -> tuple[str, ...]:
    return tuple(sorted(part.strip() for part in normalise(text).split(",")))


METRICS: Mapping[str, Score] = MappingProxyType(
    {
        "em": exact,
        "em_any": exact,
        "em_set": exact_set,
        "rouge1": rouge_1,
        "rougeL": rouge_l,
        "bleu": bleu,
        "bleu_multi": bleu,
    }
)
"""By the names that a folder of tasks uses in its manifest."""

GENERATION = ("rougeL", "rouge1", "bleu", "bleu_multi")
"""Metrics of tasks whose answers are free text: for these the others are given too."""


def scores(metric: str, answer: str, references: Sequence[str]) -> dict[str, float]:
    """`score` by the task's own metric and `em`; for generation also `rouge1`, `rougeL` and `bleu`.

    Raises:
        ValueError: there is no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is none of {', '.join(METRICS)}")
    found = {"score": METRICS[metric](answer, references), "em": exact(answer, references)}
    if metric in GENERATION:
        found |= {name: METRICS[name](answer, references) for name in ("rouge1", "rougeL", "bleu")}
    return found
