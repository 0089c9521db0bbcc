"""The LoRA kernels against the reference in fp32: under Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch
from torch import Tensor

from kernels.gemm_table import GemmTable
from kernels.lora import dense_lora_, lora_delta, mapping_matrix
from kernels.lora_config import ExpandConfig, LoraConfig, ShrinkConfig
from kernels.mapping import RowSpan, build_mapping
from kernels.tiles import Kind
from kernels.triton_ops import SIDE_ROWS, TritonOps
from tests.kernels.lora_pools import DEVICE, KINDS, Pools, assert_near, reference_delta, tiles_of

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

SLICES = (40, 24, 24)
IN = 72


def small_case(dtype: torch.dtype, slices: tuple[int, ...] = SLICES) -> tuple[Pools, list[RowSpan], Tensor]:
    """Mixed ranks and sets, a row (3) without pages, a repeated page, a weight of 0, and 18 rows of one adapter."""
    pools = Pools.random([16, 4, 8, 16, 1, 16], IN, slices, dtype)
    spans = [
        pools.span(0, 1, {1: 0.5}),
        pools.span(1, 3, {2: 1.0, 1: -1.0, 0: 0.0}),
        RowSpan(4, 5, (4, 2, 4), (0.25, 0.5, 0.5), (1, 8, 1)),
        pools.span(5, 23, {3: 1.5, 4: 1.0}),
    ]
    return pools, spans, torch.randn(24, IN).to(DEVICE, dtype)


def small_config(joined: bool = False, reduced: bool = False) -> LoraConfig:
    """Splits that do not divide the input, several column blocks a slice with a rest, and two pages at a time."""
    return LoraConfig(ShrinkConfig(16, 2, joined, 2, 2), ExpandConfig(16, 2, 2, 2), reduced)


@pytest.mark.parametrize(
    ("kind", "block_rows", "dtype", "scaled"),
    [
        ("rows", 16, torch.float32, True),
        ("rows", 16, torch.float16, False),
        ("rows", 64, torch.float16, True),
        ("shared", 16, torch.float32, False),
        ("shared", 16, torch.float16, True),
        ("shared", 64, torch.float32, True),
    ],
)
def test_delta_equals_the_reference(kind: Kind, block_rows: int, dtype: torch.dtype, scaled: bool) -> None:
    pools, spans, x = small_case(dtype)
    tiles = tiles_of(spans, len(x), kind, block_rows)
    scale = torch.rand(len(SLICES), len(x), int(tiles.page_count), device=DEVICE) if scaled else None
    result = lora_delta(x, *pools.unused_poisoned(), tiles, SLICES, scale)
    assert_near(result, reference_delta(x, pools, spans, SLICES, scale), dtype)
    assert (result[[3, 23]] == 0).all()


@pytest.mark.parametrize(
    ("kind", "slices", "joined", "reduced"),
    [
        ("rows", SLICES, False, False),
        ("rows", SLICES, True, True),
        ("shared", (24, 40), True, True),
        ("rows", (40,), True, False),
    ],
)
def test_splits_and_column_blocks_may_have_a_rest(
    kind: Kind, slices: tuple[int, ...], joined: bool, reduced: bool
) -> None:
    pools, spans, x = small_case(torch.float32, slices)
    tiles = tiles_of(spans[:3], len(x), kind)
    result = lora_delta(x, *pools.unused_poisoned(), tiles, slices, config=small_config(joined, reduced))
    assert_near(result, reference_delta(x, pools, spans[:3], slices), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN, in the interpreter
def test_rows_do_not_see_the_pages_of_others() -> None:
    pools, spans, x = small_case(torch.float32, (40,))
    clean = lora_delta(x, pools.a, pools.b, tiles_of(spans, len(x), "rows"), (40,))
    pools.a[3], pools.b[3] = float("nan"), float("inf")
    pools.a[5], pools.b[5] = float("nan"), float("nan")
    result = lora_delta(x, pools.a, pools.b, tiles_of(spans, len(x), "rows"), (40,))
    others = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    others[5:23] = False
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NaN, in the interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_hides_an_overflowing_product(kind: Kind) -> None:
    pools, _, x = small_case(torch.float32, (40,))
    spans = [pools.span(0, 2, {0: 1.0, 3: 1.0})]
    scale = torch.ones(1, 2, 2, device=DEVICE)
    scale[:, 0, 1] = 0
    pools.a[3] = float("inf")
    result = lora_delta(x[:2], pools.a, pools.b, tiles_of(spans, 2, kind), (40,), scale)
    expected = reference_delta(x[:1], pools, [pools.span(0, 1, {0: 1.0})], (40,))
    assert_near(result[:1], expected, torch.float32)
    assert not result[1].isfinite().any()


def test_inputs_may_be_parts_of_larger_tensors() -> None:
    pools, spans, x = small_case(torch.float16, (40,))
    layers = [torch.stack((torch.full_like(pool, float("nan")), pool), 1) for pool in (pools.a, pools.b)]
    wide = torch.cat((x, torch.full_like(x, float("nan"))), 1)
    tiles = tiles_of(spans[:3], len(x), "rows")
    result = lora_delta(wide[:, :IN], layers[0][:, 1], layers[1][:, 1], tiles, (40,))
    assert torch.equal(result, lora_delta(x, pools.a, pools.b, tiles, (40,)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dense_update_equals_the_reference(dtype: torch.dtype, scaled: bool) -> None:
    pools, spans, x = small_case(dtype)
    mapping = build_mapping(spans, DEVICE)
    assert mapping is not None
    weights = torch.zeros(len(x), len(mapping.pages), device=DEVICE)
    for span in spans:
        for page, weight in zip(span.pages, span.weights, strict=True):
            if weight:
                weights[span.start : span.stop, mapping.pages.index(page)] += weight
    scale = torch.rand(3, len(x), len(mapping.pages), device=DEVICE) if scaled else None
    y = torch.zeros(len(x), sum(SLICES), dtype=dtype, device=DEVICE)
    a, b = (torch.stack((pool, pool), 1)[:, 0] for pool in (pools.a, pools.b))
    result = dense_lora_(y, x, a, b, torch.tensor(mapping.pages, device=DEVICE), weights, SLICES, scale)
    assert result is y
    assert_near(y, reference_delta(x, pools, spans, SLICES, scale), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mapping_matrix_of_tiles(kind: Kind) -> None:
    _, spans, x = small_case(torch.float32)
    tiles = tiles_of(spans, len(x), kind)
    pages = tiles.pages.tolist()
    expected = torch.zeros(len(x), len(pages))
    for span in spans:
        for page, weight in zip(span.pages, span.weights, strict=True):
            if weight:
                expected[span.start : span.stop, pages.index(page)] += weight
    torch.testing.assert_close(mapping_matrix(tiles, len(x)).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_many_gated_rows_take_the_dense_way(kind: Kind) -> None:
    pools, spans, x = small_case(torch.float32)
    many = SIDE_ROWS + 12
    x = torch.cat([x, torch.randn(many - len(x), IN, device=DEVICE)])
    tiles = tiles_of(spans, many, kind)
    scale = torch.rand(3, many, len(tiles.pages), device=DEVICE)
    weight = torch.zeros(sum(SLICES), IN, device=DEVICE)
    a, b = (pool.nan_to_num() for pool in (pools.a, pools.b))
    ops = TritonOps(DEVICE, GemmTable())
    y, delta = ops.lora_linear(x, weight, None, (a, b), tiles, SLICES, scale)
    assert delta is None
    mapping = build_mapping(spans, DEVICE)
    assert mapping is not None
    assert_near(y, reference_delta(x, pools, spans, SLICES, scale[..., : len(mapping.pages)]), torch.float32)


def test_wrong_shapes_are_refused() -> None:
    pools, spans, x = small_case(torch.float32)
    tiles = tiles_of(spans, len(x), "rows")
    with pytest.raises(ValueError, match="expected 1 to 3"):
        lora_delta(x, pools.a, pools.b, tiles, (22, 22, 22, 22))
    with pytest.raises(ValueError, match="a_pages is"):
        lora_delta(x, pools.a[:, :32], pools.b, tiles, SLICES)
    with pytest.raises(ValueError, match="b_pages is"):
        lora_delta(x, pools.a, pools.b, tiles, (40, 24, 40))
    with pytest.raises(ValueError, match="scale is"):
        lora_delta(x, pools.a, pools.b, tiles, SLICES, torch.ones(3, 2, 6, device=DEVICE))
    with pytest.raises(ValueError, match="x has shape"):
        lora_delta(x.T.contiguous().T, pools.a, pools.b, tiles, SLICES)
