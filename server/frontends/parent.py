"""The parent of several front ends: it binds the port, starts engines and front ends, and supervises all of them."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from server.board import Board
from server.checkpoint import locate
from server.config import ServeSettings, Settings
from server.engine.config import EngineConfig
from server.frontends.engines import SupervisedEngine, SuspectDesk
from server.frontends.exchange import Exchange
from server.frontends.front_end import FrontEnd, Shared
from server.frontends.messages import (
    Answer,
    Answers,
    Ask,
    Cleared,
    Drain,
    GiveTurn,
    InFlight,
    Proven,
    Question,
    Stop,
    Stuck,
    TakeTurn,
    ToFront,
    ToParent,
)
from server.frontends.tally import Tally
from server.metrics import Metrics
from server.metrics_sum import TOPIC as METRICS
from server.serve import LAST_WORDS_SECONDS, bind, run

STOP_SECONDS = 10.0
"""So long front ends may take beyond what they were given, to close what they have open."""

logger = logging.getLogger(__name__)


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve from several processes until SIGTERM or SIGINT. `announce` gets one line when requests can come.

    Raises BindError, CheckpointError, EngineStartError and FrontEndError.
    """
    run(_serve(settings, announce))


async def _serve(settings: Settings, announce: Callable[[str], None]) -> None:
    with reserve(settings.serve) as reserved:
        assert settings.serve.model is not None
        folder = await asyncio.to_thread(locate, settings.serve.model, settings.data_dir)
        board = Board(settings.serve.frontends)
        shared = Shared(settings.revealed(), reserved.getsockname()[1], board.file)
        try:
            configs = settings.serve.engine_configs(folder, settings.data_dir)
            await Parent(settings, shared, board, configs).run(announce)
        finally:
            board.close()


def reserve(settings: ServeSettings) -> socket.socket:
    """The port for the front ends and nobody else's: not shared with another server, which would get half of what is
    meant for this one. Raises BindError.
    """
    with bind(settings) as alone:
        port = alone.getsockname()[1]
    return bind(settings, port, is_shared=True)


class Parent:
    """All processes of one server. The first signal drains every front end, the second one stops them."""

    def __init__(self, settings: Settings, shared: Shared, board: Board, configs: Sequence[EngineConfig]) -> None:
        self._timeout = settings.serve.shutdown_timeout
        self._board = board
        self._exchange = Exchange(self._tell, self._complete)
        self._metrics = Metrics(max_num_seqs=settings.serve.max_num_seqs * len(configs))
        self._tally = Tally(self._metrics.registry)
        self._suspects = SuspectDesk(self._tell)
        stall = settings.serve.stall_timeout
        self._engines = [
            SupervisedEngine(number, config, stall, self._suspects, self._living)
            for number, config in enumerate(configs)
        ]
        for engine in self._engines:
            engine.count(self._metrics)
        slots = range(settings.serve.frontends)
        self._fronts = [FrontEnd(slot, shared, self._begun, self._take, self._gone, stall) for slot in slots]
        self._signals = 0
        self._signalled = asyncio.Event()
        self._second = asyncio.Event()

    async def run(self, announce: Callable[[str], None]) -> None:
        """Until a signal, and then until everything has ended. Raises EngineStartError and FrontEndError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)
        try:
            starting = asyncio.create_task(self._start(announce))
            signalled = asyncio.create_task(self._signalled.wait())
            await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await signalled
                await self._drain()
            else:
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
        finally:
            for front in self._fronts:
                front.kill()
            await asyncio.gather(*(front.end(Stop()) for front in self._fronts))
            await asyncio.gather(*(engine.stop() for engine in self._engines))

    async def _start(self, announce: Callable[[str], None]) -> None:
        """Engines load while the first front end opens the registry: what is done once it does before the others."""
        first, *others = self._fronts
        await _together(first.start(), *(engine.start() for engine in self._engines))
        await _together(*(front.start() for front in others))
        announce(first.line or "")

    def _signal(self) -> None:
        self._signals += 1
        self._signalled.set()
        if self._signals > 1:
            self._second.set()

    async def _drain(self) -> None:
        """Let requests end, for so long at most; not for long after the second signal."""
        ending: asyncio.Future[Any] = asyncio.gather(*(front.end(Drain()) for front in self._fronts))
        second: asyncio.Future[Any] = asyncio.create_task(self._second.wait())
        most = self._timeout + 2 * LAST_WORDS_SECONDS + STOP_SECONDS
        await asyncio.wait({ending, second}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            for front in self._fronts:
                front.send(Stop())
            await asyncio.wait({ending}, timeout=LAST_WORDS_SECONDS + STOP_SECONDS)
        second.cancel()
        ending.cancel()
        await asyncio.gather(ending, second, return_exceptions=True)

    def _living(self) -> list[FrontEnd]:
        return [front for front in self._fronts if front.alive]

    def _tell(self, name: str, message: Question | Answers | ToFront) -> None:
        for front in self._living():
            if front.name == name:
                front.send(message)

    def _complete(self, topic: str, front: str, answers: Mapping[str, bytes]) -> list[bytes]:
        return self._tally.others(front) if topic == METRICS else list(answers.values())

    def _begun(self, front: FrontEnd) -> None:
        for engine in self._engines:
            engine.introduce(front)

    def _gone(self, front: FrontEnd) -> None:
        """Whatever it had in hand is free for others."""
        self._board.set(front.slot, 0)
        self._tally.gone(front.name)
        self._exchange.gone(front.name)
        self._suspects.gone(front.name)
        for engine in self._engines:
            engine.part(front.name)

    def _take(self, front: FrontEnd, message: ToParent) -> None:
        if isinstance(message, Ask):
            if message.topic == METRICS:
                self._tally.note(front.name, message.data)
                message = Ask(message.number, METRICS, b"", message.seconds)
            others = [other.name for other in self._living() if other is not front and other.line is not None]
            self._exchange.ask(front.name, message, others)
        elif isinstance(message, Answer):
            if self._exchange.topic(message.number) == METRICS:  # it may have died before all others have answered
                self._tally.note(front.name, message.data)
            self._exchange.answer(message.number, message.data)
        elif isinstance(message, InFlight):
            self._engines[message.engine].had(front.name, message.keys)
        elif isinstance(message, Stuck):
            self._engines[message.engine].is_said_to_be_stuck()
        elif isinstance(message, Proven):
            self._engines[message.engine].process.has_answered = True
        elif isinstance(message, TakeTurn):
            self._suspects.take(front.name, message)
        elif isinstance(message, GiveTurn):
            self._suspects.give(front.name, message.number)
        elif isinstance(message, Cleared):
            self._suspects.clear(front.name, message)


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """All of it, or the first failure."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as failed:  # the others were told to stop for its sake
        raise failed.exceptions[0] from None
