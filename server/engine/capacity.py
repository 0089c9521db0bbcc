"""Which capacities steps on a GPU are captured for, and the smallest that holds a step."""

from collections.abc import Iterator
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, replace
from functools import cached_property

from adapters_store.types import GROUPS, QKV, TargetGroup
from kernels.attention import QUERY_BLOCK
from kernels.tiles import Kind, TilePlan, TileShape
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
GATED_TILES = 4096
"""Room for the pages that gates choose from, at most so many tiles of them. Any row may use any page."""

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
        self, rows: int, decoding: bool, plans: ReadOnlyDict[str, TilePlan], gated: bool = False
    ) -> StepShape | None:
        """The first that holds `rows` token rows and these tiles; None where a step must do without a graph.

        gated: rows are routed by token; then the tiles are "shared".
        """
        shapes = self.decode_shapes if decoding else self.mixed_shapes
        shape = next((shape for shape in shapes if shape.rows >= rows), None)
        if shape is None or not (plans or gated):
            return shape
        if gated:
            shape = replace(shape, gates=self.gates)
            capacities = list(self.gated_tiles(shape, decoding))
        else:
            kind = next(iter(plans.values())).shape.kind
            capacities = [self.tiles(shape, decoding, kind, n) for n in (DECODE_TILES if decoding else MIXED_TILES)]
        for capacity in capacities:
            if all(plan.fits(capacity) for plan in plans.values()):
                return replace(shape, tiles=tuple((group, capacity) for group in plans))
        return None

    def gated_tiles(self, shape: StepShape, decoding: bool) -> Iterator[TileShape]:
        """Room for any rows to use any of so many pages, smallest first."""
        block_rows = DECODE_BLOCK if decoding else MIXED_BLOCK
        for pages in GATED_PAGES:
            tiles = pages * -(-shape.rows // block_rows)
            if pages == GATED_PAGES[0] or tiles <= GATED_TILES:
                yield TileShape("shared", block_rows, tiles, 0, pages)

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
            for shapes, decoding in ((self.decode_shapes, True), (self.mixed_shapes, False)):
                for shape in shapes:
                    largest = list(self.gated_tiles(shape, decoding))[-1]
                    yield replace(self._with_tiles(shape, largest), gates=self.gates)

    def _with_tiles(self, shape: StepShape, capacity: TileShape, groups: tuple[TargetGroup, ...] = GROUPS) -> StepShape:
        """With that room for tiles in each of these groups."""
        return replace(shape, tiles=tuple((group.name, capacity) for group in groups))

    def common(self) -> Iterator[StepShape]:
        """What steady traffic needs, the largest first: later graphs then find room in its memory."""
        for decoding, shapes in ((False, self.mixed_shapes), (True, self.decode_shapes)):
            sizes = [tiles for tiles in (DECODE_TILES if decoding else MIXED_TILES) if tiles <= COMMON_TILES]
            for shape in reversed(shapes):
                yield shape
                if self.gates is not None:
                    fewest = next(self.gated_tiles(shape, decoding))
                    yield replace(self._with_tiles(shape, fewest), gates=self.gates)
                for tiles in sizes:
                    if tiles == sizes[0] or shape.rows > 8:
                        for groups in COMMON_GROUPS:
                            yield self._with_tiles(shape, self.tiles(shape, decoding, "rows", tiles), groups)
