"""The metadata of one step on its way to a GPU: one flat int32 array, filled in pinned memory, sent by one copy."""

from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from kernels.attention import PagedMeta, query_blocks
from kernels.gated_pages import GatedPages, GatedShape
from kernels.tiles import LoraTiles, TileShape, view_tiles
from server.engine.gate_stage import GateViews, GateWords, Words, fill_gates, gate_sections, view_gates
from server.engine.gates import GateShape
from server.engine.plan import Chunk

ALIGNMENT = 32
"""Words. Sections start where Triton may take their addresses for aligned: others would compile a kernel anew."""


@dataclass(frozen=True)
class StepShape:
    """What a step has room for; a captured graph is known by it.

    rows: tokens. decodes: sequences of one token, whose rows come first. query_blocks: pieces of longer chunks.
    logits: rows that yield a token. tiles: by target group, for the groups in which any row uses a page. gates: the
    slots for gates, where rows may be routed by token; the tiles are in the form for gates then. decided: rows may have
    factors that a router decided.
    """

    rows: int
    decodes: int
    query_blocks: int
    logits: int
    tiles: tuple[tuple[str, TileShape | GatedShape], ...] = ()
    gates: GateShape | None = None
    decided: bool = False

    @cached_property
    def sections(self) -> ReadOnlyDict[str, slice]:
        """Where each part lies in the flat array; block tables follow behind the last one."""
        sizes = dict.fromkeys(("ids", "sources", "positions", "slots"), self.rows)
        sizes |= {"logit_rows": self.logits, "decode_lens": self.decodes}
        sizes |= {"table_starts": self.decodes + self.query_blocks, "query_blocks": 4 * self.query_blocks}
        sizes |= {group: shape.words for group, shape in self.tiles}
        if self.gates is not None:
            sizes |= gate_sections(self.gates, self.rows, self.logits, self.tiles)
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
        starts = accumulate(aligned, initial=0)
        return {name: slice(start, start + size) for (name, size), start in zip(sizes.items(), starts, strict=False)}

    @cached_property
    def words(self) -> int:
        """Words of everything but the block tables."""
        last: int = max(section.stop for section in self.sections.values())
        return -(-last // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class StepViews:
    """A step's metadata on the device, as views of the flat array."""

    ids: Tensor
    sources: Tensor
    positions: Tensor
    logit_rows: Tensor
    attention: PagedMeta
    mappings: ReadOnlyDict[str, LoraTiles | GatedPages]
    gates: GateViews | None = None

    @classmethod
    def of(cls, words: Tensor, shape: StepShape, block_size: int, longest: int) -> "StepViews":
        parts = {name: words[section] for name, section in shape.sections.items()}
        attention = PagedMeta(
            slots=parts["slots"],
            tables=words[shape.words :],
            table_starts=parts["table_starts"],
            decode_lens=parts["decode_lens"],
            query_blocks=parts["query_blocks"].view(-1, 4),
            block_size=block_size,
            longest=longest,
        )
        mappings = {group: _view(parts[group], tiles) for group, tiles in shape.tiles}
        gates = None if shape.gates is None else view_gates(parts, shape.gates)
        return cls(parts["ids"], parts["sources"], parts["positions"], parts["logit_rows"], attention, mappings, gates)


def _view(words: Tensor, capacity: TileShape | GatedShape) -> LoraTiles | GatedPages:
    return view_tiles(words, capacity) if isinstance(capacity, TileShape) else GatedPages.view(words, capacity)


@dataclass
class _Slot:
    """One of the host arrays, and when the copy out of it is done."""

    host: Tensor
    sent: torch.cuda.Event | None = None


@dataclass
class Staging:
    """A device array at a fixed address, and two pinned host arrays that take turns at filling it."""

    capacity: int
    device: torch.device
    words: Tensor = field(init=False)
    _slots: list[_Slot] = field(init=False)
    _turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        pinned = self.device.type == "cuda"
        self.words = torch.zeros(self.capacity, dtype=torch.int32, device=self.device)
        self._slots = [_Slot(torch.zeros(self.capacity, dtype=torch.int32, pin_memory=pinned)) for _ in range(2)]

    def begin(self) -> Words:
        """A host array to fill; its contents are undefined."""
        self._turn ^= 1
        slot = self._slots[self._turn]
        if slot.sent is not None:
            slot.sent.synchronize()
        array: Words = slot.host.numpy()
        return array

    def send(self, count: int) -> None:
        """Copy the first `count` words of the array that `begin` gave, behind all work that was launched before."""
        slot = self._slots[self._turn]
        self.words[:count].copy_(slot.host[:count], non_blocking=True)
        if self.device.type == "cuda":
            slot.sent = torch.cuda.Event()
            slot.sent.record()


def fill(
    out: Words,
    shape: StepShape,
    chunks: list[Chunk],
    tiles: ReadOnlyDict[str, Words],
    block_size: int,
    gates: GateWords | None = None,
) -> int:
    """Write a step into the array; returns the number of words. `tiles` are the groups' finished sections.

    Chunks of one token come first, and at most `shape.decodes` of them. What the shape has room for beyond the chunks
    is marked as unused.
    """
    parts = {name: out[section] for name, section in shape.sections.items()}
    for name in ("sources", "slots", "query_blocks"):
        parts[name].fill(-1)
    for name in ("ids", "positions", "logit_rows", "decode_lens", "table_starts"):
        parts[name].fill(0)
    decodes = next((i for i, chunk in enumerate(chunks) if chunk.num_tokens > 1), len(chunks))
    _fill_decodes(parts, chunks[:decodes], block_size)
    _fill_prefills(parts, chunks[decodes:], decodes, shape.decodes, block_size)
    last_rows = accumulate(chunk.num_tokens for chunk in chunks)
    logit_rows = [row - 1 for chunk, row in zip(chunks, last_rows, strict=True) if chunk.samples]
    parts["logit_rows"][: len(logit_rows)] = logit_rows
    for group, words in tiles.items():
        parts[group][:] = words
    if shape.gates is not None:
        fill_gates(parts, gates or {})
    return _fill_tables(out, parts["table_starts"], shape, chunks, decodes)


def _fill_decodes(parts: ReadOnlyDict[str, Words], chunks: list[Chunk], block_size: int) -> None:
    count = len(chunks)
    starts = [chunk.start for chunk in chunks]
    sequences = [chunk.sequence for chunk in chunks]
    known = [start < len(s.tokens) for start, s in zip(starts, sequences, strict=True)]
    parts["ids"][:count] = [s.tokens[start] if k else 0 for s, start, k in zip(sequences, starts, known, strict=True)]
    parts["sources"][:count] = [-1 if k else s.sampled_row for s, k in zip(sequences, known, strict=True)]
    parts["positions"][:count] = starts
    parts["slots"][:count] = [
        s.blocks[start // block_size] * block_size + start % block_size
        for s, start in zip(sequences, starts, strict=True)
    ]
    parts["decode_lens"][:count] = [start + 1 for start in starts]


def _fill_prefills(
    parts: ReadOnlyDict[str, Words], chunks: list[Chunk], row: int, first_sequence: int, block_size: int
) -> None:
    """Chunks of several tokens, from token row `row` on; their sequences are counted from `first_sequence`."""
    spans = []
    for sequence, chunk in enumerate(chunks, first_sequence):
        rows = slice(row, row + chunk.num_tokens)
        positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        table = np.asarray(chunk.sequence.blocks, dtype=np.int32)
        parts["ids"][rows] = chunk.sequence.tokens[chunk.start : chunk.stop]
        parts["positions"][rows] = positions
        parts["slots"][rows] = table[positions // block_size] * block_size + positions % block_size
        spans.append((sequence, row, chunk.num_tokens, chunk.start))
        row = rows.stop
    found = query_blocks(spans).reshape(-1)
    parts["query_blocks"][: len(found)] = found


def _fill_tables(out: Words, starts: Words, shape: StepShape, chunks: list[Chunk], decodes: int) -> int:
    """Block tables one after the other, behind everything else."""
    tables = [chunk.sequence.blocks for chunk in chunks]
    offsets = list(accumulate(map(len, tables), initial=0))
    starts[:decodes] = offsets[:decodes]
    starts[shape.decodes : shape.decodes + len(chunks) - decodes] = offsets[decodes:-1]
    stop = shape.words + offsets[-1]
    out[shape.words : stop] = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=offsets[-1])
    return stop
