"""An engine in its own process: messages in, steps, messages out; `python -m server.engine.loop ADDRESS PARENT_PID`."""

import contextlib
import logging
import os
import signal
import sys
import time

import torch
import zmq

from adapters_store.types import AdapterError
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.messages import (
    Abort,
    FromEngine,
    Prefetch,
    Ready,
    Refusal,
    Shutdown,
    Start,
    StartFailed,
    Submit,
    Update,
    decode_to_engine,
    encode,
)

IDLE_POLL_MS = 500
STATS_SECONDS = 0.25


class EngineLoop:
    """The step loop. Ends when told to, or when the process that started it is gone."""

    def __init__(self, engine: Engine, socket: "zmq.Socket[bytes]", parent: int) -> None:
        self.engine = engine
        self.socket = socket
        self.parent = parent
        self._refusals: list[Refusal] = []
        self._prefetches: dict[str, str] = {}
        self._next_stats = 0.0

    def run(self) -> None:
        while os.getppid() == self.parent:
            if not self._receive():
                return
            if not self.engine.has_work and not self._refusals:
                self._prefetch_one()
                continue
            outputs = self.engine.step()
            refusals, self._refusals = self._refusals, []
            idle = not self.engine.has_work
            stats = self.engine.stats() if idle or time.monotonic() >= self._next_stats else None
            if stats is not None:
                self._next_stats = time.monotonic() + STATS_SECONDS
            if outputs or refusals or stats is not None:
                send(self.socket, Update(outputs, refusals, stats))
            if idle:
                self.engine.check_integrity()

    def _receive(self) -> bool:
        """Take all messages that wait; with nothing to do, wait a while for one. False on shutdown."""
        timeout = 0 if self.engine.has_work or self._prefetches else IDLE_POLL_MS
        while self.socket.poll(timeout):
            timeout = 0
            message = decode_to_engine(self.socket.recv())
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Abort):
                self.engine.abort(message.request_id)
            elif isinstance(message, Prefetch):
                self._prefetches |= message.paths
        return True

    def _prefetch_one(self) -> None:
        """One adapter at a time, so that a request that comes meanwhile waits for one read at most."""
        if self._prefetches:
            with contextlib.suppress(AdapterError):  # whoever asks for it will be told
                self.engine.adapters.prefetch(*self._prefetches.popitem())
            send(self.socket, Update(stats=self.engine.stats()))

    def _submit(self, message: Submit) -> None:
        try:
            self.engine.add_request(message.request)
        except RequestError as error:
            self._refusals.append(Refusal(message.request.id, str(error), error.param, error.code))
        except AdapterError as error:  # it was fine when it was registered
            self._refusals.append(Refusal(message.request.id, str(error), "model", "adapter_unavailable"))


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
        EngineLoop(engine, socket, parent).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
