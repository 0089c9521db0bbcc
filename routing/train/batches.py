"""Task rows become padded token batches whose loss counts the answer only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from routing.train.data import TaskDataError, TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one chat; the last `answer_length` are the target and the end of turn."""

    ids: tuple[int, ...]
    answer_length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tokens: `ids`, `mask` and `labels`, each (rows, longest) int64; `labels` is -100 off the answer."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def prompt_text(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> str:
    """The chat of one user message, up to where the assistant begins."""
    chat = [{"role": "user", "content": row.prompt}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow], max_length: int) -> list[Example]:
    """Tokenises rows as they are served: template, then the answer, then the end-of-turn token.

    The answer is tokenised apart from the prompt, because that is the border at which generation begins.

    Raises:
        TaskDataError: a row is longer than `max_length` tokens.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        prompt = tokenizer(prompt_text(tokenizer, row), add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) > max_length:
            length = len(prompt) + len(answer)
            raise TaskDataError(f"task {row.task}, row {number}: {length} tokens, expected at most {max_length}")
        examples.append(Example((*prompt, *answer), len(answer)))
    return examples


def batch_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The row numbers of training step `step` (from 0): a new permutation each epoch, a pure function of the arguments.

    Batches run across the ends of epochs, so each has exactly `batch_size` rows and a run resumes anywhere.
    """
    first = step * batch_size
    rows = []
    for epoch in range(first // count, (first + batch_size - 1) // count + 1):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        begin, end = max(first - epoch * count, 0), min(first + batch_size - epoch * count, count)
        rows += order[begin:end]
    return rows


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pads examples to the longest of them."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        answer = slice(length - example.answer_length, length)
        labels[row, answer] = ids[row, answer]
    return Batch(ids.to(device), mask.to(device), labels.to(device))
