"""Which texts a retriever is trained on: task rows in a query form, drawn as pairs of the same task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from routing.train.data import TaskRow

INPUT, BOTH, MIXED = "input", "instruction+input", "mixed"
FORMS = (INPUT, BOTH)
INPUT_SHARE = 0.75
"""Prompts with instructions are told apart almost untrained, so most of what is to be learned is in inputs alone."""


def text_of(row: TaskRow, form: str) -> str:
    """What a user would send: `input` alone, or `instruction+input`. A row without input is its instruction."""
    return row.prompt if form == BOTH else row.input or row.instruction


def trained_tasks(names: Sequence[str], share: float, seed: int) -> list[str]:
    """A seeded choice of `share` (0 to 1) of the tasks, rounded, sorted; the rest stays unseen."""
    ordered = sorted(names)
    random.Random(f"tasks/{seed}").shuffle(ordered)
    return sorted(ordered[: round(share * len(ordered))])


@dataclass(frozen=True, slots=True)
class PairBatch:
    """`anchors[i]` and the samples in `positives[i]` are of one task, no two `i` of the same task."""

    anchors: tuple[str, ...]
    positives: tuple[tuple[str, ...], ...]


def batch_pairs(
    rows: Sequence[Sequence[TaskRow]], tasks: int, support: int, forms: str, step: int, seed: int
) -> PairBatch:
    """The pairs of training step `step`, a pure function of the arguments, so that a run resumes anywhere.

    Args:
        rows: the training rows of each task.
        tasks: tasks in a batch at most; every other pair's positive is a negative, so all negatives are of other tasks.
        support: samples that make one positive; with more than one it is their mean, as a prototype is.
        forms: `mixed` draws a form for the anchors and one for the positives, each for the whole batch, because all
            prototypes that a query meets are of one form too. `INPUT_SHARE` of the draws are `input`.
    """
    chance = random.Random(f"pairs/{seed}/{step}")
    chosen = chance.sample(range(len(rows)), min(tasks, len(rows)))
    asked, stored = (_drawn_form(chance) if forms == MIXED else forms for _ in range(2))
    anchors, positives = [], []
    for task in chosen:
        anchor, *samples = chance.sample(rows[task], min(1 + support, len(rows[task])))
        anchors.append(text_of(anchor, asked))
        positives.append(tuple(text_of(sample, stored) for sample in samples or [anchor]))
    if len({len(samples) for samples in positives}) > 1:  # a task with few rows: its samples stand in more than once
        positives = [tuple(samples[i % len(samples)] for i in range(support)) for samples in positives]
    return PairBatch(tuple(anchors), tuple(positives))


def _drawn_form(chance: random.Random) -> str:
    return INPUT if chance.random() < INPUT_SHARE else BOTH
