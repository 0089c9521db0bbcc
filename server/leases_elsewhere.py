"""Leases of a server's other processes, for deletions."""

import msgspec

from adapters_store.neighbours import Neighbours
from adapters_store.store import AdapterStore
from server.siblings import Siblings

USES, IDLE = "uses", "idle"
USES_SECONDS = 2.0


class LeasesElsewhere(Neighbours):
    """What the other front ends lease. Who dies leases nothing."""

    def __init__(self, siblings: Siblings, store: AdapterStore) -> None:
        self._siblings = siblings
        self._store = store
        siblings.on(USES, self._tell_uses)
        siblings.on(IDLE, self._tell_idle)

    async def uses(self, owner: str, name: str) -> int:
        answers = await self._siblings.ask(USES, _encode(owner, name), USES_SECONDS)
        return sum(int(answer) for answer in answers if answer)

    async def idle(self, owner: str, name: str) -> None:
        await self._siblings.ask(IDLE, _encode(owner, name))

    async def _tell_uses(self, data: bytes) -> bytes:
        return str(self._store.uses(*_decode(data))).encode()

    async def _tell_idle(self, data: bytes) -> bytes:
        await self._store.idle(*_decode(data))
        return b"idle"


def _encode(owner: str, name: str) -> bytes:
    return msgspec.msgpack.encode((owner, name))


def _decode(data: bytes) -> tuple[str, str]:
    return msgspec.msgpack.decode(data, type=tuple[str, str])
