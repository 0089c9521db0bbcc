"""Requests that were in flight when an engine died: one of them may be why, and may come again."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from server.engine.config import RequestError
from server.engine.sequence import Request

KEPT = 10_000
CRASHES = 2


class Quarantined(RequestError):
    """The request was in flight whenever the engine died."""

    def __init__(self) -> None:
        super().__init__(
            f"the inference engine died {CRASHES} times while it computed this request; it is not tried again",
            param=None,
            code="request_quarantined",
        )


class Suspicion(Protocol):
    """What a conversation with an engine does about suspects."""

    def admitted(self, request: Request) -> AbstractAsyncContextManager[None]:
        """While the request is in flight; a suspect waits for its turn first. Raises Quarantined."""

    def cleared(self, request: Request) -> None:
        """The request has been answered."""


class Suspects:
    """Counts crashes by what was asked, so that a client's retry is known again.

    A suspect runs while no other suspect does. So the second crash convicts one request, not everybody who happened to
    be in flight twice: those others end well and are cleared. The `kept` last suspects are remembered.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._crashes: OrderedDict[bytes, int] = OrderedDict()
        self._turn = asyncio.Lock()
        self._running: str | None = None

    def crashed(self, requests: Iterable[Request]) -> None:
        """The engine died while it had these requests."""
        for key in {_key(request) for request in requests}:
            self._crashes[key] = self._crashes.pop(key, 0) + 1
        while len(self._crashes) > self._kept:
            self._crashes.popitem(last=False)

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[None]:
        """While the request is in flight; a suspect waits for its turn first. Raises Quarantined."""
        if _key(request) not in self._crashes:
            yield
            return
        await self._turn.acquire()
        self._running = request.id
        try:
            if self.is_convicted(request):
                raise Quarantined
            yield
        finally:
            self._give_turn(request)

    def is_convicted(self, request: Request) -> bool:
        """Whether engines died of the request, as far as can be known."""
        return self._crashes.get(_key(request), 0) >= CRASHES

    def cleared(self, request: Request) -> None:
        """The request has been answered, or has come further than it had when its engine died: the next one's turn."""
        self._crashes.pop(_key(request), None)
        self._give_turn(request)

    def _give_turn(self, request: Request) -> None:
        if self._running == request.id:
            self._running = None
            self._turn.release()


def _key(request: Request) -> bytes:
    """What was asked, whatever it was called: prompt, adapters, routing and tenant, not seeds and ids."""
    prompt = b"".join(token.to_bytes(4, "little") for token in request.prompt)
    return hashlib.sha256(len(request.cache_root).to_bytes(4, "little") + request.cache_root + prompt).digest()
