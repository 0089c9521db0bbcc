"""A mixture of adapters by LoraRetriever's own einsums, beside our kernels and beside a single adapter for all rows.

The paper's form (arXiv 2402.09997, released code): each of the batch's p adapters on each of its rows, weighed at the
end. It writes rows x p x outputs, p times the outputs of one adapter, where the mapping matrix weighs the ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.bench_cases import Case, Where
from kernels.bench_lora import CHAIN_BYTES, page_bytes, pages_of, popularity, spans_of, tiles_of, update
from kernels.mapping import RowSpan
from kernels.shapes import Linear, ModelShape
from kernels.tiles import PAGE_RANK

Json = dict[str, Any]
Pages = tuple[Tensor, Tensor]
Factors = list[tuple[Tensor, Tensor]]

MIXTURE = "mix3"
KINDS = ("single", MIXTURE)


def stacked(pages: Pages, linear: Linear, rank: int) -> Factors:
    """The pages as the paper's stacks, for each slice: A (p, rank, in) and B (p, out, rank)."""
    a, b = pages
    rows = a.view(len(a), len(linear.slices), PAGE_RANK, linear.inputs)[:, :, :rank]
    columns = b[:, :rank].split(linear.slices, -1)
    return [(rows[:, i].contiguous(), own.transpose(1, 2).contiguous()) for i, own in enumerate(columns)]


def einsum_(y: Tensor, x: Tensor, factors: Factors, mapping: Tensor) -> Tensor:
    """y (b, l, sum of out) += the mixture of every row, in place; x (b, l, in), mapping (b, p) of weights."""
    first = 0
    for a, b in factors:
        ranks = torch.einsum("bld,prd->blpr", x, a)
        outputs = torch.einsum("blpr,pdr->blpd", ranks, b)
        y[..., first : first + b.shape[1]] += torch.einsum("blpd,bp->bld", outputs, mapping)
        first += b.shape[1]
    return y


@dataclass(frozen=True)
class Layers:
    """The base weights of some layers, all linears of each."""

    linears: list[Linear]
    weights: list[list[Tensor]]

    @classmethod
    def of(cls, shape: ModelShape, where: Where) -> "Layers":
        linears = list(shape.linears.values())
        layer = sum(linear.inputs * linear.outputs for linear in linears) * where.dtype.itemsize
        count = max(1, min(shape.num_layers, CHAIN_BYTES // layer)) if where.device.type == "cuda" else 1
        weights = [[where.random(n.outputs, n.inputs, std=n.inputs**-0.5) for n in linears] for _ in range(count)]
        return cls(linears, weights)


def einsum_cases(
    shape: ModelShape, rows: Sequence[int], where: Where, rank: int = PAGE_RANK, length: int = 1
) -> Iterator[Case]:
    """All linears of some layers with `length` tokens of each row: one adapter for all rows, then mixtures of 3 of 64
    adapters in both forms. `peak_bytes` is what a call allocates at most beside its inputs, None without a GPU.
    """
    layers = Layers.of(shape, where)
    for count in rows:
        for kind in KINDS:
            used = popularity("1" if kind == "single" else kind, count, where.seed)
            yield from _cases(layers, kind, used, where, rank, length)


def _cases(layers: Layers, kind: str, used: list[list[int]], where: Where, rank: int, length: int) -> Iterator[Case]:
    from kernels.triton_ops import TritonOps

    ops, tokens = TritonOps(where.device), len(used) * length
    adapters = len({adapter for row in used for adapter in row})
    xs = [where.random(tokens, linear.inputs) for linear in layers.linears]
    pages = [[pages_of(linear, adapters, rank, where) for linear in layers.linears] for _ in layers.weights]
    spans = [
        RowSpan(span.start * length, span.stop * length, span.pages, span.weights, span.ranks)
        for span in spans_of(used, 0, rank)
    ]
    tiles = tiles_of(spans, tokens, None, where.device)
    assert tiles is not None

    def ours(place: int, weight: Tensor, own: Any) -> Tensor:
        y, delta = ops.lora_linear(xs[place], weight, None, own, tiles, layers.linears[place].slices)
        return y if delta is None else y + delta

    def expected() -> Tensor:
        last = layers.linears[-1]
        return xs[-1].float() @ layers.weights[-1][-1].float().T + update(xs[-1], pages[-1][-1], spans, last)

    def case(backend: str, form: Callable[[int, Tensor, Any], Tensor], factors: list[list[Any]]) -> Case:
        def run(_: int) -> Tensor:
            y = xs[0]
            for layer, own in zip(layers.weights, factors, strict=True):
                for place, weight in enumerate(layer):
                    y = form(place, weight, own[place])
            return y

        setup = {
            "rank": rank,
            "tokens": length,
            "adapters": adapters,
            "layers": len(layers.weights),
            "peak_bytes": peak_bytes(run, where.device),
        }
        return Case("einsum", kind, len(used), backend, 1, num_bytes, run, expected, setup)

    own_bytes = sum(page_bytes(linear, rank, where) for linear in layers.linears) * adapters
    num_bytes = sum(weight.nbytes for layer in layers.weights for weight in layer) + own_bytes * len(layers.weights)
    yield case("triton", ours, pages)
    if kind == "single":
        return
    mapping = torch.zeros(len(used), adapters, dtype=where.dtype, device=where.device)
    for row, span in enumerate(spans):
        mapping[row, list(span.pages)] = torch.tensor(span.weights, dtype=where.dtype, device=where.device)

    def theirs(place: int, weight: Tensor, own: Factors) -> Tensor:
        x = xs[place]
        y = ops.linear(x, weight, None)
        einsum_(y.view(len(used), length, -1), x.view(len(used), length, -1), own, mapping)
        return y

    stacks = [[stacked(p, linear, rank) for p, linear in zip(layer, layers.linears, strict=True)] for layer in pages]
    yield case("torch einsum", theirs, stacks)


def peak_bytes(run: Callable[[int], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at most beside what is there; None without a GPU."""
    if device.type != "cuda":
        return None
    run(0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def compared(lines: Sequence[Json]) -> list[Json]:
    """By rows: the throughput of mixtures as a share of a single adapter's, ours and the paper's, and their memory."""
    found = {(line["rows"], line["case"], line["backend"]): line for line in lines if line["op"] == "einsum"}
    table = []
    for count in sorted({rows for rows, _, _ in found}):
        single, ours, theirs = (
            found[count, kind, backend]
            for kind, backend in (("single", "triton"), (MIXTURE, "triton"), (MIXTURE, "torch einsum"))
        )
        times = [line["us_p50"] for line in (single, ours, theirs)]
        known = None not in times
        table.append(
            {
                "rows": count,
                "adapters": ours["adapters"],
                "single_us": times[0],
                "mixture_us": times[1],
                "einsum_us": times[2],
                "mixture_share": times[0] / times[1] if known else None,
                "einsum_share": times[0] / times[2] if known else None,
                "mixture_peak_bytes": ours["peak_bytes"],
                "einsum_peak_bytes": theirs["peak_bytes"],
            }
        )
    return table
