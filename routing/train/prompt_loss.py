"""The losses of prompt-level routers, beside the language model's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """MoA's L_cls: mean cross-entropy of all layers' logits (B, L, N) against the prompts' labels (B); fp32 scalar.

    smoothing: share of every label that is spread over all experts.
    """
    every = labels[:, None].expand(logits.shape[:2])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), every.flatten(), label_smoothing=smoothing)


def balance_loss(logits: Tensor) -> Tensor:
    """MiLoRA's load balance: sum over layers of N sum_i f_i p_i, of logits (B, L, N); fp32 scalar, at least L if even.

    f_i is the share of the B prompts for which expert i is the most likely, without a gradient; p_i its mean
    probability.
    """
    shares = logits.softmax(dim=-1)
    first = torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(shares.dtype)
    return logits.shape[-1] * (first.mean(dim=0) * shares.mean(dim=0)).sum()


def task_labels(tasks: Tensor, labels: Sequence[int]) -> Tensor:
    """The expert of each row's task, (B) int64."""
    return torch.tensor(labels, device=tasks.device)[tasks]
