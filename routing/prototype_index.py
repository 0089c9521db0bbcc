"""Exact search among the prototypes that a tenant may see."""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from routing.prototype_rows import Key, RowsByCount, Vectors

_DIGITS = 6
"""Scores are rounded to so many decimals: equal prototypes tie wherever their rows lie, whatever the order of sums."""


class Hit(NamedTuple):
    """One adapter and the largest cosine of its prototypes with the query."""

    owner: str
    name: str
    score: float


class PrototypeIndex:
    """One encoder's prototypes: unit vectors of `width` float32. For one event loop.

    Each tenant's private adapters lie together, and so do the public ones of all tenants: a search multiplies these
    two and touches nothing else. A tenant's own name hides the public one.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._private: dict[str, RowsByCount] = {}
        self._public = RowsByCount(width)
        self._owners: dict[str, set[str]] = {}  # of public adapters, by name
        self._versions: dict[str, int] = {}  # of private adapters, by tenant; never forgotten, lest they repeat
        self._public_version = 0

    def __len__(self) -> int:
        return len(self._public) + sum(map(len, self._private.values()))

    def __iter__(self) -> Iterator[Key]:
        for rows in (self._public, *self._private.values()):
            yield from rows

    def __contains__(self, key: Key) -> bool:
        return self._rows_of(key) is not None

    def version(self, tenant: str) -> tuple[int, int]:
        """Another one after every change of what the tenant's searches can find."""
        return self._versions.get(tenant, 0), self._public_version

    def put(self, tenant: str, name: str, public: bool, vectors: Vectors) -> None:
        """Add or replace an adapter's prototypes (count, width). Raises ValueError unless they are finite and fit."""
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != self.width:
            raise ValueError(f"prototypes of {name!r} are {vectors.shape}: expected (count, {self.width})")
        if not np.isfinite(vectors).all():
            raise ValueError(f"prototypes of {name!r} are not finite")
        key = (tenant, name)
        rows = self._rows_of(key)
        if rows is not None and (rows is self._public) != public:
            self.remove(tenant, name)
        if public:
            self._public.put(key, vectors)
            self._owners.setdefault(name, set()).add(tenant)
        else:
            self._private.setdefault(tenant, RowsByCount(self.width)).put(key, vectors)
        self._count_change(tenant, public)

    def remove(self, tenant: str, name: str) -> bool:
        """Forget an adapter; whether it was there."""
        key = (tenant, name)
        rows = self._rows_of(key)
        if rows is None:
            return False
        rows.remove(key)
        if rows is self._public:
            self._owners[name].discard(tenant)
            if not self._owners[name]:
                del self._owners[name]
        elif not rows:
            del self._private[tenant]
        self._count_change(tenant, rows is self._public)
        return True

    def count(self, tenant: str, candidates: Collection[str] | None = None) -> int:
        """How many adapters a search looks at, hidden ones included; 0 only if there are none."""
        if candidates is not None:
            return len(self._visible(tenant, candidates))
        return len(self._public) + len(self._private.get(tenant, ()))

    def search(self, tenant: str, query: Vectors, candidates: Collection[str] | None = None) -> list[Hit]:
        """All adapters that the tenant sees, best first, ties by owner and name. `query` is (width,) float32."""
        hits: list[Hit] = []
        for keys, scores in self._score(tenant, query, candidates):
            values = scores.tolist()
            hits += [Hit(*key, value) for key, value in zip(keys, values, strict=True) if self._sees(tenant, key)]
        return sorted(hits, key=_order)

    def top(self, tenant: str, query: Vectors, k: int, candidates: Collection[str] | None = None) -> list[Hit]:
        """The first `k` of `search`, without an order of the others."""
        best: list[Hit] = []
        for keys, scores in self._score(tenant, query, candidates):
            best += self._best_of(tenant, keys, scores, k)
        return heapq.nsmallest(k, best, key=_order)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each adapter is at one place, its owner's or the public one."""
        self._public.check_integrity()
        for tenant, rows in self._private.items():
            rows.check_integrity()
            if not rows or any(owner != tenant or (owner, name) in self._public for owner, name in rows):
                raise RuntimeError(f"the private prototypes of {tenant!r} are not only its own")
        if {(owner, name) for name, owners in self._owners.items() for owner in owners} != set(self._public):
            raise RuntimeError("the owners of public names differ from the public prototypes")
        if not all(self._owners.values()):
            raise RuntimeError("a public name has no owner")

    def _rows_of(self, key: Key) -> RowsByCount | None:
        if key in self._public:
            return self._public
        rows = self._private.get(key[0])
        return rows if rows is not None and key in rows else None

    def _count_change(self, tenant: str, public: bool) -> None:
        if public:
            self._public_version += 1
        else:
            self._versions[tenant] = self._versions.get(tenant, 0) + 1

    def _sees(self, tenant: str, key: Key) -> bool:
        """Whether a public adapter is not hidden by one of the tenant's own."""
        return key[0] == tenant or (tenant, key[1]) not in self

    def _visible(self, tenant: str, candidates: Collection[str]) -> list[Key]:
        found: list[Key] = []
        for name in dict.fromkeys(candidates):
            own = (tenant, name)
            found += [own] if own in self else sorted((owner, name) for owner in self._owners.get(name, ()))
        return found

    def _score(
        self, tenant: str, query: Vectors, candidates: Collection[str] | None
    ) -> Iterator[tuple[Sequence[Key], Vectors]]:
        private = self._private.get(tenant)
        if candidates is None:
            parts: Iterable[tuple[Sequence[Key], Vectors]] = self._public.scores(query)
            parts = [*parts, *(private.scores(query) if private is not None else ())]
        else:
            keys = self._visible(tenant, candidates)
            parts = [*self._public.scores_of([key for key in keys if key in self._public], query)]
            if private is not None:
                parts += private.scores_of([key for key in keys if key not in self._public], query)
        for some, scores in parts:
            yield some, np.round(scores, _DIGITS)

    def _best_of(self, tenant: str, keys: Sequence[Key], scores: Vectors, k: int) -> list[Hit]:
        """The best `k` of one part and all that tie with the last of them."""
        wanted = k
        while True:
            if wanted >= len(keys):
                places = range(len(keys))
                floor = -np.inf
            else:
                floor = np.partition(scores, len(keys) - wanted)[len(keys) - wanted]
                places = np.flatnonzero(scores >= floor).tolist()
            hits = [Hit(*keys[place], float(scores[place])) for place in places if self._sees(tenant, keys[place])]
            if len(hits) >= k or wanted >= len(keys):
                return hits
            wanted *= 4  # some were hidden


def _order(hit: Hit) -> tuple[float, str, str]:
    return -hit.score, hit.owner, hit.name
