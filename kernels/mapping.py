"""The mapping matrix M[rows, pages] of one target group: the weight with which each token row uses each page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONG_RUN = 16
"""Rows from which on a run of equal spans is multiplied by itself, as one dense product."""

BLOCK_COST = 30
PAGE_COST = 6
"""Costs of a scattered block and of reading one of its pages, in products of one row with one page.

Fitted on a CPU (fp32, 576 -> 3072): a block takes about 60 us, a page 13 us and a row of a page 2 us.
"""


@dataclass(frozen=True)
class RowSpan:
    """Consecutive token rows [start, stop) of one sequence, which use the same pages of one target group.

    `weights[i]` belongs to `pages[i]` and contains the adapter's own scale. Weights of a repeated page add up.
    `ranks[i]` rank rows of the page are in use, the others are zero; empty where that is not known.
    """

    start: int
    stop: int
    pages: tuple[int, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class SharedBlock:
    """Rows [start, stop) that all use the same P pages with the same weights.

    pages: a slice of the pool (a view) or int64[P] page ids (a copy). columns: int64[P], the pages' positions in
    `Mapping.pages`. weights: fp32[P].
    """

    start: int
    stop: int
    pages: slice | Tensor
    columns: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ScatteredBlock:
    """P pages, each with up to R rows of its own: a page meets no row that does not use it.

    pages, columns: as in SharedBlock, but a slice may cover pages that no row uses.
    rows: int64[P, R] row ids; pages with fewer rows repeat one. weights: fp32[P, R].
    kept: int64[n], the positions within P * R that mean something, None for all of them.
    targets: int64[n], the rows of those positions.
    """

    pages: slice | Tensor
    columns: Tensor
    rows: Tensor
    weights: Tensor
    kept: Tensor | None
    targets: Tensor


@dataclass(frozen=True)
class Mapping:
    """M of one target group for one step: the sum of its blocks. `pages` are the distinct pages in use, sorted.

    The same mapping serves all layers, since a page has the same id in each of them.
    """

    shared: tuple[SharedBlock, ...]
    scattered: tuple[ScatteredBlock, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows with equal weights by page, none of them 0."""

    start: int
    stop: int
    weights: dict[int, float]


def build_mapping(spans: Sequence[RowSpan], device: torch.device) -> Mapping | None:
    """M from its spans, which must be disjoint and sorted by row. None if no row uses a page.

    Neighbouring spans with equal pages and weights are one run. A long run (prefill) becomes a shared block, and so
    does an only short one; the rows of short runs (decoding) are regrouped by page into scattered blocks.
    Raises ValueError for spans that overlap, are unsorted or empty, or whose pages and weights differ in number.
    """
    runs = _runs(spans)
    if not runs:
        return None
    pages = tuple(sorted({page for run in runs for page in run.weights}))
    columns = {page: column for column, page in enumerate(pages)}
    long = [run for run in runs if run.stop - run.start >= LONG_RUN]
    short = [run for run in runs if run.stop - run.start < LONG_RUN]
    if len(short) == 1:
        long, short = runs, []
    shared = tuple(_shared(run, columns, device) for run in long)
    scattered = tuple(_scattered(level, columns, device) for level in _levels(short))
    return Mapping(shared, scattered, pages)


def _runs(spans: Sequence[RowSpan]) -> list[_Run]:
    runs: list[_Run] = []
    row = 0
    for span in spans:
        if not row <= span.start < span.stop:
            raise ValueError(f"{span} is empty, overlaps the span before it or is out of order")
        if len(span.pages) != len(span.weights):
            raise ValueError(f"{span} has {len(span.pages)} pages but {len(span.weights)} weights")
        row = span.stop
        weights: dict[int, float] = {}
        for page, weight in zip(span.pages, span.weights, strict=True):
            weights[page] = weights.get(page, 0.0) + weight
        weights = {page: weight for page, weight in weights.items() if weight}
        if runs and runs[-1].stop == span.start and runs[-1].weights == weights:
            runs[-1] = _Run(runs[-1].start, span.stop, weights)
        elif weights:
            runs.append(_Run(span.start, span.stop, weights))
    return runs


def _shared(run: _Run, columns: dict[int, int], device: torch.device) -> SharedBlock:
    pages = sorted(run.weights)
    contiguous = pages[-1] - pages[0] + 1 == len(pages)
    return SharedBlock(
        run.start,
        run.stop,
        slice(pages[0], pages[-1] + 1) if contiguous else torch.tensor(pages, device=device),
        torch.tensor([columns[page] for page in pages], device=device),
        torch.tensor([run.weights[page] for page in pages], dtype=torch.float32, device=device),
    )


def _levels(runs: list[_Run]) -> Iterator[dict[int, list[tuple[int, float]]]]:
    """(row, weight) lists by page, split so that a page with many rows does not make all other pages as long."""
    users: dict[int, list[tuple[int, float]]] = {}
    for run in runs:
        for page, weight in run.weights.items():
            users.setdefault(page, []).extend((row, weight) for row in range(run.start, run.stop))
    while users:
        depth = _depth([len(rows) for rows in users.values()])
        yield {page: rows[:depth] for page, rows in sorted(users.items())}
        users = {page: rows[depth:] for page, rows in users.items() if len(rows) > depth}


def _depth(counts: list[int]) -> int:
    """Rows that the next block takes of each page: all that the most used one has, or fewer if a second block pays."""
    longest = max(counts)

    def cost(depth: int) -> int:
        rest = sum(count > depth for count in counts)
        first = BLOCK_COST + len(counts) * (PAGE_COST + depth)
        return first + (BLOCK_COST + rest * (PAGE_COST + longest - depth) if rest else 0)

    return min(set(counts), key=lambda depth: (cost(depth), depth))


def _scattered(
    users: dict[int, list[tuple[int, float]]], columns: dict[int, int], device: torch.device
) -> ScatteredBlock:
    used = list(users)
    depth = max(len(rows) for rows in users.values())
    covered = range(used[0], used[-1] + 1)
    # A page that no row uses costs its products; a copied one two more passes over its bytes.
    sliced = (len(covered) - len(used)) * (PAGE_COST + depth) <= 2 * PAGE_COST * len(used)
    listed = covered if sliced else used
    rows: list[int] = []
    weights: list[float] = []
    kept: list[int] = []
    for page in listed:
        entries = users.get(page, [])
        kept.extend(range(len(rows), len(rows) + len(entries)))
        entries = entries + [entries[0] if entries else (0, 0.0)] * (depth - len(entries))
        rows.extend(row for row, _ in entries)
        weights.extend(weight for _, weight in entries)
    return ScatteredBlock(
        slice(covered.start, covered.stop) if sliced else torch.tensor(used, device=device),
        torch.tensor([columns.get(page, 0) for page in listed], device=device),
        torch.tensor(rows, device=device).view(-1, depth),
        torch.tensor(weights, dtype=torch.float32, device=device).view(-1, depth),
        None if len(kept) == len(rows) else torch.tensor(kept, device=device),
        torch.tensor([rows[position] for position in kept], device=device),
    )
