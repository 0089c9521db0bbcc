"""What the gates of a step need to know of its rows, as sections of the staged array: no shape depends on the routing.

Adapters are numbered anew in every plan: a column of the mapping and a gate belong together if their numbers agree.
"""

from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.types import GROUPS
from kernels.gate_rows import MASK_BITS, TOTALS, GateRows
from kernels.gated_pages import GatedPlan, GatedShape
from kernels.tiles import TilePlan, TileShape
from server.engine.gates import GateShape, Shares
from server.engine.plan import Chunk

Words = NDArray[np.int32]
GateWords = ReadOnlyDict[str, Words]
"""Sections by name, as long as the step is; temperatures are fp32."""

Plans = ReadOnlyDict[str, TilePlan] | ReadOnlyDict[str, GatedPlan]
"""By group name, for the groups in which any row uses a page."""

PREFIX = "gates_"
"""Of the names of all sections here; no group of linears begins with it."""

COLUMNS = "gates_columns_"
EMPTY = {"gates_slots": -1, "gates_shares": -1, "gates_adapters": -2}
"""What marks unused places; elsewhere it is 0, and in the columns -1."""

LIMITS = torch.finfo(torch.float32)


@dataclass(frozen=True, eq=False)
class GateViews:
    """Views of the staged array: the rows, and by group name int32[U], the adapter of each column of the mapping."""

    rows: GateRows
    columns: ReadOnlyDict[str, Tensor]


def gate_sections(
    shape: GateShape, rows: int, logits: int, tiles: tuple[tuple[str, TileShape | GatedShape], ...]
) -> dict[str, int]:
    """Words of each section for a step of so many rows, `logits` of which yield a token."""
    by_row = ("gates_slots", "gates_top_k", "gates_temperatures", "gates_touches", "gates_shares")
    sizes = dict.fromkeys(by_row, rows)
    sizes |= {"gates_masks": rows * (shape.gates // MASK_BITS)}
    sizes |= {"gates_targets": shape.slots, "gates_counts": shape.slots, "gates_adapters": shape.slots * shape.gates}
    sizes |= {"gates_totals": logits * TOTALS * shape.gates}
    return sizes | {COLUMNS + group: own.padded_pages for group, own in tiles}


def view_gates(parts: ReadOnlyDict[str, Tensor], shape: GateShape) -> GateViews:
    rows = GateRows(
        slots=parts["gates_slots"],
        top_k=parts["gates_top_k"],
        temperatures=parts["gates_temperatures"].view(torch.float32),
        masks=parts["gates_masks"].view(-1, shape.gates // MASK_BITS),
        touches=parts["gates_touches"],
        shares=parts["gates_shares"],
        targets=parts["gates_targets"],
        counts=parts["gates_counts"],
        adapters=parts["gates_adapters"].view(-1, shape.gates),
        totals=parts["gates_totals"].view(torch.float32).view(-1, TOTALS, shape.gates),
    )
    columns = {name.removeprefix(COLUMNS): part for name, part in parts.items() if name.startswith(COLUMNS)}
    return GateViews(rows, columns)


def fill_gates(parts: ReadOnlyDict[str, Words], words: GateWords) -> None:
    """Write the step's words into its sections. What they have room for beyond is marked as unused."""
    for name, part in parts.items():
        if name.startswith(PREFIX):
            part.fill(-1 if name.startswith(COLUMNS) else EMPTY.get(name, 0))
            own = words.get(name)
            if own is not None:
                part[: len(own)] = own


def gate_words(chunks: list[Chunk], plans: Plans, shape: GateShape) -> GateWords:
    """The sections of a step in which rows are routed by token."""
    slots, numbers = _slot_words(chunks, shape)
    columns = {COLUMNS + group: _columns(chunks, group, plan, numbers) for group, plan in plans.items()}
    return {**_row_words(chunks, shape), **slots, **columns}


def staged_shares(chunks: list[Chunk], totals: Tensor) -> Shares:
    """The shares of the chunks that yield a token; totals fp32[>= those, TOTALS, N], which may be written over."""
    rows = accumulate((chunk.samples for chunk in chunks), initial=0)
    places = []
    for chunk, row in zip(chunks, rows, strict=False):
        gates = chunk.sequence.gates
        places.append((0, row, gates.num_rows) if gates is not None and chunk.samples else None)
    return Shares((totals.sum(dim=1),), tuple(places))


def _row_words(chunks: list[Chunk], shape: GateShape) -> dict[str, Words]:
    lengths = [chunk.num_tokens for chunk in chunks]
    count, width = len(chunks), shape.gates // MASK_BITS
    slots, top_k = np.full(count, -1, np.int32), np.zeros(count, np.int32)
    touches, temperatures = np.zeros(count, np.int32), np.ones(count, np.float32)
    masks = np.zeros((count, width), np.uint32)
    shares = np.full(sum(lengths), -1, np.int32)
    last_rows = [row - 1 for row in accumulate(lengths)]
    sampled = list(accumulate((chunk.samples for chunk in chunks), initial=0))
    for i, chunk in enumerate(chunks):
        sequence = chunk.sequence
        use, lease = sequence.request.gates, sequence.lease
        if sequence.gates is None or use is None:
            continue
        slots[i] = sequence.gate_slot
        top_k[i] = min(use.top_k, shape.gates)
        temperatures[i] = min(max(use.temperature, LIMITS.tiny), LIMITS.max)
        bits = sum(1 << gate for gate, may in enumerate(use.allowed) if may)
        masks[i] = [(bits >> MASK_BITS * word) & 0xFFFFFFFF for word in range(width)]
        if lease is not None:
            touches[i] = sum(1 << number for number, group in enumerate(GROUPS) if lease.pages[group.name])
        if chunk.samples:
            shares[last_rows[i]] = sampled[i]
    return {
        "gates_slots": slots.repeat(lengths),
        "gates_top_k": top_k.repeat(lengths),
        "gates_temperatures": temperatures.repeat(lengths).view(np.int32),
        "gates_masks": masks.repeat(lengths, axis=0).view(np.int32).reshape(-1),
        "gates_touches": touches.repeat(lengths),
        "gates_shares": shares,
    }


def _slot_words(chunks: list[Chunk], shape: GateShape) -> tuple[dict[str, Words], dict[str, int]]:
    """The sections of the slots, and the numbers of the adapters by digest."""
    targets, counts = np.zeros(shape.slots, np.int32), np.zeros(shape.slots, np.int32)
    adapters = np.full((shape.slots, shape.gates), -2, np.int32)
    numbers: dict[str, int] = {}
    seen: set[tuple[int, tuple[str | None, ...]]] = set()
    for chunk in chunks:
        sequence = chunk.sequence
        gates, use, slot = sequence.gates, sequence.request.gates, sequence.gate_slot
        if gates is None or use is None or (slot, use.rows) in seen:
            continue
        seen.add((slot, use.rows))
        targets[slot], counts[slot] = gates.targets, gates.num_rows
        for row, digest in enumerate(use.rows):
            if digest is not None:  # another request of the same router may use more of them
                adapters[slot, row] = numbers.setdefault(digest, len(numbers))
    return {"gates_targets": targets, "gates_counts": counts, "gates_adapters": adapters.reshape(-1)}, numbers


def _columns(chunks: list[Chunk], group: str, plan: TilePlan | GatedPlan, numbers: ReadOnlyDict[str, int]) -> Words:
    """A page has the same adapter in all leases."""
    owners: dict[int, int] = {}
    seen: set[tuple[str, ...]] = set()
    for chunk in chunks:
        lease = chunk.sequence.lease
        if chunk.sequence.gates is None or lease is None or lease.keys in seen:
            continue
        seen.add(lease.keys)
        for digest, pages in lease.by_key(group):
            if digest in numbers:
                owners.update(dict.fromkeys(pages, numbers[digest]))
    return np.array([owners.get(page, -1) for page in plan.pages.tolist()], np.int32)
