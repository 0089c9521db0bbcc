"""Low-rank updates whose adapters gates weigh anew for every row: the launches on a GPU."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gate_rows import TOTALS, Gated, check_gates
from kernels.gated_kernels import gated_shrink_kernel, gated_weigh_kernel
from kernels.gated_pages import GatedPages
from kernels.lora import check_pages, expand_shared, shared_rows
from kernels.lora_config import PROGRAMS, ExpandConfig, fit_expand, shared_columns

FEWEST_INPUTS, MOST_SPLITS = 128, 16
"""Inputs of one split: below, a launch costs more than its products. Splits: as many are summed for every row."""


@dataclass(frozen=True)
class GatedConfig:
    """One program multiplies `rows` rows with `width` rank rows or gates, over a `splits`-th of the input."""

    rows: int
    width: int
    block_k: int
    splits: int
    warps: int
    stages: int


def gated_config(num_rows: int, inputs: int, num_slices: int, columns: int, gates: int, itemsize: int) -> GatedConfig:
    """What `gated_delta` runs with: it depends on shapes and capacities alone, as a captured graph needs it.

    columns: rank rows of all pages; gates: of one slot. Programs of decode steps are small, to find room beside the
    base product.
    """
    rows = min(64, max(16, 1 << (num_rows - 1).bit_length()))
    width = 32 if num_rows <= 128 else 64
    width = min(width, gates, columns)
    blocks = triton.cdiv(num_rows, rows) * num_slices * ((columns + gates) // width)
    block_k = 128 if rows <= 32 else 64
    if itemsize >= 4:
        block_k //= 2
    splits = 1
    while splits < MOST_SPLITS and 4 * splits * blocks <= 3 * PROGRAMS and inputs >= 2 * splits * FEWEST_INPUTS:
        splits *= 2
    return GatedConfig(rows, width, block_k, splits, 4 if rows > 16 else 2, 3)


def gated_delta(
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    mapping: GatedPages,
    slices: tuple[int, ...],
    gated: Gated,
    *,
    pdl: bool = False,
) -> Tensor:
    """delta[t, slice s] = sum over u of M[t, u] * w[s, t, u] * (x[t] A[pages[u], s]^T) B[pages[u], slice s].

    w: the weight that the gates of row t give the adapter of column u, 1 for rows without gates, times `factors`.
    x [T, in]; a_pages, b_pages as in `kernels.lora.lora_delta`, pages finite; T <= mapping.shape.rows. Returns
    [T, sum(slices)] in the dtype of x. `pdl`: every kernel starts beside the one before it in the stream and waits for
    it (sm_90). Raises ValueError where a shape is another one.
    """
    check_pages(x, a_pages, b_pages, slices)
    check_gates(x, gated)
    shape, count, num_slices = mapping.shape, len(x), len(slices)
    if count > shape.rows or gated.columns.shape != (shape.padded_pages,):
        raise ValueError(f"{count} rows and {tuple(gated.columns.shape)} columns do not fit {shape}")
    delta = x.new_empty(count, sum(slices))
    if not count:
        return delta
    num_slots, _, num_gates, inputs = gated.gates.shape
    columns = shape.padded_pages * shape.ranks
    config = gated_config(count, inputs, num_slices, columns, num_gates, x.element_size())
    ranks = x.new_empty(config.splits, num_slices, count, columns, dtype=torch.float32)
    logits = x.new_empty(config.splits, num_slices, count, num_gates, dtype=torch.float32)
    blocks = num_slices * (columns + num_slots * num_gates) // config.width
    gated_shrink_kernel[triton.cdiv(count, config.rows), blocks, config.splits](
        x,
        a_pages,
        gated.gates,
        ranks,
        logits,
        mapping.pages,
        mapping.page_ranks,
        mapping.page_count,
        gated.rows.slots,
        gated.rows.counts,
        count,
        INPUTS=inputs,
        X_STRIDE=x.stride(0),
        A_STRIDE=a_pages.stride(0),
        SLOT_STRIDE=gated.gates.stride(0),
        SLICES=num_slices,
        PAGES=shape.padded_pages,
        RANKS=shape.ranks,
        GATES=num_gates,
        ROWS=config.rows,
        WIDTH=config.width,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )
    block = shared_rows(count)
    values = x.new_empty(num_slices, triton.cdiv(count, block) * block, columns)
    _weigh(ranks, logits, values, mapping, gated, count, pdl)
    expand = expand_config(sum(slices), max(slices), shape.ranks, x.element_size())
    expand_shared(values, b_pages, delta, mapping, slices, expand, pdl, ranks=shape.ranks)
    return delta


def _weigh(
    ranks: Tensor, logits: Tensor, values: Tensor, mapping: GatedPages, gated: Gated, count: int, pdl: bool
) -> None:
    splits, num_slices, _, num_gates = logits.shape
    rows, shape = gated.rows, mapping.shape
    gated_weigh_kernel[values.shape[1], num_slices](
        ranks,
        logits,
        values,
        mapping.weights,
        rows.slots,
        rows.top_k,
        rows.temperatures,
        rows.masks,
        rows.touches,
        rows.shares,
        rows.targets,
        rows.counts,
        rows.adapters,
        gated.columns,
        rows.totals,
        mapping.weights if gated.factors is None else gated.factors,
        count,
        values.shape[1],
        0 if gated.factors is None else gated.factors.stride(0),
        0 if gated.factors is None else gated.factors.stride(1),
        SLICES=num_slices,
        PAGES=shape.padded_pages,
        RANKS=shape.ranks,
        GATES=num_gates,
        SPLITS=splits,
        FIRST_TARGET=gated.first_target,
        GROUP=gated.group,
        TOTALS=TOTALS,
        SCALED=gated.factors is not None,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def expand_config(outputs: int, widest: int, ranks: int, itemsize: int) -> ExpandConfig:
    """As wide as that of "shared" tiles; pages of half as many rank rows go by twice as many."""
    columns = shared_columns(outputs)
    pages = (8 if columns < 64 else 4) * (16 // ranks)
    return fit_expand(ExpandConfig(columns, pages, 4, 2), widest, itemsize)
