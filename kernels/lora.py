"""Low-rank updates of one group of linears for rows that each use pages of their own: Triton kernels.

Two products in a row, after Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023): *shrink* multiplies the rows of a
tile with the page's A, *expand* the weighted results with B. Nothing is added atomically: results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.lora_config import ExpandConfig, LoraConfig, ShrinkConfig, lora_config
from kernels.tiles import PAGE_PADDING, PAGE_RANK, LoraTiles

MAX_SLICES = 3
"""Slices that the kernels tell apart: query, key and value."""

RANK = tl.constexpr(PAGE_RANK)
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
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta[rows, columns] = values[slice, rows] times B of all pages of the step, PAGES at a time.

    Grid: (row blocks, column blocks). Every B is read once for ROWS rows.
    """
    if PDL:
        gdc_launch_dependents()
    OUTPUTS: tl.constexpr = N0 + N1 + N2
    part, first, end = _output_columns(tl.program_id(1), N0, N1, N2, BLOCK_N)
    columns = first + tl.arange(0, BLOCK_N)
    inside = (columns < end)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, PAGES * RANK)
    count = tl.load(page_count)
    if PDL:
        gdc_wait()
    values_at = values + (part.to(tl.int64) * value_rows + rows) * (value_blocks * VALUE_BLOCK)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for page in range(0, count, PAGES):
        ids = tl.load(pages + page + k // RANK).to(tl.int64)
        used = k % RANK < tl.load(page_ranks + page + k // RANK)
        b_at = ids * B_STRIDE + (k % RANK) * OUTPUTS
        b = tl.load(b_pages + b_at[:, None] + columns[None, :], mask=used[:, None] & inside, other=0.0)
        own = tl.load(values_at[:, None] + (k + page * RANK)[None, :])
        total = tl.dot(own, b, total, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    tl.store(delta + at, total.to(delta.dtype.element_ty), mask=(rows < num_rows)[:, None] & inside)


def lora_delta(
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    tiles: LoraTiles,
    slices: tuple[int, ...],
    scale: Tensor | None = None,
    *,
    pdl: bool = False,
    config: LoraConfig | None = None,
) -> Tensor:
    """delta[t, slice s] = sum over pages p of M[t, p] * scale[s, t, p] * (x[t] A[p, s]^T) B[p, slice s].

    x [T, in]; a_pages [pages, S * 16, in], rows s*16..s*16+15 of a page belong to slice s (S <= 3); b_pages
    [pages, 16, sum(slices)], all of one dtype; scale None or fp32[S, T, U], column u for the page `tiles.pages[u]`:
    exactly 0 where it is 0. Returns [T, sum(slices)] in that dtype, rounded once more after the first product.
    "rows": only the rows of the plan are written, and none sees a page that it does not use. "shared": every row meets
    every page of the step, which must be finite.
    `pdl`: every kernel starts beside the one before it in the stream and waits for it (sm_90).
    Raises ValueError where a shape is another one.
    """
    _check(x, a_pages, b_pages, slices, scale)
    shape = tiles.shape
    delta = x.new_empty(len(x), sum(slices))
    if not shape.tiles or not len(x):
        return delta.zero_()
    config = config or lora_config(shape, x.shape[1], slices, x.element_size())
    parts = (len(slices), shape.block_rows, PAGE_RANK)
    values = partials = x.new_empty(shape.tiles, config.shrink.splits, *parts, dtype=torch.float32)
    if shape.kind == "shared":
        block = _shared_rows(len(x))
        values = x.new_empty(len(slices), triton.cdiv(len(x), block) * block, len(tiles.pages) * PAGE_RANK)
    elif config.reduced:
        values = x.new_empty(shape.tiles, *parts)
    _shrink(x, a_pages, partials, values, tiles, scale, config.shrink, pdl)
    if values is not partials:
        _reduce(partials, values, tiles, pdl)
    if shape.kind == "shared":
        _expand_shared(values, b_pages, delta, tiles, slices, config.expand, pdl)
    else:
        _expand_rows(values, b_pages, delta, tiles, slices, config.expand, pdl)
    return delta


def _check(x: Tensor, a_pages: Tensor, b_pages: Tensor, slices: tuple[int, ...], scale: Tensor | None) -> None:
    num_slices = len(slices)
    if not 1 <= num_slices <= MAX_SLICES:
        raise ValueError(f"slices are {slices}, expected 1 to {MAX_SLICES}")
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, in] with contiguous rows")
    if a_pages.shape[1:] != (num_slices * PAGE_RANK, x.shape[1]) or a_pages.stride()[1:] != (x.shape[1], 1):
        raise ValueError(f"a_pages is {tuple(a_pages.shape)}, expected [pages, {num_slices * PAGE_RANK}, {x.shape[1]}]")
    if b_pages.shape[1:] != (PAGE_RANK, sum(slices)) or b_pages.stride()[1:] != (sum(slices), 1):
        raise ValueError(f"b_pages is {tuple(b_pages.shape)}, expected [pages, {PAGE_RANK}, {sum(slices)}]")
    if scale is not None and (scale.shape[:2] != (num_slices, len(x)) or scale.stride(2) != 1):
        raise ValueError(f"scale is {tuple(scale.shape)}, expected [{num_slices}, {len(x)}, pages]")


def _shared_rows(num_rows: int) -> int:
    """Rows of a program of `expand_shared_kernel`."""
    return min(64, max(16, 1 << (num_rows - 1).bit_length()))


def _shrink(
    x: Tensor,
    a_pages: Tensor,
    partials: Tensor,
    values: Tensor,
    tiles: LoraTiles,
    scale: Tensor | None,
    config: ShrinkConfig,
    pdl: bool,
) -> None:
    num_tiles, splits, num_slices, rows, _ = partials.shape
    joined = triton.next_power_of_2(num_slices) if config.joined else 1
    shrink_kernel[num_tiles, triton.cdiv(num_slices, joined), splits](
        x,
        a_pages,
        partials,
        values,
        tiles.tile_weights if scale is None else scale,
        tiles.tile_pages,
        tiles.tile_ranks,
        tiles.tile_columns,
        tiles.tile_rows,
        tiles.tile_weights,
        values.numel(),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        INPUTS=x.shape[1],
        X_STRIDE=x.stride(0),
        A_STRIDE=a_pages.stride(0),
        SLICES=num_slices,
        JOINED=joined,
        ROWS=rows,
        BLOCK_K=config.block_k,
        SPLITS=splits,
        SCALED=scale is not None,
        SHARED=tiles.shape.kind == "shared",
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )


def _reduce(partials: Tensor, values: Tensor, tiles: LoraTiles, pdl: bool) -> None:
    num_tiles, splits, num_slices, rows, _ = partials.shape
    shared = tiles.shape.kind == "shared"
    reduce_kernel[num_tiles, num_slices](
        partials,
        values,
        tiles.tile_pages,
        tiles.tile_columns,
        tiles.tile_rows,
        values.shape[1] if shared else 0,
        values.shape[2] // VALUE_BLOCK.value if shared else 0,
        SLICES=num_slices,
        ROWS=rows,
        SPLITS=splits,
        SHARED=shared,
        PDL=pdl,
        num_warps=1 if rows == 16 else 4,
        launch_pdl=pdl,
    )


def _widths(slices: tuple[int, ...]) -> dict[str, int]:
    return {f"N{i}": slices[i] if i < len(slices) else 0 for i in range(MAX_SLICES)}


def _expand_rows(
    values: Tensor,
    b_pages: Tensor,
    delta: Tensor,
    tiles: LoraTiles,
    slices: tuple[int, ...],
    config: ExpandConfig,
    pdl: bool,
) -> None:
    expand_rows_kernel[tiles.shape.blocks, sum(triton.cdiv(n, config.block_n) for n in slices)](
        values,
        b_pages,
        delta,
        tiles.tile_pages,
        tiles.tile_ranks,
        tiles.block_rows,
        tiles.block_starts,
        tiles.block_counts,
        **_widths(slices),
        SLICES=len(slices),
        B_STRIDE=b_pages.stride(0),
        ROWS=tiles.shape.block_rows,
        SPLITS=values.shape[1] if values.dim() == 5 else 1,
        BLOCK_N=config.block_n,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )


def _expand_shared(
    values: Tensor,
    b_pages: Tensor,
    delta: Tensor,
    tiles: LoraTiles,
    slices: tuple[int, ...],
    config: ExpandConfig,
    pdl: bool,
) -> None:
    rows = _shared_rows(len(delta))
    expand_shared_kernel[triton.cdiv(len(delta), rows), sum(triton.cdiv(n, config.block_n) for n in slices)](
        values,
        b_pages,
        delta,
        tiles.pages,
        tiles.page_ranks,
        tiles.page_count,
        len(delta),
        values.shape[1],
        values.shape[2] // VALUE_BLOCK.value,
        **_widths(slices),
        B_STRIDE=b_pages.stride(0),
        ROWS=rows,
        PAGES=config.pages,
        BLOCK_N=config.block_n,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )


def dense_lora_(
    y: Tensor,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    pages: Tensor,
    weights: Tensor,
    slices: tuple[int, ...],
    scale: Tensor | None = None,
) -> Tensor:
    """y[t, slice s] += sum over u of weights[t, u] * scale[s, t, u] * (x[t] A[pages[u], s]^T) B[pages[u], slice s].

    The same update as two dense products a slice, over copies of all listed pages: for many rows that each use several
    of few pages (a gate for every token), up to some 32 pages. y [T, sum(slices)] is changed and returned.
    pages int64[U]; weights fp32[T, U]; scale None or fp32[S, T, U]; the others as in `lora_delta`, pages finite.
    """
    _check(x, a_pages, b_pages, slices, scale)
    num_slices = len(slices)
    parts = torch.arange(num_slices, device=pages.device)[:, None]
    a = a_pages.unflatten(1, (num_slices, PAGE_RANK))[pages, parts]
    ranks = functional.linear(x, a.flatten(0, 2)).view(len(x), num_slices, len(pages), PAGE_RANK)
    factors = (weights[None] if scale is None else weights * scale).transpose(0, 1)[..., None]
    ranks = (ranks * factors).masked_fill_(factors == 0, 0).to(x.dtype).flatten(2)
    b = b_pages.index_select(0, pages).flatten(0, 1)
    for s, (out, part) in enumerate(zip(y.split(slices, 1), b.split(slices, 1), strict=True)):
        out.addmm_(ranks[:, s], part)
    return y
