"""The flat metadata of a step: what its views say, against a plain model of the step's rows."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import accumulate, count, islice, pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import QUERY_BLOCK, query_blocks
from kernels.tiles import TileShape, view_tiles
from server.engine.plan import Chunk
from server.engine.sequence import Request, SamplingParams, Sequence
from server.engine.staging import ALIGNMENT, Staging, StepShape, StepViews, Words, fill

CPU = torch.device("cpu")
LONGEST = 4096
PARAMS = SamplingParams()


class Step:
    """Random chunks as the scheduler orders them, a shape with room to spare, and finished sections of some groups."""

    def __init__(self, data: st.DataObject) -> None:
        draw = data.draw
        self.block_size = draw(st.sampled_from((4, 16)))
        self.free = iter(np.random.default_rng(draw(st.integers(0, 99))).permutation(5000).tolist())
        self.next_token = count(1)
        decodes = [self.decode(data) for _ in range(draw(st.integers(0, 6)))]
        prefills = [self.prefill(data) for _ in range(draw(st.integers(0, 4)))]
        self.chunks = decodes + prefills
        self.decodes = len(decodes)
        self.rows = sum(chunk.num_tokens for chunk in self.chunks)
        blocks = sum(-(-chunk.num_tokens // QUERY_BLOCK) for chunk in prefills)
        samples = sum(chunk.samples for chunk in self.chunks)
        spare = st.integers(0, 40)
        rows, decode_rows, pieces, logits = (size + draw(spare) for size in (self.rows, self.decodes, blocks, samples))
        groups = draw(st.lists(st.sampled_from(("qkv", "o", "gate_up", "down")), unique=True))
        sizes = st.integers(1, 9)
        tiles = tuple((g, TileShape("rows", 16, draw(sizes), draw(sizes), draw(sizes))) for g in groups)
        self.shape = StepShape(rows, decode_rows, pieces, logits, tiles)
        self.tiles = {
            group: np.random.default_rng(i).integers(0, 1000, shape.words, dtype=np.int32)
            for i, (group, shape) in enumerate(tiles)
        }
        self.size = self.shape.words + sum(len(chunk.sequence.blocks) for chunk in self.chunks)

    def sequence(self, data: st.DataObject, length: int, capacity: int) -> Sequence:
        sequence = Sequence.of(Request("r", tuple(islice(self.next_token, length)), PARAMS))
        blocks = -(-capacity // self.block_size) + data.draw(st.integers(0, 2))
        sequence.blocks = list(islice(self.free, blocks))
        return sequence

    def decode(self, data: st.DataObject) -> Chunk:
        """The last token, a token in the middle of a prompt, or one that only the device knows."""
        length, kind = data.draw(st.integers(1, 70)), data.draw(st.sampled_from(("last", "middle", "pending")))
        sequence = self.sequence(data, length, length + 1)
        sequence.num_computed = length - 1
        if kind == "middle":
            sequence.num_computed = data.draw(st.integers(0, length - 1))
        if kind == "pending":
            sequence.num_pending, sequence.num_computed = 1, length
            sequence.sampled_row = data.draw(st.integers(0, 300))
        return Chunk.of(sequence, 1)

    def prefill(self, data: st.DataObject) -> Chunk:
        past, rest = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 3))
        new = data.draw(st.integers(2, 20) | st.sampled_from((127, 128, 129, 256, 300)))
        sequence = self.sequence(data, past + new + rest, past + new + rest)
        sequence.num_computed = past
        return Chunk.of(sequence, new)

    def fill(self, garbage: int = -77) -> tuple[Words, int]:
        out = np.full(self.size, garbage, dtype=np.int32)
        return out, fill(out, self.shape, self.chunks, self.tiles, self.block_size)

    def views(self, garbage: int = -77) -> StepViews:
        out, words = self.fill(garbage)
        return StepViews.of(torch.from_numpy(out[:words]), self.shape, self.block_size, LONGEST)


def padded(values: list[int], size: int, padding: int) -> list[int]:
    return values + [padding] * (size - len(values))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_say_what_the_chunks_are(data: st.DataObject) -> None:
    step = Step(data)
    ids, sources, positions, slots, logit_rows, lens = [], [], [], [], [], []
    for number, chunk in enumerate(step.chunks):
        for position in range(chunk.start, chunk.stop):
            sequence = chunk.sequence
            known = position < len(sequence.tokens)
            ids.append(sequence.tokens[position] if known else 0)
            sources.append(-1 if known else sequence.sampled_row)
            positions.append(position)
            slots.append(sequence.blocks[position // step.block_size] * step.block_size + position % step.block_size)
        if chunk.samples:
            logit_rows.append(len(ids) - 1)
        if number < step.decodes:
            lens.append(chunk.stop)
    views, shape = step.views(), step.shape
    assert views.ids.tolist() == padded(ids, shape.rows, 0)
    assert views.sources.tolist() == padded(sources, shape.rows, -1)
    assert views.positions.tolist() == padded(positions, shape.rows, 0)
    assert views.attention.slots.tolist() == padded(slots, shape.rows, -1)
    assert views.logit_rows.tolist() == padded(logit_rows, shape.logits, 0)
    assert views.attention.decode_lens.tolist() == padded(lens, shape.decodes, 0)
    assert (views.attention.block_size, views.attention.longest) == (step.block_size, LONGEST)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_sequence_finds_its_blocks(data: st.DataObject) -> None:
    step = Step(data)
    meta = step.views().attention
    starts, tables = meta.table_starts.tolist(), meta.tables.tolist()
    assert len(starts) == step.shape.decodes + step.shape.query_blocks
    first_rows = dict(zip(accumulate((c.num_tokens for c in step.chunks), initial=0), step.chunks, strict=False))
    for number, chunk in enumerate(step.chunks[: step.decodes]):
        blocks = chunk.sequence.blocks
        assert tables[starts[number] : starts[number] + len(blocks)] == blocks
    seen: list[int] = []
    pieces = meta.query_blocks.tolist()
    used = [piece for piece in pieces if piece[0] >= 0]
    assert pieces == used + [[-1] * 4] * (len(pieces) - len(used)), "unused ones come last and are marked"
    for sequence, row, queries, position in used:
        first = max(start for start in first_rows if start <= row)
        chunk = first_rows[first]
        blocks = chunk.sequence.blocks
        assert position == chunk.start + row - first
        assert 1 <= queries <= QUERY_BLOCK
        assert tables[starts[sequence] : starts[sequence] + len(blocks)] == blocks
        seen += range(row, row + queries)
    assert sorted(seen) == list(range(step.decodes, step.rows)), "every row of a prompt is in exactly one piece"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sections_are_aligned_and_apart(data: st.DataObject) -> None:
    shape = Step(data).shape
    sections = sorted(shape.sections.values(), key=lambda section: (section.start, section.stop))
    assert all(section.start % ALIGNMENT == 0 for section in sections)
    assert all(before.stop <= after.start for before, after in pairwise(sections))
    assert sections[-1].stop <= shape.words
    assert shape.words % ALIGNMENT == 0


def leaves(value: Any) -> dict[str, torch.Tensor]:
    """All tensors of a nest of dataclasses and mappings, by path."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    if isinstance(value, Mapping):
        parts = dict(value)
    else:
        parts = (
            {f.name: getattr(value, f.name) for f in fields(value)} if hasattr(value, "__dataclass_fields__") else {}
        )
    return {f"{name}.{path}": leaf for name, part in parts.items() for path, leaf in leaves(part).items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_stale_is_left(data: st.DataObject) -> None:
    """Whatever the array held before, all views are the same."""
    step = Step(data)
    one, other = leaves(step.views(garbage=-77)), leaves(step.views(garbage=424242))
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.int32), other[name].view(torch.int32)), name
    assert step.fill()[1] == step.size, "words and block tables, no more"


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_tiles_are_passed_on(data: st.DataObject) -> None:
    step = Step(data)
    mappings = step.views().mappings
    assert set(mappings) == set(step.tiles)
    for group, capacity in step.shape.tiles:
        expected = leaves(view_tiles(torch.from_numpy(step.tiles[group]), capacity))
        for name, tensor in leaves(mappings[group]).items():
            assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), (group, name)
        assert mappings[group].shape == capacity


def test_an_empty_step_uses_nothing() -> None:
    shape = StepShape(8, 4, 3, 4)
    out = np.full(shape.words, 9, dtype=np.int32)
    assert fill(out, shape, [], {}, 16) == shape.words
    views = StepViews.of(torch.from_numpy(out), shape, 16, LONGEST)
    assert views.attention.slots.tolist() == views.sources.tolist() == [-1] * 8
    assert views.attention.decode_lens.tolist() == [0] * 4
    assert views.attention.query_blocks.tolist() == [[-1] * 4] * 3
    assert not views.attention.tables.numel()
    assert len(query_blocks([])) == 0


def test_two_host_arrays_take_turns() -> None:
    staging = Staging(8, CPU)
    address = staging.words.data_ptr()
    first = staging.begin()
    first[:] = 1
    staging.send(8)
    second = staging.begin()
    assert not np.shares_memory(first, second), "the first copy may still be under way"
    second[:] = 2
    staging.send(3)
    assert staging.words.tolist() == [2, 2, 2, 1, 1, 1, 1, 1], "only what was asked for is sent"
    assert np.shares_memory(staging.begin(), first)
    assert staging.words.data_ptr() == address, "graphs have captured the address"
