"""The names of all tenants, for an event loop: SQL is left to threads, and what names mean is remembered."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from adapters_store.name_queries import NameQueries
from adapters_store.names_cache import NamesCache
from adapters_store.registry import ModelRow, NamedAdapter, Page, Registry, Resolved, may_be_meant
from adapters_store.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


class Names:
    """What names mean, what is known of them, and how they change. `timer` counts seconds.

    All methods that wait raise RegistryUnavailable.
    """

    def __init__(self, registry: Registry, workers: Workers, timer: Callable[[], float]) -> None:
        self._registry = registry
        self._workers = workers
        self._cache = NamesCache(NameQueries(self._look_up).ask, timer)

    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:
        """What each `name` or `name@<digest prefix>` means for a tenant; what means nothing is absent.

        Answers are remembered for a second, and for longer while the registry fails; what can be no name is not asked
        for, nor remembered.
        """
        return await self._cache.resolve(tenant, [name for name in names if may_be_meant(name)])

    def forget(self, name: str) -> None:
        """Somebody else changes the name: it is looked up anew by who comes now."""
        self._cache.forget(name)

    async def get(self, tenant: str, name: str) -> NamedAdapter:
        """The adapter of this name that a tenant may use. Raises NotFound."""
        return await self._workers.query(self._registry.get, tenant, name)

    async def list(
        self, tenant: str, *, limit: int = 100, cursor: str | None = None, tag: str | None = None, own: bool = False
    ) -> Page[NamedAdapter]:
        """The adapters that a tenant may use, by name; with `own`, only those that belong to it."""
        return await self._workers.query(self._registry.list, tenant, limit=limit, cursor=cursor, tag=tag, own=own)

    async def models(self, tenant: str, limit: int | None = None, cursor: str | None = None) -> Page[ModelRow]:
        """What `list` has, all of it unless limited, with little of each."""
        return await self._workers.query(self._registry.models, tenant, limit=limit, cursor=cursor)

    async def count(self) -> int:
        """How many names all tenants have; some may mean the same adapter."""
        return await self._workers.query(self._registry.count_names)

    async def update(self, tenant: str, name: str, **changes: Any) -> NamedAdapter:
        """Change a tenant's own name as `Registry.update` does, which says what it raises."""
        return await self.write(self._workers.sql, name, self._registry.update, tenant, name, **changes)

    async def roll_back(self, tenant: str, name: str, digest: str, *, may_be_public: bool = True) -> NamedAdapter:
        """Move a tenant's own name to another of its revisions. Raises NotFound, NotPermitted."""
        move = partial(self._registry.roll_back, may_be_public=may_be_public)
        return await self.write(self._workers.sql, name, move, tenant, name, digest)

    async def mark(self, owner: str, name: str, deleting: bool) -> None:
        """Hide a name from everybody, or show it again. Raises NotFound."""
        await self.write(self._workers.sql, name, self._registry.removals.mark, owner, name, deleting)

    async def remove(self, owner: str, name: str) -> tuple[str, ...]:
        """Forget a hidden name; returns the digests that nobody has then. Raises NotFound."""
        remove = partial(self._registry.removals.remove, only_marked=True)
        return await self.write(self._workers.sql, name, remove, owner, name)

    async def write(self, threads: Executor, name: str, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call in a thread what writes a name; failed or not, what the name meant before is forgotten.

        Once begun it is finished, even if the caller stops waiting.
        """

        async def write() -> T:
            try:
                return await self._workers.run(threads, call, *args, **options)
            finally:
                self._cache.forget(name)

        return await self._workers.finish(write())

    def check_integrity(self) -> None:
        """Raise RuntimeError unless what is remembered is whole."""
        self._cache.check_integrity()

    async def _look_up(self, tenant: str, names: Sequence[str]) -> dict[str, Resolved]:
        return await self._workers.query(self._registry.resolve, tenant, names)
