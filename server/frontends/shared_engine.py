"""An engine that a front end shares with others, and the requests that it is suspected to have died of."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager

from server.engine.conversation import EngineConversation
from server.engine.sequence import Request
from server.engine.suspects import CRASHES, Quarantined, suspect_key
from server.frontends.messages import Cleared, EngineUp, GiveTurn, Proven, Stuck, TakeTurn, ToParent, Turn

Send = Callable[[ToParent], None]


class SharedEngine(EngineConversation):
    """A conversation with an engine of the parent's, which says when it lives and when it is gone."""

    def __init__(self, number: int, name: str, suspects: "LinkedSuspects", stall_seconds: float, send: Send) -> None:
        super().__init__(name, suspects, stall_seconds)
        self._number = number
        self._linked = suspects
        self._send_up = send
        self._has_answered = False
        self.on_stuck = lambda: send(Stuck(number))
        self.on_answered = self._answered_one

    def up(self, message: EngineUp) -> None:
        self._has_answered = False
        self.connect(message.address, message.info)

    def down(self, reason: str) -> list[bytes]:
        """What the engine was asked when it died, by keys."""
        keys = {suspect_key(request) for request in self.in_flight()}
        self._linked.crashed(keys)
        self.lost(reason)
        return list(keys)

    def _answered_one(self) -> None:
        if not self._has_answered:
            self._has_answered = True
            self._send_up(Proven(self._number))


class LinkedSuspects:
    """The suspects of all front ends, whose turns the parent gives. `crashes`: how often engines died, by key."""

    def __init__(self, send: Send) -> None:
        self.crashes: dict[bytes, int] = {}
        self._send = send
        self._numbers = itertools.count()
        self._turns: dict[int, asyncio.Future[bool]] = {}
        self._running: dict[str, int] = {}  # number of the turn by request

    def crashed(self, keys: AbstractSet[bytes]) -> None:
        """An engine died that this front end had asked these. The parent counts, and tells all."""
        for key in keys:
            self.crashes[key] = self.crashes.get(key, 0) + 1

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[None]:
        """While the request is in flight; a suspect waits for its turn first. Raises Quarantined."""
        key = suspect_key(request)
        if key not in self.crashes:
            yield
            return
        number = next(self._numbers)
        turn = self._turns[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(TakeTurn(number, key))
            if await turn:
                raise Quarantined
            self._running[request.id] = number
            yield
        finally:
            del self._turns[number]
            self._running.pop(request.id, None)
            self._send(GiveTurn(number))

    def is_convicted(self, request: Request) -> bool:
        """Whether engines died of the request, as far as this front end has heard."""
        return self.crashes.get(suspect_key(request), 0) >= CRASHES

    def cleared(self, request: Request) -> None:
        """The request has been answered."""
        key = suspect_key(request)
        if self.crashes.pop(key, None) is not None:
            self._send(Cleared(key, self._running.get(request.id, -1)))

    def turned(self, message: Turn) -> None:
        """The parent says that it is a suspect's turn, or that it is not to be tried again."""
        turn = self._turns.get(message.number)
        if turn is not None and not turn.done():
            turn.set_result(message.is_convicted)
