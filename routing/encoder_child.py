"""The server's side of an encoder process: started when it is needed, watched, and ended."""

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from routing.encoder_messages import (
    Embedded,
    Failed,
    Ready,
    Start,
    StartFailed,
    ToEncoder,
    decode_from_encoder,
    encode,
)
from server.openmp import OPENMP

LONGEST_BACKOFF = 30.0
LAST_WORDS_SECONDS = 0.5
CLOSED = "the server is shutting down"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The encoder is a folder: nothing is fetched, nothing shown; and its tokenizer keeps to the process's threads."""

logger = logging.getLogger(__name__)


class EncoderUnavailable(RuntimeError):
    """No encoder can answer at the moment: not installed, not there, or its process died. One sentence."""


class EncoderChild:
    """At most one encoder process at a time. `on_lost` hears why, when it is gone and all it was sent with it."""

    def __init__(
        self,
        start: Start,
        num_threads: int,
        on_answer: Callable[[Embedded | Failed], None],
        on_lost: Callable[[str], None],
        backoff: float,
    ) -> None:
        self._start = start
        self._num_threads = num_threads
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._first_backoff = self._backoff = backoff
        self._not_before = 0.0
        self._reason = ""
        self._life: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._ready = False
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id, or None when none lives."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def revive(self) -> None:
        """Start a process unless one lives; returns at once, and what is sent meanwhile waits for it.

        Raises EncoderUnavailable after `close`, and for a while after a process was lost.
        """
        if self._closed:
            raise EncoderUnavailable(CLOSED)
        if self._life is not None and not self._life.done():
            return
        now = asyncio.get_running_loop().time()
        if now < self._not_before:
            raise EncoderUnavailable(self._reason)
        self._not_before = now + self._first_backoff
        self._ready = False
        try:
            folder = tempfile.TemporaryDirectory(prefix="loramux-")  # mode 0700: nobody else can connect
            address = f"ipc://{Path(folder.name) / 'encoder'}"
            self._context = self._context or zmq.asyncio.Context()
            self._socket = self._context.socket(zmq.PAIR)
            self._socket.set_hwm(0)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(address)
        except (OSError, zmq.ZMQError) as error:
            self._reason = f"the encoder process cannot be started ({error})"
            raise EncoderUnavailable(self._reason) from error
        self.send(self._start)
        self._life = asyncio.create_task(self._live(self._socket, address, folder))

    def send(self, message: ToEncoder) -> None:
        """To the process that lives or starts; lost with it."""
        if self._socket is not None:
            self._socket.send(encode(message))  # without a high-water mark this never waits

    async def close(self) -> None:
        """End the process, now and for good. It holds nothing that is worth waiting for."""
        self._closed = True
        if self._life is not None:
            await asyncio.sleep(0)  # a task that has not begun would never run its clean-up
            self._life.cancel()
            await asyncio.wait((self._life,))
        if self._context is not None:
            self._context.destroy(linger=0)

    async def _live(self, socket: zmq.asyncio.Socket, address: str, folder: tempfile.TemporaryDirectory[str]) -> None:
        """One process from its start to its end."""
        reason = CLOSED
        reader = asyncio.create_task(self._read(socket, folder))
        process = None
        try:
            # -P: whoever starts the server in a folder with a package `routing` of its own gets ours all the same.
            command = (sys.executable, "-P", "-m", "routing.encoder_process", address, str(os.getpid()))
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._num_threads))
            environment = OPENMP | os.environ | ENVIRONMENT | threads
            process = self._process = await asyncio.create_subprocess_exec(*command, env=environment)
            reason = await self._until_lost(process, reader)
        except OSError as error:
            reason = f"the encoder process cannot be started ({error})"
        finally:
            try:
                if process is not None:
                    await _end(process)
            finally:  # nothing may wait from here on: whoever hears of the loss may start the next process at once
                reader.cancel()
                self._socket = None
                socket.close()
                folder.cleanup()
                self._lost(reason)

    async def _until_lost(self, process: asyncio.subprocess.Process, reader: asyncio.Task[str]) -> str:
        """Why the process is of no more use."""
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((reader, exited), return_when=asyncio.FIRST_COMPLETED)
            if not reader.done() and not self._ready:
                await asyncio.wait((reader,), timeout=LAST_WORDS_SECONDS)  # they may arrive after its end
        finally:
            exited.cancel()
        if reader.done() and reader.exception() is None:
            return reader.result()
        if reader.done():
            logger.error("the encoder's messages could not be read", exc_info=reader.exception())
            return "the encoder process answered what cannot be read; please retry"
        when = "unexpectedly" if self._ready else "while it was starting"
        return f"the encoder process ended {when} (code {process.returncode}); please retry"

    async def _read(self, socket: zmq.asyncio.Socket, folder: tempfile.TemporaryDirectory[str]) -> str:
        """Hand out what comes, until the process says that it cannot start, and why."""
        while True:
            message = decode_from_encoder(await socket.recv())
            if isinstance(message, StartFailed):
                return message.message
            if isinstance(message, Ready):
                self._ready = True
                self._backoff = self._first_backoff
                folder.cleanup()  # the connection stands without its address
            else:
                self._on_answer(message)

    def _lost(self, reason: str) -> None:
        """Whoever lived may start again at once, one that never did only after a while, each time longer."""
        self._reason = reason
        if not self._ready:
            self._not_before = asyncio.get_running_loop().time() + self._backoff
            self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
        if not self._closed:
            logger.error("the encoder is lost: %s", reason)
        self._on_lost(reason)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
