"""The rows and pages of a step in which gates weigh adapters: every row may meet every page.

What a gate chooses is known on the device only, so that nothing here is grouped by it: the mapping matrix itself, with
the weights that rows use pages with unless their gates leave them out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.mapping import RowSpan
from kernels.tiles import PAGE_PADDING, PAGE_RANK, FloatArray, IntArray

FEW_RANKS = PAGE_RANK // 2
"""Rank rows of a page that are half the work. MeteoRA's adapters have as many."""


@dataclass(frozen=True)
class GatedShape:
    """Rows, distinct pages, and the most rank rows of a page: those of a plan, or the capacity of a captured graph."""

    rows: int
    pages: int
    ranks: int = PAGE_RANK

    @property
    def padded_pages(self) -> int:
        """A power of two, as the kernels need it."""
        return max(PAGE_PADDING, 1 << (self.pages - 1).bit_length())

    @property
    def words(self) -> int:
        """int32 words of the metadata; every part begins at a multiple of 16 bytes."""
        return sum(size for _, size in self.sections())

    def sections(self) -> Iterator[tuple[str, int]]:
        yield "page_count", 4
        yield "pages", self.padded_pages
        yield "page_ranks", self.padded_pages
        yield "weights", self.rows * self.padded_pages


@dataclass(frozen=True, eq=False)
class GatedPlan:
    """pages, page_ranks int32[P]: the distinct pages, sorted, and their rank rows in use. weights fp32[T, P]: M."""

    shape: GatedShape
    pages: IntArray
    page_ranks: IntArray
    weights: FloatArray

    def fits(self, capacity: object) -> bool:
        """Whether `write` can put the plan into buffers of that capacity."""
        own = self.shape
        return (
            isinstance(capacity, GatedShape)
            and own.rows <= capacity.rows
            and own.pages <= capacity.pages
            and own.ranks <= capacity.ranks
        )

    def write(self, capacity: GatedShape, out: IntArray) -> None:
        """Write the plan into `out` [capacity.words], and what marks the rest as unused.

        Raises ValueError where it does not fit.
        """
        if not self.fits(capacity) or out.shape != (capacity.words,):
            raise ValueError(f"{self.shape} does not fit into {capacity}, or not into {out.shape} words")
        parts = _split(out, capacity)
        rows, count = self.weights.shape
        parts["page_count"][:] = count
        for name, values, none in (("pages", self.pages, -1), ("page_ranks", self.page_ranks, 0)):
            parts[name][:count] = values
            parts[name][count:] = none
        matrix = parts["weights"].view(np.float32).reshape(-1, capacity.padded_pages)
        matrix.fill(0.0)
        matrix[:rows, :count] = self.weights


@dataclass(frozen=True, eq=False)
class GatedPages:
    """The arrays of a GatedPlan on the device, as views of one buffer, at the capacity of `shape`.

    `pages` [padded_pages] ends in -1 with rank 0; weights fp32[rows, padded_pages] is 0 in rows and columns not used.
    """

    shape: GatedShape
    page_count: Tensor
    pages: Tensor
    page_ranks: Tensor
    weights: Tensor

    @classmethod
    def view(cls, buffer: Tensor, capacity: GatedShape) -> "GatedPages":
        """What `GatedPlan.write` wrote into the first words of int32 `buffer`, without a copy."""
        parts, offset = {}, 0
        for name, size in capacity.sections():
            parts[name] = buffer[offset : offset + size]
            offset += size
        weights = parts["weights"].view(torch.float32).view(-1, capacity.padded_pages)
        return cls(capacity, parts["page_count"], parts["pages"], parts["page_ranks"], weights)


def plan_gated(spans: Sequence[RowSpan], num_rows: int) -> GatedPlan:
    """The plan of disjoint spans within `num_rows` rows; without pages where they use none."""
    ranks: dict[int, int] = {}
    for span in spans:
        for page, rank in zip(span.pages, span.ranks or (PAGE_RANK,) * len(span.pages), strict=True):
            ranks[page] = max(rank, ranks.get(page, 0))
    pages = np.array(sorted(ranks), np.int32)
    weights = np.zeros((num_rows, len(pages)), np.float32)
    for span in spans:
        own = np.zeros(len(pages), np.float32)
        np.add.at(own, pages.searchsorted(np.array(span.pages, np.int32)), span.weights)
        weights[span.start : span.stop] = own
    most = max(ranks.values(), default=1)
    shape = GatedShape(num_rows, len(pages), FEW_RANKS if most <= FEW_RANKS else PAGE_RANK)
    return GatedPlan(shape, pages, np.array([ranks[page] for page in pages.tolist()], np.int32), weights)


def _split(out: IntArray, shape: GatedShape) -> dict[str, IntArray]:
    parts, offset = {}, 0
    for name, size in shape.sections():
        parts[name] = out[offset : offset + size]
        offset += size
    return parts
