"""Decisions that are remembered, for each tenant apart."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class RouteCache(Generic[T]):
    """At most `per_tenant` decisions of each tenant and `total` of all.

    Of a tenant that has too many, the one used longest ago goes; of all, one of the tenant that has been away longest.
    """

    def __init__(self, per_tenant: int = 1024, total: int = 1 << 16) -> None:
        self._per_tenant = per_tenant
        self._total = total
        self._count = 0
        self._entries: OrderedDict[str, OrderedDict[Hashable, T]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def get(self, tenant: str, key: Hashable) -> T | None:
        """The decision under this key, None if there is none."""
        entries = self._entries.get(tenant)
        if entries is None or key not in entries:
            return None
        self._entries.move_to_end(tenant)
        entries.move_to_end(key)
        return entries[key]

    def put(self, tenant: str, key: Hashable, decision: T) -> None:
        """Remember a decision."""
        entries = self._entries.setdefault(tenant, OrderedDict())
        self._entries.move_to_end(tenant)
        self._count += key not in entries
        entries[key] = decision
        entries.move_to_end(key)
        if len(entries) > self._per_tenant:
            self._pop_oldest(tenant)
        if self._count > self._total:
            self._pop_oldest(next(iter(self._entries)))

    def drop(self, tenant: str, key: Hashable) -> None:
        """Forget a decision, if it is there."""
        entries = self._entries.get(tenant)
        if entries is not None and key in entries:
            entries.move_to_end(key, last=False)
            self._pop_oldest(tenant)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all is counted and within bounds."""
        if self._count != sum(map(len, self._entries.values())) or not all(self._entries.values()):
            raise RuntimeError("the decisions differ from their count")
        if self._count > self._total or any(len(each) > self._per_tenant for each in self._entries.values()):
            raise RuntimeError("more decisions are remembered than may be")

    def _pop_oldest(self, tenant: str) -> None:
        entries = self._entries[tenant]
        entries.popitem(last=False)
        self._count -= 1
        if not entries:
            del self._entries[tenant]
