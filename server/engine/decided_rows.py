"""The factors that decisions give the adapters of a step's rows, layer by layer."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters_store.page_lease import PageLease
from adapters_store.types import GROUPS, TARGETS
from kernels.gate_rows import Gated
from kernels.ops import Mapping as PageMapping
from server.engine.decisions import Decision
from server.engine.gate_parts import Columns
from server.engine.plan import Chunk
from server.model.lora import LayerRouter

PLACES = {group.name: [TARGETS.index(target) for target in group.targets] for group in GROUPS}


@dataclass(frozen=True)
class DecidedRows:
    """Looks up what was decided, by row.

    rows: int64[T], the place of every token row's decision among K of them; the first stands for rows without one. None
    where all sequences decode, and K is T: then nothing is left to look up in a step.
    tables: by group name fp32[L, S, K, U], for the S targets of the group and the U columns of its mapping.
    """

    rows: Tensor | None
    tables: Mapping[str, Tensor]

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Tensor:  # noqa: ARG002
        """fp32[S, T, U]."""
        own = self.tables[group][layer]
        return own if self.rows is None else own.index_select(1, self.rows)


@dataclass(frozen=True)
class BothRouters:
    """Rows that are routed by token beside rows whose factors are decided: each leaves 1 to the other's rows."""

    gated: LayerRouter
    decided: LayerRouter

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Tensor | Gated | None:
        """fp32[S, T, U], None for 1, or the gates that say it."""
        one, other = (each.scale(layer, group, x, mapping) for each in (self.gated, self.decided))
        assert not isinstance(other, Gated), "decisions are factors"
        if isinstance(one, Gated):
            return replace(one, factors=other)
        return one if other is None else other if one is None else one * other


def with_decided(router: LayerRouter | None, decided: DecidedRows | None) -> LayerRouter | None:
    """Both on one step."""
    if router is None or decided is None:
        return router or decided
    return BothRouters(router, decided)


class DecidedBuilder:
    """Makes a step's `DecidedRows`; while the same sequences have as many rows, those of the step before stay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: object = None
        self._rows: DecidedRows | None = None

    def build(self, chunks: List[Chunk], columns: Callable[[], Columns]) -> DecidedRows | None:
        """None if no row has factors of its own."""
        if all(_table(chunk) is None for chunk in chunks):
            return None
        key = [(chunk.sequence.lease, chunk.sequence.decision, chunk.num_tokens) for chunk in chunks]
        if key != self._key:  # equal leases make equal mappings
            self._key, self._rows = key, self._built(chunks, columns())
        return self._rows

    def _built(self, chunks: List[Chunk], columns: Columns) -> DecidedRows:
        own = [(chunk.sequence.lease, table) for chunk in chunks if (table := _table(chunk)) is not None]
        places: list[int] = []
        count = 0
        for chunk in chunks:
            has_table = _table(chunk) is not None
            count += has_table
            places += [count if has_table else 0] * chunk.num_tokens
        rows = torch.tensor(places)
        tables = {group: _spread(own, group, pages) for group, pages in columns.items()}
        if len(places) == len(chunks):
            spread = {group: table.index_select(2, rows).to(self.device) for group, table in tables.items()}
            return DecidedRows(None, spread)
        return DecidedRows(rows.to(self.device), {group: table.to(self.device) for group, table in tables.items()})


def _table(chunk: Chunk) -> Tensor | None:
    decision: Decision | None = chunk.sequence.decision
    return None if decision is None else decision.weights


def _spread(own: List[tuple[PageLease | None, Tensor]], group: str, pages: tuple[int, ...]) -> Tensor:
    """fp32[L, S, 1 + len(own), U]: 1, but in the columns of a decision's adapters their factors."""
    layers, places = len(own[0][1]), PLACES[group]
    table = torch.ones(layers, len(places), 1 + len(own), len(pages))
    column_of = {page: column for column, page in enumerate(pages) if page >= 0}
    for number, (lease, weights) in enumerate(own, 1):
        if lease is None:
            continue
        for adapter, (_, held) in enumerate(lease.by_key(group)):
            found = [column_of[page] for page in held if page in column_of]  # else its own scale is 0
            table[:, :, number, found] = weights[:, places, adapter, None]
    return table
