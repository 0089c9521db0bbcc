"""Token-level gating of one layer's linears without their base products: our kernels beside MeteoRA's own forms.

Every form finds the gates' logits, chooses, and makes the updates of all seven linears. Its result is compared with
fp64 before it is timed, on inputs whose logits are so far apart that rounding changes no choice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kernels import meteora_forms
from kernels.bench_cases import Case, Where
from kernels.bench_einsum import peak_bytes
from kernels.bench_lora import page_bytes
from kernels.gate_rows import MASK_BITS, TOTALS, Gated, GateRows
from kernels.gated_pages import GatedPages, plan_gated
from kernels.mapping import RowSpan
from kernels.shapes import Linear, ModelShape
from kernels.tiles import PAGE_RANK

Json = dict[str, Any]
Routing = Literal["uniform", "single"]
Outputs = list[Tensor]

ROWS = (1, 8, 64, 512, 4096)
"""Three sizes of decoding, two of prompts."""

RANK = 8
"""The paper's."""

ROUTINGS: tuple[Routing, ...] = ("uniform", "single")
SINGLE = "single"
"""One adapter for all rows and no gates: what LoRA costs anyway."""

OURS = ("triton", "triton dense")

HIGHEST, LOWEST = 2.0, -2.0
"""The designed logits of a row lie in between."""


@dataclass(frozen=True)
class Setting:
    """n adapters of one rank, k of them for each of `rows` tokens: others for each, or the same for all."""

    rows: int
    adapters: int
    top_k: int
    routing: Routing
    rank: int


@dataclass(frozen=True)
class Embedded:
    """The adapters of one linear as the paper holds them: a [n, in, r], b [n, r, out], gates [n, in]."""

    a: Tensor
    b: Tensor
    gates: Tensor

    @classmethod
    def of(cls, inputs: int, outputs: int, setting: Setting, where: Where) -> "Embedded":
        """The first n inputs of a row are its logits; what the others add is small."""
        n, rank = setting.adapters, setting.rank
        apart = replace(where, seed=where.seed + 1)  # numbers of one seed are those of the rows
        gates = apart.random(n, inputs, std=0.01 * inputs**-0.5)
        gates[:, :n] = torch.eye(n, device=where.device, dtype=where.dtype)
        a = where.random(n, inputs, rank, std=inputs**-0.5)
        return cls(a, where.random(n, rank, outputs, std=0.1), gates)


def inputs_of(width: int, setting: Setting, where: Where) -> Tensor:
    """x [rows, width] with the logits of every row, evenly spaced and in an order of its own, in front."""
    generator = torch.Generator(where.device).manual_seed(where.seed)
    shape = (1 if setting.routing == "single" else setting.rows, setting.adapters)
    order = torch.rand(shape, generator=generator, device=where.device).argsort(dim=1)
    levels = torch.linspace(HIGHEST, LOWEST, setting.adapters, device=where.device).to(where.dtype)
    x = where.random(setting.rows, width)
    x[:, : setting.adapters] = levels[order]
    return x


def exact(x: Tensor, own: Embedded, k: int) -> Tensor:
    """fp64[T, out]: the gated update by the formulas."""
    n, _, rank = own.a.shape
    wide = x.double()
    logits, chosen = (wide @ own.gates.double().T).topk(k, dim=1)
    weights = torch.zeros(len(x), n, dtype=torch.float64, device=x.device).scatter(1, chosen, logits.softmax(dim=1))
    ranks = wide @ own.a.double().transpose(0, 1).flatten(1)
    return (ranks * weights.repeat_interleave(rank, dim=1)) @ own.b.double().flatten(0, 1)


def first_only(x: Tensor, own: Embedded) -> Tensor:
    """fp64[T, out]: the update of the first adapter for all rows."""
    return x.double() @ own.a[0].double() @ own.b[0].double()


def gated_cases(shape: ModelShape, settings: Sequence[Setting], where: Where) -> Iterator[Case]:
    """Every form of every setting. `peak_bytes` counts the results of all linears, for every form alike."""
    for setting in settings:
        yield from _cases(list(shape.linears.values()), setting, where)


def settings_of(
    rows: Sequence[int], adapters: Sequence[int], top_k: Sequence[int], routings: Sequence[Routing], rank: int
) -> list[Setting]:
    return [Setting(t, n, k, routing, rank) for n in adapters for k in top_k for routing in routings for t in rows]


def _cases(linears: list[Linear], setting: Setting, where: Where) -> Iterator[Case]:
    touched = sum(page_bytes(n, setting.rank, where) + n.inputs * len(n.slices) * where.dtype.itemsize for n in linears)
    num_bytes = setting.adapters * touched
    copies = where.copies(num_bytes)
    xs = [inputs_of(linear.inputs, setting, where) for linear in linears]
    layers = [
        [[Embedded.of(n.inputs, width, setting, where) for width in n.slices] for n in linears] for _ in range(copies)
    ]

    def expected(formula: Callable[[Tensor, Embedded], Tensor]) -> Tensor:
        parts = [formula(x, own).float() for x, group in zip(xs, layers[0], strict=True) for own in group]
        return torch.cat(parts, dim=1)

    for backend, captured, run in _forms(linears, xs, layers, setting, where):
        setup = {
            "adapters": setting.adapters,
            "top_k": setting.top_k,
            "rank": setting.rank,
            "routing": setting.routing,
            "peak_bytes": peak_bytes(run, where.device),
        }
        yield Case(
            "meteora",
            f"{setting.adapters} adapters top-{setting.top_k} {setting.routing}",
            setting.rows,
            backend,
            copies,
            num_bytes,
            run,
            partial(expected, first_only if backend == SINGLE else partial(exact, k=setting.top_k)),
            setup,
            captured=captured,
            eager=True,
        )


def _forms(
    linears: list[Linear], xs: list[Tensor], layers: list[list[list[Embedded]]], setting: Setting, where: Where
) -> Iterator[tuple[str, bool, Callable[[int], Outputs]]]:
    """(name, whether a CUDA graph can hold it, run). What a form packs beforehand is gone when the next one begins."""

    def by_linear(form: Callable[[Tensor, Embedded], Tensor]) -> Callable[[int], Outputs]:
        return lambda i: [form(x, own) for x, group in zip(xs, layers[i], strict=True) for own in group]

    def gated(form: Callable[..., Tensor]) -> Callable[[Tensor, Embedded], Tensor]:
        return lambda x, own: form(x, own.a, own.b, *meteora_forms.choose(x, own.gates, setting.top_k))

    yield "loop", False, by_linear(gated(meteora_forms.loop))
    yield "bmm-torch", True, by_linear(gated(meteora_forms.bmm_torch))
    if setting.rank in (1, 2, 4, 8) and all(linear.inputs % meteora_forms.PARTS == 0 for linear in linears):
        split = {id(own): meteora_forms.split_factor(own.a) for layer in layers for group in layer for own in group}

        def published(x: Tensor, own: Embedded) -> Tensor:
            chosen, weights = meteora_forms.choose(x, own.gates, setting.top_k)
            return meteora_forms.bmm_triton(x, split[id(own)], own.b, chosen, weights)

        yield "bmm-triton", True, by_linear(published)
    yield SINGLE, True, by_linear(lambda x, own: meteora_forms.single(x, own.a[0], own.b[0]))
    yield from _ours(linears, xs, layers, setting, where)


def _ours(
    linears: list[Linear], xs: list[Tensor], layers: list[list[list[Embedded]]], setting: Setting, where: Where
) -> Iterator[tuple[str, bool, Callable[[int], Outputs]]]:
    """Gates in a slot and adapters in pages, by our kernels and as dense products."""
    from kernels.gated import gated_delta
    from kernels.gates import gate_scale
    from kernels.lora import dense_lora_

    n, count = setting.adapters, setting.rows
    plan = plan_gated([RowSpan(0, count, tuple(range(n)), (1.0,) * n, (setting.rank,) * n)], count)
    words = np.zeros(plan.shape.words, np.int32)
    plan.write(plan.shape, words)
    mapping = GatedPages.view(torch.from_numpy(words).to(where.device), plan.shape)
    padded = max(32, 1 << (n - 1).bit_length())
    rows = gate_rows(setting, padded, where)
    columns = where.ints([*range(n), *[-1] * (len(mapping.pages) - n)])
    packed = [
        [_packed(linear, group, padded) for linear, group in zip(linears, layer, strict=True)] for layer in layers
    ]
    ids = mapping.pages.long().clamp_(min=0)
    firsts = [sum(len(linear.slices) for linear in linears[:place]) for place in range(len(linears))]

    def gated(place: int, gates: Tensor) -> Gated:
        return Gated(gates, rows, columns, place, firsts[place])

    def by_kernels(i: int) -> Outputs:
        return [
            gated_delta(xs[place], a, b, mapping, linear.slices, gated(place, gates), pdl=where.pdl)
            for place, (linear, (a, b, gates)) in enumerate(zip(linears, packed[i], strict=True))
        ]

    def dense(i: int) -> Outputs:
        outputs = []
        for place, (linear, (a, b, gates)) in enumerate(zip(linears, packed[i], strict=True)):
            y, scale = xs[place].new_zeros(count, linear.outputs), gate_scale(xs[place], gated(place, gates))
            outputs.append(
                dense_lora_(y, xs[place], a, b, ids, mapping.weights, linear.slices, scale, mapping.shape.ranks)
            )
        return outputs

    yield OURS[0], True, by_kernels
    yield OURS[1], True, dense


def gate_rows(setting: Setting, num_gates: int, where: Where) -> GateRows:
    """Rows that all use the one slot in the same way."""

    def same(value: int) -> Tensor:
        return where.ints([value]).repeat(setting.rows)

    bits = (1 << setting.adapters) - 1
    words = [(bits >> start) & 0xFFFFFFFF for start in range(0, num_gates, MASK_BITS)]
    signed = [word - (1 << 32) if word >> 31 else word for word in words]
    return GateRows(
        slots=same(0),
        top_k=same(setting.top_k),
        temperatures=torch.ones(setting.rows, device=where.device),
        masks=where.ints(signed).repeat(setting.rows, 1),
        touches=same(-1),
        shares=where.ints(range(setting.rows)),
        targets=where.ints([-1]),
        counts=where.ints([setting.adapters]),
        adapters=where.ints([*range(setting.adapters), *[-2] * (num_gates - setting.adapters)]).view(1, -1),
        totals=torch.zeros(setting.rows, TOTALS, num_gates, device=where.device),
    )


def _packed(linear: Linear, group: list[Embedded], num_gates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The linears of a group as pages of A [n, S * 16, in] and B [n, 16, out], and gates [1, S, num_gates, in]."""
    n, _, rank = group[0].a.shape
    a = group[0].a.new_zeros(n, len(group), PAGE_RANK, linear.inputs)
    b = a.new_zeros(n, PAGE_RANK, linear.outputs)
    gates = a.new_zeros(1, len(group), num_gates, linear.inputs)
    for part, own in enumerate(group):
        a[:, part, :rank] = own.a.transpose(1, 2)
        gates[0, part, :n] = own.gates
    b[:, :rank] = torch.cat([own.b for own in group], dim=2)
    return a.flatten(1, 2), b, gates


def compared(lines: Sequence[Json]) -> list[Json]:
    """By setting: microseconds in a CUDA graph (of the loop, which none can hold, as it comes) and peak bytes of all
    forms, and the better of ours as ratios to the others; None for what was not measured.
    """
    settings: dict[tuple[str, int], dict[str, Json]] = {}
    for line in lines:
        if line["op"] == "meteora":
            settings.setdefault((line["case"], line["rows"]), {})[line["backend"]] = line
    table = []
    for (case, rows), found in settings.items():
        us = {name: line["us_p50"] for name, line in found.items()}
        best = min((name for name in OURS if us.get(name)), key=lambda name: us[name], default=None)
        peaks = {name: line["peak_bytes"] for name, line in found.items()}
        table.append(
            {
                "case": case,
                "rows": rows,
                "us": us,
                "eager_us": {name: line["eager_us_p50"] for name, line in found.items()},
                "peak_bytes": peaks,
                "best": best,
                "speedup": {name: time / us[best] for name, time in us.items() if best and time and name not in OURS},
                "peak_ratio_to_loop": _ratio(peaks.get(best) if best else None, peaks.get("loop")),
            }
        )
    return table


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
