"""Rows as somebody else would ask them, so that a router knows a task by more than the wordings of its training rows.

SmolLM2-135M with the demo's seven adapters, gates on white inputs (160 steps of 8 rows, 400 rows a task), asked 28 rows
a task whose instructions are worded as no training row's: 78.6 and 79.6% right with top 1 and 2, 93.4 and 90.8% where
half of the rows were reworded, 98.5% if the task's adapter is named. Where words were left out and none put in their
place it was 89.3% (top 2). A router by prompt needs none of it: MoA has 97.4%, with it and without.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from routing.train.batches import Example, encode
from routing.train.data import TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSIONS = 16
"""Of each row: hardly any instruction comes twice."""


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are letters alone, at least two: any words, sorted. There are none where tokens are bytes."""
    texts = (text.strip() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))
    return sorted({text for text in texts if len(text) > 1 and text.isalpha()})


def reworded(row: TaskRow, words: Sequence[str], chance: random.Random) -> TaskRow:
    """The row without a part of its instruction's words, anything from none to all, or with `words` in their place.

    A row without input stays as it is: its instruction is all there is.
    """
    if not row.input:
        return row
    part = chance.random()
    kept = []
    for word in row.instruction.split():
        if chance.random() >= part:
            kept.append(word)
        elif words and chance.random() < 0.5:
            kept.append(chance.choice(words))
    return replace(row, instruction=" ".join(kept))


class Versions(Sequence[Example]):
    """`VERSIONS` of each of a task's rows, `share` of them reworded (0 to 1), tokenised when they are asked for.

    Which ones are, and how, is a function of `seed`, row and version. One that is longer than `max_length` tokens stays
    the row's own example.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TaskRow],
        examples: Sequence[Example],
        words: Sequence[str],
        share: float,
        max_length: int,
        seed: int,
    ) -> None:
        """examples: the rows' own. words: that may come into an instruction."""
        self._tokenizer = tokenizer
        self._rows = rows
        self._examples = examples
        self._words = words
        self._share = share
        self._max_length = max_length
        self._seed = seed

    def __len__(self) -> int:
        return VERSIONS * len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[each] for each in number]
        row, own = self._rows[number // VERSIONS], self._examples[number // VERSIONS]
        chance = random.Random(f"words/{self._seed}/{row.task}/{number}")
        if chance.random() >= self._share:
            return own
        (made,) = encode(self._tokenizer, [reworded(row, self._words, chance)], sys.maxsize)
        return made if len(made.ids) <= self._max_length else own
