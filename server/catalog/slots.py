"""How many adapters are received and made at the same time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import Unavailable
from server.tenants import Caller

MOST_WAITING = 512
"""Registrations that wait for a place; one tenant's key can take half of them."""


@dataclass(eq=False)
class _Waiting:
    tenant: str
    is_admin: bool
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Slots:
    """`most` registrations and merges at once; at most half of them, but one, for any one tenant's key.

    The others wait in the order in which they came, as far as their tenant may have another place.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_one = max(1, most // 2)
        self._taken: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []

    @property
    def taken(self) -> int:
        return self._taken.total()

    @asynccontextmanager
    async def take(self, caller: Caller) -> AsyncIterator[None]:
        """A place, when there is one. Raises Unavailable when too many wait already."""
        tenant = caller.tenant.id
        own = sum(waiting.tenant == tenant for waiting in self._waiting)
        if len(self._waiting) >= MOST_WAITING or (own >= MOST_WAITING // 2 and not caller.admin):
            raise Unavailable("too many adapters are being registered: expected fewer at once", code="uploads_busy")
        mine = _Waiting(tenant, caller.admin)
        self._waiting.append(mine)
        self._hand_out()
        try:
            await mine.turn
            yield
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                self._taken[tenant] -= 1
                self._taken += Counter()  # without those that have none
            self._hand_out()

    def _hand_out(self) -> None:
        for waiting in self._waiting[:]:
            if self.taken >= self._most:
                return
            if waiting.is_admin or self._taken[waiting.tenant] < self._most_of_one:
                self._waiting.remove(waiting)
                self._taken[waiting.tenant] += 1
                if not waiting.turn.done():
                    waiting.turn.set_result(None)
