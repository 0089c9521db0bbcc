"""Engines of several front ends, as their parent sees them, and requests that engines may have died of."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from server.engine.config import EngineConfig, EngineStats
from server.engine.conversation import EngineConversation
from server.engine.engine_process import EngineProcess
from server.engine.suspects import Quarantined, Suspects
from server.frontends.messages import Cleared, EngineDown, EngineUp, TakeTurn, Turn
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.frontends.front_end import FrontEnd

PARENT = "parent"
"""The parent's own name among an engine's front ends: it listens to what all are told."""
IN_FLIGHT_SECONDS = 5.0
"""So long front ends may take to say what they had asked an engine that died."""

logger = logging.getLogger(__name__)


class SupervisedEngine:
    """An engine whose every life is announced to all front ends, and whose every death is examined."""

    def __init__(
        self,
        number: int,
        config: EngineConfig,
        stall_seconds: float,
        suspects: "SuspectDesk",
        fronts: Callable[[], "Iterable[FrontEnd]"],
    ) -> None:
        self.number = number
        self.process = EngineProcess(config, self._started, self._lost)
        self.conversation = EngineConversation(PARENT, Suspects(), stall_seconds)
        self._suspects = suspects
        self._fronts = fronts
        self._asked: dict[str, asyncio.Future[None]] = {}
        self._counted: set[bytes] = set()  # what the engine had that died last

    def count(self, metrics: Metrics) -> None:
        """What the engine says of itself is counted here, once for all front ends."""
        name = str(self.number)
        metrics.watch(name, lambda: self.conversation.alive)
        metrics.engine(EngineStats(), time.time(), name)
        self.conversation.on_stats = lambda stats: metrics.engine(stats, time.time(), name)

    async def start(self) -> None:
        """Raises EngineStartError."""
        await self.process.start()

    async def stop(self) -> None:
        await self.process.stop()
        await self.conversation.stop()

    def introduce(self, front: "FrontEnd") -> None:
        """Tell a front end of the engine, if one lives."""
        if self.conversation.alive and self.process.info is not None:
            crashes = self._suspects.crashes
            front.send(EngineUp(self.number, self.process.address, self.process.info, crashes))

    def part(self, front: str) -> None:
        """A front end is gone."""
        self.process.part(front)
        asked = self._asked.pop(front, None)
        if asked is not None and not asked.done():
            asked.set_result(None)

    def had(self, front: str, keys: list[bytes]) -> None:
        """What the engine was asked by a front end when it died. What several had asked alike counts once."""
        self._suspects.crashed(set(keys) - self._counted)
        self._counted |= set(keys)
        asked = self._asked.pop(front, None)
        if asked is not None and not asked.done():
            asked.set_result(None)

    def is_said_to_be_stuck(self) -> None:
        """By a front end: it may be stuck itself, so the engine is ended only if the parent does not hear it either."""
        if self.conversation.unheard_for >= self.conversation.stall_seconds:
            self.process.kill()
        else:
            logger.warning("a front end hears nothing of engine %d, which the parent does", self.number)

    async def _started(self) -> None:
        assert self.process.info is not None
        self.conversation.connect(self.process.address, self.process.info)
        for front in self._fronts():
            self.introduce(front)

    async def _lost(self, reason: str) -> None:
        was_alive = self.conversation.alive
        self.conversation.lost(reason)
        if not was_alive or self.process.is_stopping:
            return
        loop = asyncio.get_running_loop()
        self._counted = set()
        for front in self._fronts():
            front.send(EngineDown(self.number, reason))
            if front.line is not None:  # one that does not serve yet has asked nothing, and may answer late
                self._asked[front.name] = loop.create_future()
        asked = list(self._asked.values())
        if asked:
            await asyncio.wait(asked, timeout=IN_FLIGHT_SECONDS)
        self._asked.clear()


class SuspectDesk:
    """The suspects of all front ends: one of them runs at a time, whichever front end has it.

    `tell` sends a message to the front end of a name.
    """

    def __init__(self, tell: Callable[[str, Turn], None]) -> None:
        self._suspects = Suspects()
        self._tell = tell
        self._turns: dict[tuple[str, int], asyncio.Task[None]] = {}

    @property
    def crashes(self) -> dict[bytes, int]:
        """How often engines died, by what they were asked."""
        return self._suspects.crashes

    def crashed(self, keys: AbstractSet[bytes]) -> None:
        """An engine died while it had these."""
        self._suspects.crashed_with(keys)

    def take(self, front: str, message: TakeTurn) -> None:
        """A front end wants to run a suspect."""
        key = front, message.number
        self._turns[key] = task = asyncio.create_task(self._turn(front, message))
        task.add_done_callback(lambda _: self._turns.pop(key, None))

    def give(self, front: str, number: int) -> None:
        """It has run, or gave up waiting."""
        task = self._turns.get((front, number))
        if task is not None:
            task.cancel()

    def gone(self, front: str) -> None:
        """A front end is gone, and with it what it ran."""
        for (name, _), task in list(self._turns.items()):
            if name == front:
                task.cancel()

    def clear(self, front: str, message: Cleared) -> None:
        """A suspect was answered, or has outlived what its first engine died of."""
        self._suspects.clear(message.key, f"{front} {message.number}")

    async def _turn(self, front: str, message: TakeTurn) -> None:
        try:
            async with self._suspects.turn(message.key, f"{front} {message.number}"):
                self._tell(front, Turn(message.number, is_convicted=False))
                await asyncio.Event().wait()  # until it is cancelled
        except Quarantined:
            self._tell(front, Turn(message.number, is_convicted=True))
