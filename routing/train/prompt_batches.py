"""Batches of single rows that know where their prompts end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.train.batches import IGNORED, Example
from routing.train.mixed_batches import Sample


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Right-padded tokens, (rows, longest) each but `tasks` (rows) int64, the number of each row's task.

    `ids`, `mask` and `labels` are int64; `labels` is the token itself in the answer and -100 elsewhere; `prompts` bool
    is true for the prompt's tokens, which end where the answer begins.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    prompts: Tensor
    tasks: Tensor


def collate_prompts(
    samples: Sequence[Sample], pad_id: int, device: torch.device, *, answers: bool = True
) -> PromptBatch:
    """Pads single rows to the longest. Without `answers` the rows end with their prompts."""
    rows: list[tuple[int, Example]] = [sample[0] for sample in samples]
    prompts = [len(example.ids) - example.answer_length for _, example in rows]
    lengths = [len(example.ids) for _, example in rows] if answers else prompts
    ids = torch.full((len(rows), max(lengths)), pad_id)
    labels = torch.full_like(ids, IGNORED)
    places = torch.arange(max(lengths))
    for row, ((_, example), prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        ids[row, :length] = torch.tensor(example.ids[:length])
        labels[row, prompt:length] = ids[row, prompt:length]
    mask = (places < torch.tensor(lengths)[:, None]).long()
    within = places < torch.tensor(prompts)[:, None]
    tasks = torch.tensor([task for task, _ in rows])
    return PromptBatch(*(field.to(device) for field in (ids, mask, labels, within, tasks)))
