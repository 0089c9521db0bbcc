"""Which tasks are trained together: similar row lengths, so that little is padded, and no more than memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SHARE = 0.75
"""Of the free device memory, for activations: the rest is for logits, the optimiser and fragments."""


def task_groups(longest: Mapping[str, int], most: int, row_tokens: float) -> list[list[str]]:
    """Groups of tasks in ascending order of their longest row.

    Args:
        longest: tokens of each task's longest row.
        most: tasks of a group.
        row_tokens: tokens of one row of every task of a group, padded to the longest of all. A task above it is alone.
    """
    groups: list[list[str]] = []
    names = sorted(longest, key=lambda name: (longest[name], name))
    for name in reversed(names):  # from the longest on, so that what is left over is a small group of short rows
        if groups and len(groups[-1]) < most and longest[groups[-1][0]] * (len(groups[-1]) + 1) <= row_tokens:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [group[::-1] for group in reversed(groups)]


def activation_bytes(config: Any) -> int:
    """What a training step keeps of one token for the backward pass, under bf16 autocast, in bytes.

    Counted on a Llama of 30 layers, 576 wide: 26.2 kB a layer, of which 8 bytes for each unit of the MLP and 24 for
    each of the residual stream. In fp32 it is not quite twice as much.
    """
    return int(config.num_hidden_layers * (8 * config.intermediate_size + 24 * config.hidden_size))


def row_token_budget(config: Any, device: torch.device, batch_size: int) -> float:
    """Tokens that one row of every task of a group may have in all, padding included; unlimited on the CPU."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return SHARE * free / activation_bytes(config) / batch_size
