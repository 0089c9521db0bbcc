"""Batches of several tasks and the gradient of the sum of the tasks' losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from routing.train.batches import IGNORED, Example, collate

HEAD_TOKENS = 8192
"""Answer tokens whose logits exist at a time: 4.8 GB with their gradients, of a vocabulary of 49,152."""


@dataclass(frozen=True, slots=True)
class GroupedBatch:
    """Rows of several tasks, ordered by task, equally many each, padded on the right.

    `ids` is (rows, longest). Answer token i is `targets[i]`, is predicted at the flat position `places[i]` of `ids`,
    belongs to task `owners[i]` and weighs `weights[i]`: one over its task's answer tokens.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor
    weights: Tensor
    tasks: int


def grouped_batch(rows: Sequence[Sequence[Example]], pad_id: int, device: torch.device) -> GroupedBatch:
    """One step's batch of the tasks' rows."""
    joint = collate([example for own in rows for example in own], pad_id, torch.device("cpu"))
    row, place = (joint.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    owners = row // len(rows[0])
    counts = torch.bincount(owners, minlength=len(rows))
    longest = joint.ids.shape[1]
    return GroupedBatch(
        ids=joint.ids.to(device),
        places=(row * longest + place).to(device),
        targets=joint.labels[row, place + 1].to(device),
        owners=owners.to(device),
        weights=(1 / counts[owners]).to(device),
        tasks=len(rows),
    )


def losses_and_gradients(
    causal: Any, batch: GroupedBatch, weights: Sequence[Tensor], head_tokens: int = HEAD_TOKENS
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Each task's mean loss over its answer tokens (tasks) fp32, and the gradients of their sum by `weights`.

    Rows are padded on the right and attention is causal, so that no token of a row sees padding: there is no mask,
    and attention may take the kernels that know none. The vocabulary head sees answer tokens only, some at a time.
    """
    device = batch.ids.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    with autocast:
        hidden = causal.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    picked = hidden.flatten(0, 1)[batch.places]
    losses = torch.zeros(batch.tasks, device=batch.ids.device)
    above: list[Tensor] = []
    for start in range(0, len(picked), head_tokens):
        part = slice(start, start + head_tokens)
        piece = picked[part].detach().requires_grad_()
        with autocast:
            logits = causal.get_output_embeddings()(piece)
        each = torch.nn.functional.cross_entropy(logits.float(), batch.targets[part], reduction="none")
        weighed = each * batch.weights[part]
        above += torch.autograd.grad(weighed.sum(), piece)
        losses.index_add_(0, batch.owners[part], weighed.detach())
        del logits, each, weighed  # before the next part's
    return losses, torch.autograd.grad(picked, weights, torch.cat(above))
