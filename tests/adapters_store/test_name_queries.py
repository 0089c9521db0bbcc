"""Questions for names that come at once, as few queries."""

import asyncio
from collections.abc import Sequence

import pytest

from adapters_store.name_queries import NameQueries
from adapters_store.registry import RegistryUnavailable, Resolved


class Registry:
    """Answers when it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.open = asyncio.Event()
        self.is_broken = False
        self.queries = NameQueries(self.fetch)

    async def fetch(self, tenant: str, names: Sequence[str]) -> dict[str, Resolved]:
        self.asked.append((tenant, tuple(names)))
        await self.open.wait()
        if self.is_broken:
            raise RegistryUnavailable("gone")
        return {name: meaning(tenant, name) for name in names if not name.startswith("no")}

    def ask(self, tenant: str, *names: str) -> "asyncio.Task[dict[str, Resolved]]":
        return asyncio.create_task(self.queries.ask(tenant, names))


def meaning(tenant: str, name: str) -> Resolved:
    return Resolved(tenant, name, f"digest of {name}", False, "config", "weights")


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_one_turn_is_one_query_a_tenant_and_each_gets_its_own_part() -> None:
    registry = Registry()
    registry.open.set()
    found = await asyncio.gather(
        registry.ask("t", "a", "b"), registry.ask("u", "a"), registry.ask("t", "b", "no"), registry.ask("t", "c")
    )
    assert registry.asked == [("t", ("a", "b", "no", "c")), ("u", ("a",))]
    assert found == [
        {"a": meaning("t", "a"), "b": meaning("t", "b")},
        {"a": meaning("u", "a")},
        {"b": meaning("t", "b")},
        {"c": meaning("t", "c")},
    ]


async def test_who_asks_after_a_query_began_gets_an_answer_from_after_it() -> None:
    """A write between the two must be seen."""
    registry = Registry()
    first = registry.ask("t", "a")
    await settle()
    second = registry.ask("t", "a")
    await settle()
    assert registry.asked == [("t", ("a",)), ("t", ("a",))]
    registry.open.set()
    await asyncio.gather(first, second)


async def test_a_failure_is_everybodys_and_the_next_query_is_a_new_one() -> None:
    registry = Registry()
    registry.is_broken = True
    registry.open.set()
    for outcome in await asyncio.gather(registry.ask("t", "a"), registry.ask("t", "b"), return_exceptions=True):
        assert isinstance(outcome, RegistryUnavailable)
    registry.is_broken = False
    assert await registry.ask("t", "a") == {"a": meaning("t", "a")}


async def test_who_stops_waiting_takes_nothing_from_the_others() -> None:
    registry = Registry()
    leaving, staying = registry.ask("t", "a"), registry.ask("t", "b")
    await settle()
    leaving.cancel()
    registry.open.set()
    assert await staying == {"b": meaning("t", "b")}
    with pytest.raises(asyncio.CancelledError):
        await leaving
