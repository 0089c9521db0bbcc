"""Tenants that flood and tenants that wait: who yields, how often, and what each is served, on a fake clock."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from math import inf
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import Simulation, alone, request, simulate

from server.engine.blocks import BlockPool
from server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE, FairQueue
from server.engine.plan import Chunk
from server.engine.sequence import Request, Sequence
from server.engine.shares import PATIENCE, QUANTUM, Shares

ROOM = {"num_blocks": 150, "block_size": 16, "max_batch_tokens": 64}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_step(self, chunks: list[Chunk]) -> None:
        """Seconds of a step: its weights are read once, and its tokens computed."""
        self.now += 0.02 + 0.0005 * sum(chunk.num_tokens for chunk in chunks)


@dataclass
class Backlog:
    """A tenant that always has `waiting` requests waiting."""

    tenant: str
    prompt: int
    max_tokens: int
    weight: float = 1.0
    waiting: int = 4

    def requests(self, simulation: Simulation, number: "count[int]") -> list[Request]:
        waits = sum(sequence.request.tenant == self.tenant for sequence in simulation.scheduler.waiting)
        return [
            replace(
                request(f"{self.tenant}{i}", text(i, self.prompt), max_tokens=self.max_tokens, weight=self.weight),
                tenant=self.tenant,
            )
            for i in (next(number) for _ in range(self.waiting - waits))
        ]


def text(number: int, length: int) -> tuple[int, ...]:
    """Prompts that share no block."""
    return (number % 250, number // 250, *range(length))[:length]


@dataclass
class Contest:
    """A simulation over time, and what each tenant was served in it: priced tokens, as the counters price them."""

    simulation: Simulation
    clock: Clock
    sequences: list[Sequence] = field(default_factory=list)
    numbers: "count[int]" = field(default_factory=count)

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.simulation.add(item)
            self.sequences.append(self.simulation.sequences[item.id])

    def step(self, *backlogs: Backlog) -> None:
        for backlog in backlogs:
            self.add(*backlog.requests(self.simulation, self.numbers))
        self.clock.pass_step(self.simulation.step())

    def served(self) -> Counter[str]:
        served: Counter[str] = Counter()
        for sequence in self.sequences:
            if sequence.first_scheduled is not None:
                tokens = INPUT_PRICE * sequence.num_prompt + OUTPUT_PRICE * sequence.num_output
                served[sequence.request.tenant] += tokens  # type: ignore[assignment]
        return served

    def waits(self, tenant: str) -> bool:
        return any(sequence.request.tenant == tenant for sequence in self.simulation.scheduler.waiting)

    def runs(self, tenant: str) -> bool:
        return any(sequence.request.tenant == tenant for sequence in self.simulation.sequences.values())

    def finish(self) -> None:
        """Every text is what it would be alone, however often its sequence was preempted."""
        self.simulation.run()
        for sequence in self.sequences:
            assert self.simulation.outputs[sequence.request.id] == alone(sequence.request)


def contest(**settings: object) -> Contest:
    clock = Clock()
    simulation = simulate(**{**ROOM, **settings}, clock=clock)  # type: ignore[arg-type]
    simulation.check_every = 10
    return Contest(simulation, clock)


def flood(count: int, prompt: int, max_tokens: int, weight: float = 1.0) -> list[Request]:
    return [
        request(f"flood{i}", text(1000 + i, prompt), max_tokens=max_tokens, tenant="flood", weight=weight)
        for i in range(count)
    ]


def difference(before: Counter[str], after: Counter[str]) -> Counter[str]:
    return Counter({tenant: after[tenant] - before[tenant] for tenant in after})


MODEST = Backlog("modest", 8, 24)


@pytest.mark.parametrize(
    ("modest", "lookahead"),
    [(MODEST, False), (MODEST, True), (Backlog("modest", 40, 6), False), (Backlog("modest", 3, 150), True)],
    ids=["like", "like, looking ahead", "prompts", "outputs"],
)
def test_a_flood_leaves_a_tenant_with_work_its_half(modest: Backlog, lookahead: bool) -> None:
    """64 long requests hold all rows when the other tenant comes: it gets 80 % of its half, and in each second too."""
    run = contest(max_num_seqs=16, lookahead=lookahead)
    run.add(*flood(64, 8, 96))
    for _ in range(10):
        run.step()
    assert len(run.simulation.scheduler.running) == 16
    start, marks = run.clock.now, [run.served()]
    while run.waits("flood"):
        run.step(modest)
        if run.clock.now - start >= len(marks):
            marks.append(run.served())
    assert len(marks) > 10
    for interval in (difference(before, after) for before, after in pairwise(marks)):
        assert 0.4 <= interval["modest"] / interval.total() <= 0.6
    while run.runs("flood"):
        run.step(modest)
    served = difference(marks[0], run.served())
    assert served["modest"] / served.total() >= 0.4
    assert 0 < run.simulation.scheduler.yielded <= 16
    run.finish()


def test_without_preemption_it_gets_nothing_until_the_first_long_ones_end() -> None:
    """What the test above would measure if nobody yielded."""
    run = contest(max_num_seqs=16, patience=inf)
    run.add(*flood(64, 8, 96))
    for _ in range(10):
        run.step()
    before = run.served()
    while not any(name.startswith("flood") for name in run.simulation.endings):
        run.step(MODEST)
    interval = difference(before, run.served())
    assert interval["modest"] / interval.total() < 0.1
    assert run.simulation.scheduler.yielded == 0


def test_a_newcomer_is_served_within_a_few_steps() -> None:
    run = contest(max_num_seqs=16)
    run.add(*flood(64, 8, 96))
    for _ in range(20):
        run.step()
    arrived = run.clock.now
    run.add(request("one", 8, tenant="modest"))
    one = run.simulation.sequences["one"]
    while one.first_scheduled is None:
        run.step()
    assert one.first_scheduled - arrived < 6 * 0.03
    assert run.simulation.scheduler.yielded == 1
    run.finish()


@pytest.mark.parametrize(
    ("weights", "lengths"),
    [((1, 3), (8, 30)), ((3, 1), (30, 8)), ((0.1, 0.3), (4, 120)), ((200, 200), (4, 120)), ((1, 1.5), (8, 30))],
)
def test_weights_divide_what_is_served(weights: tuple[float, float], lengths: tuple[int, int]) -> None:
    run = contest(max_num_seqs=8)
    backlogs = [Backlog(name, *lengths, weight) for name, weight in zip("ab", weights, strict=True)]
    backlogs[1].max_tokens += 7
    for _ in range(100):
        run.step(*backlogs)
    before = run.served()
    for _ in range(1200):
        run.step(*backlogs)
    served = difference(before, run.served())
    assert served["b"] / served["a"] == pytest.approx(weights[1] / weights[0], rel=0.2)
    assert run.simulation.scheduler.yielded <= len(run.simulation.endings) / 10
    run.finish()


def test_a_flood_of_three_times_the_weight_keeps_three_quarters() -> None:
    run = contest(max_num_seqs=16)
    run.add(*flood(64, 8, 96, weight=3.0))
    run.step()
    before = run.served()
    while run.waits("flood"):
        run.step(MODEST)
    served = difference(before, run.served())
    assert served["flood"] / served["modest"] == pytest.approx(3.0, rel=0.2)
    run.finish()


def test_an_idle_tenant_earns_no_credit() -> None:
    run = contest(max_num_seqs=8)
    run.add(request("early", 8, tenant="late"))
    for _ in range(500):
        run.step(Backlog("busy", 8, 60))
    before = run.served()
    for _ in range(400):
        run.step(Backlog("busy", 8, 60), Backlog("late", 8, 60))
        gained = difference(before, run.served())
        assert gained["late"] <= 1.2 * gained["busy"]
    assert gained["late"] >= 0.8 * gained["busy"]
    run.finish()


def test_nor_does_one_whose_requests_come_one_by_one() -> None:
    """It takes a row each time, from whoever was admitted last; the others keep all other rows."""
    run = contest(max_num_seqs=8)
    for _ in range(30):
        run.step(Backlog("busy", 8, 400))
    asked = 0
    for number in range(20):
        run.add(request(f"single{number}", (number, 1, 2), max_tokens=10, tenant="single"))
        while run.runs("single"):
            run.step(Backlog("busy", 8, 400))
            asked += 1
            rows = Counter(sequence.request.tenant for sequence in run.simulation.scheduler.running)
            assert rows["single"] <= 1
            assert rows.total() == 8 or not run.runs("single")
    assert 10 * 20 < asked < 20 * 20
    assert run.simulation.scheduler.yielded <= 20
    assert max(run.simulation.yields.values()) <= 1 + 400 // QUANTUM


def test_rows_return_to_the_flood_when_the_other_has_no_more_work() -> None:
    run = contest(max_num_seqs=8)
    run.add(*flood(40, 8, 60))
    for _ in range(5):
        run.step()
    run.add(*[request(f"r{number}", (number, 9), max_tokens=30, tenant="modest") for number in range(4)])
    while run.runs("modest"):
        run.step()
    yielded = run.simulation.scheduler.yielded
    assert yielded == 4
    run.step()
    assert len(run.simulation.scheduler.running) == 8
    run.finish()
    assert run.simulation.scheduler.yielded == yielded


def test_tenants_take_turns_where_rows_are_fewer() -> None:
    """Six tenants with endless requests and two rows: nobody waits for the end of another's."""
    run = contest(max_num_seqs=2, num_blocks=400)
    run.add(*[request(name, (number, 1), max_tokens=900, tenant=name) for number, name in enumerate("abcdef")])
    for _ in range(700):
        run.step()
    served = run.served()
    assert max(served.values()) - min(served.values()) <= 4 * (PATIENCE + 900)
    assert min(served.values()) >= 0.3 * max(served.values())
    run.finish()
    assert run.simulation.computed <= 1.2 * 6 * 900


@pytest.mark.parametrize("lookahead", [False, True])
def test_where_every_row_decodes_and_the_budget_is_spent(lookahead: bool) -> None:
    """The row that is taken gives its token back to the budget."""
    run = contest(max_num_seqs=8, max_batch_tokens=8, lookahead=lookahead)
    run.add(*flood(32, 2, 60))
    for _ in range(20):
        run.step()
    assert len(run.simulation.scheduler.running) == 8
    before = run.served()
    for _ in range(12):
        run.step(Backlog("modest", 5, 20))
    assert run.simulation.scheduler.yielded > 0
    while run.runs("flood"):
        run.step(Backlog("modest", 5, 20))
    served = difference(before, run.served())
    assert served["modest"] / served.total() >= 0.4
    run.finish()


@pytest.mark.parametrize("num_blocks", [130, 200])
def test_a_flood_that_holds_all_kv_yields_too(num_blocks: int) -> None:
    """26 blocks are one request of the flood: rows are free, blocks are not."""
    run = contest(max_num_seqs=16, num_blocks=num_blocks, block_size=4)
    run.add(*flood(40, 8, 96))
    for _ in range(60):
        run.step()
    assert len(run.simulation.scheduler.running) < 16
    before = run.served()
    while run.runs("flood"):
        run.step(MODEST)
    served = difference(before, run.served())
    assert served["modest"] / served.total() >= 0.4
    assert run.simulation.scheduler.preemptions <= len(run.simulation.endings)
    run.finish()


def test_what_is_freed_is_not_for_others_of_the_tenant_that_yields() -> None:
    """Its small request waits behind the one that was preempted for less than it held."""
    simulation = simulate(num_blocks=34, max_num_seqs=8, max_batch_tokens=200)
    for number in range(3):
        simulation.add(request(f"long{number}", text(number, 38), max_tokens=40, tenant="flood"))
    simulation.step()
    simulation.add(request("small", text(3, 17), tenant="flood"))
    simulation.step()
    simulation.add(request("claimant", text(4, 25), tenant="modest"))
    simulation.scheduler.waiting.counters["flood"] += 1000.0
    simulation.step()
    running = [sequence.request.id for sequence in simulation.scheduler.running]
    assert running == ["long0", "long1", "claimant"]
    assert [sequence.request.id for sequence in simulation.scheduler.waiting] == ["long2", "small"]
    simulation.run()


def test_nothing_yields_to_a_mix_whose_pages_are_missing() -> None:
    run = contest(max_num_seqs=2, capacity=3)
    run.add(*[request(f"flood{i}", (i, 7), "d", max_tokens=200, tenant="flood") for i in range(4)])
    run.step()
    run.add(request("c", 4, "c", tenant="modest"))
    for _ in range(50):
        run.step()
    assert run.simulation.scheduler.yielded == 0
    run.add(request("base", 4, tenant="modest"))
    run.step()
    assert "base" in {sequence.request.id for sequence in run.simulation.scheduler.running}
    assert run.simulation.scheduler.yielded == 1
    run.finish()


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


@given(planned=arrivals("a"), rows=st.integers(1, 3), lookahead=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_single_tenant_never_yields(planned: list[Arrival], rows: int, lookahead: bool) -> None:
    simulation = serve(planned, max_num_seqs=rows, patience=0.0, quantum=0, lookahead=lookahead)
    assert simulation.scheduler.preemptions == 0
