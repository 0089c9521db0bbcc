"""The kernels of `kernels.gated`, in Triton's language: gates and the first low-rank product in one, then the weights.

Two launches instead of four, since every launch is in the way of a decode step: the gates of a linear are more rows of
its pages' A as far as the product is concerned, and whoever sums its parts can weigh them.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gate_kernels import chosen_weights
from kernels.tiles import PAGE_RANK

PAGE_ROWS = tl.constexpr(PAGE_RANK)
"""Rank rows that a page has room for."""


@triton.jit(do_not_specialize=["num_rows"])
def gated_shrink_kernel(
    x: tl.tensor,
    a_pages: tl.tensor,
    gates: tl.tensor,
    ranks: tl.tensor,
    logits: tl.tensor,
    pages: tl.tensor,
    page_ranks: tl.tensor,
    page_count: tl.tensor,
    row_slots: tl.tensor,
    slot_counts: tl.tensor,
    num_rows: tl.tensor,
    INPUTS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    PAGES: tl.constexpr,
    RANKS: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ranks[split, slice, row] = x A^T of all pages, [PAGES * RANKS]; logits[split, slice, row] = x G^T, [GATES].

    Both over a split of the input, in fp32. Grid: (blocks of rows, blocks of WIDTH columns: those of all slices' pages,
    then those of all slots' and slices' gates, SPLITS). Rows meet the gates of their own slot only.
    """
    if PDL:
        gdc_launch_dependents()
    PAGE_BLOCKS: tl.constexpr = PAGES * RANKS // WIDTH
    GATE_BLOCKS: tl.constexpr = GATES // WIDTH
    STEPS: tl.constexpr = (INPUTS + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    WHOLE: tl.constexpr = STEPS * BLOCK_K * SPLITS == INPUTS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    split = tl.program_id(2)
    inside = rows < num_rows
    if block < SLICES * PAGE_BLOCKS:
        part = block // PAGE_BLOCKS
        column = block % PAGE_BLOCKS * WIDTH + tl.arange(0, WIDTH)
        page = tl.load(pages + column // RANKS)
        kept = column % RANKS < tl.load(page_ranks + column // RANKS)
        weights_at = a_pages + (page.to(tl.int64) * A_STRIDE + (part * PAGE_ROWS + column % RANKS) * INPUTS)
        rows_kept = inside
        out_at = ranks + ((split * SLICES + part) * num_rows + rows).to(tl.int64) * (PAGES * RANKS)
        idle = block % PAGE_BLOCKS * WIDTH >= tl.load(page_count) * RANKS
    else:
        place = block - SLICES * PAGE_BLOCKS
        slot = place // (SLICES * GATE_BLOCKS)
        part = place // GATE_BLOCKS % SLICES
        column = place % GATE_BLOCKS * WIDTH + tl.arange(0, WIDTH)
        count = tl.load(slot_counts + slot)
        kept = column < count
        weights_at = gates + (slot.to(tl.int64) * SLOT_STRIDE + (part * GATES + column) * INPUTS)
        rows_kept = tl.load(row_slots + rows, mask=inside, other=-1) == slot
        out_at = logits + ((split * SLICES + part) * num_rows + rows).to(tl.int64) * GATES
        idle = (tl.max(rows_kept.to(tl.int32), axis=0) == 0) | (place % GATE_BLOCKS * WIDTH >= count)
    if PDL:
        gdc_wait()  # also by those that do nothing: the kernel's end is that of all before it
    if idle:
        return
    x_at = x + rows.to(tl.int64) * X_STRIDE
    first = split * (STEPS * BLOCK_K)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(STEPS):
        at = first + step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask, mask = rows_kept[:, None], kept[:, None]
        if not WHOLE:
            x_mask, mask = x_mask & (at < INPUTS)[None, :], mask & (at < INPUTS)[None, :]
        own = tl.load(x_at[:, None] + at[None, :], mask=x_mask, other=0.0)
        weights = tl.load(weights_at[:, None] + at[None, :], mask=mask, other=0.0)
        total = tl.dot(own, tl.trans(weights), total, input_precision="ieee")
    tl.store(out_at[:, None] + column[None, :], total, mask=rows_kept[:, None])


@triton.jit(do_not_specialize=["num_rows", "value_rows", "scale_slice", "scale_row"])
def gated_weigh_kernel(
    ranks: tl.tensor,
    logits: tl.tensor,
    values: tl.tensor,
    weights: tl.tensor,
    row_slots: tl.tensor,
    row_top_k: tl.tensor,
    row_temperatures: tl.tensor,
    row_masks: tl.tensor,
    row_touches: tl.tensor,
    row_shares: tl.tensor,
    slot_targets: tl.tensor,
    slot_counts: tl.tensor,
    slot_adapters: tl.tensor,
    columns: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    value_rows: tl.tensor,
    scale_slice: tl.tensor,
    scale_row: tl.tensor,
    SLICES: tl.constexpr,
    PAGES: tl.constexpr,
    RANKS: tl.constexpr,
    GATES: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST_TARGET: tl.constexpr,
    GROUP: tl.constexpr,
    TOTALS: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """values[slice, row, page, rank] = M * weight of the page's adapter * the sum of the splits.

    Grid: (value_rows, slices). SCALED: times `scale` [slice, row, page] besides. Rows without gates have no other
    weights. What is not chosen is 0, and nothing of it is read; so are the rows from `num_rows` on. The weights of the
    gates are added to the row's `totals` [TOTALS, GATES] besides, in the order of the launches.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    part = tl.program_id(1)
    gate, page, rank = tl.arange(0, GATES), tl.arange(0, PAGES), tl.arange(0, RANKS)
    at = page[:, None] * RANKS + rank[None, :]
    values_at = values + (part.to(tl.int64) * value_rows + row) * (PAGES * RANKS)
    if row >= num_rows:
        if PDL:
            gdc_wait()
        tl.store(values_at + at, tl.zeros([PAGES, RANKS], values.dtype.element_ty))
        return
    slot = tl.load(row_slots + row)
    factors = tl.load(weights + row * PAGES + page)
    gated = slot >= 0
    known = tl.maximum(slot, 0)
    allowed = ((tl.load(row_masks + row * (GATES // 32) + gate // 32) >> (gate % 32)) & 1) != 0
    present = gated & (((tl.load(slot_targets + known) >> (FIRST_TARGET + part)) & 1) != 0)
    allowed = allowed & present & (gate < tl.load(slot_counts + known))
    top_k = tl.load(row_top_k + row)
    temperature = tl.load(row_temperatures + row)
    adapters = tl.load(slot_adapters + known * GATES + gate)
    owners = tl.load(columns + page)
    share = tl.load(row_shares + row)
    counts = gated & (share >= 0) & (((tl.load(row_touches + row) >> GROUP) & 1) != 0)
    if PDL:
        gdc_wait()
    if SCALED:
        factors *= tl.load(scale + part.to(tl.int64) * scale_slice + row.to(tl.int64) * scale_row + page)
    sums = tl.zeros([GATES], tl.float32)
    for split in tl.static_range(SPLITS):
        place = ((split * SLICES + part) * num_rows + row).to(tl.int64) * GATES
        sums += tl.load(logits + place + gate, mask=allowed, other=0.0)
    chosen = chosen_weights(sums, allowed, top_k, tl.where(gated, temperature, 1.0), GATES)
    own = tl.sum(tl.where(adapters[:, None] == owners[None, :], chosen[:, None], 0.0), axis=0)
    factors = factors * tl.where(gated, own, 1.0)
    used = (factors != 0.0)[:, None]
    total = tl.zeros([PAGES, RANKS], tl.float32)
    for split in tl.static_range(SPLITS):
        place = ((split * SLICES + part) * num_rows + row).to(tl.int64) * (PAGES * RANKS)
        total += tl.load(ranks + place + at, mask=used, other=0.0)
    total = tl.where(used, total * factors[:, None], 0.0)
    tl.store(values_at + at, total.to(values.dtype.element_ty))
    total_at = totals + (share * TOTALS + part) * GATES + gate
    tl.store(total_at, tl.load(total_at, mask=counts, other=0.0) + chosen, mask=counts)
