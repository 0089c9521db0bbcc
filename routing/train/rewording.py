"""Rows as somebody else would ask them, so that a router knows a task by more than the wordings of its training rows.

SmolLM2-135M with the demo's seven adapters, gates on white inputs (160 steps of 8 rows, 400 rows a task), asked 28 rows
a task whose instructions are worded as no training row's: 78.6 and 79.6% right with top 1 and 2, 93.4 and 90.8% where
half of the rows were reworded, 98.5% if the task's adapter is named. A router by prompt needs none of it: MoA 97.4%.
With 24 adapters, 900 steps of 32 rows and such a wording, 63.7 and 64.0% without, 69.6 and 68.4% with, 71.1% named.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Versions(Sequence[Example]):
    """`VERSIONS` of each of a task's rows, `share` of them reworded (0 to 1), tokenised when they are asked for.

    Which ones are, and how, is a function of `seed`, row and version. One that is longer than `max_length` tokens stays
    the row's own example, which `examples` has. `words` may come into an instruction.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[TaskRow]
    examples: Sequence[Example]
    words: Sequence[str]
    share: float
    max_length: int
    seed: int

    def __len__(self) -> int:
        return VERSIONS * len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[each] for each in number]
        row, own = self.rows[number // VERSIONS], self.examples[number // VERSIONS]
        chance = random.Random(f"words/{self.seed}/{row.task}/{number}")
        if chance.random() >= self.share:
            return own
        (made,) = encode(self.tokenizer, [reworded(row, self.words, chance)], sys.maxsize)
        return made if len(made.ids) <= self.max_length else own
