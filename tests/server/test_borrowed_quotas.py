"""Several front ends and one quota: together they never use more than it allows, and none keeps it from another."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.registry import (
    BudgetGrant,
    BudgetWish,
    LocalBuckets,
    PlaceWish,
    Quotas,
    Registry,
    RegistryUnavailable,
    TenantRow,
)
from server.borrowed_bucket import BUDGET_SECONDS, RETRY_SECONDS
from server.errors import TooManyRequests
from server.lender import Lender
from server.quotas import QuotaGate
from server.tenants import Tenants


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shared(LocalBuckets):
    """The registry's part, without a database. `is_down`: it does not answer."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.is_down = False
        self.questions = 0

    def exchange(
        self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish] = ()
    ) -> tuple[list[BudgetGrant], list[int]]:
        self.questions += 1
        if self.is_down:
            raise RegistryUnavailable("it is down")
        return super().exchange(wishes, place_wishes)

    def leave(self) -> None:
        pass


class Front:
    """A front end's gate, which has the quotas of one tenant."""

    def __init__(self, ledger: object, clock: Clock, quotas: Quotas, count: int = 1) -> None:
        tenants = Tenants()
        tenants.replace([TenantRow("acme", quotas=quotas)])
        self.lender = Lender(ledger, clock, count)  # type: ignore[arg-type]
        self.gate = QuotaGate(tenants, clock, lambda *_: None, self.lender)

    async def ask(self) -> bool:
        """Whether one request is let in."""
        await self.gate.fund("acme", requests=1)
        try:
            self.gate.count_request("acme")
        except TooManyRequests:
            return False
        return True

    async def reserve(self, tokens: int) -> bool:
        await self.gate.fund("acme", tokens=tokens)
        try:
            with self.gate.admit("acme") as meter:
                meter.reserve(tokens)
        except TooManyRequests:
            return False
        return True


PER_SECOND = Quotas(requests_per_second=10)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_budget_is_asked_for_once_a_second_not_once_a_request(clock: Clock) -> None:
    ledger = Shared(clock)
    front = Front(ledger, clock, Quotas(requests_per_second=1000))
    for _ in range(4):
        for _ in range(100):
            assert await front.ask()
            clock.now += 0.01
    assert ledger.questions < 20


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([0.5, 2.0, 10.0, 50.0]),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 0.7), st.integers(1, 12)), max_size=60),
    st.sets(st.integers(0, 59), max_size=3),
)
def test_all_together_never_use_more_than_the_quota(
    count: int, rate: float, bursts: list[tuple[int, float, int]], deaths: set[int]
) -> None:
    """Whoever asks, and whoever dies with what it has borrowed: a full bucket, its gains, and one budget at most."""

    async def simulate() -> None:
        clock = Clock()
        ledger = Shared(clock)
        quotas = Quotas(requests_per_second=rate)
        fronts = [Front(ledger, clock, quotas, count) for _ in range(count)]
        used: list[float] = []
        for number, (who, pause, burst) in enumerate(bursts):
            clock.now += pause
            if number in deaths:
                fronts[who % count] = Front(ledger, clock, quotas, count)
            for _ in range(burst):
                if await fronts[who % count].ask():
                    used.append(clock.now)
            for front in fronts:
                await front.gate.settle()
        for first, start in enumerate(used):
            for last in range(first, len(used)):
                allowed = max(1.0, rate) + rate * (used[last] - start)
                assert last - first + 1 <= allowed + rate * BUDGET_SECONDS + 1e-6

    asyncio.run(simulate())


async def test_who_leaves_while_it_is_asked_for_gains_nothing(clock: Clock) -> None:
    """What such a request gives back and what it gets are counted as if it had stayed."""

    class Slow(Shared):
        def __init__(self) -> None:
            super().__init__(clock)
            self.may_answer, self.is_asked = threading.Event(), threading.Event()
            self.may_answer.set()

        def exchange(
            self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish] = ()
        ) -> tuple[list[BudgetGrant], list[int]]:
            self.is_asked.set()
            assert self.may_answer.wait(60)
            return super().exchange(wishes, place_wishes)

    ledger, used = Slow(), 0
    front = Front(ledger, clock, Quotas(tokens_per_minute=6000))
    for tokens in (10, 5900, 10):  # the third borrows all that is left, and uses a part of it
        assert await front.reserve(tokens)
        used += tokens
    for _ in range(3):
        ledger.may_answer.clear()
        ledger.is_asked.clear()
        leaving = asyncio.create_task(front.gate.fund("acme", tokens=5000))
        assert await asyncio.to_thread(ledger.is_asked.wait, 60)
        leaving.cancel()
        await asyncio.wait({leaving})
        ledger.may_answer.set()
        assert front.lender._asking is not None
        await front.lender._asking
        async with front.gate._meter("acme")._funding:  # behind what was on its way
            pass
        clock.now += RETRY_SECONDS
    while await front.reserve(5):
        used += 5
    assert 6000 - 5 <= used <= 6000 + 100 * 3 * RETRY_SECONDS


async def test_who_idles_does_not_hold_back_who_works(clock: Clock) -> None:
    """One front end used all it could and then stops: a second later the other one has the whole quota."""
    ledger = Shared(clock)
    idle, busy = Front(ledger, clock, PER_SECOND), Front(ledger, clock, PER_SECOND)
    for _ in range(5):
        assert await idle.ask()
    clock.now += 1.0
    for front in (idle, busy):
        await front.gate.settle()
    served = 0
    for _ in range(200):
        clock.now += 0.05
        served += await busy.ask()
        await idle.gate.settle()
    assert served >= 10 * 10 * 0.95


async def test_one_request_borrows_one(clock: Clock) -> None:
    """So that a small quota is not gone because one front end had a single request."""
    ledger = Shared(clock)
    fronts = [Front(ledger, clock, Quotas(requests_per_second=4)) for _ in range(4)]
    assert [await front.ask() for front in fronts] == [True] * 4
    assert not await fronts[0].ask()


async def test_tokens_that_were_used_beyond_a_budget_are_a_debt_for_all(clock: Clock) -> None:
    ledger = Shared(clock)
    quotas = Quotas(tokens_per_minute=600)
    one, other = Front(ledger, clock, quotas), Front(ledger, clock, quotas)
    await one.gate.fund("acme", tokens=100)
    with one.gate.admit("acme") as meter:
        meter.reserve(100)
        meter.charge(700)  # the answer
    await one.gate.settle()
    assert not await other.reserve(1)
    clock.now += 21.0  # at 10 tokens a second
    assert await other.reserve(1)


async def test_without_the_registry_each_counts_for_itself(clock: Clock) -> None:
    ledger = Shared(clock)
    ledger.is_down = True
    fronts = [Front(ledger, clock, PER_SECOND) for _ in range(2)]
    for front in fronts:
        assert [await front.ask() for _ in range(12)] == [True] * 10 + [False] * 2
    ledger.is_down = False
    clock.now += 60
    assert await fronts[0].ask()


@pytest.fixture
def registries(tmp_path: Path, clock: Clock) -> Iterator[list[Registry]]:
    """Two processes' on one file."""
    found = [Registry.open(f"sqlite:///{tmp_path}/registry.sqlite", clock) for _ in range(2)]
    yield found
    for registry in found:
        registry.close()


async def test_places_are_counted_over_all(registries: list[Registry], clock: Clock) -> None:
    quotas = Quotas(concurrency=3)
    fronts = [Front(each.budgets(f"p{number}"), clock, quotas) for number, each in enumerate(registries)]

    async def enter(front: Front) -> bool:
        await front.gate.fund("acme", sequences=1)
        try:
            held.append(front.gate.admit("acme"))
            held[-1].__enter__()
        except TooManyRequests:
            held.pop()
            return False
        return True

    held: list[object] = []  # type: ignore[type-arg]
    assert [await enter(front) for front in (*fronts, *fronts)] == [True, True, True, False]
    clock.now += 2.0
    for front in fronts:
        await front.gate.settle()  # they are renewed
    clock.now += 2.0
    assert not await enter(fronts[0])
    held[0].__exit__(None, None, None)  # type: ignore[attr-defined]
    await fronts[0].gate.settle()
    assert await enter(fronts[1])
    clock.now += 10.0  # the second one has died: its places are free
    assert [await enter(fronts[0]) for _ in range(3)] == [True, True, False]
    for front in fronts:
        await front.lender.close()


async def test_a_quota_in_a_database_is_one_quota(registries: list[Registry], clock: Clock) -> None:
    fronts = [Front(each.budgets(f"p{number}"), clock, PER_SECOND) for number, each in enumerate(registries)]
    served = 0
    for _ in range(100):
        clock.now += 0.02
        for front in fronts:
            served += await front.ask()
            await front.gate.settle()
    assert 10 * 2 * 0.9 + 10 <= served + 3 <= 10 + 10 * 2 + 4
    for front in fronts:
        await front.lender.close()
