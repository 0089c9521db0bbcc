"""A front end's process, as its parent sees it: spawned, heard, and started again with back-off when it is gone."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.backoff import Backoff
from server.frontends.channel import Channel
from server.frontends.messages import (
    Begin,
    Drain,
    Failed,
    Ping,
    Pong,
    Serving,
    Stop,
    ToFront,
    ToParent,
    decode_to_parent,
)

MODULE = "server.frontends.child"

PINGS = 10
"""So many without an answer end a front end. They are counted, and not the time, which also passes while all processes
of a machine are stopped."""

logger = logging.getLogger(__name__)


class FrontEndError(RuntimeError):
    """A front end could not be started. The message is one sentence."""


@dataclass(frozen=True)
class Shared:
    """What all front ends get: the settings as JSON, the port, and the file of the board."""

    settings: bytes
    port: int
    board: int


class FrontEnd:
    """One of the front ends, of which another follows when it dies. `name` is that of the process that lives.

    `on_message` hears what it says but for its beginning, `on_begun` that it can be told about engines, `on_gone` that
    it is gone, while `name` is still its name. One that serves and says nothing for `silence` seconds is killed: the
    kernel would give it connections for ever.
    """

    def __init__(
        self,
        slot: int,
        shared: Shared,
        on_begun: Callable[["FrontEnd"], None],
        on_message: Callable[["FrontEnd", ToParent], None],
        on_gone: Callable[["FrontEnd"], None],
        silence: float,
    ) -> None:
        self.slot = slot
        self.name = ""
        self.line: str | None = None
        """What it announced, once requests can come."""
        self.restarts = 0
        self._shared = shared
        self._on_begun = on_begun
        self._on_message = on_message
        self._on_gone = on_gone
        self._silence = silence
        self._unanswered = 0
        self._count = 0
        self._channel: Channel[ToParent] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._living: asyncio.Task[None] | None = None
        self._last: Drain | Stop | None = None

    @property
    def alive(self) -> bool:
        return self._channel is not None

    @property
    def pid(self) -> int | None:
        """Of the process, or None when none lives."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Spawn the process and wait until requests can come. Raises FrontEndError."""
        self._living = asyncio.create_task(self._live(await self._spawn()))
        while self.line is None:
            done, _ = await asyncio.wait({self._living}, timeout=0.05)
            if done:
                self._living.result()

    async def end(self, message: Drain | Stop) -> None:
        """Tell it to leave, and wait until it has; one that is just being spawned is told as well. None follows."""
        self._last = message
        self.send(message)
        if self._living is not None:
            await asyncio.wait({self._living})

    def kill(self) -> None:
        if self.pid is not None and self._process is not None:
            self._process.kill()

    def send(self, message: ToFront) -> None:
        if self._channel is not None:
            self._channel.send(message)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._count += 1
        self.name, self.line = f"{self.slot}.{self._count}", None
        mine, its = socket.socketpair()
        try:
            numbers = (its.fileno(), self._shared.board)
            # -P: whoever starts the server in a folder with a package `server` of its own gets ours all the same.
            command = (sys.executable, "-P", "-m", MODULE, *map(str, numbers))
            self._process = await asyncio.create_subprocess_exec(*command, pass_fds=numbers)
        except BaseException:
            mine.close()
            raise
        finally:
            its.close()
        self._channel = await Channel.over(mine, decode_to_parent)
        is_first = self.slot == 0 and self._count == 1
        self.send(Begin(self._shared.settings, self._shared.port, self.slot, self.name, is_first))
        self._on_begun(self)
        if self._last is not None:
            self.send(self._last)
        return self._process

    async def _live(self, process: asyncio.subprocess.Process) -> None:
        """From the first process to the last. Raises FrontEndError if the first one cannot start."""
        backoff, clock = Backoff(), asyncio.get_running_loop().time
        while True:
            started = clock()
            watching = asyncio.create_task(self._watch(process))
            failure = await self._hear(process)
            watching.cancel()
            has_served, self.line = self.line is not None, None
            self._on_gone(self)
            if self._last is not None:
                return
            if not has_served and self._count == 1:
                raise FrontEndError(failure)
            logger.error("a front end is gone and is started again: %s", failure)
            is_proven, next_one = has_served and clock() - started > backoff.longest, None
            while next_one is None:
                await asyncio.sleep(backoff.after(proven=is_proven))
                if self._last is not None:
                    return
                self.restarts += 1
                next_one, is_proven = await self._spawn_if_possible(), False
            process = next_one

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill it when it serves no longer."""
        self._unanswered = 0
        while self._unanswered < PINGS:
            await asyncio.sleep(self._silence / PINGS)
            if self.line is not None:
                self._unanswered += 1
                self.send(Ping())
        logger.error("a front end has said nothing for %g s and is killed", self._silence)
        process.kill()

    async def _spawn_if_possible(self) -> asyncio.subprocess.Process | None:
        """None where the system has no room for a process now."""
        try:
            return await self._spawn()
        except OSError:
            logger.exception("a front end could not be started again")
            return None

    async def _hear(self, process: asyncio.subprocess.Process) -> str:
        """Take what it says until it is gone. Returns why."""
        assert self._channel is not None
        why = ""
        try:
            while True:
                message = await self._channel.receive()
                self._unanswered = 0
                if isinstance(message, Failed):
                    why = message.message
                elif isinstance(message, Serving):
                    self.line = message.line
                elif not isinstance(message, Pong):
                    self._on_message(self, message)
        except EOFError:
            pass
        except Exception:
            logger.exception("a front end said what cannot be understood")
            process.kill()
        channel, self._channel = self._channel, None
        await channel.close()
        code = await process.wait()
        return why or f"its process ended with code {code}"
