"""Which capacities steps on a GPU are captured for, and the smallest that holds a step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from adapters_store.types import GROUPS, QKV, TargetGroup
from kernels.attention import QUERY_BLOCK
from kernels.gated_pages import FEW_RANKS, GatedShape
from kernels.tiles import PAGE_RANK, Kind, TilePlan, TileShape
from server.engine.gate_stage import Plans
from server.engine.gates import GateShape
from server.engine.staging import StepShape

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MIXED_ROWS = (128, 256, 384, 512, 1024, 2048)
"""Token rows of graphs for decoding alone, and for decoding mixed with prompts, up to what the settings allow."""

DECODE_BLOCK, MIXED_BLOCK = 16, 64
"""Rows of a tile of adapters. Decoding rows are many sets of few rows; prompts bring long runs of one set."""

DECODE_TILES = (8, 32, 64, 128, 512, 2048)
MIXED_TILES = (16, 64, 256, 1024)
"""Tiles that graphs have room for. Unused ones are cheap: 256 for 8 in use cost 4 % of a step on an H100."""

GATED_PAGES = (32, 64, 128)
"""Pages that gates may choose from."""

KINDS: tuple[Kind, ...] = ("rows", "shared")

COMMON_GROUPS = (GROUPS, (QKV,))
"""Adapters on all linears, and on those of attention's input, as PEFT does by default."""

COMMON_TILES = 128
"""Graphs with at most so many tiles are captured at the start, others when they are first needed."""


@dataclass(frozen=True)
class Capacities:
    """The graphs of an engine whose steps have at most `max_batch_tokens` rows of `max_num_seqs` sequences.

    gates: the slots for token-level routers, None for an engine without.
    """

    max_num_seqs: int
    max_batch_tokens: int
    gates: GateShape | None = None

    @cached_property
    def decode_shapes(self) -> tuple[StepShape, ...]:
        """Without adapters, smallest first."""
        rows = sorted({min(rows, self.max_num_seqs) for rows in DECODE_ROWS})
        return tuple(StepShape(count, count, 0, count) for count in rows)

    @cached_property
    def mixed_shapes(self) -> tuple[StepShape, ...]:
        """Without adapters, smallest first. Every chunk of a prompt may end with a query block that is not full."""
        seqs = self.max_num_seqs
        rows = sorted({min(rows, self.max_batch_tokens) for rows in MIXED_ROWS})
        return tuple(
            StepShape(count, min(seqs, count), count // QUERY_BLOCK + min(seqs, count // 2), min(seqs, count))
            for count in rows
        )

    def smallest(
        self,
        rows: int,
        decoding: bool,
        plans: Plans,
        gated: bool = False,
    ) -> StepShape | None:
        """The first that holds `rows` token rows and these tiles; None where a step must do without a graph.

        gated: rows are routed by token, and the plans are for gates.
        """
        shapes = self.decode_shapes if decoding else self.mixed_shapes
        shape = next((shape for shape in shapes if shape.rows >= rows), None)
        if shape is None or not (plans or gated):
            return shape
        capacities: Iterable[TileShape | GatedShape]
        if gated:
            shape = replace(shape, gates=self.gates)
            capacities = gated_capacities(shape)
        else:
            kind = next(plan.shape.kind for plan in plans.values() if isinstance(plan, TilePlan))
            capacities = (self.tiles(shape, decoding, kind, n) for n in (DECODE_TILES if decoding else MIXED_TILES))
        for capacity in capacities:
            if all(plan.fits(capacity) for plan in plans.values()):
                return replace(shape, tiles=tuple((group, capacity) for group in plans))
        return None

    def tiles(self, shape: StepShape, decoding: bool, kind: Kind, tiles: int) -> TileShape:
        """Room for `tiles` tiles. A block has a tile, but for those of rows without adapters; and each distinct set of
        adapters has at most one block that is not full.
        """
        block_rows = DECODE_BLOCK if decoding else MIXED_BLOCK
        sets = min(shape.rows, self.max_num_seqs + 1)
        blocks = min(tiles + -(-shape.rows // block_rows), shape.rows // block_rows + sets) if kind == "rows" else 0
        return TileShape(kind, block_rows, tiles, blocks, tiles)

    @cached_property
    def words(self) -> int:
        """Words of metadata, without block tables, of the largest."""
        last = ((self.decode_shapes, True, DECODE_TILES), (self.mixed_shapes, False, MIXED_TILES))
        plain = [
            self._with_tiles(shapes[-1], self.tiles(shapes[-1], decoding, kind, tiles[-1]))
            for shapes, decoding, tiles in last
            for kind in KINDS
        ]
        return max(shape.words for shape in (*plain, *self._largest_gated()))

    def _largest_gated(self) -> Iterator[StepShape]:
        if self.gates is not None:
            for shape in (self.decode_shapes[-1], self.mixed_shapes[-1]):
                *_, largest = gated_capacities(shape)
                yield replace(self._with_tiles(shape, largest), gates=self.gates)

    def _with_tiles(
        self, shape: StepShape, capacity: TileShape | GatedShape, groups: tuple[TargetGroup, ...] = GROUPS
    ) -> StepShape:
        """With that room for tiles in each of these groups."""
        return replace(shape, tiles=tuple((group.name, capacity) for group in groups))

    def common(self) -> Iterator[StepShape]:
        """What steady traffic needs, the largest first: later graphs then find room in its memory."""
        for decoding, shapes in ((False, self.mixed_shapes), (True, self.decode_shapes)):
            sizes = [tiles for tiles in (DECODE_TILES if decoding else MIXED_TILES) if tiles <= COMMON_TILES]
            for shape in reversed(shapes):
                yield shape
                if self.gates is not None:
                    fewest = next(gated_capacities(shape))
                    yield replace(self._with_tiles(shape, fewest), gates=self.gates)
                for tiles in sizes:
                    if tiles == sizes[0] or shape.rows > 8:
                        for groups in COMMON_GROUPS:
                            yield self._with_tiles(shape, self.tiles(shape, decoding, "rows", tiles), groups)


def gated_capacities(shape: StepShape) -> Iterator[GatedShape]:
    """Room for any row to use any of so many pages, smallest first."""
    for pages in GATED_PAGES:
        for ranks in (FEW_RANKS, PAGE_RANK):
            yield GatedShape(shape.rows, pages, ranks)
