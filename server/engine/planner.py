"""The tiles of a step: which rows use which pages, planned anew only when sequences come, go or change their length."""

from dataclasses import dataclass, field

import numpy as np

from adapters_store.page_lease import PageLease
from adapters_store.types import GROUPS
from kernels.gated_pages import GatedPlan, GatedShape, plan_gated
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, TilePlan, TileShape, write_tiles
from server.engine.batch import spans_of
from server.engine.gate_stage import GateWords, Plans, Words, gate_words
from server.engine.gates import GateShape
from server.engine.plan import Chunk
from server.engine.sequence import Sequence
from server.engine.staging import StepShape


@dataclass
class StepTiles:
    """The plans of a step by group name, for the groups in which any row uses a page, and their words by capacity.

    gates: what the gates need to know, in steps with rows that are routed by token.
    """

    plans: Plans
    gates: GateWords | None = None
    _words: dict[tuple[str, TileShape | GatedShape], Words] = field(default_factory=dict)

    def words(self, group: str, capacity: TileShape | GatedShape) -> Words:
        words = self._words.get((group, capacity))
        if words is None:
            words = self._words[group, capacity] = np.empty(capacity.words, dtype=np.int32)
            _write(self.plans[group], capacity, words)
        return words


def _write(plan: TilePlan | GatedPlan, capacity: TileShape | GatedShape, out: Words) -> None:
    if isinstance(capacity, GatedShape):
        assert isinstance(plan, GatedPlan), "a capacity for gates holds plans for gates"
        plan.write(capacity, out)
    else:
        assert isinstance(plan, TilePlan), "tiles hold plans of tiles"
        write_tiles(plan, capacity, out)


class TilePlanner:
    """Plans tiles; while the same leases have as many rows as in the step before, that step's plan stays.

    gates: the slots of this engine, None where no row is routed by token.
    """

    def __init__(self, gates: GateShape | None = None) -> None:
        self._gates = gates
        self._key: list[tuple[PageLease | None, int, Sequence | None]] = []
        self._block_rows = 0
        self._samples: list[bool] = []
        self._tiles = StepTiles({})

    def plan(self, chunks: list[Chunk], block_rows: int) -> StepTiles:
        key = [
            (chunk.sequence.lease, chunk.num_tokens, chunk.sequence if chunk.sequence.gates is not None else None)
            for chunk in chunks
        ]
        gated = self._gates is not None and any(routed is not None for _, _, routed in key)
        samples = [chunk.samples for chunk in chunks] if gated else []
        if key != self._key or block_rows != self._block_rows:
            plans = _plan_gated(chunks) if gated else _plan_groups(chunks, block_rows)
            self._key, self._block_rows, self._samples = key, block_rows, samples
            self._tiles = StepTiles(plans, self._gate_words(chunks, plans) if gated else None)
        elif samples != self._samples:
            self._samples = samples
            self._tiles.gates = self._gate_words(chunks, self._tiles.plans)
        return self._tiles

    def _gate_words(self, chunks: list[Chunk], plans: Plans) -> GateWords | None:
        return None if self._gates is None else gate_words(chunks, plans, self._gates)


def _plan_gated(chunks: list[Chunk]) -> dict[str, GatedPlan]:
    """What a gate will choose is not known here: every row may meet every page."""
    rows = sum(chunk.num_tokens for chunk in chunks)
    plans = {group.name: plan_gated(spans_of(group.name, chunks), rows) for group in GROUPS}
    return {group: plan for group, plan in plans.items() if plan.shape.pages}


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
    """A plan of tiles in which no row uses a page."""
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


def nothing(shape: StepShape) -> StepTiles:
    """What a graph is captured with: no row uses a page."""
    plans = {group: no_tiles(own) for group, own in shape.tiles if isinstance(own, TileShape)}
    gated = {group: plan_gated([], 0) for group, own in shape.tiles if isinstance(own, GatedShape)}
    return StepTiles(gated if shape.gates is not None else plans)
