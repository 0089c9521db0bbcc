"""Plans the tiles of a step: which rows stand together, so that every page is read as seldom as possible."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kernels.mapping import RowSpan
from kernels.tiles import PAGE_RANK, FloatArray, IntArray, Kind, TilePlan, TileShape

SHARING = 1.5
"""Tiles that "rows" may need for each tile of "shared", which takes two kernels more and has dense values to fill.

On an H100 (64 rows) "rows" is 5 to 15 % faster where rows share no pages, and 50 % slower at 3 of 8 adapters a row.
"""


@dataclass(frozen=True, eq=False)
class _Uses:
    """The spans of a step without repeated and weightless pages, those with the same sorted pages side by side.

    sets: the page tuples, longest first (the longest programs start first). counts: int[sets], spans of each.
    starts, lengths: int[spans], rows. weights: one list per span. ranks: rank rows in use by page id, ascending.
    """

    sets: list[tuple[int, ...]]
    counts: list[int]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    ranks: dict[int, int]


def plan_tiles(spans: Sequence[RowSpan], num_rows: int, block_rows: int, kind: Kind | None = None) -> TilePlan | None:
    """The tiles of spans that are disjoint, sorted by row and within `num_rows`. None if no row uses a page.

    Kind None: "rows", unless rows with different page sets share so many pages that it reads them too often.
    Rows of "rows" that use no page are in blocks without tiles, so that each of `num_rows` is in exactly one block.
    Raises ValueError for spans that overlap, are unsorted, empty or beyond `num_rows`, whose pages, weights and ranks
    differ in number, and for ranks or pages out of range.
    """
    if block_rows < 16 or block_rows & (block_rows - 1):
        raise ValueError(f"block_rows is {block_rows}, expected a power of two from 16 on")
    uses = _collect(spans, num_rows)
    if not uses.ranks:
        return None
    if kind is None:
        kind = _choose(uses, block_rows)
    return _plan_rows(uses, block_rows) if kind == "rows" else _plan_shared(uses, block_rows)


def _collect(spans: Sequence[RowSpan], num_rows: int) -> _Uses:
    groups: defaultdict[tuple[int, ...], list[tuple[int, int, tuple[float, ...]]]] = defaultdict(list)
    ranks: dict[int, int] = {}
    checked: set[tuple[int, ...]] = set()
    row = used = 0
    for span in spans:
        start, stop, pages, weights, own = span.start, span.stop, span.pages, span.weights, span.ranks
        if not row <= start < stop <= num_rows:
            raise ValueError(f"{span} is empty, overlaps the span before it, is out of order or beyond row {num_rows}")
        row = stop
        if len(pages) != len(weights) or (own and len(own) != len(pages)):
            raise ValueError(f"{span} has {len(pages)} pages but {len(weights)} weights and {len(own)} ranks")
        if own not in checked:
            if own and not 1 <= min(own) <= max(own) <= PAGE_RANK:
                raise ValueError(f"{span} has ranks out of range, expected 1 to {PAGE_RANK}")
            checked.add(own)
        for page, rank in zip(pages, own or (PAGE_RANK,) * len(pages), strict=True):
            if rank > ranks.get(page, 0):
                ranks[page] = rank
        if len(pages) > 1 or 0.0 in weights:
            pages, weights = _merged(pages, weights)
        if pages:
            if start > used:
                groups[()].append((used, start - used, ()))
            groups[pages].append((start, stop - start, weights))
            used = stop
    if used < num_rows:
        groups[()].append((used, num_rows - used, ()))
    sets = sorted(groups, key=len, reverse=True)
    members = [groups[pages] for pages in sets]
    starts, lengths, parts = zip(*chain.from_iterable(members), strict=True) if members else ((), (), ())
    distinct = sorted(set(chain.from_iterable(sets)))
    if distinct and distinct[0] < 0:
        raise ValueError(f"page {distinct[0]} is negative")
    return _Uses(sets, [len(m) for m in members], starts, lengths, parts, {page: ranks[page] for page in distinct})


def _merged(pages: tuple[int, ...], weights: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sorted distinct pages and their weights, none of them 0."""
    merged: dict[int, float] = {}
    for page, weight in zip(pages, weights, strict=True):
        merged[page] = merged.get(page, 0.0) + weight
    kept = sorted(page for page, weight in merged.items() if weight)
    return tuple(kept), tuple([merged[page] for page in kept])


def _choose(uses: _Uses, block_rows: int) -> Kind:
    if sum(map(len, uses.sets)) == len(uses.ranks):
        return "rows"
    users = dict.fromkeys(uses.ranks, 0)
    tiles = first = 0
    for pages, count in zip(uses.sets, uses.counts, strict=True):
        rows = sum(uses.lengths[first : first + count])
        first += count
        tiles += -(-rows // block_rows) * len(pages)
        for page in pages:
            users[page] += rows
    return "rows" if tiles <= SHARING * sum(-(-rows // block_rows) for rows in users.values()) else "shared"


def _plan_rows(uses: _Uses, block_rows: int) -> TilePlan:
    spans = _ints(uses.counts)
    lengths = _ints(uses.lengths)
    set_pages = _ints([len(pages) for pages in uses.sets])
    positions, set_blocks = _place(np.add.reduceat(lengths, _before(spans)), block_rows)
    num_blocks = int(set_blocks.sum())
    rows = np.full(num_blocks * block_rows, -1, np.int32)
    rows[positions] = _ranges(_ints(uses.starts), lengths)
    # where the weights of the row at each position begin; behind them all stand zeros for positions without a row
    weights = list(chain.from_iterable(uses.weights))
    offsets = np.full(num_blocks * block_rows, len(weights), np.int32)
    offsets[positions] = _before(set_pages.repeat(spans)).repeat(lengths)
    weights.extend([0.0] * len(uses.sets[0]))

    counts = set_pages.repeat(set_blocks)
    starts = _before(counts)
    tile_blocks = np.arange(num_blocks, dtype=np.int32).repeat(counts)
    tile_index = np.arange(len(tile_blocks), dtype=np.int32) - starts[tile_blocks]
    page_index = _before(set_pages).repeat(set_blocks)[tile_blocks] + tile_index
    blocks: IntArray = rows.reshape(num_blocks, block_rows)
    tile_offsets = offsets.reshape(num_blocks, block_rows)[tile_blocks] + tile_index[:, None]
    return _finish(
        "rows",
        uses,
        _columns(uses, uses.sets)[page_index],
        blocks[tile_blocks],
        np.array(weights, np.float32)[tile_offsets],
        blocks,
        starts,
        counts,
    )


def _plan_shared(uses: _Uses, block_rows: int) -> TilePlan:
    spans = [pages for pages, count in zip(uses.sets, uses.counts, strict=True) for _ in range(count)]
    sizes = _ints([len(pages) for pages in spans])
    columns = _columns(uses, spans)
    starts, lengths = _ints(uses.starts).repeat(sizes), _ints(uses.lengths).repeat(sizes)
    weights = np.array(list(chain.from_iterable(uses.weights)), np.float32)
    order = np.lexsort((starts, columns))
    columns, starts, lengths, weights = columns[order], starts[order], lengths[order], weights[order]
    firsts = columns.searchsorted(np.arange(len(uses.ranks)))
    positions, page_tiles = _place(np.add.reduceat(lengths, firsts), block_rows)
    num_tiles = int(page_tiles.sum())
    tile_rows = np.full(num_tiles * block_rows, -1, np.int32)
    tile_rows[positions] = _ranges(starts, lengths)
    tile_weights = np.zeros(num_tiles * block_rows, np.float32)
    tile_weights[positions] = weights.repeat(lengths)
    return _finish(
        "shared",
        uses,
        np.arange(len(uses.ranks), dtype=np.int32).repeat(page_tiles),
        tile_rows.reshape(num_tiles, block_rows),
        tile_weights.reshape(num_tiles, block_rows),
        np.empty((0, block_rows), np.int32),
        _ints([]),
        _ints([]),
    )


def _finish(
    kind: Kind,
    uses: _Uses,
    tile_columns: IntArray,
    tile_rows: IntArray,
    tile_weights: FloatArray,
    block_rows: IntArray,
    block_starts: IntArray,
    block_counts: IntArray,
) -> TilePlan:
    pages, ranks = _ints(list(uses.ranks)), _ints(list(uses.ranks.values()))
    return TilePlan(
        TileShape(kind, block_rows.shape[1], len(tile_rows), len(block_rows), len(pages)),
        pages[tile_columns],
        ranks[tile_columns],
        tile_columns,
        tile_rows,
        tile_weights,
        block_rows,
        block_starts,
        block_counts,
        pages,
        ranks,
        _ints([len(pages)]),
    )


def _ints(values: Sequence[int]) -> IntArray:
    return np.array(values, np.int32)


def _columns(uses: _Uses, sets: Sequence[tuple[int, ...]]) -> IntArray:
    """Positions among the distinct pages of all pages in `sets`, one set after the other."""
    columns = {page: column for column, page in enumerate(uses.ranks)}
    return _ints([columns[page] for pages in sets for page in pages])


def _before(counts: IntArray) -> IntArray:
    """The sum of the counts before each."""
    before: IntArray = counts.cumsum(dtype=np.int32) - counts
    return before


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, ... for `length` numbers, one span after the other."""
    ranges: IntArray = (starts - _before(lengths)).repeat(lengths) + np.arange(lengths.sum(), dtype=np.int32)
    return ranges


def _place(sizes: IntArray, block_rows: int) -> tuple[IntArray, IntArray]:
    """Cut consecutive groups of `sizes` elements into blocks: flat position of each element, blocks of each group."""
    blocks = -(-sizes // block_rows)
    firsts = _before(blocks) * block_rows
    return _ranges(firsts, sizes), blocks
