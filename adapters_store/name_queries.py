"""Questions of many requests for what names mean, as few queries."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters_store.names_cache import Fetch
from adapters_store.registry import Resolved


@dataclass(eq=False)
class _Query:
    names: dict[str, None] = field(default_factory=dict)
    task: "asyncio.Task[dict[str, Resolved]] | None" = None


class NameQueries:
    """What a tenant asks in one turn of the event loop is one query; for one event loop.

    When many requests come at once and all choose other adapters, a query for each, in a thread, costs them more than
    all the rest of their way to the engine (docs/results.md).
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._next: dict[str, _Query] = {}  # those that have not begun, by tenant

    async def ask(self, tenant: str, names: Sequence[str]) -> dict[str, Resolved]:
        """As `fetch`, whose errors are raised by all who share its query."""
        query = self._next.get(tenant)
        if query is None:
            query = self._next[tenant] = _Query()
            query.task = asyncio.create_task(self._run(tenant))
            query.task.add_done_callback(_retrieve)
        query.names.update(dict.fromkeys(names))
        assert query.task is not None
        found = await asyncio.shield(query.task)
        return {name: found[name] for name in names if name in found}

    async def _run(self, tenant: str) -> dict[str, Resolved]:
        return await self._fetch(tenant, tuple(self._next.pop(tenant).names))


def _retrieve(task: "asyncio.Task[dict[str, Resolved]]") -> None:
    if not task.cancelled():
        task.exception()
