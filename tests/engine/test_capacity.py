"""The capacities of captured steps: what is chosen holds the step, and nothing smaller would."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.page_lease import PageLease
from adapters_store.types import BASE, GROUPS
from kernels.attention import query_blocks
from kernels.tiles import TilePlan
from server.engine.capacity import (
    COMMON_TILES,
    DECODE_BLOCK,
    DECODE_TILES,
    KINDS,
    MIXED_BLOCK,
    MIXED_TILES,
    Capacities,
)
from server.engine.plan import Chunk
from server.engine.planner import StepTiles, TilePlanner, no_tiles
from server.engine.sequence import Request, SamplingParams, Sequence
from server.engine.staging import StepShape, fill

PARAMS = SamplingParams()
BLOCK_SIZE = 16
SETTINGS = [(1, 1), (1, 2), (3, 5), (8, 64), (64, 512), (40, 130), (200, 256), (256, 4096)]


def lease(pages: Mapping[str, tuple[int, ...]]) -> PageLease:
    full = {group.name: tuple(pages.get(group.name, ())) for group in GROUPS}
    weights = {name: (0.5,) * len(own) for name, own in full.items()}
    ranks = {name: (16,) * len(own) for name, own in full.items()}
    return PageLease(BASE, full, weights, ranks, ())


def chunk_of(new: int, owned: PageLease | None, past: int = 3, rest: int = 0) -> Chunk:
    sequence = Sequence.of(Request("r", tuple(range(past + new + rest)), PARAMS))
    sequence.num_computed, sequence.lease = past, owned
    sequence.blocks = list(range(-(-len(sequence) // BLOCK_SIZE)))
    return Chunk.of(sequence, new)


@st.composite
def leases(draw: st.DrawFn) -> list[PageLease | None]:
    """Some that share pages, some that touch a part of the groups only, and none at all."""
    pages = st.lists(st.integers(0, 60), max_size=6, unique=True).map(tuple)
    targets = st.sampled_from([("qkv", "o", "gate_up", "down"), ("qkv",), ("down", "o")])
    one = st.builds(lambda names, own: lease(dict.fromkeys(names, own)), targets, pages)
    return draw(st.lists(st.none() | one, min_size=1, max_size=6))


@st.composite
def steps(draw: st.DrawFn) -> tuple[Capacities, list[Chunk]]:
    """Settings and a step that they allow."""
    capacities = Capacities(*draw(st.sampled_from(SETTINGS)))
    owners, numbers = draw(leases()), np.random.default_rng(draw(st.integers(0, 999)))
    count = draw(st.integers(1, capacities.max_num_seqs))
    budget = capacities.max_batch_tokens - count
    chunks = []
    prompts = draw(st.integers(0, 3) | st.just(count))
    for index in range(count):
        more = int(numbers.integers(1, max(2, budget // max(1, prompts) + 1))) if index < prompts and budget else 0
        budget -= min(more, budget)
        owner = owners[int(numbers.integers(len(owners)))]
        chunks.append(chunk_of(1 + more, owner, past=int(numbers.integers(40)), rest=int(numbers.integers(3)) // 2))
    assert sum(chunk.num_tokens for chunk in chunks) <= capacities.max_batch_tokens
    return capacities, sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)


def planned(chunks: list[Chunk]) -> tuple[int, bool, StepTiles]:
    rows = sum(chunk.num_tokens for chunk in chunks)
    decoding = rows == len(chunks)
    return rows, decoding, TilePlanner().plan(chunks, DECODE_BLOCK if decoding else MIXED_BLOCK)


def holds(shape: StepShape, chunks: list[Chunk], plans: Mapping[str, TilePlan]) -> bool:
    decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    prompts = [(0, 0, chunk.num_tokens, chunk.start) for chunk in chunks if chunk.num_tokens > 1]
    capacities = dict(shape.tiles)
    return (
        shape.rows >= sum(chunk.num_tokens for chunk in chunks)
        and shape.decodes >= decodes
        and shape.query_blocks >= len(query_blocks(prompts))
        and shape.logits >= sum(chunk.samples for chunk in chunks)
        and set(capacities) == set(plans)
        and all(plan.fits(capacities[group]) for group, plan in plans.items())
    )


@settings(max_examples=150, deadline=None)
@given(steps())
def test_the_chosen_shape_holds_the_step(step: tuple[Capacities, list[Chunk]]) -> None:
    capacities, chunks = step
    rows, decoding, tiles = planned(chunks)
    shape = capacities.smallest(rows, decoding, tiles.plans)
    if shape is None:
        most = (DECODE_TILES if decoding else MIXED_TILES)[-1]
        largest = (capacities.decode_shapes if decoding else capacities.mixed_shapes)[-1]
        too_many = any(max(plan.shape.tiles, plan.shape.pages) > most for plan in tiles.plans.values())
        assert rows > largest.rows or too_many, "without a graph only where no graph is large enough"
        return
    assert holds(shape, chunks, tiles.plans)
    assert shape.words <= capacities.words
    out = np.zeros(shape.words + sum(len(chunk.sequence.blocks) for chunk in chunks), dtype=np.int32)
    words = {group: tiles.words(group, capacity) for group, capacity in shape.tiles}
    assert fill(out, shape, chunks, words, BLOCK_SIZE) == len(out)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_nothing_smaller_holds_the_step(step: tuple[Capacities, list[Chunk]]) -> None:
    capacities, chunks = step
    rows, decoding, tiles = planned(chunks)
    shape = capacities.smallest(rows, decoding, tiles.plans)
    if shape is None:
        return
    shapes = capacities.decode_shapes if decoding else capacities.mixed_shapes
    assert all(other.rows < rows for other in shapes if other.rows < shape.rows)
    for _, chosen in shape.tiles:
        for fewer in (size for size in (DECODE_TILES if decoding else MIXED_TILES) if size < chosen.tiles):
            room = capacities.tiles(shape, decoding, chosen.kind, fewer)
            assert not all(plan.fits(room) for plan in tiles.plans.values())


def every_shape(capacities: Capacities) -> list[StepShape]:
    """All that `smallest` can return, with tiles in every group."""
    found: list[StepShape] = []
    for decoding, shapes, sizes in (
        (True, capacities.decode_shapes, DECODE_TILES),
        (False, capacities.mixed_shapes, MIXED_TILES),
    ):
        found += shapes
        for shape, kind, size in product(shapes, KINDS, sizes):
            room = capacities.tiles(shape, decoding, kind, size)
            tiles = tuple((group.name, room) for group in GROUPS)
            found.append(StepShape(shape.rows, shape.decodes, shape.query_blocks, shape.logits, tiles))
    return found


@pytest.mark.parametrize(("seqs", "tokens"), SETTINGS)
def test_words_are_those_of_the_largest(seqs: int, tokens: int) -> None:
    capacities = Capacities(seqs, tokens)
    assert capacities.words == max(shape.words for shape in every_shape(capacities))


@pytest.mark.parametrize(("seqs", "tokens"), SETTINGS)
def test_no_part_is_larger_than_the_rows(seqs: int, tokens: int) -> None:
    """Decoding rows are token rows, used or not: attention writes every one of them."""
    for shape in every_shape(Capacities(seqs, tokens)):
        assert shape.decodes <= shape.rows
        assert shape.rows <= tokens


@pytest.mark.parametrize(("seqs", "tokens"), SETTINGS)
def test_shapes_reach_the_limits_and_grow(seqs: int, tokens: int) -> None:
    capacities = Capacities(seqs, tokens)
    decode, mixed = capacities.decode_shapes, capacities.mixed_shapes
    assert decode[-1] == capacities.smallest(seqs, True, {})
    assert decode[-1].rows >= min(seqs, 1024)
    assert mixed[-1].rows >= min(tokens, 2048)
    for shapes in (decode, mixed):
        assert [shape.rows for shape in shapes] == sorted({shape.rows for shape in shapes})


def test_too_many_rows_run_without_a_graph() -> None:
    capacities = Capacities(64, 5000)
    assert capacities.smallest(2048, False, {}) is not None
    assert capacities.smallest(2049, False, {}) is None


def test_too_many_tiles_run_without_a_graph() -> None:
    capacities = Capacities(16, 64)
    pages = lease({"qkv": tuple(range(129))})
    chunks = [chunk_of(1, pages) for _ in range(16)]
    rows, decoding, tiles = planned(chunks)
    shape = capacities.smallest(rows, decoding, tiles.plans)
    assert shape is not None
    assert dict(shape.tiles)["qkv"].tiles == 512
    assert list(dict(shape.tiles)) == ["qkv"], "groups that no row uses take no room"
    many = [chunk_of(1, lease({"qkv": tuple(range(129 * i, 129 * i + 129))})) for i in range(16)]
    assert capacities.smallest(*planned(many)[:2], planned(many)[2].plans) is None


@pytest.mark.parametrize(("seqs", "tokens"), SETTINGS[1:])
def test_common_shapes_are_used_and_come_largest_first(seqs: int, tokens: int) -> None:
    capacities = Capacities(seqs, tokens)
    common, possible = list(capacities.common()), every_shape(capacities)
    assert len(set(common)) == len(common)
    for shape in common:
        tiles = {room for _, room in shape.tiles}
        assert len(tiles) <= 1
        assert replace(shape, tiles=tuple((group.name, room) for room in tiles for group in GROUPS)) in possible
        decoding = shape.query_blocks == 0 and shape.rows == shape.decodes
        plans = {group: no_tiles(tiles) for group, tiles in shape.tiles}
        found = capacities.smallest(shape.rows, decoding, plans)
        assert found is not None
        assert (found.rows, set(dict(found.tiles))) == (shape.rows, set(dict(shape.tiles)))
        assert all(tiles.tiles <= COMMON_TILES for _, tiles in shape.tiles)
    for decoding in (False, True):
        rows = [s.rows for s in common if (s.query_blocks == 0 and s.rows == s.decodes) is decoding]
        assert rows == sorted(rows, reverse=True)
    assert set(capacities.decode_shapes) | set(capacities.mixed_shapes) <= set(common)
