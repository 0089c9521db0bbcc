"""The LoRA kernels against the reference in fp32: under Triton's interpreter, and on the GPU where there is one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gemm_table import GemmTable
from kernels.lora import dense_lora_, lora_delta, mapping_matrix
from kernels.lora_config import ExpandConfig, LoraConfig, ShrinkConfig
from kernels.mapping import RowSpan, build_mapping
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, LoraTiles, TileShape, view_tiles, write_tiles
from kernels.triton_ops import SIDE_ROWS, TritonOps

# the interpreter makes its run-time loop bounds of arrays with one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ||error|| / ||reference||: sums round to the dtype twice, 2^-9 each for bf16."""

KINDS: tuple[Kind, ...] = ("rows", "shared")
SLICES = (40, 24, 24)
IN = 72


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write stays NaN, in outputs and between the kernels."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        empty = new_empty(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@dataclass
class Pools:
    """Random pages of ranks that differ; the rank rows that a page does not use are NaN in the copies for kernels."""

    ranks: list[int]
    a: Tensor
    b: Tensor

    @classmethod
    def random(cls, ranks: list[int], inputs: int, slices: tuple[int, ...], dtype: torch.dtype) -> "Pools":
        generator = torch.Generator().manual_seed(len(ranks))
        a = torch.randn(len(ranks), len(slices), 16, inputs, generator=generator) / inputs**0.5
        b = torch.randn(len(ranks), 16, sum(slices), generator=generator) / 4
        for page, rank in enumerate(ranks):
            a[page, :, rank:], b[page, rank:] = 0, 0
        return cls(ranks, a.flatten(1, 2).to(DEVICE, dtype), b.to(DEVICE, dtype))

    def unused_poisoned(self) -> tuple[Tensor, Tensor]:
        a, b = self.a.clone(), self.b.clone()
        for page, rank in enumerate(self.ranks):
            a[page].unflatten(0, (-1, 16))[:, rank:], b[page, rank:] = float("nan"), float("nan")
        return a, b

    def span(self, start: int, stop: int, uses: dict[int, float]) -> RowSpan:
        return RowSpan(start, stop, tuple(uses), tuple(uses.values()), tuple(self.ranks[page] for page in uses))


def tiles_of(spans: list[RowSpan], num_rows: int, kind: Kind | None, block_rows: int = 16, spare: int = 1) -> LoraTiles:
    """Tiles with a capacity of `spare` more than they need."""
    plan = plan_tiles(spans, num_rows, block_rows, kind)
    assert plan is not None
    own = plan.shape
    blocks = own.blocks + (spare if own.kind == "rows" else 0)
    capacity = TileShape(own.kind, block_rows, own.tiles + spare, blocks, own.pages + spare)
    buffer = np.full(capacity.words, 99, np.int32)
    write_tiles(plan, capacity, buffer)
    return view_tiles(torch.from_numpy(buffer).to(DEVICE), capacity)


def reference_delta(
    x: Tensor, pools: Pools, spans: list[RowSpan], slices: tuple[int, ...], scale: Tensor | None = None
) -> Tensor:
    mapping = build_mapping(spans, DEVICE)
    assert mapping is not None
    y = torch.zeros(len(x), sum(slices), device=DEVICE)
    return reference.lora_(y, x.float(), pools.a.float(), pools.b.float(), mapping, slices, scale)


def assert_near(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert ((result.double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


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


# ----------------------------------------------------------------------------------------------------------------------
# On the GPU

GPU_IN, GPU_SLICES = 1024, (1024, 256, 256)
ADAPTER_RANKS = (16, 4, 8, 64, 16, 128, 32, 24)


@dataclass
class Fleet:
    """Adapters of mixed ranks over one pool: `pages[i]` are those of adapter i."""

    pools: Pools
    pages: list[list[int]]

    @classmethod
    def random(cls, num_adapters: int, dtype: torch.dtype, slices: tuple[int, ...] = GPU_SLICES) -> "Fleet":
        ranks: list[int] = []
        pages: list[list[int]] = []
        for adapter in range(num_adapters):
            rank = ADAPTER_RANKS[adapter % len(ADAPTER_RANKS)]
            own = [min(16, rank - first) for first in range(0, rank, 16)]
            pages.append(list(range(len(ranks), len(ranks) + len(own))))
            ranks += own
        pools = Pools.random(ranks, GPU_IN, slices, dtype)
        for own in pages[1::3]:  # every third adapter has the first slice as its only target
            pools.a[own, 16:], pools.b[own, :, slices[0] :] = 0, 0
        return cls(pools, pages)

    def spans(self, sets: list[list[int]], lengths: list[int]) -> list[RowSpan]:
        spans, start = [], 0
        for adapters, length in zip(sets, lengths, strict=True):
            uses = {page: 0.5 + 0.1 * adapter for adapter in adapters for page in self.pages[adapter]}
            spans.append(self.pools.span(start, start + length, uses))
            start += length
        return spans


def popular(name: str, count: int, num_adapters: int, rng: np.random.Generator) -> list[list[int]]:
    """One adapter for each of `count` rows."""
    draws = {
        "distinct": lambda: np.arange(count) % num_adapters,
        "identical": lambda: np.full(count, 3),
        "uniform": lambda: rng.integers(0, num_adapters, count),
        "zipf": lambda: (rng.zipf(1.5, count) - 1) % num_adapters,
        "skewed": lambda: np.where(rng.random(count) < 0.8, 0, rng.integers(0, num_adapters, count)),
    }
    return [[int(adapter)] for adapter in draws[name]()]


def sets_of(name: str, count: int, num_adapters: int, rng: np.random.Generator) -> list[list[int]]:
    """As `popular`, or for "sets" 0 to 8 adapters a row."""
    if name != "sets":
        return popular(name, count, num_adapters, rng)
    return [rng.permutation(num_adapters)[: rng.integers(0, 9)].tolist() for _ in range(count)]


POPULARITY = ["distinct", "identical", "uniform", "zipf", "skewed", "sets"]
ROWS = [1, 2, 3, 7, 16, 17, 33, 64, 65, 127, 128, 255, 257]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_of_any_popularity(dtype: torch.dtype, popularity: str, kind: Kind | None) -> None:
    fleet = Fleet.random(48, dtype)
    rng = np.random.default_rng(1)
    for num_rows in ROWS:
        spans = fleet.spans(sets_of(popularity, num_rows, 48, rng), [1] * num_rows)
        if not any(span.pages for span in spans):
            continue
        x = torch.randn(num_rows, GPU_IN, device=DEVICE, dtype=dtype)
        tiles = tiles_of(spans, num_rows, kind, spare=5)
        scale = torch.rand(3, num_rows, int(tiles.page_count), device=DEVICE) if num_rows % 2 else None
        pages = fleet.pools.unused_poisoned()
        result = lora_delta(x, *pages, tiles, GPU_SLICES, scale)
        assert_near(result, reference_delta(x, fleet.pools, spans, GPU_SLICES, scale), dtype)
        for _ in range(2):
            assert torch.equal(lora_delta(x, *pages, tiles, GPU_SLICES, scale), result)


@pytest.mark.gpu
@pytest.mark.parametrize("slices", [(512,), (768, 768), GPU_SLICES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_beside_decoding(dtype: torch.dtype, kind: Kind, slices: tuple[int, ...]) -> None:
    fleet = Fleet.random(12, dtype, slices)
    lengths = [1] * 9 + [200, 1000, 31, 64]
    sets = sets_of("sets", len(lengths), 12, np.random.default_rng(2))
    spans = fleet.spans(sets, lengths)
    x = torch.randn(sum(lengths) + 3, GPU_IN, device=DEVICE, dtype=dtype)
    for block_rows in (16, 64):
        tiles = tiles_of(spans, len(x), kind, block_rows)
        result = lora_delta(x, *fleet.pools.unused_poisoned(), tiles, slices)
        assert_near(result, reference_delta(x, fleet.pools, spans, slices), dtype)


@pytest.mark.gpu
def test_pages_may_lie_beyond_two_gigabytes() -> None:
    num_pages = 2**31 // (48 * GPU_IN) + 2
    a = torch.zeros(num_pages, 48, GPU_IN, device=DEVICE, dtype=torch.bfloat16)
    b = torch.zeros(num_pages, 16, sum(GPU_SLICES), device=DEVICE, dtype=torch.bfloat16)
    pools = Pools.random([16], GPU_IN, GPU_SLICES, torch.bfloat16)
    a[-1], b[-1] = pools.a[0], pools.b[0]
    x = torch.randn(20, GPU_IN, device=DEVICE, dtype=torch.bfloat16)
    expected = reference_delta(x, pools, [RowSpan(0, 20, (0,), (1.0,))], GPU_SLICES)
    for kind in KINDS:
        tiles = tiles_of([RowSpan(0, 20, (num_pages - 1,), (1.0,))], 20, kind)
        assert_near(lora_delta(x, a, b, tiles, GPU_SLICES), expected, torch.bfloat16)


def mappings(fleet: Fleet, num_rows: int) -> Iterator[list[RowSpan]]:
    rng = np.random.default_rng(3)
    for popularity in POPULARITY:
        yield fleet.spans(sets_of(popularity, num_rows, 16, rng), [1] * num_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_follows_the_mapping(kind: Kind, pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch needs sm_90")
    fleet, num_rows = Fleet.random(16, torch.bfloat16), 33
    pages = fleet.pools.unused_poisoned()
    capacity = TileShape(kind, 16, 1200, num_rows + 1 if kind == "rows" else 0, len(fleet.pools.ranks) + 3)
    host = torch.zeros(capacity.words, dtype=torch.int32)
    x = torch.zeros(num_rows, GPU_IN, device=DEVICE, dtype=torch.bfloat16)
    scale = torch.zeros(3, num_rows, capacity.pages, device=DEVICE)
    buffer = host.to(DEVICE)
    tiles = view_tiles(buffer, capacity)

    def step() -> Tensor:
        return lora_delta(x, *pages, tiles, GPU_SLICES, scale, pdl=pdl)

    plan = plan_tiles(next(mappings(fleet, num_rows)), num_rows, 16, kind)
    assert plan is not None
    write_tiles(plan, capacity, host.numpy())
    buffer.copy_(host)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        delta = step()
    for spans in mappings(fleet, num_rows):
        plan = plan_tiles(spans, num_rows, 16, kind)
        assert plan is not None
        write_tiles(plan, capacity, host.numpy())
        buffer.copy_(host)
        x.normal_()
        scale.uniform_()
        delta.fill_(float("nan"))
        graph.replay()
        expected = reference_delta(x, fleet.pools, spans, GPU_SLICES, scale[:, :, : plan.shape.pages])
        assert_near(delta, expected, torch.bfloat16)
        first = delta.clone()
        for _ in range(2):
            graph.replay()
            assert torch.equal(delta, first)
