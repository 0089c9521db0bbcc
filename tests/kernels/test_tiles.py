"""Tiles against the matrix that the spans describe."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.mapping import RowSpan
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, LoraTiles, TilePlan, TileShape, view_tiles, write_tiles
from tests.kernels.test_mapping import NUM_PAGES, from_spans, span_lists

KINDS: tuple[Kind, ...] = ("rows", "shared")


def rank_of(page: int) -> int:
    return page % 16 + 1


@st.composite
def ranked_spans(draw: st.DrawFn) -> tuple[list[RowSpan], int]:
    """Spans with the ranks of their pages, and a number of rows that may go on behind the last."""
    spans = [replace(span, ranks=tuple(map(rank_of, span.pages))) for span in draw(span_lists())]
    return spans, (spans[-1].stop if spans else 1) + draw(st.integers(0, 20))


def expected(spans: list[RowSpan], num_rows: int) -> NDArray[np.float32]:
    matrix = np.zeros((num_rows, NUM_PAGES), np.float32)
    given = from_spans(spans).numpy()
    matrix[: len(given)] = given
    return matrix


def matrix_of(tiles: TilePlan | LoraTiles, num_rows: int) -> NDArray[np.float32]:
    """M as the tiles have it; every row and page may meet in one tile only."""
    matrix = np.zeros((num_rows, NUM_PAGES), np.float32)
    met = np.zeros((num_rows, NUM_PAGES), bool)
    for page, rank, column, rows, weights in zip(
        tiles.tile_pages, tiles.tile_ranks, tiles.tile_columns, tiles.tile_rows, tiles.tile_weights, strict=True
    ):
        if page < 0:
            assert (rows == -1).all()
            continue
        assert rank == rank_of(int(page))
        assert tiles.pages[int(column)] == page
        used = rows >= 0
        assert used.any()
        assert (weights[~used] == 0).all()
        assert not met[rows[used], page].any()
        met[rows[used], page] = True
        matrix[rows[used], page] = weights[used]
    return matrix


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("kind", [*KINDS, None])
@given(case=ranked_spans())
@settings(deadline=None, max_examples=30)
def test_tiles_are_the_matrix(kind: Kind | None, block_rows: int, case: tuple[list[RowSpan], int]) -> None:
    spans, num_rows = case
    matrix = expected(spans, num_rows)
    plan = plan_tiles(spans, num_rows, block_rows, kind)
    if not matrix.any():
        assert plan is None
        return
    assert plan is not None
    assert kind in (None, plan.shape.kind)
    np.testing.assert_array_equal(matrix_of(plan, num_rows), matrix)
    used = np.flatnonzero(matrix.any(0))
    assert plan.pages.tolist() == used.tolist()
    assert plan.page_ranks.tolist() == [rank_of(page) for page in used]
    assert plan.page_count.tolist() == [len(used)]
    sizes = (len(plan.tile_pages), len(plan.block_rows), len(plan.pages))
    assert plan.shape == TileShape(plan.shape.kind, block_rows, *sizes)


@pytest.mark.parametrize("block_rows", [16, 64])
@given(case=ranked_spans())
@settings(deadline=None, max_examples=30)
def test_every_row_is_in_one_block_with_all_its_pages(block_rows: int, case: tuple[list[RowSpan], int]) -> None:
    spans, num_rows = case
    plan = plan_tiles(spans, num_rows, block_rows, "rows")
    if plan is None:
        return
    rows = plan.block_rows[plan.block_rows >= 0]
    assert sorted(rows.tolist()) == list(range(num_rows))
    matrix = expected(spans, num_rows)
    stops = plan.block_starts + plan.block_counts
    assert plan.block_starts.tolist() == [0, *stops[:-1]]
    assert stops[-1] == len(plan.tile_pages)
    for block, start, stop in zip(plan.block_rows, plan.block_starts, stops, strict=True):
        assert block[0] >= 0
        assert (plan.tile_rows[start:stop] == block).all()
        for row in block[block >= 0]:
            assert np.flatnonzero(matrix[row]).tolist() == plan.tile_pages[start:stop].tolist()
    assert (np.diff(plan.block_counts) <= 0).all()
    sets: dict[tuple[int, ...], int] = {}
    for row in matrix:
        pages = tuple(np.flatnonzero(row).tolist())
        sets[pages] = sets.get(pages, 0) + 1
    assert plan.shape.blocks == sum(-(-count // block_rows) for count in sets.values())


@given(case=ranked_spans())
@settings(deadline=None, max_examples=30)
def test_shared_tiles_are_few_and_by_page(case: tuple[list[RowSpan], int]) -> None:
    spans, num_rows = case
    plan = plan_tiles(spans, num_rows, 16, "shared")
    if plan is None:
        return
    users = (expected(spans, num_rows) != 0).sum(0)
    assert plan.tile_pages.tolist() == [page for page in range(NUM_PAGES) for _ in range(-(-users[page] // 16))]
    assert plan.shape.blocks == 0
    for page in plan.pages:
        rows = plan.tile_rows[plan.tile_pages == page]
        assert (np.diff(rows[rows >= 0]) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@given(case=ranked_spans(), spare=st.tuples(*[st.integers(0, 9)] * 3), offset=st.sampled_from([0, 4]))
@settings(deadline=None, max_examples=30)
def test_a_written_plan_is_read_back(
    kind: Kind, case: tuple[list[RowSpan], int], spare: tuple[int, int, int], offset: int
) -> None:
    spans, num_rows = case
    plan = plan_tiles(spans, num_rows, 16, kind)
    if plan is None:
        return
    own = plan.shape
    blocks = own.blocks + (spare[1] if kind == "rows" else 0)
    capacity = TileShape(kind, 16, own.tiles + spare[0], blocks, own.pages + spare[2])
    assert plan.fits(capacity)
    buffer = torch.full((offset + capacity.words,), 12345, dtype=torch.int32)
    write_tiles(plan, capacity, buffer[offset:].numpy())
    tiles = view_tiles(buffer[offset:], capacity)
    assert not (buffer[offset:] == 12345).any()
    for name in ("tile_pages", "tile_ranks", "tile_columns", "tile_rows", "tile_weights", "block_rows", "block_starts"):
        values = getattr(tiles, name).numpy()
        np.testing.assert_array_equal(values[: len(getattr(plan, name))], getattr(plan, name))
        assert getattr(tiles, name).storage_offset() % 4 == 0
    np.testing.assert_array_equal(matrix_of(tiles, num_rows), expected(spans, num_rows))
    assert (tiles.tile_pages[own.tiles :] == -1).all()
    assert (tiles.block_rows[own.blocks :] == -1).all()
    assert (tiles.block_counts[own.blocks :] == 0).all()
    assert len(tiles.pages) % 16 == 0
    assert (tiles.pages[own.pages :] == -1).all()
    assert (tiles.page_ranks[own.pages :] == 0).all()
    assert tiles.page_count.tolist() == [own.pages]


def rows_of(sets: list[tuple[int, ...]]) -> list[RowSpan]:
    return [RowSpan(i, i + 1, pages, (1.0,) * len(pages)) for i, pages in enumerate(sets)]


@pytest.mark.parametrize(
    ("spans", "kind"),
    [
        (rows_of([(3,)] * 64), "rows"),
        (rows_of([(i % 8,) for i in range(64)]), "rows"),
        (rows_of([(i,) for i in range(64)]), "rows"),
        (rows_of([(0, 1, 2, 3)] * 10 + [(4, 5, 6, 7)] * 6), "rows"),
        (rows_of([(i % 8, (i + 1 + i // 8 % 6) % 8) for i in range(64)]), "shared"),
        (rows_of([(0, 1 + i) for i in range(32)]), "shared"),
        ([RowSpan(0, 2000, (5,), (1.0,))], "rows"),
    ],
)
def test_the_kind_follows_the_sharing(spans: list[RowSpan], kind: Kind) -> None:
    plan = plan_tiles(spans, spans[-1].stop, 16)
    assert plan is not None
    assert plan.shape.kind == kind


def test_a_page_without_ranks_is_full() -> None:
    plan = plan_tiles([RowSpan(0, 1, (2, 1), (1.0, 1.0), (3, 4)), RowSpan(1, 2, (1, 7), (1.0, 1.0))], 2, 16)
    assert plan is not None
    assert dict(zip(plan.pages.tolist(), plan.page_ranks.tolist(), strict=True)) == {1: 16, 2: 3, 7: 16}


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([RowSpan(1, 1, (0,), (1.0,))], "empty"),
        ([RowSpan(0, 2, (0,), (1.0,)), RowSpan(1, 3, (0,), (1.0,))], "overlaps"),
        ([RowSpan(0, 5, (0,), (1.0,))], "beyond row 4"),
        ([RowSpan(0, 1, (0, 1), (1.0,))], "2 pages but 1 weights"),
        ([RowSpan(0, 1, (0, 1), (1.0, 1.0), (4,))], "and 1 ranks"),
        ([RowSpan(0, 1, (0,), (1.0,), (17,))], "expected 1 to 16"),
        ([RowSpan(0, 1, (0,), (1.0,), (0,))], "expected 1 to 16"),
        ([RowSpan(0, 1, (-1,), (1.0,))], "page -1 is negative"),
    ],
)
def test_wrong_spans_are_refused(spans: list[RowSpan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tiles(spans, 4, 16)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="block_rows is 24"):
        plan_tiles([], 1, 24)
    plan = plan_tiles(rows_of([(0, 1), (2,)]), 2, 16, "rows")
    assert plan is not None
    for field, value in {"kind": "shared", "block_rows": 64, "tiles": 2, "blocks": 1, "pages": 2}.items():
        capacity = replace(plan.shape, **{field: value})
        assert not plan.fits(capacity)
        with pytest.raises(ValueError, match="does not fit"):
            write_tiles(plan, capacity, np.zeros(capacity.words, np.int32))
    with pytest.raises(ValueError, match="out has shape"):
        write_tiles(plan, plan.shape, np.zeros(plan.shape.words + 1, np.int32))
    with pytest.raises(ValueError, match="expected int32"):
        view_tiles(torch.zeros(plan.shape.words - 1, dtype=torch.int32), plan.shape)
