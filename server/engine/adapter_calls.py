"""The front end's side of an engine's adapters: what is pinned, where everything is, and calls that get an answer."""

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

from server.engine.config import RequestError
from server.engine.messages import Evict, Pin, Prefetch, ReadAhead, Reply, ToEngine, Unpin

logger = logging.getLogger(__name__)

OnResidency = Callable[[str, str], None]
"""(digest, tier)"""


class EngineUnavailable(RuntimeError):
    """No engine lives at the moment."""


class AdapterCalls(ABC):
    """The part of an engine's client that is about adapters. Pins and prefetches hold for engines to come as well.

    `alive`: an engine takes messages. `residency` has "device" or "host" by digest; what is absent is on disk.
    `on_residency` is told of each change, and of "disk" for all that a dying engine had.
    """

    def __init__(self) -> None:
        self.alive = False
        self.residency: dict[str, str] = {}
        self.on_residency: OnResidency | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[bool | str]] = {}
        self._repeated: set[int] = set()
        self._pins: dict[str, str] = {}
        self._ahead: dict[str, str] = {}

    @abstractmethod
    def _send(self, message: ToEngine) -> None: ...

    async def pin(self, digest: str, path: str) -> bool:
        """Keep an adapter on the device, in this engine and those after it.

        False if pins would take more than half of some group's pages. Raises RequestError `adapter_unavailable` if it
        cannot be read, and EngineUnavailable.
        """
        try:
            pinned = bool(await self._call(partial(Pin, digest=digest, path=path)))
        except asyncio.CancelledError:
            if digest not in self._pins:
                self.unpin(digest)
            raise
        if pinned:
            self._pins[digest] = path
        return pinned

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted like others."""
        self._pins.pop(digest, None)
        self._tell(Unpin(digest))

    async def prefetch_now(self, digest: str, path: str) -> str:
        """Bring an adapter into host memory, and onto the device if there is room now: its residency.

        Raises RequestError `adapter_unavailable` if it cannot be read, and EngineUnavailable.
        """
        return str(await self._call(partial(Prefetch, digest=digest, path=path)))

    def evict(self, digest: str) -> None:
        """Free an adapter's host memory, and its pages as soon as nothing uses them, unless it is pinned.

        An adapter that is pinned when this comes has been registered and pinned again since it went.
        """
        self._ahead.pop(digest, None)
        self._tell(Evict(digest))

    def prefetch(self, paths: Mapping[str, str]) -> None:
        """Have these adapters (digest to folder) read into host memory in idle time."""
        self._ahead |= paths
        self._tell(ReadAhead(dict(paths)))

    def _engine_started(self) -> None:
        """An engine lives that knows of nothing."""
        for digest, path in self._pins.items():
            number = next(self._numbers)
            self._repeated.add(number)
            self._send(Pin(number, digest, path))
        if self._ahead:
            self._send(ReadAhead(self._ahead))

    def _engine_lost(self, reason: str) -> None:
        """The engine is gone: every call gets its answer, and nothing is in its memory."""
        self._repeated.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineUnavailable(reason))
        self._answers.clear()
        self._moved(dict.fromkeys(self.residency, "disk"))

    def _answered(self, reply: Reply) -> None:
        if reply.call in self._repeated:
            self._repeated.remove(reply.call)
            if not reply.value:
                logger.warning("an adapter is not pinned in the new engine: %s", reply.error or "too many are")
        answer = self._answers.pop(reply.call, None)
        if answer is not None and not answer.done():
            if reply.error is None:
                answer.set_result(reply.value)
            else:
                answer.set_exception(RequestError(reply.error, param="model", code=reply.code))

    def _moved(self, changes: Mapping[str, str]) -> None:
        """Adapters changed their tier."""
        for digest, tier in changes.items():
            if tier == "disk":
                self.residency.pop(digest, None)
            else:
                self.residency[digest] = tier
            if self.on_residency is not None:
                self.on_residency(digest, tier)

    async def _call(self, make: Callable[[int], ToEngine]) -> bool | str:
        if not self.alive:
            raise EngineUnavailable("the inference engine is not running, it is being restarted")
        number = next(self._numbers)
        answer: asyncio.Future[bool | str] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send(make(number))
            return await answer
        finally:
            self._answers.pop(number, None)

    def _tell(self, message: ToEngine) -> None:
        if self.alive:
            self._send(message)
