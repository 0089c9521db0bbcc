"""Which token-level router has its gates in which slot of the device: slots are few, at fixed addresses.

A request takes its router's slot before it is queued and gives it back when it ends, so that nothing that runs can wait
for a slot. A router that finds none keeps later requests of the others away, once enough of them have overtaken it.
"""

from collections import Counter

from server.engine.config import RequestError
from server.engine.gates import Gates, SlotMemory

PATIENCE = 64
"""Requests that may overtake one that waits for a slot."""


class GateSlots:
    """Slots by the digest of the router in them. Not thread-safe."""

    def __init__(self, memory: SlotMemory, patience: int = PATIENCE) -> None:
        self._memory = memory
        self._patience = patience
        self._slots: dict[str, int] = {}  # the least recently taken first
        self._free = list(range(memory.shape.slots))[::-1]
        self._users: Counter[str] = Counter()
        self._claimant: str | None = None
        self._overtaken = 0

    def take(self, digest: str, gates: Gates) -> int | None:
        """The router's slot, with the gates in it, for one request more; None: it must wait, and ask again.

        Raises RequestError for gates that no slot holds.
        """
        room = self._memory.shape.gates
        if gates.num_rows > room:
            raise RequestError(
                f"the router has {gates.num_rows} gates a linear, but this engine has room for {room}",
                param="lora.router",
                code="router_unavailable",
            )
        if digest in self._slots:
            if not self._may_overtake():
                return None
        elif not self._seat(digest, gates):
            return None
        self._slots[digest] = slot = self._slots.pop(digest)
        self._users[digest] += 1
        return slot

    def give_back(self, digest: str) -> None:
        """A request that had taken the slot has ended."""
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]

    def withdraw(self, digest: str) -> None:
        """Nobody waits for this router's slot any more."""
        if self._claimant == digest:
            self._claimant = None

    @property
    def used(self) -> set[str]:
        """The routers whose slots requests have taken and not given back."""
        return set(self._users)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every slot is free or one router's, and every user's router has one."""
        if sorted([*self._slots.values(), *self._free]) != list(range(self._memory.shape.slots)):
            raise RuntimeError(f"slots {self._slots} are taken and {self._free} free, but there are others")
        if lost := self._users.keys() - self._slots.keys():
            raise RuntimeError(f"requests use the gates {sorted(lost)}, which are in no slot")
        if self._claimant in self._slots:
            raise RuntimeError(f"the router {self._claimant} waits for the slot that it has")

    def _may_overtake(self) -> bool:
        """Whether a request whose router has its slot may go before one that waits for a slot."""
        if self._claimant is None:
            return True
        self._overtaken += 1
        return self._overtaken <= self._patience

    def _seat(self, digest: str, gates: Gates) -> bool:
        """Put gates into a slot that is free or that nobody uses, unless somebody has waited for longer."""
        if self._claimant not in (None, digest):
            return False
        if not self._free:
            idle = next((own for own in self._slots if own not in self._users), None)
            if idle is None:
                if self._claimant is None:
                    self._claimant, self._overtaken = digest, 0
                return False
            self._free.append(self._slots.pop(idle))
        self._slots[digest] = slot = self._free.pop()
        self._memory.load(slot, gates)
        self._claimant = None
        return True
