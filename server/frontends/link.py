"""A front end's link to its parent: engines that come and go, questions, suspects, and the end."""

import asyncio
import itertools
import random
from typing import Protocol

from server.engine.placement import Placement
from server.engine.pool import EnginePool
from server.frontends.channel import Channel
from server.frontends.messages import (
    Answer,
    Answers,
    Ask,
    Drain,
    EngineDown,
    EngineUp,
    InFlight,
    Ping,
    Pong,
    Question,
    Stop,
    ToFront,
    ToParent,
    Turn,
)
from server.frontends.shared_engine import LinkedSuspects, SharedEngine
from server.siblings import Siblings


class Stoppable(Protocol):
    """What the parent can end."""

    def drain(self) -> None:
        """Take no new requests, and end when those that run have."""

    def stop(self) -> None:
        """End now."""

    def leave(self) -> None:
        """The parent is gone, and the engines with it."""


class ParentLink:
    """All that comes from the parent goes to whom it is for. For one event loop."""

    def __init__(self, channel: Channel[ToFront], name: str, stall_seconds: float) -> None:
        self.siblings = LinkedSiblings(self)
        self.server: Stoppable | None = None
        """What the parent can end, once it is there."""
        self._channel = channel
        self._name = name
        self._stall_seconds = stall_seconds
        self._suspects = LinkedSuspects(self.send)
        self._engines: tuple[SharedEngine, ...] = ()
        self._up: dict[int, EngineUp] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def engines(self, count: int) -> SharedEngine | EnginePool:
        """The front end's side of the parent's engines. They live already, or it is told when they do."""
        numbers = range(count)
        self._engines = tuple(
            SharedEngine(number, self._name, self._suspects, self._stall_seconds, self.send) for number in numbers
        )
        for up in self._up.values():
            self._engines[up.engine].up(up)
        if len(self._engines) == 1:
            return self._engines[0]
        return EnginePool(self._engines, Placement(len(self._engines), random.Random()), self._suspects)

    def send(self, message: ToParent) -> None:
        self._channel.send(message)

    async def listen(self) -> None:
        """Until the parent is gone, or wants a front end to end that does not serve yet."""
        try:
            while True:
                message = await self._channel.receive()
                if isinstance(message, Drain | Stop):
                    if self.server is None:
                        return
                    self.server.drain() if isinstance(message, Drain) else self.server.stop()
                else:
                    self._take(message)
        except EOFError:
            if self.server is not None:
                self.server.leave()

    def _take(self, message: ToFront) -> None:
        if isinstance(message, EngineUp):
            self._up[message.engine] = message
            self._suspects.crashes = message.suspects
            if message.engine < len(self._engines):
                self._engines[message.engine].up(message)
        elif isinstance(message, EngineDown):
            self._up.pop(message.engine, None)
            keys = self._engines[message.engine].down(message.reason) if message.engine < len(self._engines) else []
            self.send(InFlight(message.engine, keys))
        elif isinstance(message, Question):
            task = asyncio.create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Answers):
            self.siblings.answered(message)
        elif isinstance(message, Turn):
            self._suspects.turned(message)
        elif isinstance(message, Ping):
            self.send(Pong())

    async def _answer(self, question: Question) -> None:
        self.send(Answer(question.number, await self.siblings.answer(question.topic, question.data)))


class LinkedSiblings(Siblings):
    """The others, whom the parent asks."""

    are_none = False

    def __init__(self, link: ParentLink) -> None:
        super().__init__()
        self._link = link
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[bytes]]] = {}

    async def ask(self, topic: str, data: bytes = b"", seconds: float | None = None) -> list[bytes]:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._link.send(Ask(number, topic, data, seconds))
            return await self._waiting[number]
        finally:
            del self._waiting[number]

    def answered(self, message: Answers) -> None:
        waiting = self._waiting.get(message.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(message.answers)
