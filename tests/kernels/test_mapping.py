"""The blocks of a mapping against the matrix that its spans describe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.mapping import Mapping, RowSpan, SharedBlock, build_mapping

CPU = torch.device("cpu")
NUM_PAGES = 24

weight = st.sampled_from([0.0, 1.0, -0.5, 0.25, 2.0])
uses = st.lists(st.tuples(st.integers(0, NUM_PAGES - 1), weight), max_size=6)
lengths = st.one_of(st.integers(1, 3), st.sampled_from([15, 16, 40]))


@st.composite
def span_lists(draw: st.DrawFn) -> list[RowSpan]:
    """Spans with gaps between them; some have the pages of an earlier one."""
    spans: list[RowSpan] = []
    row = 0
    for length in draw(st.lists(lengths, max_size=12)):
        row += draw(st.sampled_from([0, 0, 0, 1, 20]))
        used = draw(
            st.sampled_from([list(zip(s.pages, s.weights, strict=True)) for s in spans])
            if spans and draw(st.booleans())
            else uses
        )
        spans.append(RowSpan(row, row + length, tuple(page for page, _ in used), tuple(w for _, w in used)))
        row += length
    return spans


def from_spans(spans: list[RowSpan]) -> Tensor:
    matrix = torch.zeros(spans[-1].stop if spans else 0, NUM_PAGES)
    for span in spans:
        for page, value in zip(span.pages, span.weights, strict=True):
            matrix[span.start : span.stop, page] += value
    return matrix


def page_ids(pages: slice | Tensor) -> list[int]:
    return list(range(pages.start, pages.stop)) if isinstance(pages, slice) else pages.tolist()


def entries(mapping: Mapping) -> list[tuple[int, int, int, float]]:
    """(row, page, column, weight) of every product that a mapping asks for, but those whose result it drops."""
    found = []
    for block in mapping.shared:
        for page, column, value in zip(page_ids(block.pages), block.columns, block.weights, strict=True):
            found += [(row, page, int(column), float(value)) for row in range(block.start, block.stop)]
    for block in mapping.scattered:
        ids, depth = page_ids(block.pages), block.rows.shape[1]
        kept = range(block.rows.numel()) if block.kept is None else block.kept.tolist()
        assert block.rows.flatten()[list(kept)].tolist() == block.targets.tolist()
        for position in kept:
            i, j = divmod(position, depth)
            found.append((int(block.rows[i, j]), ids[i], int(block.columns[i]), float(block.weights[i, j])))
    return found


@given(span_lists())
@settings(deadline=None)
def test_blocks_add_up_to_the_spans(spans: list[RowSpan]) -> None:
    expected = from_spans(spans)
    mapping = build_mapping(spans, CPU)
    if mapping is None:
        assert not expected.any()
        return
    matrix = torch.zeros_like(expected)
    for row, page, column, value in entries(mapping):
        assert mapping.pages[column] == page
        assert expected[row, page], "a row meets a page that it does not use"
        assert not matrix[row, page], "a row meets a page twice"
        matrix[row, page] = value
    assert torch.equal(matrix, expected)
    assert mapping.pages == tuple(expected.any(0).nonzero().flatten().tolist())


@given(span_lists())
@settings(deadline=None)
def test_padding_and_dropped_products_stay_within_the_rows(spans: list[RowSpan]) -> None:
    mapping = build_mapping(spans, CPU)
    for block in mapping.scattered if mapping else ():
        assert block.rows.shape == block.weights.shape
        assert 0 <= int(block.rows.min()) <= int(block.rows.max()) < spans[-1].stop
        assert len(page_ids(block.pages)) == len(block.rows) == len(block.columns)


def test_equal_neighbours_are_one_shared_block() -> None:
    mapping = build_mapping([RowSpan(i, i + 1, (4, 5), (0.5, 2.0)) for i in range(8)], CPU)
    assert mapping is not None
    assert not mapping.scattered
    [block] = mapping.shared
    assert (block.start, block.stop, block.pages) == (0, 8, slice(4, 6))


def test_a_long_run_stays_apart_from_decoding_rows() -> None:
    spans = [RowSpan(0, 1, (3,), (1.0,)), RowSpan(1, 2, (4,), (1.0,)), RowSpan(2, 66, (9, 3), (1.0, 2.0))]
    mapping = build_mapping(spans, CPU)
    assert mapping is not None
    [shared], [scattered] = mapping.shared, mapping.scattered
    assert isinstance(shared, SharedBlock)
    assert (shared.start, shared.stop, page_ids(shared.pages)) == (2, 66, [3, 9])
    assert shared.weights.tolist() == [2.0, 1.0]
    assert scattered.targets.tolist() == [0, 1]


def test_neighbouring_pages_are_a_view_and_distant_ones_a_copy() -> None:
    near = build_mapping([RowSpan(0, 1, (10,), (1.0,)), RowSpan(1, 2, (12,), (1.0,))], CPU)
    far = build_mapping([RowSpan(0, 1, (10,), (1.0,)), RowSpan(1, 2, (900,), (1.0,))], CPU)
    assert near is not None
    assert far is not None
    assert near.scattered[0].pages == slice(10, 13)
    assert page_ids(far.scattered[0].pages) == [10, 900]


def test_one_popular_page_does_not_lengthen_the_others() -> None:
    rows = [(0, 1.0)] * 31
    spans = [RowSpan(i, i + 1, (0, i + 1), (1.0, rows[i][1])) for i in range(31)]
    mapping = build_mapping(spans, CPU)
    assert mapping is not None
    assert sum(block.rows.numel() for block in mapping.scattered) < 2 * len(entries(mapping))


@pytest.mark.parametrize(
    "spans",
    [
        [RowSpan(0, 0, (1,), (1.0,))],
        [RowSpan(0, 2, (1,), (1.0,)), RowSpan(1, 3, (1,), (1.0,))],
        [RowSpan(2, 3, (1,), (1.0,)), RowSpan(0, 1, (1,), (1.0,))],
        [RowSpan(0, 1, (1, 2), (1.0,))],
    ],
    ids=["empty", "overlap", "unsorted", "weights"],
)
def test_wrong_spans_are_refused(spans: list[RowSpan]) -> None:
    with pytest.raises(ValueError, match="RowSpan"):
        build_mapping(spans, CPU)


def test_no_pages_is_no_mapping() -> None:
    assert build_mapping([], CPU) is None
    assert build_mapping([RowSpan(0, 4, (), ()), RowSpan(4, 5, (7,), (0.0,))], CPU) is None
