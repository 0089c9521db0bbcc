"""Gates that weigh the adapters of a step anew for every token row, on a GPU and without a look from the host.

For a linear with input x and gates G (n, in): g = G x; the k highest logits of those allowed are chosen; their weights
are the softmax over a temperature (MeteoRA, arXiv 2405.13053, section 3.2).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gate_kernels import gate_logits_kernel, gate_weights_kernel
from kernels.gate_rows import TOTALS, Gated, check_gates
from kernels.lora_config import PROGRAMS

SPLIT_INPUTS = 256
"""The fewest inputs that a program multiplies: below, its launch costs more than its products."""

COLUMN_BLOCK = 32


@dataclass(frozen=True)
class GateConfig:
    """One program multiplies `rows` rows with a `splits`-th of the gates of one linear, `block_k` inputs at a time."""

    rows: int
    block_k: int
    splits: int


def gate_config(num_rows: int, inputs: int, num_slices: int, itemsize: int) -> GateConfig:
    """What `gate_scale` runs with: it depends on shapes alone, as a captured graph needs it."""
    rows = 16 if num_rows <= 128 else 64
    block_k = 128 if itemsize < 4 else 64
    most = max(1, min(16, inputs // SPLIT_INPUTS))
    wanted = max(1, PROGRAMS // (triton.cdiv(num_rows, rows) * num_slices))
    return GateConfig(rows, block_k, min(most, wanted))


def gate_scale(x: Tensor, gated: Gated) -> Tensor:
    """fp32[S, T, U] for x [T, in]: how much of the page of each of the U columns each of the group's S linears takes.

    Rows without gates take all columns fully. Raises ValueError where a shape is another one.
    """
    check_gates(x, gated)
    gates, rows, columns = gated.gates, gated.rows, gated.columns
    slots, num_slices, num_gates, inputs = gates.shape
    scale = x.new_empty(num_slices, len(x), len(columns), dtype=torch.float32)
    if not len(x):
        return scale if gated.factors is None else scale.mul_(gated.factors)
    config = gate_config(len(x), inputs, num_slices, x.element_size())
    partials = x.new_empty(config.splits, len(x), num_slices, num_gates, dtype=torch.float32)
    gate_logits_kernel[triton.cdiv(len(x), config.rows), slots * num_slices, config.splits](
        x,
        gates,
        partials,
        rows.slots,
        rows.counts,
        len(x),
        INPUTS=inputs,
        X_STRIDE=x.stride(0),
        SLOT_STRIDE=gates.stride(0),
        SLICES=num_slices,
        GATES=num_gates,
        ROWS=config.rows,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        num_warps=4,
        num_stages=2,
    )
    gate_weights_kernel[len(x),](
        partials,
        scale,
        rows.slots,
        rows.top_k,
        rows.temperatures,
        rows.masks,
        rows.touches,
        rows.shares,
        rows.targets,
        rows.adapters,
        columns,
        rows.totals,
        len(x),
        len(columns),
        SLICES=num_slices,
        GATES=num_gates,
        SPLITS=config.splits,
        FIRST_TARGET=gated.first_target,
        GROUP=gated.group,
        TOTALS=TOTALS,
        BLOCK=COLUMN_BLOCK,
        num_warps=max(1, num_gates // 32),
    )
    return scale if gated.factors is None else scale.mul_(gated.factors)
