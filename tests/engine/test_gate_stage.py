"""What the device is told of gated rows: captured steps route as eager ones do, whatever shares the step."""

from collections.abc import Sequence as Rows
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.page_lease import PageLease
from adapters_store.types import GROUPS, TARGETS, LinearShape, Mix
from kernels.gate_rows import Gated
from kernels.gated_pages import GatedPlan, GatedShape
from kernels.gates import gate_scale
from kernels.tiles import PAGE_RANK, TilePlan
from routing.token_gates import TokenGates
from routing.token_router import TokenGateFactory
from routing.token_slots import TokenSlots
from server.engine.capacity import Capacities
from server.engine.decided_rows import BothRouters, DecidedRows
from server.engine.gate_parts import make_router, part_shares
from server.engine.gate_stage import gate_words, staged_shares
from server.engine.gates import GateShape, GateUse
from server.engine.plan import Chunk
from server.engine.planner import TilePlanner, nothing
from server.engine.sequence import Request, SamplingParams, Sequence
from server.engine.staging import StepShape, StepViews, Words, fill

CPU = torch.device("cpu")
PARAMS = SamplingParams()
SHAPE = LinearShape(2, dict.fromkeys(TARGETS, 16), dict.fromkeys(TARGETS, 16))
SLOTS = GateShape(3, 32)
ALL = tuple(group.name for group in GROUPS)
ADAPTERS = {"a": (1, ALL), "b": (2, ("qkv",)), "c": (1, ("qkv", "down")), "d": (3, ALL), "e": (1, ("o", "down"))}
"""Pages in each group, and groups, by digest; the pages of an adapter are the same in all groups."""

PAGES = {
    digest: tuple(range(first, first + size))
    for digest, (size, _), first in zip(ADAPTERS, ADAPTERS.values(), (0, 3, 9, 12, 20), strict=True)
}


def lease(digests: Rows[str]) -> PageLease:
    owned = {
        group: tuple(len(PAGES[digest]) if group in ADAPTERS[digest][1] else 0 for digest in digests) for group in ALL
    }
    pages = {
        group: tuple(page for digest in digests if group in ADAPTERS[digest][1] for page in PAGES[digest])
        for group in ALL
    }
    weights = {group: (0.5,) * len(own) for group, own in pages.items()}
    ranks = {group: (PAGE_RANK,) * len(own) for group, own in pages.items()}
    return PageLease(Mix(tuple((d, 1.0) for d in digests)), pages, weights, ranks, tuple(digests), owned)


class Router:
    """Gates over some of the adapters, in a slot."""

    def __init__(self, slot: int, rows: tuple[str, ...], targets: Rows[str], null: bool) -> None:
        generator = torch.Generator().manual_seed(slot)
        gates = {
            (layer, target): torch.randn(len(rows) + null, 16, generator=generator)
            for layer in range(SHAPE.num_layers)
            for target in targets
        }
        self.slot, self.rows, self.null = slot, rows, null
        self.gates = TokenGates(gates, CPU, torch.float32)

    def sequence(self, length: int, top_k: int, temperature: float, hidden: int) -> Sequence:
        """One that may not use every `hidden`-th adapter."""
        rows = tuple(None if i % hidden == hidden - 1 else digest for i, digest in enumerate(self.rows))
        use = GateUse(str(self.slot), "", rows, top_k, temperature, self.null)
        sequence = Sequence.of(Request("r", tuple(range(length)), PARAMS, gates=use))
        sequence.gates, sequence.gate_slot = self.gates, self.slot
        usable = tuple(sorted({row for row in rows if row is not None}))
        sequence.lease = lease(usable) if usable else None
        return sequence


ROUTERS = (
    Router(2, ("b", "a", "c"), TARGETS, null=True),
    Router(0, ("d", "e", "d", "a"), ("q_proj", "v_proj", "o_proj", "down_proj"), null=False),
)


@pytest.fixture(scope="module")
def slots() -> TokenSlots:
    made = TokenSlots(SHAPE, SLOTS, CPU, torch.float32)
    for gates in made.groups.values():
        gates.fill_(float("nan"))  # what nobody may read
    for router in ROUTERS:
        made.load(router.slot, router.gates)
    return made


@st.composite
def steps(draw: st.DrawFn) -> list[Chunk]:
    """Rows of both routers, with all options, beside explicit mixes and base rows."""
    lengths = [1] * draw(st.integers(0, 5)) + draw(st.lists(st.integers(2, 5), max_size=3))
    chunks = []
    for length in lengths:
        rest = draw(st.sampled_from((0, 0, 2)))
        kind = draw(st.sampled_from((0, 0, 1, 1, "mix", "base")))
        if isinstance(kind, int):
            options = draw(st.integers(1, 5)), draw(st.sampled_from((1.0, 0.2, 30.0))), draw(st.sampled_from((2, 3, 9)))
            sequence = ROUTERS[kind].sequence(length + rest, *options)
        else:
            sequence = Sequence.of(Request("r", tuple(range(length + rest)), PARAMS))
            sequence.lease = lease(("a", "c")) if kind == "mix" else None
        sequence.blocks = [0]
        chunks.append(Chunk.of(sequence, length))
    return chunks


def staged(chunks: list[Chunk], spare: int, block_rows: int = 16) -> tuple[StepViews, dict[str, Any]]:
    """The views of a shape with room to spare, over words that were garbage, and the plans."""
    tiles = TilePlanner(SLOTS).plan(chunks, block_rows)
    rows = sum(chunk.num_tokens for chunk in chunks)
    shapes = tuple(
        (group, GatedShape(rows + spare, plan.shape.pages + 8 * spare)) for group, plan in tiles.plans.items()
    )
    shape = StepShape(rows + spare, rows + spare, 8, len(chunks) + spare, shapes, SLOTS)
    out: Words = np.full(shape.words + len(chunks), -77, np.int32)
    words = {group: tiles.words(group, own) for group, own in shapes}
    filled = fill(out, shape, chunks, words, 16, tiles.gates)
    return StepViews.of(torch.from_numpy(out[:filled]), shape, 16, 64), dict(tiles.plans)


@settings(max_examples=16, deadline=None)
@given(chunks=steps(), spare=st.integers(0, 3), number=st.integers(0, 3))
def test_captured_steps_route_as_eager_ones(slots: TokenSlots, chunks: list[Chunk], spare: int, number: int) -> None:
    """In one group of linears, since the interpreter takes its time."""
    if all(chunk.sequence.gates is None for chunk in chunks):
        return
    views, plans = staged(chunks, spare)
    assert views.gates is not None
    rows = sum(chunk.num_tokens for chunk in chunks)
    columns = {group: tuple(plan.pages.tolist()) for group, plan in plans.items()}
    eager = make_router(TokenGateFactory(SHAPE, CPU, torch.float32), chunks, columns, CPU)
    assert eager is not None
    captured = slots.router(views.gates)
    for group in list(plans)[number : number + 1]:
        x = torch.randn(rows + spare, 16, generator=torch.Generator().manual_seed(1))
        found = gate_scale(x, captured.scale(1, group, x, views.mappings[group]))
        expected = eager.scale(1, group, x[:rows], None)
        assert isinstance(expected, torch.Tensor)
        assert found.shape[2] == len(views.mappings[group].pages)
        torch.testing.assert_close(found[:, :rows, : expected.shape[2]], expected, rtol=1e-4, atol=1e-6)
        assert (found[:, rows:] == 1.0).all()
    told = staged_shares(chunks, views.gates.rows.totals).read()
    for chunk, one, other in zip(chunks, told, part_shares(chunks, eager).read(), strict=True):
        assert one == (pytest.approx(other, abs=1e-5) if chunk.samples else ())


def test_decided_factors_go_with_the_gates(slots: TokenSlots) -> None:
    sequence = ROUTERS[0].sequence(4, 2, 1.0, 9)
    sequence.blocks = [0]
    views, _ = staged([Chunk(sequence, 3, 1, samples=True)], 0)
    assert views.gates is not None
    pages, x = views.mappings["o"].pages, torch.randn(1, 16)
    decided = DecidedRows(torch.tensor([1]), {"o": torch.rand(2, 1, 2, len(pages))})
    gated = BothRouters(slots.router(views.gates), decided).scale(1, "o", x, views.mappings["o"])
    assert isinstance(gated, Gated)
    assert gated.factors is not None
    assert torch.equal(gated.factors, decided.tables["o"][1, :, 1:])


def test_padding_is_routed_nowhere(slots: TokenSlots) -> None:
    """What a graph is captured with: no chunk, no page."""
    capacity = GatedShape(3, 4)
    shape = StepShape(3, 3, 0, 3, tuple((group, capacity) for group in ALL), SLOTS)
    tiles = nothing(shape)
    out: Words = np.full(shape.words, -77, np.int32)
    fill(out, shape, [], {group: tiles.words(group, capacity) for group in ALL}, 16)
    views = StepViews.of(torch.from_numpy(out), shape, 16, 64)
    assert views.gates is not None
    x = torch.randn(3, 16)
    assert (gate_scale(x, slots.router(views.gates).scale(0, "qkv", x, views.mappings["qkv"])) == 1.0).all()
    assert (views.gates.rows.totals == 0).all()


class TestPlans:
    """Steady decoding plans once; whatever changes what gates may do plans anew."""

    def test_the_same_rows_keep_their_words(self) -> None:
        planner = TilePlanner(SLOTS)
        sequences = [router.sequence(9, 2, 1.0, 9) for router in ROUTERS]
        first = planner.plan([Chunk(s, 8, 1, samples=True) for s in sequences], 16)
        again = planner.plan([Chunk(s, 9, 1, samples=True) for s in sequences], 16)
        assert first is again
        assert first.gates is again.gates is not None

    def test_a_prompt_that_ends_has_shares(self) -> None:
        planner, sequence = TilePlanner(SLOTS), ROUTERS[0].sequence(9, 2, 1.0, 9)
        found = []
        for samples in (False, True):
            gates = planner.plan([Chunk(sequence, 0, 3, samples)], 16).gates
            assert gates is not None
            found.append(gates["gates_shares"].tolist())
        assert found == [[-1, -1, -1], [-1, -1, 0]]

    def test_another_request_without_adapters_in_its_place(self) -> None:
        planner, found = TilePlanner(SLOTS), []
        for temperature in (1.0, 2.0):
            sequence = ROUTERS[0].sequence(4, 2, temperature, 1)
            assert sequence.lease is None
            gates = planner.plan([Chunk(sequence, 3, 1, samples=True)], 16).gates
            assert gates is not None
            found.append(gates["gates_temperatures"].view(np.float32).tolist())
        assert found == [[1.0], [2.0]]

    def test_no_gates_without_gated_rows(self) -> None:
        sequence = Sequence.of(Request("r", (1, 2), PARAMS))
        sequence.lease = lease(("a", "b"))
        tiles = TilePlanner(SLOTS).plan([Chunk(sequence, 1, 1, samples=True)], 16)
        assert tiles.gates is None
        assert all(isinstance(plan, TilePlan) for plan in tiles.plans.values())

    def test_plans_for_gates_beside_tiles(self) -> None:
        chunk = Chunk(ROUTERS[0].sequence(4, 2, 1.0, 9), 3, 1, samples=True)
        plans = TilePlanner(SLOTS).plan([chunk], 16).plans
        assert all(isinstance(plan, GatedPlan) for plan in plans.values())


def test_extreme_options_fit_into_words() -> None:
    sequence = ROUTERS[0].sequence(4, 1 << 40, 1e-300, 9)
    words = gate_words([Chunk(sequence, 3, 1, samples=True)], {}, SLOTS)
    assert words["gates_top_k"].tolist() == [32]
    assert 0 < words["gates_temperatures"].view(np.float32)[0] < 1e-30


@settings(max_examples=60, deadline=None)
@given(chunks=steps(), max_num_seqs=st.integers(8, 300), decoding=st.booleans())
def test_a_graph_for_gated_rows_holds_the_step(chunks: list[Chunk], max_num_seqs: int, decoding: bool) -> None:
    if decoding:
        chunks = [Chunk(chunk.sequence, chunk.start, 1, chunk.samples) for chunk in chunks]
    decoding = all(chunk.num_tokens == 1 for chunk in chunks)
    tiles = TilePlanner(SLOTS).plan(chunks, 16 if decoding else 64)
    if tiles.gates is None:
        return
    rows = sum(chunk.num_tokens for chunk in chunks)
    capacities = Capacities(max_num_seqs, max(512, max_num_seqs), SLOTS)
    shape = capacities.smallest(rows, decoding, tiles.plans, gated=True)
    assert shape is not None
    assert shape.gates == SLOTS
    assert shape.words <= capacities.words
    out: Words = np.full(shape.words + len(chunks), -77, np.int32)
    words = {group: tiles.words(group, own) for group, own in shape.tiles}
    assert fill(out, shape, chunks, words, 16, tiles.gates) <= len(out)


def test_graphs_for_gated_rows_are_captured_at_the_start_where_there_are_slots() -> None:
    plain, gated = (list(Capacities(64, 512, slots).common()) for slots in (None, SLOTS))
    assert all(shape.gates is None for shape in plain)
    own = [shape for shape in gated if shape.gates is not None]
    assert [shape for shape in gated if shape.gates is None] == plain
    assert {shape.rows for shape in own} == {shape.rows for shape in plain}
    assert len(set(own)) == len(own)


def test_sections_do_not_overlap() -> None:
    capacity = GatedShape(37, 20)
    shape = StepShape(37, 5, 3, 6, tuple((group, capacity) for group in ALL), SLOTS)
    sections = list(shape.sections.values())
    assert all(one.stop <= other.start for one, other in pairwise(sections))
    assert shape.words >= max(section.stop for section in sections)
    assert {f"gates_columns_{group}" for group in ALL} <= shape.sections.keys()
