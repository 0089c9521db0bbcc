"""Random pools of adapter pages, tiles over them, and the reference's update in fp32, for tests of the LoRA kernels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.mapping import RowSpan, build_mapping
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, LoraTiles, TileShape, view_tiles, write_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ||error|| / ||reference||: sums round to the dtype twice, 2^-9 each for bf16."""

KINDS: tuple[Kind, ...] = ("rows", "shared")


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
