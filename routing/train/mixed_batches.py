"""Batches of all tasks at once: every token knows its task, and a sequence may hold rows of several."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.train.batches import IGNORED, Example, batch_rows

Sample = tuple[tuple[int, Example], ...]
"""One sequence: rows one after the other, each with the number of its task. Later rows see the earlier ones."""

PACK_ROWS = (2, 3)


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """Right-padded tokens, each field (rows, longest).

    `ids`, `mask`, `labels` and `tasks` are int64: `labels` is the token itself where the language model's loss counts
    it and -100 elsewhere, `tasks` the number of the token's task and -100 in the padding. `answers` bool is true where
    the next token belongs to an answer.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    tasks: Tensor
    answers: Tensor


class Mixture:
    """Which rows a step trains on: a function of seed and step, whatever was asked before.

    Every task comes once in each round over the tasks, in an order drawn anew, so that no task has more than one row
    more than another; each goes through its own rows in epochs, in orders of its own.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Example]],
        batch_size: int,
        seed: int,
        packed: float = 0.0,
        max_length: int = 1 << 30,
    ) -> None:
        """packed: share of the samples to which rows of one or two other tasks are appended, within `max_length`.

        One row of each other task is tried, in random order, until there are as many as were drawn. Where fewer fit,
        the pack has fewer; where none fits, the sample stays a single row, and the share is lower than asked for.
        """
        self._tasks = tasks
        self._batch_size = batch_size
        self._seed = seed
        self._packed = packed
        self._max_length = max_length
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def samples(self, step: int) -> list[Sample]:
        """The sequences of step `step`, from 0."""
        drawn = batch_rows(len(self._tasks), self._batch_size, step, self._seed)
        return [self._sample(task, step * self._batch_size + place) for place, task in enumerate(drawn)]

    def _sample(self, task: int, number: int) -> Sample:
        first = (task, self._tasks[task][self._row(task, number // len(self._tasks))])
        rng = random.Random(f"{self._seed}/pack/{number}")
        if rng.random() >= self._packed:
            return (first,)
        parts, length = [first], len(first[1].ids)
        others = [other for other in range(len(self._tasks)) if other != task]
        wanted = rng.choice(PACK_ROWS)
        for other in rng.sample(others, len(others)):
            example = rng.choice(self._tasks[other])
            if len(parts) < wanted and length + len(example.ids) <= self._max_length:
                parts.append((other, example))
                length += len(example.ids)
        return tuple(parts)

    def _row(self, task: int, use: int) -> int:
        """The row of a task's use `use`, from 0."""
        count = len(self._tasks[task])
        epoch, place = divmod(use, count)
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            order = list(range(count))
            random.Random(f"{self._seed}/task {task}/{epoch}").shuffle(order)  # equally long tasks: other orders
            known = self._orders[task] = (epoch, order)
        return known[1][place]


def collate_mixed(
    samples: Sequence[Sample], pad_id: int, device: torch.device, *, prompts_count: bool = False
) -> MixedBatch:
    """Pads samples to the longest. The language model's loss counts answers, with `prompts_count` all but first tokens
    of rows."""
    lengths = [sum(len(example.ids) for _, example in sample) for sample in samples]
    ids = torch.full((len(samples), max(lengths)), pad_id)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    labels, tasks = torch.full_like(ids, IGNORED), torch.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        start = 0
        for task, example in sample:
            stop = start + len(example.ids)
            answer = stop - example.answer_length
            counted = slice(start + 1 if prompts_count else answer, stop)
            ids[row, start:stop] = torch.tensor(example.ids)
            mask[row, start:stop] = 1
            tasks[row, start:stop] = task
            answers[row, answer - 1 : stop - 1] = True
            labels[row, counted] = ids[row, counted]
            start = stop
    return MixedBatch(*(field.to(device) for field in (ids, mask, labels, tasks, answers)))
