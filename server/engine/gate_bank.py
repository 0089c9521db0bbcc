"""The token-level routers of one engine, and the slots of those in use."""

from collections.abc import Callable

from adapters_store.loader import Loader
from server.engine.gate_slots import GateSlots
from server.engine.gates import Gates
from server.engine.router_bank import KEPT, InFolder, RouterBank


class GateBank(RouterBank[Gates]):
    """Gates in memory. slots: where the gates in use are on a device whose steps are captured."""

    def __init__(
        self, loader: Loader, read: Callable[[str], Gates], kept: int = KEPT, slots: GateSlots | None = None
    ) -> None:
        super().__init__(loader, read, kept)
        self._slots = slots

    def take_slot(self, digest: str) -> int | None:
        """The slot of gates that `get` has given, for one request more; None: it must wait. -1 where steps need none.

        Raises RequestError for gates that no slot holds.
        """
        gates = self.get(digest)
        if self._slots is None or gates is None:
            return -1
        return self._slots.take(digest, gates)

    def leave(self, use: InFolder, seated: bool = False) -> bool:
        """As `RouterBank.leave`; `seated`: the request had taken its slot."""
        if self._slots is not None and seated:
            self._slots.give_back(use.digest)
        is_last = super().leave(use)
        if self._slots is not None and is_last:
            self._slots.withdraw(use.digest)
        return is_last

    def check_integrity(self) -> None:
        """As `RouterBank.check_integrity`."""
        super().check_integrity()
        if self._slots is not None:
            self._slots.check_integrity()
            if kept := self._slots.used - self._users.keys():
                raise RuntimeError(f"slots of {sorted(kept)} are taken, but no request uses these routers")
