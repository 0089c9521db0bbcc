"""Updates that gates weigh, against the reference with the weights of the formulas; and the plans of such steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import triton_ops
from kernels.gate_rows import TOTALS, Gated, GateRows
from kernels.gated import gated_config, gated_delta
from kernels.gated_pages import GatedPages, GatedShape, plan_gated
from kernels.gates import gate_scale
from kernels.gemm_table import GemmTable
from kernels.mapping import RowSpan
from kernels.triton_ops import TritonOps
from tests.kernels.lora_pools import DEVICE, Pools, assert_near, reference_delta
from tests.kernels.test_gates import FIRST_TARGET, GATES, GROUP, inputs, ints, step

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
]

SLICES, INPUTS = (40, 24, 24), 72
OWNERS = (5, 5, 0, 3, 7)
"""Of the pages, in the numbers of `test_gates.ADAPTERS`; the last page of the pool is that of an explicit mix."""


def pages_of(spans: list[RowSpan], rows: int, spare: int = 0) -> GatedPages:
    """Room for `spare` more rows, and pages of all ranks."""
    plan = plan_gated(spans, rows)
    capacity = GatedShape(rows + spare, plan.shape.pages + spare, 16 if spare else plan.shape.ranks)
    words = np.full(capacity.words, 99, np.int32)
    plan.write(capacity, words)
    return GatedPages.view(torch.from_numpy(words).to(DEVICE), capacity)


def case(dtype: torch.dtype, rows: int, most: int = 16) -> tuple[Pools, list[RowSpan], Tensor, Tensor, GateRows]:
    """Gated rows of two slots, an explicit mix (every third row, beside which a page has rank 1), and a base row."""
    pools = Pools.random([min(rank, most) for rank in (16, 4, 8, 16, 1, 16)], INPUTS, SLICES, dtype)
    x, gates = inputs(rows, dtype)
    slots, spans = [], []
    for row in range(rows):
        slots.append((0, 1, -1)[row % 3])
        uses = {page: 0.5 + page / 4 for page in range(5)} if row % 3 < 2 else {5: -0.7, 2: 1.5}
        if row != 2:
            spans.append(pools.span(row, row + 1, uses))
    allowed = [[gate for gate in range(5) if (row + gate) % 4] for row in range(rows)]
    return pools, spans, x, gates, step(rows, slots, [1 + row % 3 for row in range(rows)], allowed)


def gated_of(gates: Tensor, rows: GateRows, mapping: GatedPages, factors: Tensor | None = None) -> Gated:
    columns = [*OWNERS, *[-1] * (len(mapping.pages) - len(OWNERS))]
    return Gated(gates, rows, ints(columns), GROUP, FIRST_TARGET, factors)


def reference(
    x: Tensor, pools: Pools, spans: list[RowSpan], gated: Gated, slices: tuple[int, ...] = SLICES
) -> tuple[Tensor, Tensor]:
    """(delta, totals) with the weights that `gate_scale` gives, which `test_gates` compares with the formulas."""
    apart = replace(gated, rows=replace(gated.rows, totals=torch.zeros_like(gated.rows.totals)))
    return reference_delta(x, pools, spans, slices, gate_scale(x, apart)), apart.rows.totals


@pytest.mark.parametrize(
    ("dtype", "rows", "most", "spare", "factored"),
    [
        (torch.float32, 5, 16, 0, False),
        (torch.float16, 20, 8, 0, True),
        (torch.float32, 3, 8, 2, False),
        (torch.float16, 70, 16, 0, False),
    ],
)
def test_delta_equals_the_reference(dtype: torch.dtype, rows: int, most: int, spare: int, factored: bool) -> None:
    pools, spans, x, gates, told = case(dtype, rows, most)
    mapping = pages_of(spans, rows, spare)
    assert mapping.shape.ranks == (16 if spare else most)
    factors = torch.rand(3, rows, len(mapping.pages), device=DEVICE) if factored else None
    gated = gated_of(gates, told, mapping, factors)
    result = gated_delta(x, *pools.unused_poisoned(), mapping, SLICES, gated)
    expected, totals = reference(x, pools, spans, gated)
    assert_near(result, expected, dtype)
    assert (result[2] == 0).all(), "a base row"
    torch.testing.assert_close(told.totals, totals, rtol=1e-4, atol=1e-5)


def test_results_repeat_bit_by_bit() -> None:
    pools, spans, x, gates, told = case(torch.float32, 4)
    mapping, found = pages_of(spans, 4), []
    for _ in range(2):
        rows = replace(told, totals=torch.zeros_like(told.totals))
        found.append((gated_delta(x, pools.a, pools.b, mapping, SLICES, gated_of(gates, rows, mapping)), rows.totals))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN, in the interpreter
def test_what_is_not_chosen_is_not_read() -> None:
    pools, spans, x, gates, told = case(torch.float32, 2)
    mapping = pages_of(spans, 2)
    one = replace(told, masks=ints([[1 << 1], [1 << 0]]), targets=ints([0b1110000, 0b1110000]))  # adapters 0 and 0
    gated = gated_of(gates, one, mapping)
    clean = gated_delta(x, pools.a, pools.b, mapping, SLICES, gated)
    pools.a[[0, 1, 3, 4]] = float("inf")
    assert torch.equal(gated_delta(x, pools.a, pools.b, mapping, SLICES, gated), clean)


def test_linears_with_gates_beside_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's three ways: beside the base product, behind it, and as dense products."""
    pools, spans, x, gates, told = case(torch.float32, 5)
    mapping = pages_of(spans, 5)
    gated, ops = gated_of(gates, told, mapping), TritonOps(DEVICE, GemmTable())
    weight = torch.randn(sum(SLICES), INPUTS, device=DEVICE)
    expected = reference(x, pools, spans, gated)[0] + x @ weight.T
    for side, dense in ((64, 64), (2, 64), (2, 2)):
        monkeypatch.setattr(triton_ops, "SIDE_ROWS", side)
        monkeypatch.setattr(triton_ops, "DENSE_ROWS", dense)
        y, delta = ops.lora_linear(x, weight, None, (pools.a, pools.b), mapping, SLICES, gated)
        assert (delta is None) is (dense == 2)
        assert_near(y if delta is None else y + delta, expected, torch.float32)


def test_wrong_shapes_are_refused() -> None:
    pools, spans, x, gates, told = case(torch.float32, 4)
    mapping = pages_of(spans, 4)
    gated = gated_of(gates, told, mapping)
    with pytest.raises(ValueError, match="do not fit"):
        gated_delta(x, pools.a, pools.b, mapping, SLICES, replace(gated, columns=ints([0])))
    with pytest.raises(ValueError, match="do not fit"):
        gated_delta(x, pools.a, pools.b, pages_of(spans[:1], 3), SLICES, gated)
    with pytest.raises(ValueError, match="b_pages is"):
        gated_delta(x, pools.a, pools.b, mapping, (40, 24, 40), gated)
    with pytest.raises(ValueError, match="rows are for"):
        gated_delta(x[:3], pools.a, pools.b, mapping, SLICES, gated)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_plans_are_the_mapping_matrix(data: st.DataObject) -> None:
    draw, spans, row = data.draw, [], 0
    expected: dict[tuple[int, int], float] = {}
    ranks: dict[int, int] = {}
    for _ in range(draw(st.integers(0, 5))):
        row += draw(st.integers(0, 2))
        stop = row + draw(st.integers(1, 4))
        pages = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
        own = draw(st.lists(st.integers(1, 16), min_size=len(pages), max_size=len(pages)))
        spans.append(RowSpan(row, stop, tuple(pages), tuple(1.0 + page for page in pages), tuple(own)))
        for page, rank in zip(pages, own, strict=True):
            ranks[page] = max(rank, ranks.get(page, 0))
            for each in range(row, stop):
                expected[each, page] = expected.get((each, page), 0.0) + 1.0 + page
        row = stop
    plan = plan_gated(spans, row)
    assert dict(zip(plan.pages.tolist(), plan.page_ranks.tolist(), strict=True)) == dict(sorted(ranks.items()))
    assert plan.shape.ranks == (16 if max(ranks.values(), default=0) > 8 else 8)
    capacity = GatedShape(row + draw(st.integers(0, 3)), plan.shape.pages + draw(st.integers(0, 40)))
    assert plan.fits(capacity)
    words = np.full(capacity.words, -77, np.int32)
    plan.write(capacity, words)
    views = GatedPages.view(torch.from_numpy(words), capacity)
    count = int(views.page_count[0])
    assert views.pages[count:].tolist() == [-1] * (capacity.padded_pages - count)
    assert (views.page_ranks[count:] == 0).all()
    found = {
        (row, int(views.pages[column])): float(views.weights[row, column])
        for row, column in views.weights.nonzero().tolist()
    }
    assert found == pytest.approx(expected)


def test_plans_fit_only_where_there_is_room() -> None:
    plan = plan_gated([RowSpan(0, 2, (1, 4), (1.0, 1.0), (9, 2))], 3)
    assert plan.shape == GatedShape(3, 2, 16)
    assert [plan.fits(GatedShape(*size)) for size in ((3, 2), (2, 2), (3, 1), (3, 2, 8))] == [True, False, False, False]
    with pytest.raises(ValueError, match="does not fit"):
        plan.write(GatedShape(3, 1), np.zeros(100, np.int32))


@pytest.mark.parametrize(
    ("rows", "inputs", "slices", "splits"),
    [(1, 4096, 3, 8), (64, 4096, 1, 16), (64, 14336, 1, 16), (64, 576, 3, 4), (512, 4096, 2, 4), (4096, 4096, 3, 1)],
)
def test_splits_fill_the_gpu_but_are_not_too_short(rows: int, inputs: int, slices: int, splits: int) -> None:
    config = gated_config(rows, inputs, slices, 32 * 8, 64, 2)
    assert config.splits == splits
    assert (32 * 8) % config.width == 64 % config.width == 0


def test_gates_are_those_of_the_other_test() -> None:
    """`step` and `inputs` are shared: what they say of slots and gates holds here."""
    assert (32, len(SLICES)) == (GATES, TOTALS)
