"""An engine's process: spawned, watched, and started again with back-off when it dies."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from server.engine.backoff import Backoff
from server.engine.config import EngineConfig, EngineInfo
from server.engine.messages import (
    FromEngine,
    Left,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    ToEngine,
    decode_from_engine,
    encode,
    fronts_address,
)
from server.openmp import OPENMP

SHUTDOWN_SECONDS = 5.0

logger = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine could not be started. The message is one sentence."""


class EngineProcess:
    """One engine process after the other, and the socket to the one that lives.

    `on_started` is awaited whenever one is ready, `on_lost` with a sentence whenever one is gone, the last one too.
    `program`: the module that it runs, and arguments before the address. `has_answered`: the process that lives now
    gave somebody an answer, so that a next one is started at once.
    """

    def __init__(
        self, config: EngineConfig, on_started: Callable[[], Awaitable[None]], on_lost: Callable[[str], Awaitable[None]]
    ) -> None:
        self.config = config
        self.program: tuple[str, ...] = ("server.engine.loop",)
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.has_answered = False
        self._on_started = on_started
        self._on_lost = on_lost
        self._context = zmq.asyncio.Context()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.is_stopping = False

    @property
    def address(self) -> str:
        """Where the process that lives listens to its front ends."""
        return fronts_address(self._address)

    @property
    def _address(self) -> str:
        assert self._folder is not None
        return f"ipc://{Path(self._folder.name) / 'engine'}"

    def part(self, front: str) -> None:
        """A front end is gone: the engine forgets it, and all that it asked for."""
        if self.pid is not None:
            self.send(Left(front))

    @property
    def pid(self) -> int | None:
        """Of the process, or None when none lives."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Spawn the process and wait until the model is loaded. Raises EngineStartError."""
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the process."""
        self.is_stopping = True
        if self.pid is not None and self._process is not None:
            self.send(Shutdown())
            await _reap(self._process)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._lost("the server is shutting down")
        self._context.destroy(linger=0)

    def kill(self) -> None:
        """End a process that does not answer, or not so that it could be understood. Another one follows."""
        if self.pid is not None and self._process is not None:
            self._process.kill()

    def send(self, message: ToEngine) -> None:
        assert self._socket is not None
        self._socket.send(encode(message))  # without a high-water mark this never waits

    async def _receive(self) -> FromEngine:
        assert self._socket is not None
        message: FromEngine = decode_from_engine(await self._socket.recv())
        return message

    async def _spawn(self) -> None:
        # Of mode 0700: nobody else can connect.
        self._folder = tempfile.TemporaryDirectory(prefix="loramux-", ignore_cleanup_errors=True)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)
        # -P: whoever starts the server in a folder with a package `server` of its own gets ours all the same.
        command = (sys.executable, "-P", "-m", *self.program, self._address, str(os.getpid()))
        process = None
        try:
            process = await asyncio.create_subprocess_exec(*command, env=OPENMP | os.environ)
            self.send(Start(self.config))
            self.info = await self._handshake(process)
        except BaseException:
            if process is not None:
                process.kill()
                await process.wait()
            self._disconnect()
            raise
        self._process = process
        await self._on_started()

    async def _handshake(self, process: asyncio.subprocess.Process) -> EngineInfo:
        first = asyncio.ensure_future(self._receive())
        exited = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((first, exited), return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                await asyncio.wait((first,), timeout=0.5)  # the last words of a process may arrive after its end
            if not first.done():
                raise EngineStartError(f"the engine's process {how_it_ended(process.returncode)} while it was starting")
            message = first.result()
        finally:
            first.cancel()
            exited.cancel()
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        assert isinstance(message, Ready)
        return message.info

    async def _supervise(self) -> None:
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            if self.pid is not None and self._process is not None:
                code = await self._process.wait()
                if not self.is_stopping:
                    logger.error("the engine's process %s; another one follows", how_it_ended(code))
            if self.is_stopping:
                return
            await self._lost("the inference engine stopped unexpectedly; please retry")
            proven = self.has_answered or clock() - started > backoff.longest
            self.has_answered = False  # what fails to start now has proven nothing
            await asyncio.sleep(backoff.after(proven=proven))
            self.restarts += 1
            try:
                await self._spawn()
            except Exception:
                logger.exception("the engine could not be started again")

    async def _lost(self, reason: str) -> None:
        self._disconnect()
        await self._on_lost(reason)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._folder is not None:
            self._folder.cleanup()


def how_it_ended(code: int | None) -> str:
    """What the exit code of a process means: that of one which a signal ended is negative."""
    if code is None or code >= 0:
        return f"ended with code {code}"
    cause = ", perhaps by the system because memory ran out," if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}){cause}"


async def _reap(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
