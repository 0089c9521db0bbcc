"""Accuracy by exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from routing.train.batches import prompt_text
from routing.train.data import TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow], max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's greedy answer to each row's chat, without special tokens, stripped; left-padded batches."""
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        tokens = greedy_tokens(model, tokenizer, rows[start : start + batch_size], max_new_tokens)
        answers += decode_answers(tokenizer, tokens)
    return answers


@torch.inference_mode()
def greedy_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow], max_new_tokens: int
) -> torch.Tensor:
    """The tokens of greedy answers (rows, at most `max_new_tokens`) int64, generated in one left-padded batch."""
    prompts = [tokenizer(prompt_text(tokenizer, row), add_special_tokens=False)["input_ids"] for row in rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated: torch.Tensor = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return generated[:, longest:]


def grouped_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[TaskRow]],
    limits: Sequence[int],
    batch_size: int,
) -> list[list[str]]:
    """The greedy answers to several tasks' rows: a batch holds equally many rows of each task, ordered by task.

    Args:
        rows: each task's, at least one.
        limits: most tokens of an answer, by task.
        batch_size: rows of one task in a batch.
    """
    answers: list[list[str]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), batch_size):
        parts = [own[start : start + batch_size] for own in rows]
        height = max(map(len, parts))
        filled = [[*part, *[own[0]] * (height - len(part))] for part, own in zip(parts, rows, strict=True)]
        tokens = greedy_tokens(model, tokenizer, [row for part in filled for row in part], max(limits))
        by_task = tokens.view(len(rows), height, -1)
        for given, part, limit, found in zip(answers, parts, limits, by_task, strict=True):
            if part:
                given += decode_answers(tokenizer, found[: len(part), :limit])
    return answers


def decode_answers(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> list[str]:
    """Texts without special tokens, stripped."""
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def answer_limit(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow]) -> int:
    """How many tokens an answer may take: somewhat more than the longest target."""
    return max(len(tokenizer(row.target)["input_ids"]) for row in rows) + 8


def exact_match(answers: Sequence[str], rows: Sequence[TaskRow]) -> float:
    """The share of answers that equal their row's target, character by character, in [0, 1]."""
    return sum(answer == row.target.strip() for answer, row in zip(answers, rows, strict=True)) / len(rows)
