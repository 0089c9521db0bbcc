"""Who yields to whom, case by case and in arbitrary simulations."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pytest
from contest import ROOM, flood, text
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import Simulation, alone, request, simulate

from server.engine.blocks import BlockPool
from server.engine.fairness import FairQueue
from server.engine.plan import Chunk
from server.engine.sequence import Request, Sequence
from server.engine.shares import Shares


class Table:
    """Sequences that run, of 10 tokens and one block each, and what their tenants were served beside `t`."""

    def __init__(self, tenants: str, excess: float, weights: Mapping[str, float] = MappingProxyType({})) -> None:
        self.queue = FairQueue()
        self.blocks = BlockPool(64, 16)
        self.shares = Shares(self.queue, self.blocks, patience=100.0, quantum=8)
        self.running: list[Sequence] = []
        self.weights = weights
        for place, tenant in enumerate(tenants):
            sequence = self.wait(f"{tenant}{place}", tenant)
            sequence.blocks = self.blocks.allocate(1) or []
            self.queue.started(sequence)
            self.running.append(sequence)
        self.claimant = self.wait("claimant", "t")
        for tenant in set(tenants) - {"t"}:
            self.queue.counters[tenant] = excess / weights.get(tenant, 1.0)
        self.queue.counters["t"] = 0.0

    def wait(self, name: str, tenant: str) -> Sequence:
        sequence = Sequence.of(request(name, 9, max_tokens=50, tenant=tenant, weight=self.weights.get(tenant, 1.0)))
        sequence.tokens.append(1)
        self.queue.push(sequence)
        return sequence

    def yields(self, *, row: bool = True, missing: int = 0, spared: frozenset[str] = frozenset()) -> list[int] | None:
        """Their places."""
        found = self.shares.victims(self.claimant, self.running, spared, row=row, missing=missing)
        return None if found is None else [self.running.index(sequence) for sequence in found]


def test_a_row_is_taken_for_more_than_it_costs() -> None:
    assert Table("aaaa", 110.0).yields() is None
    assert Table("aaaa", 110.5).yields() == [3]


def test_all_that_is_taken_is_paid_for() -> None:
    assert Table("aaaaaa", 120.0).yields(missing=2) is None
    assert Table("aaaaaa", 120.5).yields(missing=2) == [5, 4]
    assert Table("aaaaaa", 129.0).yields(row=False, missing=3) is None
    assert Table("aaaaaa", 131.0).yields(row=False, missing=3) == [5, 4, 3]


@pytest.mark.parametrize(
    ("tenants", "weights", "expected"),
    [
        ("aaat", {}, [2]),  # 3 : 1 becomes 2 : 2
        ("aatt", {}, None),
        ("aaatt", {}, None),  # 3 : 2 would become 2 : 3
        ("a", {}, [0]),  # the first row, whatever is left
        ("ab", {}, [1]),
        ("aabbb", {}, [4]),  # of who holds most
        ("aaabb", {"b": 0.5}, [4]),  # for its weight
        ("aaatt", {"t": 2.0}, [2]),
        ("aaaattttt", {"t": 3.0}, [3]),
        ("aaatttttt", {"t": 3.0}, None),
        ("attta", {"a": 0.25}, [4]),
    ],
)
def test_who_yields_keeps_as_much_for_its_weight(
    tenants: str, weights: dict[str, float], expected: list[int] | None
) -> None:
    assert Table(tenants, 1000.0, weights).yields() == expected


def test_who_holds_most_is_left_alone_if_it_was_not_served_more() -> None:
    table = Table("aaabb", 1000.0)
    table.queue.counters["a"] = 50.0
    assert table.yields() == [4]
    assert table.yields(spared=frozenset("b")) is None


def test_the_last_that_may_yield_does() -> None:
    table = Table("aaaa", 1000.0)
    table.running[3].kept_until = 11
    assert table.yields() == [2]
    table.running[3].tokens.append(1)
    assert table.yields() == [3]
    table.running[3].tokens += [1] * 47
    table.running[3].num_pending = 1  # it ends with the pending token
    assert table.yields() == [2]


def test_blocks_are_taken_from_who_holds_most_of_them() -> None:
    table = Table("aaabtt", 1000.0)
    table.running[3].blocks += table.blocks.allocate(9) or []
    assert table.yields(row=False, missing=4) is None, "it would be left with none"
    table = Table("abbt", 1000.0)
    table.running[2].blocks += table.blocks.allocate(9) or []
    table.running[1].blocks += table.blocks.allocate(3) or []
    assert table.yields(row=False, missing=4) == [2]
    assert table.yields(row=False, missing=11) is None


def test_how_long_a_sequence_stays() -> None:
    shares = Shares(FairQueue(), BlockPool(4, 16), quantum=8)
    sequence = Sequence.of(request("r", 9))
    shares.started(sequence, again=False)
    assert sequence.kept_until == 10
    sequence.num_pending = 1
    sequence.num_computed = 4
    shares.started(sequence, again=True)
    assert sequence.kept_until == 10 + 8 + 6


def test_the_tenant_that_is_served_less_does_not_make_room_for_the_growth_of_the_flood() -> None:
    simulation = simulate(num_blocks=100, max_num_seqs=8)
    for item in flood(4, 8, 90):
        simulation.add(item)
    simulation.step()
    simulation.add(request("last", (1, 2), max_tokens=90, tenant="modest"))
    simulation.step()
    last = simulation.sequences["last"]
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert simulation.scheduler.yielded == 0
    assert last in simulation.scheduler.running
    simulation.run()


def test_shared_blocks_count_once() -> None:
    """A prefix that all of a tenant's sequences share is freed by the last of them alone."""
    simulation = simulate(num_blocks=60, max_num_seqs=8)
    prefix = tuple(range(1, 41))
    simulation.add(request("warm", (*prefix, 1), max_tokens=1, tenant="flood"))
    simulation.run()
    for number in range(4):
        simulation.add(request(f"r{number}", (*prefix, 50 + number), max_tokens=8, tenant="flood"))
    simulation.step()
    blocks = simulation.scheduler.blocks
    holders = [sequence.blocks for sequence in simulation.scheduler.running]
    assert blocks.num_used == 10 + 4
    assert [blocks.freed_by(holders[:number]) for number in range(5)] == [0, 1, 2, 3, 14]
    simulation.run()


class Watched(Simulation):
    """Memory is ample, so that rows and the budget of a step are all that can be short."""

    def check_plan(self, chunks: list[Chunk], before: list[Sequence]) -> None:
        super().check_plan(chunks, before)
        scheduler = self.scheduler
        if sum(chunk.num_tokens for chunk in chunks) < scheduler.max_batch_tokens:
            free = scheduler.max_num_seqs - len(scheduler.running)
            assert not free or all(sequence.num_pending for sequence in scheduler.waiting), "a row is idle"


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request


@st.composite
def arrivals(draw: st.DrawFn, tenants: str) -> list[Arrival]:
    weights = {tenant: draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])) for tenant in tenants}
    found = []
    for number in range(draw(st.integers(2, 20))):
        tenant = draw(st.sampled_from(tenants))
        prompt, max_tokens = text(number, draw(st.integers(1, 30))), draw(st.integers(1, 60))
        penalty = draw(st.sampled_from([0.0, 0.0, 1.0]))
        weight = weights[tenant]
        item = request(f"r{number}", prompt, max_tokens=max_tokens, tenant=tenant, weight=weight, penalty=penalty)
        found.append(Arrival(draw(st.integers(0, 40)), item))
    return found


def serve(planned: list[Arrival], **options: object) -> Simulation:
    made = simulate(**{**ROOM, **options})  # type: ignore[arg-type]
    simulation = Watched(made.scheduler, made.pages, made.lookahead)
    for step in range(1 + max(arrival.step for arrival in planned)):
        for arrival in planned:
            if arrival.step == step:
                simulation.add(arrival.request)
        simulation.step()
    simulation.run()
    for arrival in planned:
        assert simulation.outputs[arrival.request.id] == alone(arrival.request)
    return simulation


@given(
    planned=arrivals("abc"),
    rows=st.integers(1, 4),
    spare_tokens=st.integers(0, 40),
    patience=st.sampled_from([1.0, 8.0]),
    quantum=st.integers(1, 8),
    prefix_cache=st.booleans(),
    lookahead=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_row_is_idle_and_none_goes_to_and_fro(
    planned: list[Arrival],
    rows: int,
    spare_tokens: int,
    patience: float,
    quantum: int,
    prefix_cache: bool,
    lookahead: bool,
) -> None:
    """Preemptions are bounded by requests and tokens, recomputed tokens by those served."""
    simulation = serve(
        planned,
        max_num_seqs=rows,
        max_batch_tokens=rows + spare_tokens,
        patience=patience,
        quantum=quantum,
        prefix_cache=prefix_cache,
        lookahead=lookahead,
    )
    for sequence, yields in simulation.yields.items():
        assert yields <= 1 + sequence.num_output / quantum
    prompts = sum(len(arrival.request.prompt) for arrival in planned)
    outputs = sum(arrival.request.params.max_tokens for arrival in planned)
    assert simulation.scheduler.yielded == simulation.yields.total() == simulation.scheduler.preemptions
    assert simulation.computed <= 2 * prompts + 3 * outputs


def test_no_row_is_taken_in_a_step_that_has_no_token_for_it() -> None:
    """Rows that wait for their own token, because of a penalty, are in every other step, and give it nothing back."""
    sizes = ((21, 3, 14, "b"), (8, 4, 43, "b"), (1, 28, 38, "b"), (19, 17, 15, "b"), (35, 15, 13, "a"))
    sizes += ((15, 25, 60, "b"), (0, 13, 24, "b"), (14, 28, 49, "c"), (24, 23, 11, "c"), (12, 28, 38, "b"))
    planned = []
    for number, (step, prompt, tokens, tenant) in enumerate(sizes):
        weight, penalty = 0.5 if tenant == "b" else 1.0, float(number in (6, 7))
        asked = {"max_tokens": tokens, "tenant": tenant, "weight": weight, "penalty": penalty}
        planned.append(Arrival(step, request(f"r{number}", text(number, prompt), **asked)))
    simulation = serve(planned, max_num_seqs=2, max_batch_tokens=6, patience=1.0, quantum=8, lookahead=True)
    assert simulation.scheduler.yielded > 0


@given(planned=arrivals("a"), rows=st.integers(1, 3), lookahead=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_single_tenant_never_yields(planned: list[Arrival], rows: int, lookahead: bool) -> None:
    simulation = serve(planned, max_num_seqs=rows, patience=0.0, quantum=0, lookahead=lookahead)
    assert simulation.scheduler.preemptions == 0
