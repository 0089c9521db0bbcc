"""The LoRA kernels on a GPU at sizes of real models: adapters of any popularity, long prompts, captured graphs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.lora import lora_delta
from kernels.mapping import RowSpan
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, TileShape, view_tiles, write_tiles
from tests.kernels.lora_pools import DEVICE, KINDS, Pools, assert_near, reference_delta, tiles_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

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
