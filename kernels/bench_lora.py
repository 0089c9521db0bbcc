"""What is timed of the adapters: shrink and expand alone, and all linears of a model with the updates beside them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.bench_cases import Case, Where
from kernels.mapping import RowSpan, build_mapping
from kernels.shapes import Linear, ModelShape
from kernels.tile_planner import plan_tiles
from kernels.tiles import PAGE_RANK, Kind, LoraTiles, view_tiles, write_tiles

MIX_POOL = 64
CHAIN_BYTES = 4 << 30


def popularity(kind: str, rows: int, seed: int = 0) -> list[list[int]]:
    """Adapters of each row: `K` (row i uses i mod K; 0: none), `zipf` (of 64, exponent 1), `mix3` (3 of 64)."""
    rng = np.random.default_rng(seed)
    if kind.startswith("mix"):
        size = int(kind.removeprefix("mix"))
        return [sorted(rng.choice(MIX_POOL, size, replace=False).tolist()) for _ in range(rows)]
    if kind == "zipf":
        share = 1.0 / np.arange(1, MIX_POOL + 1)
        return [[adapter] for adapter in rng.choice(MIX_POOL, rows, p=share / share.sum()).tolist()]
    return [[row % int(kind)] if int(kind) else [] for row in range(rows)]


def spans_of(used: Sequence[Sequence[int]], first_page: int, rank: int) -> list[RowSpan]:
    """One row a span; the adapters in use own the pages from `first_page` on, in order."""
    pages = {adapter: first_page + i for i, adapter in enumerate(sorted({a for row in used for a in row}))}
    return [
        RowSpan(i, i + 1, tuple(pages[a] for a in row), (1.0 / len(row),) * len(row), (rank,) * len(row))
        for i, row in enumerate(used)
        if row
    ]


def tiles_of(spans: Sequence[RowSpan], rows: int, kind: Kind | None, device: torch.device) -> LoraTiles | None:
    """The tiles of a step on the device, at their exact size."""
    plan = plan_tiles(spans, rows, 16 if rows <= 256 else 64, kind)
    if plan is None:
        return None
    words = np.zeros(plan.shape.words, np.int32)
    write_tiles(plan, plan.shape, words)
    return view_tiles(torch.from_numpy(words).to(device), plan.shape)


def pages_of(linear: Linear, count: int, rank: int, where: Where) -> tuple[Tensor, Tensor]:
    """`count` random pages of a group with `rank` rows in use."""
    slices = len(linear.slices)
    a = where.random(count, slices * PAGE_RANK, linear.inputs, std=linear.inputs**-0.5)
    b = where.random(count, PAGE_RANK, linear.outputs, std=0.1)
    a.view(-1, slices, PAGE_RANK, linear.inputs)[:, :, rank:] = 0
    b[:, rank:] = 0
    return a, b


def page_bytes(linear: Linear, rank: int, where: Where) -> int:
    return rank * (len(linear.slices) * linear.inputs + linear.outputs) * where.dtype.itemsize


def update(x: Tensor, pages: tuple[Tensor, Tensor], spans: Sequence[RowSpan], linear: Linear) -> Tensor:
    """The update in fp32, by the reference."""
    zero = torch.zeros(len(x), linear.outputs, device=x.device)
    mapping = build_mapping(spans, x.device)
    return zero if mapping is None else reference.lora_(zero, x.float(), *pages, mapping, linear.slices)


def different(kinds: Sequence[str], rows: int, seed: int) -> dict[str, list[list[int]]]:
    """The adapters of each row by kind, without kinds that come to the same with so few rows."""
    found: dict[str, list[list[int]]] = {}
    for kind in kinds:
        used = popularity(kind, rows, seed)
        if used not in found.values():
            found[kind] = used
    return found


def lora_cases(
    shape: ModelShape, rows: Sequence[int], kinds: Sequence[str], where: Where, rank: int = PAGE_RANK
) -> Iterator[Case]:
    """Shrink and expand of one group, apart from its base product; pages of every copy are others."""
    for name, linear in shape.linears.items():
        for count in rows:
            for kind, used in different(kinds, count, where.seed).items():
                yield from _lora(name, linear, kind, used, where, rank)


def _lora(name: str, linear: Linear, kind: str, used: list[list[int]], where: Where, rank: int) -> Iterator[Case]:
    from kernels.lora import lora_delta

    adapters = len({adapter for row in used for adapter in row})
    touched = page_bytes(linear, rank, where) * adapters
    copies = where.copies(touched)
    pages = pages_of(linear, copies * adapters, rank, where)
    x = where.random(len(used), linear.inputs)
    spans = [spans_of(used, copy * adapters, rank) for copy in range(copies)]
    num_bytes = touched + x.nbytes + len(used) * linear.outputs * where.dtype.itemsize
    forms: tuple[Kind, ...] = ("rows", "shared")
    for form in forms:
        tiles = [found for own in spans if (found := tiles_of(own, len(used), form, where.device))]
        if not tiles:
            continue

        def run(i: int, tiles: list[LoraTiles] = tiles) -> Tensor:
            return lora_delta(x, *pages, tiles[i], linear.slices, pdl=where.pdl)

        setup = {"popularity": kind, "pages": adapters, "rank": rank, "tiles": tiles[0].shape.tiles, "pdl": where.pdl}
        expected = lambda: update(x, pages, spans[0], linear)  # noqa: E731
        yield Case("lora", f"{name} {kind}", len(used), f"triton {form}", copies, num_bytes, run, expected, setup)


def chain_cases(
    shape: ModelShape, rows: Sequence[int], kinds: Sequence[str], where: Where, rank: int = PAGE_RANK
) -> Iterator[Case]:
    """All linears of some layers in a row, as the CUDA backend runs them, over fixed inputs: what adapters cost beside
    the base products. Compare with kind `0`; a layer's time is in `setup["layers"]` parts.
    """
    linears = list(shape.linears.values())
    layer_bytes = sum(linear.inputs * linear.outputs for linear in linears) * where.dtype.itemsize
    layers = max(1, min(shape.num_layers, CHAIN_BYTES // layer_bytes)) if where.device.type == "cuda" else 1
    weights = [[where.random(n.outputs, n.inputs, std=n.inputs**-0.5) for n in linears] for _ in range(layers)]
    for count in rows:
        for kind, used in different(("0", *kinds), count, where.seed).items():
            yield _chain(linears, weights, kind, used, where, rank)


def _chain(
    linears: list[Linear], weights: list[list[Tensor]], kind: str, used: list[list[int]], where: Where, rank: int
) -> Case:
    from kernels.triton_ops import TritonOps

    ops = TritonOps(where.device)
    adapters = len({adapter for row in used for adapter in row})
    xs = [where.random(len(used), linear.inputs) for linear in linears]
    pages = [[pages_of(linear, max(1, adapters), rank, where) for linear in linears] for _ in weights]
    spans = spans_of(used, 0, rank)
    tiles = tiles_of(spans, len(used), None, where.device)

    def run(_: int) -> Tensor:
        y, delta = xs[0], None
        for own, layer in zip(weights, pages, strict=True):
            for x, weight, pair, linear in zip(xs, own, layer, linears, strict=True):
                if tiles is None:
                    y, delta = ops.linear(x, weight, None), None
                else:
                    y, delta = ops.lora_linear(x, weight, None, pair, tiles, linear.slices)
        return y if delta is None else y + delta

    def expected() -> Tensor:
        base = xs[-1].float() @ weights[-1][-1].float().T
        return base + update(xs[-1], pages[-1][-1], spans, linears[-1])

    own_bytes = sum(page_bytes(linear, rank, where) for linear in linears) * adapters
    num_bytes = sum(weight.nbytes for layer in weights for weight in layer) + own_bytes * len(weights)
    setup = {
        "popularity": kind,
        "pages": adapters,
        "rank": rank,
        "layers": len(weights),
        "tiles": None if tiles is None else str(tiles.shape),
    }
    return Case("linears", kind, len(used), "triton", 1, num_bytes, run, expected, setup)
