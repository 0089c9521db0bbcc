"""The ledger is complete, whatever fails meanwhile."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.registry import Registry, RegistryUnavailable, TenantRow, UsageRow, Use
from adapters_store.types import Mix
from routing.router import Route, RoutedAdapter
from server.periodic import repeating
from server.usage import READ_SECONDS, UsageLedger

DAY = 86_400.0
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


def route(*names: str, owner: str = "acme") -> Route:
    adapters = tuple(
        cast(RoutedAdapter, SimpleNamespace(name=name, owner=owner, digest="d" * 64, weight=1.0)) for name in names
    )
    return Route("explicit" if names else None, adapters, Mix().composition, Mix())


class FakeRegistry:
    """Adds up what it is given, but while `fails` it takes nothing, or says so although it has."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.lines: Counter[tuple[str, str, date, str]] = Counter()
        self.counted: Counter[tuple[str, str, str]] = Counter()
        self.last_used: dict[tuple[str, str, str], float] = {}
        self.numbers: dict[str, int] = {}
        self.ledger = self.uses = self

    def add(self, batch: Iterable[UsageRow], writer: str, number: int) -> None:
        if "ledger" in self.fails:
            raise RegistryUnavailable("as the test wants")
        if number > self.numbers.get(writer, 0):
            self.numbers[writer] = number
            for row in batch:
                for field in ("requests", "prompt_tokens", "generation_tokens"):
                    self.lines[row.tenant, row.adapter, row.day, field] += getattr(row, field)
        if "answer" in self.fails:
            raise RegistryUnavailable("it has died while it committed")

    def leave(self, writer: str) -> None:
        self.numbers.pop(writer, None)

    def touch(self, batch: Iterable[Use]) -> None:
        if "touch" in self.fails:
            raise ValueError("not even an error of the registry")
        for use in batch:
            key = use.tenant, use.owner, use.name
            self.counted[key] += use.requests
            self.last_used[key] = max(self.last_used.get(key, 0.0), use.last_used)


async def test_a_moment_without_threads_neither_loses_nor_doubles_a_request() -> None:
    registry = FakeRegistry()
    ledger = UsageLedger(cast(Registry, registry), lambda: NOON, "writer")
    ledger.count("acme", route("sql"), 3, 4)
    usual = threading.stack_size(1 << 50)  # no thread starts with that
    try:
        assert not await ledger.flush()
    finally:
        threading.stack_size(usual)
    await ledger.close()
    assert registry.counted == {("acme", "acme", "sql"): 1}
    assert {key[3]: count for key, count in registry.lines.items()} == {
        "requests": 1,
        "prompt_tokens": 3,
        "generation_tokens": 4,
    }


COUNT = st.tuples(
    st.sampled_from(["acme", "umbrella"]),
    st.sampled_from([(), ("sql",), ("sql", "german"), ("german", "sql"), ("sql", "sql")]),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.sampled_from([0.0, 1.0, DAY]),
)
FLUSH = st.frozensets(st.sampled_from(["ledger", "answer", "touch"]))


@settings(max_examples=60)
@given(st.lists(st.one_of(COUNT, FLUSH), max_size=40))
def test_every_request_is_written_once(events: list[object]) -> None:
    """Requests and flushes in any order, some of which fail in one table or both."""

    async def play() -> None:
        registry, now = FakeRegistry(), NOON
        ledger = UsageLedger(cast(Registry, registry), lambda: now, "w")
        lines: Counter[tuple[str, str, date, str]] = Counter()
        uses: Counter[tuple[str, str, str]] = Counter()
        last_used: dict[tuple[str, str, str], float] = {}
        for event in events:
            if isinstance(event, frozenset):
                registry.fails = set(event)
                await ledger.flush()
                continue
            tenant, names, prompt, generated, gap = cast(tuple[str, tuple[str, ...], int, int, float], event)
            now += gap
            ledger.count(tenant, route(*names), prompt, generated)
            adapter, day = "+".join(sorted(set(names))), datetime.fromtimestamp(now, UTC).date()
            for field, count in (("requests", 1), ("prompt_tokens", prompt), ("generation_tokens", generated)):
                lines[tenant, adapter, day, field] += count
            for name in set(names):
                uses[tenant, "acme", name] += 1
                last_used[tenant, "acme", name] = now
        registry.fails = set()
        await ledger.close()
        assert (registry.lines, registry.counted, registry.last_used) == (lines, uses, last_used)
        assert not registry.numbers, "who has left is forgotten"

    asyncio.run(play())


def failing_registry(folder: Path, failing: set[str]) -> Registry:
    """With a tenant; then its writes fail at the steps in `failing`."""

    def fault(step: str) -> None:
        if step in failing:
            raise RegistryUnavailable("as the test wants")

    registry = Registry.open(f"sqlite:///{folder}/registry.sqlite", lambda: NOON, fault)
    registry.accounts.add(TenantRow("acme"))
    return registry


async def test_in_a_database_that_fails_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing = set[str]()
    registry = failing_registry(tmp_path, failing)
    ledger = UsageLedger(registry, lambda: NOON, "w")
    failing |= {"ledger.add.commit", "touch.begin"}  # the first one is rolled back
    async with repeating(ledger.flush, 0.005):
        for _ in range(20):
            ledger.count("acme", route("gone"), 10, 5)
            ledger.count("acme", route(), 1, 1)
            await asyncio.sleep(0.002)
        assert registry.ledger.read("acme").items == ()
        failing.clear()
        async with asyncio.timeout(60):
            while not registry.ledger.read("acme").items:
                await asyncio.sleep(0.005)
        ledger.count("acme", route("gone"), 10, 5)
    await ledger.close()
    day = date(2026, 3, 1)
    assert registry.ledger.read("acme").items == (
        UsageRow("acme", "", day, 20, 20, 20),
        UsageRow("acme", "gone", day, 21, 210, 105),
    )
    assert [record.levelname for record in caplog.records].count("ERROR") == 0
    registry.close()


async def test_a_database_that_dies_behind_its_commit_counts_once(tmp_path: Path) -> None:
    failing = {"ledger.add.committed"}
    registry = failing_registry(tmp_path, failing)
    ledger = UsageLedger(registry, lambda: NOON, "w")
    for _ in range(2):
        ledger.count("acme", route("gone"), 10, 5)
        assert not await ledger.flush()
    failing.clear()
    await ledger.close()
    assert registry.ledger.read("acme").items == (UsageRow("acme", "gone", date(2026, 3, 1), 2, 20, 10),)
    registry.close()


async def test_counting_during_a_flush_is_not_lost() -> None:
    registry = FakeRegistry()
    ledger = UsageLedger(cast(Registry, registry), lambda: NOON, "w")
    for number in range(200):
        ledger.count("acme", route("sql"), 1, 1)
        if number % 10 == 0:
            flushing = asyncio.create_task(ledger.flush())
            await asyncio.sleep(0)
            ledger.count("acme", route("sql"), 1, 1)
            await flushing
    await ledger.close()
    assert registry.lines["acme", "sql", date(2026, 3, 1), "requests"] == 220
    assert registry.counted["acme", "acme", "sql"] == 220


async def test_a_stop_without_the_database_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    registry = FakeRegistry()
    registry.fails = {"ledger"}
    ledger = UsageLedger(cast(Registry, registry), lambda: NOON, "w")
    for _ in range(3):
        ledger.count("acme", route(), 1, 1)
    await ledger.close(attempts=2, pause=0.0)
    assert caplog.records[-1].getMessage() == "the registry is unavailable: 3 requests are missing in the ledger"
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]


async def test_days_are_those_of_utc() -> None:
    registry, now = FakeRegistry(), datetime(2026, 3, 1, 23, 59, 59, tzinfo=UTC).timestamp()
    ledger = UsageLedger(cast(Registry, registry), lambda: now, "w")
    ledger.count("acme", route(), 1, 1)
    now += 1
    ledger.count("acme", route(), 1, 1)
    await ledger.close()
    assert {day for _, _, day, _ in registry.lines} == {date(2026, 3, 1), date(2026, 3, 2)}


async def test_uses_are_told() -> None:
    ledger, heard = UsageLedger(cast(Registry, FakeRegistry()), lambda: NOON, "w"), list[tuple[str, str, str]]()
    ledger.on_use = lambda *use: heard.append(use)
    ledger.count("acme", route("sql", "german", owner="umbrella"), 1, 1)
    ledger.count("acme", route(), 1, 1)
    assert sorted(heard) == [("acme", "umbrella", "german"), ("acme", "umbrella", "sql")]


async def test_readers_see_everything_and_write_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = FakeRegistry()
    ledger = UsageLedger(cast(Registry, registry), lambda: NOON, "w")
    slept: list[float] = []
    sleep = asyncio.sleep

    async def sleeps(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr("server.usage.asyncio.sleep", sleeps)

    def written() -> int:
        return sum(count for (*_, field), count in registry.lines.items() if field == "requests")

    for round_ in range(1, 4):
        ledger.count("acme", route("sql"), 1, 1)
        await asyncio.gather(*(ledger.catch_up() for _ in range(50)))
        assert written() == round_
    assert len(slept) == 3  # one write a round
    assert slept[0] == 0
    assert min(slept[1:]) > READ_SECONDS / 2
    await ledger.catch_up()
    assert len(slept) == 3  # nothing to write, nothing to wait for
    await ledger.close()


async def test_a_reader_waits_for_the_write_under_way() -> None:
    registry = FakeRegistry()
    ledger = UsageLedger(cast(Registry, registry), lambda: NOON, "w")
    ledger.count("acme", route("sql"), 1, 1)
    flushing = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    await ledger.catch_up()
    assert registry.counted["acme", "acme", "sql"] == 1
    await flushing
    await ledger.close()
