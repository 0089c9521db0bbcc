"""What names mean, remembered for a moment, and for longer while the registry cannot be asked."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from adapters_store.registry import RegistryUnavailable, Resolved

Fetch = Callable[[str, Sequence[str]], Awaitable[dict[str, Resolved]]]
Key = tuple[str, str]
"""(tenant, name or name@prefix)"""

_ATTEMPTS = 3
"""How often one query is repeated because its names were written while it ran."""


@dataclass(frozen=True)
class _Entry:
    """`meaning` None: no such adapter. Fresh until `expires`."""

    meaning: Resolved | None
    expires: float


@dataclass(eq=False)
class _Query:
    """A query under way; `outdated` are its names that were written since it was sent."""

    names: frozenset[str]
    outdated: set[str] = field(default_factory=set)
    task: "asyncio.Task[dict[str, Resolved]] | None" = None


class NamesCache:
    """Meanings of names by tenant, for one event loop. `timer` counts seconds.

    An entry is trusted for `max_age` seconds, so that writes of other processes are seen after it, and is dropped by
    `forget` when this process writes its name. While the registry fails, or takes longer than `patience` seconds to
    answer, names that are known keep their last meaning. Equal questions at the same time are asked once.
    """

    def __init__(
        self,
        fetch: Fetch,
        timer: Callable[[], float],
        *,
        max_age: float = 1.0,
        patience: float = 0.5,
        max_entries: int = 100_000,
    ) -> None:
        self._fetch = fetch
        self._timer = timer
        self._max_age = max_age
        self._patience = patience
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # last used last
        self._keys: defaultdict[str, set[Key]] = defaultdict(set)  # of the entries, by plain name
        self._running: set[_Query] = set()
        self._shared: dict[tuple[str, tuple[str, ...]], _Query] = {}
        self._failure: RegistryUnavailable | None = None
        self._retry = 0.0  # when the registry is asked again after a failure
        self._slow_until = 0.0

    async def resolve(self, tenant: str, names: Sequence[str]) -> dict[str, Resolved]:
        """What each name means; what means nothing is absent. Raises RegistryUnavailable for what is not known."""
        now = self._timer()
        found: dict[str, Resolved] = {}
        due: list[str] = []
        for name in dict.fromkeys(names):
            entry = self._entries.get((tenant, name))
            if entry is None or entry.expires <= now:
                due.append(name)
                continue
            self._entries.move_to_end((tenant, name))
            if entry.meaning is not None:
                found[name] = entry.meaning
        return found | await self._ask(tenant, tuple(due)) if due else found

    def forget(self, name: str) -> None:
        """A name was written: whoever asks from now on gets an answer from after it."""
        for key in self._keys.pop(name, ()):
            del self._entries[key]
        for query in self._running:
            if name in query.names:
                query.outdated.add(name)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless entries and their index agree and are within bounds."""
        indexed = {key for keys in self._keys.values() for key in keys}
        if indexed != self._entries.keys() or not all(self._keys.values()):
            raise RuntimeError("the index by name differs from the entries")
        if len(self._entries) > self._max_entries:
            raise RuntimeError(f"{len(self._entries)} entries, expected at most {self._max_entries}")

    async def _ask(self, tenant: str, due: tuple[str, ...]) -> dict[str, Resolved]:
        now = self._timer()
        stale = self._stale(tenant, due)
        if self._failure is not None and now < self._retry:
            if stale is None:
                raise RegistryUnavailable(self._failure.reason)
            return stale
        query = self._query(tenant, due)
        assert query.task is not None
        if stale is not None and now < self._slow_until:
            return stale
        try:
            # Only who has something to fall back on stops waiting.
            return await asyncio.wait_for(asyncio.shield(query.task), None if stale is None else self._patience)
        except TimeoutError:
            self._slow_until = self._timer() + self._max_age
            stale = self._stale(tenant, due)  # a write may have dropped what was there
            return stale if stale is not None else await asyncio.shield(query.task)
        except RegistryUnavailable:
            stale = self._stale(tenant, due)
            if stale is None:
                raise
            return stale

    def _stale(self, tenant: str, names: Sequence[str]) -> dict[str, Resolved] | None:
        """The last meanings of all these names, or None if one has none."""
        entries = [self._entries.get((tenant, name)) for name in names]
        meanings = {
            name: entry.meaning
            for name, entry in zip(names, entries, strict=True)
            if entry is not None and entry.meaning is not None
        }
        return meanings if len(meanings) == len(names) else None

    def _query(self, tenant: str, names: tuple[str, ...]) -> _Query:
        query = self._shared.get((tenant, names))
        if query is None or query.outdated:
            query = _Query(frozenset(_plain(name) for name in names))
            query.task = asyncio.create_task(self._run(query, tenant, names))
            query.task.add_done_callback(_retrieve)
            self._running.add(query)
            self._shared[tenant, names] = query
        return query

    async def _run(self, query: _Query, tenant: str, names: tuple[str, ...]) -> dict[str, Resolved]:
        try:
            for _ in range(_ATTEMPTS):
                query.outdated.clear()
                sent = self._timer()
                found = await self._fetch(tenant, names)
                if not query.outdated:
                    break
        except RegistryUnavailable as error:
            self._failure, self._retry = error, self._timer() + self._max_age
            raise
        finally:
            self._running.discard(query)
            if self._shared.get((tenant, names)) is query:
                del self._shared[tenant, names]
        self._failure, self._slow_until = None, 0.0
        for name in names:
            if _plain(name) not in query.outdated:
                self._keep((tenant, name), _Entry(found.get(name), sent + self._max_age))
        return found

    def _keep(self, key: Key, entry: _Entry) -> None:
        old = self._entries.get(key)
        if old is not None and old.expires > entry.expires:
            return  # an answer to a later question has come first
        self._entries[key] = entry
        self._entries.move_to_end(key)
        self._keys[_plain(key[1])].add(key)
        if len(self._entries) > self._max_entries:
            gone, _ = self._entries.popitem(last=False)
            keys = self._keys[_plain(gone[1])]
            keys.discard(gone)
            if not keys:
                del self._keys[_plain(gone[1])]


def _plain(name: str) -> str:
    return name.partition("@")[0]


def _retrieve(task: "asyncio.Task[dict[str, Resolved]]") -> None:
    if not task.cancelled():
        task.exception()
