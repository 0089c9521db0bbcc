"""The rows and pages of one step as tiles of fixed size, on the host and on the device: what the LoRA kernels read."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAGE_RANK = 16
"""Rank rows of one page."""

PAGE_PADDING = 16
"""The list of the step's pages is padded to a multiple of this, so that a kernel may take several at once."""

IntArray: TypeAlias = NDArray[np.int32]
FloatArray: TypeAlias = NDArray[np.float32]
Kind: TypeAlias = Literal["rows", "shared"]


@dataclass(frozen=True)
class TileShape:
    """Numbers of tiles, blocks and distinct pages: those of a plan, or the capacity that a captured graph has.

    "rows": blocks of up to `block_rows` rows that use the same pages; a tile is a block with one of its pages.
    "shared": a tile is a page with up to `block_rows` of the rows that use it; there are no blocks.
    """

    kind: Kind
    block_rows: int
    tiles: int
    blocks: int
    pages: int

    @property
    def words(self) -> int:
        """int32 words of the metadata."""
        return sum(_aligned(size) for _, size in self.sections())

    def sections(self) -> Iterator[tuple[str, int]]:
        """Name and words of each part of the metadata, in order; each begins at a multiple of 16 bytes."""
        yield "page_count", 1
        for name in ("tile_pages", "tile_ranks", "tile_columns"):
            yield name, self.tiles
        for name in ("tile_rows", "tile_weights"):
            yield name, self.tiles * self.block_rows
        yield "block_rows", self.blocks * self.block_rows
        for name in ("block_starts", "block_counts"):
            yield name, self.blocks
        for name in ("pages", "page_ranks"):
            yield name, self.padded_pages

    @property
    def padded_pages(self) -> int:
        return -(-self.pages // PAGE_PADDING) * PAGE_PADDING


def _aligned(words: int) -> int:
    return -(-words // 4) * 4


@dataclass(frozen=True, eq=False)
class TilePlan:
    """M of one step as tiles. Arrays are int32 but for the weights; N tiles, NB blocks, P distinct pages.

    tile_pages, tile_ranks, tile_columns [N]: page id, its rank rows in use, its position in `pages`.
    tile_rows, tile_weights (fp32) [N, block_rows]: row ids (-1: none) and the weights with which they use the page.
    block_rows [NB, block_rows]: row ids (-1: none). block_starts, block_counts [NB]: the tiles of each block.
    pages, page_ranks [P]: the distinct pages, sorted. page_count [1]: P.
    """

    shape: TileShape
    tile_pages: IntArray
    tile_ranks: IntArray
    tile_columns: IntArray
    tile_rows: IntArray
    tile_weights: FloatArray
    block_rows: IntArray
    block_starts: IntArray
    block_counts: IntArray
    pages: IntArray
    page_ranks: IntArray
    page_count: IntArray

    def fits(self, capacity: object) -> bool:
        """Whether `write_tiles` can put the plan into buffers of that capacity."""
        own = self.shape
        return (
            isinstance(capacity, TileShape)
            and (own.kind, own.block_rows) == (capacity.kind, capacity.block_rows)
            and own.tiles <= capacity.tiles
            and own.blocks <= capacity.blocks
            and own.pages <= capacity.pages
        )


@dataclass(frozen=True, eq=False)
class LoraTiles:
    """The arrays of a TilePlan on the device, as views of one buffer, at the capacity of `shape`.

    Unused tiles have page -1; unused blocks have rows -1 and no tiles; `pages` [padded_pages] ends in -1 with rank 0.
    """

    shape: TileShape
    tile_pages: Tensor
    tile_ranks: Tensor
    tile_columns: Tensor
    tile_rows: Tensor
    tile_weights: Tensor
    block_rows: Tensor
    block_starts: Tensor
    block_counts: Tensor
    pages: Tensor
    page_ranks: Tensor
    page_count: Tensor


def write_tiles(plan: TilePlan, capacity: TileShape, out: IntArray) -> None:
    """Write a plan into `out` [capacity.words] (page-locked memory, say), and what marks the rest as unused.

    Raises ValueError where the plan does not fit or `out` has another size.
    """
    if not plan.fits(capacity):
        raise ValueError(f"{plan.shape} does not fit into {capacity}")
    if out.shape != (capacity.words,):
        raise ValueError(f"out has shape {out.shape}, expected ({capacity.words},)")
    empty = {"tile_pages": -1, "tile_rows": -1, "block_rows": -1, "pages": -1}
    offset = 0
    for name, size in capacity.sections():
        values = getattr(plan, name).reshape(-1).view(np.int32)
        out[offset : offset + len(values)] = values
        stop = offset + _aligned(size)
        out[offset + len(values) : stop] = empty.get(name, 0)
        offset = stop


def view_tiles(buffer: Tensor, capacity: TileShape) -> LoraTiles:
    """The tiles that `write_tiles` wrote into the first `capacity.words` of int32 `buffer`, without a copy.

    `buffer` must begin at a multiple of 16 bytes. Raises ValueError where it is too short or not int32.
    """
    if buffer.dtype != torch.int32 or buffer.dim() != 1 or len(buffer) < capacity.words:
        raise ValueError(f"buffer is {buffer.dtype} {tuple(buffer.shape)}, expected int32 [>= {capacity.words}]")
    parts: dict[str, Tensor] = {}
    offset = 0
    for name, size in capacity.sections():
        parts[name] = buffer[offset : offset + size]
        offset += _aligned(size)
    parts["tile_weights"] = parts["tile_weights"].view(torch.float32)
    for name in ("tile_rows", "tile_weights", "block_rows"):
        parts[name] = parts[name].view(-1, capacity.block_rows)
    return LoraTiles(capacity, *(parts[part.name] for part in fields(LoraTiles)[1:]))
