"""Requests that were in flight when an engine died: one of them may be why, and may come again."""

import asyncio
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from collections.abc import Set as AbstractSet
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

    def is_convicted(self, request: Request) -> bool:
        """Whether engines died of the request, as far as can be known."""

    def cleared(self, request: Request) -> None:
        """The request has been answered, or has come further than it had when its engine died."""


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

    @property
    def crashes(self) -> dict[bytes, int]:
        """How often engines died, by the keys of what they had."""
        return dict(self._crashes)

    def crashed(self, requests: Iterable[Request]) -> None:
        """The engine died while it had these requests."""
        self.crashed_with({suspect_key(request) for request in requests})

    def crashed_with(self, keys: AbstractSet[bytes]) -> None:
        """The same, by their keys."""
        for key in keys:
            self._crashes[key] = self._crashes.pop(key, 0) + 1
        while len(self._crashes) > self._kept:
            self._crashes.popitem(last=False)

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[None]:
        """While the request is in flight; a suspect waits for its turn first. Raises Quarantined."""
        async with self.turn(suspect_key(request), request.id):
            yield

    @asynccontextmanager
    async def turn(self, key: bytes, runner: str) -> AsyncIterator[None]:
        """While `runner` runs what has this key. Raises Quarantined."""
        if key not in self._crashes:
            yield
            return
        await self._turn.acquire()
        self._running = runner
        try:
            if self._crashes.get(key, 0) >= CRASHES:
                raise Quarantined
            yield
        finally:
            self._give_turn(runner)

    def is_suspect(self, request: Request) -> bool:
        """Whether an engine died while it had the request."""
        return suspect_key(request) in self._crashes

    def is_convicted(self, request: Request) -> bool:
        """Whether engines died of the request, as far as can be known."""
        return self._crashes.get(suspect_key(request), 0) >= CRASHES

    def cleared(self, request: Request) -> None:
        """The request has been answered, or has come further than it had when its engine died: the next one's turn."""
        self.clear(suspect_key(request), request.id)

    def clear(self, key: bytes, runner: str) -> None:
        """The same, by its key."""
        self._crashes.pop(key, None)
        self._give_turn(runner)

    def _give_turn(self, runner: str) -> None:
        if self._running == runner:
            self._running = None
            self._turn.release()


def suspect_key(request: Request) -> bytes:
    """What was asked, whatever it was called: prompt, adapters, routing and tenant, not seeds and ids."""
    prompt = array("I", request.prompt).tobytes()
    return hashlib.sha256(len(request.cache_root).to_bytes(4, "little") + request.cache_root + prompt).digest()
