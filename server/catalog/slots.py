"""How many adapters are received and made at the same time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import Unavailable
from server.tenants import Caller

MOST_WAITING = 512
"""Registrations of tenants that wait for a place, of which one can have half; and as many of the administrator."""


@dataclass(eq=False)
class _Waiting:
    tenant: str
    is_admin: bool
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Slots:
    """`most` registrations and merges at once, and one more for the administrator; at most half of them for any tenant.

    The others wait in the order in which they came, as far as their tenant may have another place. However slow their
    uploads and however many of them wait, the administrator's do not wait for them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_one = max(1, most // 2)
        self._taken: Counter[tuple[str, bool]] = Counter()  # by tenant, and whether with the admin key
        self._waiting: list[_Waiting] = []

    @property
    def taken(self) -> int:
        return self._taken.total()

    @asynccontextmanager
    async def take(self, caller: Caller) -> AsyncIterator[None]:
        """A place, when there is one. Raises Unavailable when too many wait already."""
        mine = _Waiting(caller.tenant.id, caller.admin)
        self._check_room(mine)
        self._waiting.append(mine)
        self._hand_out()
        try:
            await mine.turn
            yield
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                self._taken[mine.tenant, mine.is_admin] -= 1
                self._taken += Counter()  # without those that have none
            self._hand_out()

    def _check_room(self, new: _Waiting) -> None:
        waiting = [each for each in self._waiting if each.is_admin == new.is_admin]
        own = sum(each.tenant == new.tenant for each in waiting)
        if len(waiting) >= MOST_WAITING or (own >= MOST_WAITING // 2 and not new.is_admin):
            raise Unavailable("too many adapters are being registered: expected fewer at once", code="uploads_busy")

    def _hand_out(self) -> None:
        for waiting in self._waiting[:]:
            if self._has_place(waiting):
                self._waiting.remove(waiting)
                self._taken[waiting.tenant, waiting.is_admin] += 1
                if not waiting.turn.done():
                    waiting.turn.set_result(None)

    def _has_place(self, waiting: _Waiting) -> bool:
        if waiting.is_admin:
            return self.taken < self._most + 1
        tenants = sum(count for (_, is_admin), count in self._taken.items() if not is_admin)
        own = self._taken[waiting.tenant, False]
        return tenants < self._most and self.taken < self._most + 1 and own < self._most_of_one
