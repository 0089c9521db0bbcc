"""Accuracy by exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from routing.train.batches import prompt_text
from routing.train.data import TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow], max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's greedy answer to each row's chat, without special tokens, stripped; left-padded batches."""
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        prompts = [
            tokenizer(prompt_text(tokenizer, row), add_special_tokens=False)["input_ids"]
            for row in rows[start : start + batch_size]
        ]
        longest = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += [text.strip() for text in tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)]
    return answers


def exact_match(answers: Sequence[str], rows: Sequence[TaskRow]) -> float:
    """The share of answers that equal their row's target, character by character, in [0, 1]."""
    return sum(answer == row.target.strip() for answer, row in zip(answers, rows, strict=True)) / len(rows)
