"""The tiles of a step: which rows use which pages, planned anew only when sequences come, go or change their length."""

from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field

import numpy as np

from adapters_store.pool import PageLease
from adapters_store.types import GROUPS
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, TilePlan, TileShape, write_tiles
from server.engine.batch import spans_of
from server.engine.plan import Chunk
from server.engine.staging import Words


@dataclass
class StepTiles:
    """The plans of a step by group name, for the groups in which any row uses a page, and their words by capacity."""

    plans: ReadOnlyDict[str, TilePlan]
    _words: dict[tuple[str, TileShape], Words] = field(default_factory=dict)

    def words(self, group: str, capacity: TileShape) -> Words:
        words = self._words.get((group, capacity))
        if words is None:
            words = self._words[group, capacity] = np.empty(capacity.words, dtype=np.int32)
            write_tiles(self.plans[group], capacity, words)
        return words


class TilePlanner:
    """Plans tiles; while the same leases have as many rows as in the step before, that step's plan stays."""

    def __init__(self) -> None:
        self._key: list[tuple[PageLease | None, int]] = []
        self._block_rows = 0
        self._tiles = StepTiles({})

    def plan(self, chunks: list[Chunk], block_rows: int) -> StepTiles:
        key = [(chunk.sequence.lease, chunk.num_tokens) for chunk in chunks]
        if key != self._key or block_rows != self._block_rows:
            self._key, self._block_rows = key, block_rows
            self._tiles = StepTiles(_plan_groups(chunks, block_rows))
        return self._tiles


def _plan_groups(chunks: list[Chunk], block_rows: int) -> dict[str, TilePlan]:
    """All groups get the kind of tiles that suits the first: the sets of adapters are the same in all of them."""
    rows = sum(chunk.num_tokens for chunk in chunks)
    kind: Kind | None = None
    plans: dict[str, TilePlan] = {}
    for group in GROUPS:
        spans = spans_of(group.name, chunks)
        plan = plan_tiles(spans, rows, block_rows, kind) if spans else None
        if plan is not None:
            plans[group.name], kind = plan, plan.shape.kind
    return plans


def no_tiles(capacity: TileShape) -> TilePlan:
    """A plan in which no row uses a page."""
    none, no_rows = np.zeros(0, dtype=np.int32), np.zeros((0, capacity.block_rows), dtype=np.int32)
    return TilePlan(
        shape=TileShape(capacity.kind, capacity.block_rows, 0, 0, 0),
        tile_pages=none,
        tile_ranks=none,
        tile_columns=none,
        tile_rows=no_rows,
        tile_weights=no_rows.astype(np.float32),
        block_rows=no_rows,
        block_starts=none,
        block_counts=none,
        pages=none,
        page_ranks=none,
        page_count=np.zeros(1, dtype=np.int32),
    )
