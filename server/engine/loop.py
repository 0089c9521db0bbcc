"""An engine in its own process: messages in, steps, messages out; `python -m server.engine.loop ADDRESS PARENT_PID`."""

import logging
import os
import signal
import sys
import time
from functools import partial

import torch
import zmq

from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.messages import (
    Abort,
    Evict,
    FromEngine,
    Pin,
    Prefetch,
    ReadAhead,
    Ready,
    Refusal,
    Reply,
    Shutdown,
    Start,
    StartFailed,
    Submit,
    ToEngine,
    Unpin,
    Update,
    decode_to_engine,
    encode,
)
from server.engine.sequence import Output

IDLE_POLL_MS = 500
STATS_SECONDS = 0.25


class EngineLoop:
    """The step loop. Ends when told to, or when the process that started it is gone."""

    def __init__(self, engine: Engine, socket: "zmq.Socket[bytes]", parent: int) -> None:
        self.engine = engine
        self.socket = socket
        self.parent = parent
        self._refusals: list[Refusal] = []
        self._replies: list[Reply] = []
        self._news = False
        self._next_stats = 0.0

    def run(self) -> None:
        while os.getppid() == self.parent:
            if not self._receive():
                return
            if self._active or self._news:
                self._news = False
                self._report(self.engine.step())
                if not self._active:
                    self.engine.check_integrity()

    @property
    def _active(self) -> bool:
        """Whether steps are needed, for requests or for adapters that come without one."""
        return self.engine.has_work or self.engine.adapters.busy

    def _report(self, outputs: list[Output]) -> None:
        residency = self.engine.adapters.take_residency()
        refusals, self._refusals = self._refusals, []
        replies, self._replies = self._replies, []
        now = time.monotonic()
        stats = self.engine.stats() if now >= self._next_stats or not self._active else None
        if stats is not None:
            self._next_stats = now + STATS_SECONDS
        if outputs or refusals or replies or residency or stats is not None:
            send(self.socket, Update(outputs, refusals, replies, residency, stats))

    def _receive(self) -> bool:
        """Take all messages that wait; with nothing to do, wait a while for one. False on shutdown."""
        timeout = 0 if self._active else IDLE_POLL_MS
        while self.socket.poll(timeout):
            timeout = 0
            message = decode_to_engine(self.socket.recv())
            if isinstance(message, Shutdown):
                return False
            self._take(message)
            self._news = True
        return True

    def _take(self, message: ToEngine) -> None:
        adapters = self.engine.adapters
        if isinstance(message, Submit):
            try:
                self.engine.add_request(message.request)
            except RequestError as error:
                self._refusals.append(Refusal(message.request.id, str(error), error.param, error.code))
        elif isinstance(message, Abort):
            self.engine.abort(message.request_id)
        elif isinstance(message, ReadAhead):
            adapters.read_ahead(message.paths)
        elif isinstance(message, Pin):
            adapters.pin(message.digest, message.path, partial(self._reply, message.call))
        elif isinstance(message, Prefetch):
            adapters.prefetch(message.digest, message.path, partial(self._reply, message.call))
        elif isinstance(message, Unpin):
            adapters.unpin(message.digest)
        elif isinstance(message, Evict):
            adapters.evict(message.digest)

    def _reply(self, call: int, value: bool | str | RequestError) -> None:
        if isinstance(value, RequestError):
            self._replies.append(Reply(call, error=str(value), code=value.code))
        else:
            self._replies.append(Reply(call, value))


def send(socket: "zmq.Socket[bytes]", message: FromEngine) -> None:
    socket.send(encode(message))


def start_engine(config: EngineConfig) -> Engine:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.kernel_cache is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", config.kernel_cache)
    return Engine.from_config(config)


def main() -> int:
    """Connect to the front end, load what it says, and serve it."""
    address, parent = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in (signal.SIGINT, signal.SIGTERM):  # they may go to the whole group; the front end decides when to stop
        signal.signal(name, signal.SIG_IGN)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.set_hwm(0)
        socket.connect(address)
        while not socket.poll(IDLE_POLL_MS):
            if os.getppid() != parent:
                return 1
        message = decode_to_engine(socket.recv())
        if not isinstance(message, Start):
            raise TypeError(f"the first message must be Start, got {type(message).__name__}")
        try:
            engine = start_engine(message.config)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            send(socket, StartFailed(str(error) or type(error).__name__))
            return 1
        send(socket, Ready(engine.info()))
        try:
            EngineLoop(engine, socket, parent).run()
        finally:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
