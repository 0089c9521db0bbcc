"""Retrieval accuracy: how often a prompt's own adapter is among the k nearest prototypes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from routing.encoder_model import normalised
from routing.train.data import Task
from routing.train.pairs import text_of

KS = (1, 3, 5, 8)


class Embedder(Protocol):
    """What turns texts into vectors, (n, width) float32, L2-normalised."""

    def embed(self, texts: Sequence[str], /) -> np.ndarray:
        """One row a text."""


MakePrototypes = Callable[[np.ndarray], np.ndarray]
"""An adapter's prototypes, (k, width), of its samples' embeddings, (m, width)."""


@dataclass(frozen=True, slots=True)
class TaskTexts:
    """One adapter to find: the samples it is known by, and the prompts that should find it."""

    name: str
    cluster: str
    samples: tuple[str, ...]
    queries: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, form: str, split: str, samples: int, rows: int) -> TaskTexts:
        """The first `samples` training rows and the first `rows` rows of `split`, both in the query form `form`."""
        asked = {"valid": task.valid, "test": task.test}[split]
        return cls(
            task.name,
            task.train[0].cluster,
            tuple(text_of(row, form) for row in task.train[:samples]),
            tuple(text_of(row, form) for row in asked[:rows]),
        )

    def embed(self, encoder: Embedder) -> EmbeddedTask:
        """The same, as vectors."""
        found = encoder.embed([*self.samples, *self.queries])
        return EmbeddedTask(self.name, self.cluster, found[: len(self.samples)], found[len(self.samples) :])


@dataclass(frozen=True, slots=True)
class EmbeddedTask:
    """`samples` (m, width) and `queries` (n, width), rows of length 1."""

    name: str
    cluster: str
    samples: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True, slots=True)
class Ranking:
    """`scores` (queries, tasks) of the queries of task `gold`, whose column is `column`."""

    gold: str
    column: int
    scores: np.ndarray

    def ranks(self) -> np.ndarray:
        """How many other tasks score at least as high as the right one, (queries,): 0 is found first.

        A tie counts against the router, so that equal scores everywhere are worth nothing.
        """
        own = self.scores[:, [self.column]]
        return np.asarray((self.scores >= own).sum(1) - 1)


def mean_prototype(samples: np.ndarray) -> np.ndarray:
    """The normalised mean, (1, width)."""
    return normalised(samples.mean(0, keepdims=True))


def raw_mean(samples: np.ndarray) -> np.ndarray:
    """The mean as it is, (1, width): with an inner product it favours tasks whose samples resemble each other."""
    return np.asarray(samples.mean(0, keepdims=True))


def rank_tasks(tasks: Sequence[EmbeddedTask], prototypes: MakePrototypes = mean_prototype) -> list[Ranking]:
    """Scores every query against every task: the best inner product with one of the task's prototypes."""
    stored = [prototypes(task.samples) for task in tasks]
    owner = np.repeat(np.arange(len(tasks)), [len(vectors) for vectors in stored])
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    matrix = np.concatenate(stored)
    return [
        Ranking(task.name, column, np.maximum.reduceat(task.queries @ matrix.T, starts, axis=1))
        for column, task in enumerate(tasks)
    ]


def accuracy(rankings: Iterable[Ranking], ks: Sequence[int] = KS) -> dict[str, float]:
    """Shares in [0, 1] of the queries whose own task is among the best k, as `top1`, `top3`...; and their number."""
    ranks = np.concatenate([np.zeros(0, dtype=np.int64), *(ranking.ranks() for ranking in rankings)])
    found = {f"top{k}": round(float((ranks < k).mean()), 5) if len(ranks) else 0.0 for k in ks}
    return {"queries": float(len(ranks)), **found}


def retrieval_accuracy(
    tasks: Sequence[EmbeddedTask],
    *,
    seen: Collection[str] = (),
    prototypes: MakePrototypes = mean_prototype,
    ks: Sequence[int] = KS,
) -> dict[str, dict[str, float]]:
    """Accuracy over all queries, and apart over those of tasks in `seen` and of the others, if there are both.

    The candidates are always all tasks.
    """
    rankings = rank_tasks(tasks, prototypes)
    found = {"all": accuracy(rankings, ks)}
    parts = {
        "seen": [ranking for ranking in rankings if ranking.gold in seen],
        "unseen": [ranking for ranking in rankings if ranking.gold not in seen],
    }
    if all(parts.values()):
        found |= {part: accuracy(chosen, ks) for part, chosen in parts.items()}
    return found


def by_task(rankings: Sequence[Ranking]) -> dict[str, float]:
    """Top-1 of each task."""
    return {ranking.gold: accuracy([ranking], (1,))["top1"] for ranking in rankings}


def cluster_confusion(tasks: Sequence[EmbeddedTask], rankings: Sequence[Ranking]) -> tuple[list[str], np.ndarray]:
    """Clusters in order of first appearance, and (asked, found) shares of the queries; every row sums to 1."""
    names = list(dict.fromkeys(task.cluster for task in tasks))
    of = np.array([names.index(task.cluster) for task in tasks])
    counts = np.zeros((len(names), len(names)))
    for ranking in rankings:
        np.add.at(counts, (of[ranking.column], of[ranking.scores.argmax(1)]), 1)
    return names, counts / np.maximum(counts.sum(1, keepdims=True), 1)
