"""An engine in its own process: messages in, steps, messages out; `python -m server.engine.loop ADDRESS PARENT_PID`."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import zmq

from server.engine.available_memory import MemoryProbe
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.fronts import Front, Fronts
from server.engine.memory_watch import MemoryWatch
from server.engine.messages import (
    Abort,
    Evict,
    FromEngine,
    Hello,
    Left,
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
    fronts_address,
)
from server.engine.sequence import Output
from server.logs import configure, level_of

IDLE_POLL_MS = 500
STATS_SECONDS = 0.25


class EngineLoop:
    """The step loop. Ends when told to, or when the process that started it is gone."""

    def __init__(self, engine: Engine, inbox: "Inbox") -> None:
        self.engine = engine
        self.inbox = inbox
        self.fronts = inbox.fronts
        self._news = False
        self._next_stats = 0.0
        host, grammars = engine.adapters.host, engine.arrivals.grammars
        self._memory = MemoryWatch(host, engine.adapters.wanted, grammars, MemoryProbe().read, time.monotonic)

    def run(self) -> None:
        while self.inbox.is_needed:
            if not self._receive():
                return
            self._memory.look()
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
        now = time.monotonic()
        stats = self.engine.stats() if now >= self._next_stats or not self._active else None
        if stats is not None:
            self._next_stats = now + STATS_SECONDS
        self.fronts.report(outputs, residency, stats)

    def _receive(self) -> bool:
        """Take all messages that wait; with nothing to do, wait a while for one. False on shutdown."""
        self.inbox.wait(0 if self._active else IDLE_POLL_MS)
        for message in self.inbox.orders():
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, Left):
                self._part(message.front)
            self._news = True
        received = list(iter(self.fronts.receive, None))
        self.fronts.acknowledge(received)
        for front, message in received:
            self._take(front, message)
            self._news = True
        return True

    def _take(self, front: Front, message: ToEngine) -> None:
        adapters = self.engine.adapters
        if isinstance(message, Submit):
            self._submit(front, message)
        elif isinstance(message, Abort):
            if message.request_id in front.requests:
                self.engine.abort(message.request_id)
        elif isinstance(message, ReadAhead):
            adapters.read_ahead(message.paths)
        elif isinstance(message, Pin):
            self.fronts.want(front, message.digest)
            adapters.pin(message.digest, message.path, partial(self._pinned, front, message))
        elif isinstance(message, Prefetch):
            adapters.prefetch(message.digest, message.path, partial(_reply, front, message.call))
        elif isinstance(message, Unpin):
            self._unpin(front, message.digest)
        elif isinstance(message, Evict):
            adapters.evict(message.digest)
        elif isinstance(message, Hello):
            self.fronts.tell(front, Update(residency=adapters.told, stats=self.engine.stats()))

    def _submit(self, front: Front, message: Submit) -> None:
        request = message.request
        if not self.fronts.begin(front, request.id):
            front.refusals.append(
                Refusal(request.id, f"there is a request {request.id} already", None, "invalid_value")
            )
            return
        try:
            self.engine.add_request(request)
        except RequestError as error:
            self.fronts.end(request.id)
            front.refusals.append(Refusal(request.id, str(error), error.param, error.code))

    def _pinned(self, front: Front, message: Pin, value: bool | RequestError) -> None:
        if value is not True:
            self.fronts.let_go(front, message.digest)
        _reply(front, message.call, value)

    def _unpin(self, front: Front, digest: str) -> None:
        if self.fronts.let_go(front, digest):
            self.engine.adapters.unpin(digest)

    def _part(self, name: str) -> None:
        """A front end is gone: what it asked for ends, what it pinned may go."""
        front = self.fronts.leave(name.encode())
        if front is not None:
            for request_id in front.requests:
                self.engine.abort(request_id)
            for digest in self.fronts.pins(front):
                self._unpin(front, digest)


class Inbox:
    """What comes from outside: orders of the process that started this one, and what its front ends say."""

    def __init__(self, orders: "zmq.Socket[bytes]", fronts: Fronts, parent: int) -> None:
        self.fronts = fronts
        self._orders = orders
        self._parent = parent
        self._poller = zmq.Poller()
        for socket in (orders, fronts.socket):
            self._poller.register(socket, zmq.POLLIN)

    @property
    def is_needed(self) -> bool:
        """Whether the process that started this one lives."""
        return os.getppid() == self._parent

    def wait(self, milliseconds: int) -> None:
        """Return when a message is there, or after this time."""
        self._poller.poll(milliseconds)

    def orders(self) -> Iterator[ToEngine]:
        while self._orders.poll(0):
            yield decode_to_engine(self._orders.recv())


def _reply(front: Front, call: int, value: bool | str | RequestError) -> None:
    if isinstance(value, RequestError):
        front.replies.append(Reply(call, error=str(value), code=value.code))
    else:
        front.replies.append(Reply(call, value))


def start_engine(config: EngineConfig) -> Engine:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.kernel_cache is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", config.kernel_cache)
    return Engine.from_config(config)


@contextmanager
def sockets(address: str, parent: int) -> Iterator["tuple[zmq.Socket[bytes], zmq.Socket[bytes]]"]:
    """To the process that started this one, and for the front ends, with the files of both removed at the end."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as orders, context.socket(zmq.ROUTER) as fronts:
        for socket in (orders, fronts):
            socket.setsockopt(zmq.LINGER, 1000)
            socket.set_hwm(0)
        orders.connect(address)
        fronts.bind(fronts_address(address))
        yield orders, fronts
        if os.getppid() != parent:  # it would have removed them
            shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


def take_orders(
    address: str, parent: int, serve: "Callable[[Start, zmq.Socket[bytes], zmq.Socket[bytes]], int]"
) -> int:
    """Connect to the process that started this one, and `serve` as its first message says. Gives the exit code."""
    with sockets(address, parent) as (orders, fronts):
        while not orders.poll(IDLE_POLL_MS):
            if os.getppid() != parent:
                return 1
        message = decode_to_engine(orders.recv())
        if not isinstance(message, Start):
            raise TypeError(f"the first message must be Start, got {type(message).__name__}")
        return serve(message, orders, fronts)


def main() -> int:
    """Load what the process says that started this one, and serve its front ends."""
    address, parent = sys.argv[1], int(sys.argv[2])
    for name in (signal.SIGINT, signal.SIGTERM):  # they may go to the whole group; the front end decides when to stop
        signal.signal(name, signal.SIG_IGN)
    return take_orders(address, parent, partial(_serve, parent))


def _serve(parent: int, start: Start, orders: "zmq.Socket[bytes]", fronts: "zmq.Socket[bytes]") -> int:
    configure(start.config.log_format, "engine", level=level_of(start.config.log_level))
    try:
        engine = start_engine(start.config)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        send(orders, StartFailed(str(error) or type(error).__name__))
        return 1
    send(orders, Ready(engine.info()))
    try:
        EngineLoop(engine, Inbox(orders, Fronts(fronts), parent)).run()
    finally:
        engine.close()
    return 0


def send(socket: "zmq.Socket[bytes]", message: FromEngine) -> None:
    socket.send(encode(message))


if __name__ == "__main__":
    sys.exit(main())
