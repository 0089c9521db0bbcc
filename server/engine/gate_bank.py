"""The token-level routers of one engine: each is read once, and stays while requests use it and for a while after."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

from adapters_store.loader import Loader
from server.engine.config import RequestError
from server.engine.gate_slots import GateSlots
from server.engine.gates import Gates, GateUse

KEPT = 4
"""Routers that stay though no request uses them."""

logger = logging.getLogger(__name__)


class GateBank:
    """Gates in memory, by digest. Not thread-safe; `loader` runs `read`, and reports where the engine polls it.

    slots: where the gates in use are on a device whose steps are captured.
    """

    def __init__(
        self, loader: Loader, read: Callable[[str], Gates], kept: int = KEPT, slots: GateSlots | None = None
    ) -> None:
        self._loader = loader
        self._read = read
        self._kept = kept
        self._slots = slots
        self._gates: dict[str, Gates | RequestError] = {}  # the least recently used first
        self._users: Counter[str] = Counter()
        self._reading: set[str] = set()

    def enter(self, use: GateUse) -> None:
        """A request comes; `leave` must be called once when it ends."""
        self._users[use.digest] += 1
        if isinstance(self._gates.get(use.digest), RequestError):
            del self._gates[use.digest]  # it may be there by now
        if use.digest in self._gates:
            self._gates[use.digest] = self._gates.pop(use.digest)
        elif use.digest not in self._reading:
            self._reading.add(use.digest)
            self._loader.submit(partial(self._read, use.path), partial(self._take, use.digest))

    def leave(self, use: GateUse, seated: bool = False) -> None:
        """A request has ended; `seated`: it had taken its slot."""
        self._users[use.digest] -= 1
        if self._slots is not None and seated:
            self._slots.give_back(use.digest)
        if not self._users[use.digest]:
            del self._users[use.digest]
            if self._slots is not None:
                self._slots.withdraw(use.digest)
        self._forget()

    def get(self, digest: str) -> Gates | None:
        """The gates, or None while they are being read. Raises RequestError if they could not be."""
        found = self._gates.get(digest)
        if isinstance(found, RequestError):
            raise found
        return found

    def take_slot(self, digest: str) -> int | None:
        """The slot of gates that `get` has given, for one request more; None: it must wait. -1 where steps need none.

        Raises RequestError for gates that no slot holds.
        """
        gates = self.get(digest)
        if self._slots is None or gates is None:
            return -1
        return self._slots.take(digest, gates)

    def __len__(self) -> int:
        return len(self._gates)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all that is used is there or under way, and no more is kept than should be."""
        if lost := self._users.keys() - self._gates.keys() - self._reading:
            raise RuntimeError(f"requests use the gates {sorted(lost)}, which nobody reads")
        if len(self._reading) > self._loader.pending:
            raise RuntimeError(f"{len(self._reading)} gates are awaited, {self._loader.pending} tasks are pending")
        if len(self._gates.keys() - self._users.keys()) > self._kept:
            raise RuntimeError(f"{len(self._gates)} gates are kept, {len(self._users)} used")

        if self._slots is not None:
            self._slots.check_integrity()

    def _take(self, digest: str, found: Gates | Exception) -> None:
        self._reading.remove(digest)
        if isinstance(found, Exception):
            if not isinstance(found, ValueError | OSError):
                logger.error("router %s could not be read", digest, exc_info=found)
            found = RequestError(
                f"the router's gates cannot be read: {found}", param="lora.router", code="router_unavailable"
            )
        self._gates[digest] = found
        self._forget()

    def _forget(self) -> None:
        idle = [digest for digest in self._gates if digest not in self._users]
        for digest in idle[: max(0, len(idle) - self._kept)]:
            del self._gates[digest]
