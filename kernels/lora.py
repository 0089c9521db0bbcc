"""Low-rank updates of one group of linears for rows that each use pages of their own: the launches on a GPU."""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from kernels.gated_pages import GatedPages
from kernels.lora_config import ExpandConfig, LoraConfig, ShrinkConfig, lora_config
from kernels.lora_kernels import VALUE_BLOCK, expand_rows_kernel, expand_shared_kernel, reduce_kernel, shrink_kernel
from kernels.tiles import PAGE_PADDING, PAGE_RANK, LoraTiles

MAX_SLICES = 3
"""Slices that the kernels tell apart: query, key and value."""


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
    check_pages(x, a_pages, b_pages, slices, scale)
    shape = tiles.shape
    delta = x.new_empty(len(x), sum(slices))
    if not shape.tiles or not len(x):
        return delta.zero_()
    config = config or lora_config(shape, x.shape[1], slices, x.element_size())
    parts = (len(slices), shape.block_rows, PAGE_RANK)
    values = partials = x.new_empty(shape.tiles, config.shrink.splits, *parts, dtype=torch.float32)
    if shape.kind == "shared":
        block = shared_rows(len(x))
        values = x.new_empty(len(slices), triton.cdiv(len(x), block) * block, len(tiles.pages) * PAGE_RANK)
    elif config.reduced:
        values = x.new_empty(shape.tiles, *parts)
    _shrink(x, a_pages, partials, values, tiles, scale, config.shrink, pdl)
    if values is not partials:
        _reduce(partials, values, tiles, pdl)
    if shape.kind == "shared":
        expand_shared(values, b_pages, delta, tiles, slices, config.expand, pdl)
    else:
        _expand_rows(values, b_pages, delta, tiles, slices, config.expand, pdl)
    return delta


def check_pages(
    x: Tensor, a_pages: Tensor, b_pages: Tensor, slices: tuple[int, ...], scale: Tensor | None = None
) -> None:
    """Raise ValueError where shapes are not those of `lora_delta`."""
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


def shared_rows(num_rows: int) -> int:
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


def _expand_options(b_pages: Tensor, slices: tuple[int, ...], config: ExpandConfig, pdl: bool) -> dict[str, int]:
    """What both kernels of the second product take alike."""
    widths = {f"N{i}": slices[i] if i < len(slices) else 0 for i in range(MAX_SLICES)}
    launch = {"PDL": pdl, "num_warps": config.warps, "num_stages": config.stages, "launch_pdl": pdl}
    return widths | launch | {"B_STRIDE": b_pages.stride(0), "BLOCK_N": config.block_n}


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
        SLICES=len(slices),
        ROWS=tiles.shape.block_rows,
        SPLITS=values.shape[1] if values.dim() == 5 else 1,
        **_expand_options(b_pages, slices, config, pdl),
    )


def expand_shared(
    values: Tensor,
    b_pages: Tensor,
    delta: Tensor,
    mapping: LoraTiles | GatedPages,
    slices: tuple[int, ...],
    config: ExpandConfig,
    pdl: bool,
    ranks: int = PAGE_RANK,
) -> None:
    """delta = values [S, rows, pages * ranks] times B of all pages of the mapping, `ranks` rows of each."""
    rows = shared_rows(len(delta))
    expand_shared_kernel[triton.cdiv(len(delta), rows), sum(triton.cdiv(n, config.block_n) for n in slices)](
        values,
        b_pages,
        delta,
        mapping.pages,
        mapping.page_ranks,
        mapping.page_count,
        len(delta),
        values.shape[1],
        values.shape[2] // (PAGE_PADDING * ranks),
        RANKS=ranks,
        ROWS=rows,
        PAGES=config.pages,
        **_expand_options(b_pages, slices, config, pdl),
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
    ranks: int = PAGE_RANK,
) -> Tensor:
    """y[t, slice s] += sum over u of weights[t, u] * scale[s, t, u] * (x[t] A[pages[u], s]^T) B[pages[u], slice s].

    The same update as two dense products a slice, over copies of all listed pages: for many rows that each use several
    of few pages (a gate for every token), up to some 32 pages. y [T, sum(slices)] is changed and returned.
    pages int64[U], of which only the first `ranks` rank rows are used; weights fp32[T, U]; scale None or fp32[S, T, U];
    the others as in `lora_delta`, pages finite.
    """
    check_pages(x, a_pages, b_pages, slices, scale)
    num_slices = len(slices)
    parts = torch.arange(num_slices, device=pages.device)[:, None]
    a = a_pages.unflatten(1, (num_slices, PAGE_RANK))[:, :, :ranks][pages, parts]
    values = functional.linear(x, a.flatten(0, 2)).view(len(x), num_slices, len(pages), ranks)
    del a  # gives way to the copy of B
    factors = (weights[None] if scale is None else weights * scale).transpose(0, 1)[..., None]
    values = values.mul_(factors).masked_fill_(factors == 0, 0).flatten(2)
    b = b_pages[:, :ranks].index_select(0, pages).flatten(0, 1)
    for s, (out, part) in enumerate(zip(y.split(slices, 1), b.split(slices, 1), strict=True)):
        out.addmm_(values[:, s], part)
    return y


def mapping_matrix(tiles: LoraTiles, num_rows: int) -> Tensor:
    """M as fp32[num_rows, len(tiles.pages)], for `dense_lora_`; 0 for pages that a row does not use."""
    rows = tiles.tile_rows.long()
    columns = tiles.tile_columns.long()[:, None].expand_as(rows)
    matrix = tiles.tile_weights.new_zeros(num_rows + 1, len(tiles.pages))  # the last row takes what is no row
    matrix.index_put_((torch.where(rows < 0, num_rows, rows), columns), tiles.tile_weights)
    return matrix[:num_rows]
