"""Lines of tenants for something that is had one by one: tenants take turns, each with its own line in order."""

import threading
from collections import OrderedDict, defaultdict


class Turns:
    """Keys in line, each once or under several tenants, and given out once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()  # whose turn it is first
        self._tenants: defaultdict[str, set[str]] = defaultdict(set)  # by key in line

    def enter(self, tenant: str, key: str, *, first: bool = False) -> None:
        """Put a key, which is not in line, at the end of the tenant's line, or before all others of it."""
        with self._lock:
            self._enter(tenant, key, first)

    def join(self, tenant: str, key: str, *, first: bool = False) -> None:
        """Let a key also come in this tenant's turn. Nothing happens if it has been given out."""
        with self._lock:
            if key in self._tenants:
                self._enter(tenant, key, first)

    def leave(self, key: str) -> bool:
        """Take a key out of line; False if it has been given out, or was never there."""
        with self._lock:
            return self._leave(key)

    def next(self) -> str | None:
        """The key whose turn it is, no longer in line; None if there is none."""
        with self._lock:
            if not self._lines:
                return None
            tenant, line = next(iter(self._lines.items()))
            key = next(iter(line))
            self._leave(key)
            if tenant in self._lines:
                self._lines.move_to_end(tenant)
            return key

    def _enter(self, tenant: str, key: str, first: bool) -> None:
        self._tenants[key].add(tenant)
        line = self._lines.setdefault(tenant, OrderedDict())
        line[key] = None
        if first:
            line.move_to_end(key, last=False)

    def _leave(self, key: str) -> bool:
        tenants = self._tenants.pop(key, None)
        for tenant in tenants or ():
            del self._lines[tenant][key]
            if not self._lines[tenant]:
                del self._lines[tenant]
        return tenants is not None
