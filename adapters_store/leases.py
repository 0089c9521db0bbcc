"""Who uses which adapters now."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from adapters_store.registry import Resolved

T = TypeVar("T")
Name = tuple[str, str]
"""(owner, name)"""
NOBODY = ""
"""Whose lease keeps a pinned adapter's folder: no tenant has this id, so that none sees it among its own."""


@dataclass(eq=False)
class StoreLease:
    """Adapters in use by one request of `tenant`: local folder by digest, and the (owner, name) it used them under.

    Given back exactly once by `AdapterStore.release`.
    """

    tenant: str
    names: frozenset[Name]
    digests: frozenset[str]
    paths: Mapping[str, str] = field(default_factory=dict)
    released: bool = False


class Leases:
    """Counts of leases by digest, by name, and by name and the tenant that uses it. For one event loop."""

    def __init__(self) -> None:
        self._leases: set[StoreLease] = set()
        self._digests: Counter[str] = Counter()
        self._names: Counter[Name] = Counter()
        self._uses: Counter[tuple[str, str, str]] = Counter()
        self._idle: dict[Name, asyncio.Event] = {}

    def take(self, tenant: str, adapters: Sequence[Resolved]) -> StoreLease:
        names = frozenset((adapter.tenant, adapter.name) for adapter in adapters)
        lease = StoreLease(tenant, names, frozenset(adapter.digest for adapter in adapters))
        self._leases.add(lease)
        self._digests.update(lease.digests)
        self._names.update(names)
        self._uses.update((tenant, *name) for name in names)
        return lease

    def give_back(self, lease: StoreLease) -> None:
        """Raises RuntimeError the second time."""
        if lease.released or lease not in self._leases:
            raise RuntimeError("the lease is released already or not of this store")
        lease.released = True
        self._leases.remove(lease)
        _subtract(self._digests, lease.digests)
        _subtract(self._uses, ((lease.tenant, *name) for name in lease.names))
        for name in _subtract(self._names, lease.names):
            if name in self._idle:
                self._idle.pop(name).set()

    def of_digest(self, digest: str) -> int:
        return self._digests[digest]

    def of_name(self, owner: str, name: str) -> int:
        return self._names[owner, name]

    def of_use(self, tenant: str, owner: str, name: str) -> int:
        return self._uses[tenant, owner, name]

    async def idle(self, owner: str, name: str) -> None:
        """Return when nobody uses the name."""
        while self._names[owner, name]:
            await self._idle.setdefault((owner, name), asyncio.Event()).wait()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the counts are those of the leases."""
        digests = Counter(digest for lease in self._leases for digest in lease.digests)
        names = Counter(name for lease in self._leases for name in lease.names)
        uses = Counter((lease.tenant, *name) for lease in self._leases for name in lease.names)
        for kind, counted, expected in (
            ("digest", self._digests, digests),
            ("name", self._names, names),
            ("use", self._uses, uses),
        ):
            if dict(counted) != dict(expected):
                raise RuntimeError(f"lease counts by {kind} {dict(counted)} differ from the leases {dict(expected)}")
        if any(lease.released for lease in self._leases):
            raise RuntimeError("a released lease still counts")


def _subtract(counter: Counter[T], keys: Iterable[T]) -> list[T]:
    """Count each key once less; returns those that nothing counts any more, which leave the counter."""
    gone = []
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
            gone.append(key)
    return gone
