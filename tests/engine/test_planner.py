"""The plan of a step's tiles: kept while it is the same, made anew otherwise, of one kind for all groups."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.page_lease import PageLease
from adapters_store.types import BASE, GROUPS
from kernels.tiles import Kind, TilePlan, TileShape, write_tiles
from server.engine.plan import Chunk
from server.engine.planner import TilePlanner, no_tiles
from server.engine.sequence import Request, SamplingParams, Sequence

PARAMS = SamplingParams()


def lease(seed: int = 0, **pages: tuple[int, ...]) -> PageLease:
    full = {group.name: pages.get(group.name, ()) for group in GROUPS}
    weights = {name: tuple(0.5 + seed + page for page in own) for name, own in full.items()}
    ranks = {name: tuple(1 + page % 16 for page in own) for name, own in full.items()}
    return PageLease(BASE, full, weights, ranks, ())


def everywhere(*pages: int) -> PageLease:
    return lease(qkv=pages, o=pages, gate_up=pages, down=pages)


def sequence(owned: PageLease | None, length: int = 40) -> Sequence:
    made = Sequence.of(Request("r", tuple(range(length)), PARAMS))
    made.lease = owned
    return made


def advance(chunks: list[Chunk]) -> list[Chunk]:
    """The same sequences one token further, as in steady decoding."""
    return [Chunk(chunk.sequence, chunk.start + 1, chunk.num_tokens, chunk.samples) for chunk in chunks]


def matrix(plan: TilePlan, rows: int) -> dict[tuple[int, int], float]:
    """Weight by (row, page) that the tiles say."""
    found = {}
    for page, tile_rows, weights in zip(plan.tile_pages, plan.tile_rows, plan.tile_weights, strict=True):
        for row, weight in zip(tile_rows, weights, strict=True):
            if row >= 0 and weight:
                assert row < rows
                assert (int(row), int(page)) not in found
                found[int(row), int(page)] = float(weight)
    return found


def expected(group: str, chunks: list[Chunk]) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], float] = {}
    row = 0
    for chunk in chunks:
        owned = chunk.sequence.lease
        for offset in range(chunk.num_tokens):
            if owned is not None:
                found |= {(row + offset, p): w for p, w in zip(owned.pages[group], owned.weights[group], strict=True)}
        row += chunk.num_tokens
    return found


LEASES = [
    None,
    everywhere(3),
    everywhere(0, 5),
    everywhere(7, 3, 1),
    lease(qkv=(3, 4)),
    lease(down=(2,), o=(9, 3)),
    lease(1, qkv=(3,), o=(3,), gate_up=(3,), down=(3,)),
]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(LEASES), st.integers(1, 3) | st.just(33)), min_size=1, max_size=12),
    st.sampled_from((16, 64)),
)
def test_the_tiles_are_the_weights_of_the_rows(rows: list[tuple[PageLease | None, int]], block_rows: int) -> None:
    chunks = [Chunk(sequence(owned), 0, count, samples=True) for owned, count in rows]
    total = sum(count for _, count in rows)
    tiles = TilePlanner().plan(chunks, block_rows)
    for group in GROUPS:
        weights = expected(group.name, chunks)
        assert (group.name in tiles.plans) == bool(weights)
        if weights:
            plan = tiles.plans[group.name]
            assert plan.shape.block_rows == block_rows
            assert matrix(plan, total) == weights
    assert len({plan.shape.kind for plan in tiles.plans.values()}) <= 1


def test_steady_decoding_keeps_the_plan_and_its_words() -> None:
    planner = TilePlanner()
    chunks = [Chunk(sequence(owned), 5, 1, samples=True) for owned in (everywhere(1), None, everywhere(2, 3))]
    first = planner.plan(chunks, 16)
    capacity = replace(first.plans["qkv"].shape, tiles=32, blocks=32, pages=32)
    words = first.words("qkv", capacity)
    again = planner.plan(advance(chunks), 16)
    assert again is first
    assert again.words("qkv", capacity) is words
    larger = replace(capacity, tiles=64)
    assert again.words("qkv", larger).size == larger.words != words.size
    by_hand = np.empty(capacity.words, dtype=np.int32)
    write_tiles(first.plans["qkv"], capacity, by_hand)
    assert np.array_equal(words, by_hand)


@pytest.mark.parametrize("change", ["lease", "rows", "order", "fewer", "more", "block_rows"])
def test_what_changes_is_planned_anew(change: str) -> None:
    planner = TilePlanner()
    one, two = everywhere(1), everywhere(2, 3)
    chunks = [Chunk(sequence(one), 5, 1, samples=True), Chunk(sequence(two), 5, 1, samples=True)]
    first = planner.plan(chunks, 16)
    block_rows = 64 if change == "block_rows" else 16
    if change == "lease":  # of equal contents, but its pages may hold another adapter by now
        chunks[0].sequence.lease = everywhere(1)
    elif change == "rows":
        chunks[1] = replace(chunks[1], num_tokens=2)
    elif change == "order":
        chunks.reverse()
    elif change == "fewer":
        chunks.pop()
    elif change == "more":
        chunks.append(Chunk(sequence(None), 0, 4, samples=False))
    second = planner.plan(chunks, block_rows)
    assert second is not first
    rows = sum(chunk.num_tokens for chunk in chunks)
    for group in GROUPS:
        assert matrix(second.plans[group.name], rows) == expected(group.name, chunks)


def test_all_groups_have_the_kind_that_suits_the_first() -> None:
    """Every row has a page of its own and one of all in qkv, which is "shared"; in o alone it would be "rows"."""
    mixed = [lease(qkv=(0, i + 1), o=(0,)) for i in range(16)]
    tiles = TilePlanner().plan([Chunk(sequence(owned), 5, 1, samples=True) for owned in mixed], 16)
    assert {name: plan.shape.kind for name, plan in tiles.plans.items()} == {"qkv": "shared", "o": "shared"}
    alone = TilePlanner().plan([Chunk(sequence(lease(o=(0,))), 5, 1, samples=True) for _ in mixed], 16)
    assert {name: plan.shape.kind for name, plan in alone.plans.items()} == {"o": "rows"}


def test_rows_without_pages_need_no_tiles() -> None:
    planner = TilePlanner()
    bare = lease()  # of an adapter whose targets are all elsewhere
    chunks = [Chunk(sequence(None), 0, 3, samples=True), Chunk(sequence(bare), 0, 3, samples=True)]
    assert planner.plan(chunks, 16).plans == {}
    assert planner.plan([], 16).plans == {}


@pytest.mark.parametrize("kind", ["rows", "shared"])
def test_no_tiles_fit_into_everything_and_mark_all_as_unused(kind: Kind) -> None:
    for sizes in ((0, 0, 0), (5, 3, 2), (32, 8, 32)):
        capacity = TileShape(kind, 16, *sizes)
        plan = no_tiles(capacity)
        assert plan.fits(capacity)
        out = np.full(capacity.words, 99, dtype=np.int32)
        write_tiles(plan, capacity, out)
        offset = 0
        for name, size in capacity.sections():
            unused = -1 if name in ("tile_pages", "tile_rows", "block_rows", "pages") else 0
            assert (out[offset : offset + size] == unused).all(), name
            offset += -(-size // 4) * 4
