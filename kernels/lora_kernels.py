"""The kernels of `kernels.lora`, in Triton's language.

Two products in a row, after Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023): *shrink* multiplies the rows of a
tile with the page's A, *expand* the weighted results with B. Nothing is added atomically: results repeat bit by bit.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.tiles import PAGE_PADDING, PAGE_RANK

RANK = tl.constexpr(PAGE_RANK)
PADDING = tl.constexpr(PAGE_PADDING)
VALUE_BLOCK = tl.constexpr(PAGE_PADDING * PAGE_RANK)
"""The rows of `values` are a multiple of this long ("shared")."""

FILL = tl.constexpr(1024)
"""Elements of `values` that a program sets to zero at a time; divides 16 rows of VALUE_BLOCK."""


@triton.jit
def _fill_zeros(values: tl.tensor, count: tl.tensor) -> None:
    """values[:count] = 0, by all programs of the grid together."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    zeros = tl.zeros([FILL], values.dtype.element_ty)
    for start in range(program * FILL, count, programs * FILL):
        tl.store(values + start + tl.arange(0, FILL), zeros)


@triton.jit(do_not_specialize=["num_values", "scale_slice", "scale_row"])
def shrink_kernel(
    x: tl.tensor,
    a_pages: tl.tensor,
    partials: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    tile_pages: tl.tensor,
    tile_ranks: tl.tensor,
    tile_columns: tl.tensor,
    tile_rows: tl.tensor,
    tile_weights: tl.tensor,
    num_values: tl.tensor,
    scale_slice: tl.tensor,
    scale_row: tl.tensor,
    INPUTS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """partials[tile, split, slice] = M * scale * (x A^T) over a split of the input, [ROWS, RANK] in fp32.

    Grid: (tiles, slices / JOINED, SPLITS). SHARED: `values` is set to zero besides, for `reduce_kernel`.
    """
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    slots = tl.arange(0, ROWS)
    rank = tl.arange(0, JOINED * RANK) % RANK
    part = tl.program_id(1) * JOINED + tl.arange(0, JOINED * RANK) // RANK
    page = tl.load(tile_pages + tile)
    used = (rank < tl.load(tile_ranks + tile)) & (part < SLICES)
    rows = tl.load(tile_rows + tile * ROWS + slots)
    factors = tl.load(tile_weights + tile * ROWS + slots)[:, None]
    if PDL:
        gdc_wait()
    if SHARED:
        _fill_zeros(values, num_values)
    if page < 0:
        return
    present = rows >= 0
    STEPS: tl.constexpr = (INPUTS + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    k = tl.program_id(2) * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64) * X_STRIDE
    a_at = a_pages + page.to(tl.int64) * A_STRIDE + (part * RANK + rank) * INPUTS
    total = tl.zeros([ROWS, JOINED * RANK], tl.float32)
    for step in range(STEPS):
        at = k + step * BLOCK_K
        x_kept, a_kept = present[:, None], used[:, None]
        if INPUTS % (BLOCK_K * SPLITS) != 0:
            x_kept, a_kept = x_kept & (at < INPUTS)[None, :], a_kept & (at < INPUTS)[None, :]
        own = tl.load(x_at[:, None] + at[None, :], mask=x_kept, other=0.0)
        a = tl.load(a_at[:, None] + at[None, :], mask=a_kept, other=0.0)
        total = tl.dot(own, tl.trans(a), total, input_precision="ieee")
    if SCALED:
        column = tl.load(tile_columns + tile)
        at = rows.to(tl.int64)[:, None] * scale_row + part.to(tl.int64)[None, :] * scale_slice + column
        factors = factors * tl.load(scale + at, mask=present[:, None] & (part < SLICES)[None, :], other=0.0)
    # a selection: where the factor is 0, the product may be inf or NaN
    total = tl.where(factors == 0.0, 0.0, total * factors)
    out = (tile.to(tl.int64) * SPLITS + tl.program_id(2)) * SLICES + part
    at = out[None, :] * (ROWS * RANK) + slots[:, None] * RANK + rank[None, :]
    if SLICES % JOINED == 0:
        tl.store(partials + at, total)
    else:
        tl.store(partials + at, total, mask=(part < SLICES)[None, :])


@triton.jit
def _sum_splits(
    partials: tl.tensor,
    tile: tl.tensor,
    part: tl.tensor,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """The sum over the splits of a tile and slice, in their order: [ROWS, RANK]."""
    at = tl.arange(0, ROWS)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    first = partials + ((part.to(tl.int64) + tile * (SPLITS * SLICES)) * (ROWS * RANK) + at)
    total = tl.load(first)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(first + split * (SLICES * ROWS * RANK))
    return total


@triton.jit(do_not_specialize=["value_rows", "value_blocks"])
def reduce_kernel(
    partials: tl.tensor,
    values: tl.tensor,
    tile_pages: tl.tensor,
    tile_columns: tl.tensor,
    tile_rows: tl.tensor,
    value_rows: tl.tensor,
    value_blocks: tl.tensor,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Sum and round the partials of each tile and slice. Grid: (tiles, slices).

    SHARED: into values[slice, row, column * RANK + rank], whose rows have `value_blocks` * VALUE_BLOCK elements.
    Else into values[tile, slice], [ROWS, RANK].
    """
    if PDL:
        gdc_launch_dependents()
    tile, part = tl.program_id(0), tl.program_id(1)
    page = tl.load(tile_pages + tile)
    slots, rank = tl.arange(0, ROWS), tl.arange(0, RANK)
    if PDL:
        gdc_wait()
    if page < 0:
        return
    total = _sum_splits(partials, tile, part, SLICES, ROWS, SPLITS).to(values.dtype.element_ty)
    if SHARED:
        rows = tl.load(tile_rows + tile * ROWS + slots)
        at = (part.to(tl.int64) * value_rows + rows) * (value_blocks * VALUE_BLOCK)
        at += tl.load(tile_columns + tile) * RANK
        tl.store(values + at[:, None] + rank[None, :], total, mask=(rows >= 0)[:, None])
    else:
        at = (tile.to(tl.int64) * SLICES + part) * (ROWS * RANK) + slots * RANK
        tl.store(values + at[:, None] + rank[None, :], total)


@triton.jit
def _output_columns(
    block: tl.tensor, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(slice, first column, end of the slice) of a block of columns; no block reaches over the end of a slice."""
    BLOCKS0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    second, third = block >= BLOCKS0, block >= BLOCKS0 + BLOCKS1
    begin = tl.where(third, N0 + N1, tl.where(second, N0, 0))
    end = tl.where(third, N0 + N1 + N2, tl.where(second, N0 + N1, N0))
    local = block - tl.where(third, BLOCKS0 + BLOCKS1, tl.where(second, BLOCKS0, 0))
    first = begin + local * BLOCK_N
    if N0 % 16 == 0 and N1 % 16 == 0 and N2 % 16 == 0:
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
    return second.to(tl.int32) + third.to(tl.int32), first, end


@triton.jit
def _prefetch(pointers: tl.tensor) -> None:
    """Bring cache lines into L2 without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def expand_rows_kernel(
    values: tl.tensor,
    b_pages: tl.tensor,
    delta: tl.tensor,
    tile_pages: tl.tensor,
    tile_ranks: tl.tensor,
    block_rows: tl.tensor,
    block_starts: tl.tensor,
    block_counts: tl.tensor,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SLICES: tl.constexpr,
    B_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta[rows of a block, columns] = sum over the block's tiles of values[tile] B, 0 without tiles.

    Grid: (blocks, column blocks): blocks that share a page run at the same time and find it in L2.
    `values` are the partials (SPLITS of them) or what `reduce_kernel` made of them.
    """
    if PDL:
        gdc_launch_dependents()
    OUTPUTS: tl.constexpr = N0 + N1 + N2
    block = tl.program_id(0)
    part, first, end = _output_columns(tl.program_id(1), N0, N1, N2, BLOCK_N)
    rank = tl.arange(0, RANK)
    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.load(block_rows + block * ROWS + tl.arange(0, ROWS))
    start = tl.load(block_starts + block)
    stop = start + tl.load(block_counts + block)
    if PDL:
        # B is there already, while the kernel before this one is still at work
        LINE: tl.constexpr = 1024 // b_pages.dtype.element_ty.primitive_bitwidth
        lines = first + tl.arange(0, (BLOCK_N + LINE - 1) // LINE) * LINE
        for tile in range(start, stop):
            own = tl.minimum(rank, tl.load(tile_ranks + tile) - 1)
            at = tl.load(tile_pages + tile).to(tl.int64) * B_STRIDE + own * OUTPUTS
            _prefetch(b_pages + at[:, None] + tl.minimum(lines, end - 1)[None, :])
        gdc_wait()
    if tl.load(block_rows + block * ROWS) < 0:
        return
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    inside = (columns < end)[None, :]
    for tile in range(start, stop):
        b_at = b_pages + tl.load(tile_pages + tile).to(tl.int64) * B_STRIDE
        used = (rank < tl.load(tile_ranks + tile))[:, None]
        b = tl.load(b_at + rank[:, None] * OUTPUTS + columns[None, :], mask=used & inside, other=0.0)
        own = _sum_splits(values, tile, part, SLICES, ROWS, SPLITS).to(b.dtype)
        total = tl.dot(own, b, total, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    tl.store(delta + at, total.to(delta.dtype.element_ty), mask=(rows >= 0)[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows", "value_rows", "value_blocks"])
def expand_shared_kernel(
    values: tl.tensor,
    b_pages: tl.tensor,
    delta: tl.tensor,
    pages: tl.tensor,
    page_ranks: tl.tensor,
    page_count: tl.tensor,
    num_rows: tl.tensor,
    value_rows: tl.tensor,
    value_blocks: tl.tensor,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    B_STRIDE: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta[rows, columns] = values[slice, rows] times B of all pages of the step, PAGES at a time, RANKS rows of each.

    Grid: (row blocks, column blocks). Every B is read once for ROWS rows.
    """
    if PDL:
        gdc_launch_dependents()
    OUTPUTS: tl.constexpr = N0 + N1 + N2
    part, first, end = _output_columns(tl.program_id(1), N0, N1, N2, BLOCK_N)
    columns = first + tl.arange(0, BLOCK_N)
    inside = (columns < end)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, PAGES * RANKS)
    count = tl.load(page_count)
    if PDL:
        gdc_wait()
    values_at = values + (part.to(tl.int64) * value_rows + rows) * (value_blocks * (PADDING * RANKS))
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for page in range(0, count, PAGES):
        ids = tl.load(pages + page + k // RANKS).to(tl.int64)
        used = k % RANKS < tl.load(page_ranks + page + k // RANKS)
        b_at = ids * B_STRIDE + (k % RANKS) * OUTPUTS
        b = tl.load(b_pages + b_at[:, None] + columns[None, :], mask=used[:, None] & inside, other=0.0)
        own = tl.load(values_at[:, None] + (k + page * RANKS)[None, :])
        total = tl.dot(own, b, total, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    tl.store(delta + at, total.to(delta.dtype.element_ty), mask=(rows < num_rows)[:, None] & inside)
