"""Threads that read, pack and copy adapters while the caller goes on."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from adapters_store.threads import NoThread

Result = TypeVar("Result")

IDLE_SECONDS = 1.0
"""How long a thread waits for more work before it ends."""


class Loader(Protocol):
    """Runs work elsewhere, and reports it where and when the caller polls."""

    @property
    def pending(self) -> int:
        """Pieces of work that were submitted and have not been reported."""
        ...

    def submit(
        self, work: Callable[[], Result], done: Callable[[Result | Exception], None], *, urgent: bool = False
    ) -> None:
        """Have `work` done, the urgent before the rest; `poll` then gives its result, or what it raised, to `done`.

        What was raised and is no Exception comes as `as_exception` has it, and NoThread where nobody can do it.
        """
        ...

    def poll(self) -> None:
        """Report all that is finished, in the order in which it finished."""
        ...

    def wait(self, seconds: float) -> None:
        """Return when there is something to report, nothing pending, or this time is over."""
        ...

    def close(self, seconds: float) -> None:
        """Begin nothing more, and give what runs this long to end. Nothing is reported from here on."""
        ...


def as_exception(error: BaseException) -> Exception:
    """What was raised, for whoever waits for it. A panic of a library in Rust is no Exception, and becomes the cause of
    one."""
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@dataclass(order=True)
class _Task:
    rank: tuple[bool, int]
    work: Callable[[], Any] = field(compare=False)
    done: Callable[[Any], None] = field(compare=False)
    result: Any = field(default=None, compare=False)

    def run(self, prepare: Callable[[], None]) -> None:
        try:
            prepare()
            self.result = self.work()
        except BaseException as error:  # a thread that ended here would take with it what somebody waits for
            self.result = as_exception(error)
            del self  # whose result knows this frame, and what was worked on


class ThreadLoader:
    """At most `num_threads` threads, which exist while there is work. They call `prepare` before each piece of it.

    All methods belong to one thread. The threads are daemons: a disk that hangs does not keep the process alive.
    stack_bytes: of each thread, 0 for what the system gives.
    """

    def __init__(
        self, num_threads: int = 1, prepare: Callable[[], None] = lambda: None, *, stack_bytes: int = 0
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, expected at least 1")
        self._num_threads = num_threads
        self._prepare = prepare
        self._stack_bytes = stack_bytes
        self._lock = threading.Lock()
        self._to_do = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._order = itertools.count()
        self._queue: list[_Task] = []
        self._finished: list[_Task] = []
        self._pending = 0
        self._threads = 0
        self._resting = 0
        self._closed = False

    @property
    def pending(self) -> int:
        return self._pending

    def submit(
        self, work: Callable[[], Result], done: Callable[[Result | Exception], None], *, urgent: bool = False
    ) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the loader is closed")
            heapq.heappush(self._queue, _Task((not urgent, next(self._order)), work, done))
            self._pending += 1
            if self._resting < len(self._queue) and self._threads < self._num_threads:
                self._grow()
            self._to_do.notify()

    def poll(self) -> None:
        while self._finished:
            with self._lock:
                task = self._finished.pop(0)
                self._pending -= 1
            task.done(task.result)

    def wait(self, seconds: float) -> None:
        with self._lock:
            if self._pending and not self._finished:
                self._news.wait(seconds)

    def close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._to_do.notify_all()
            while self._threads and time.monotonic() < deadline:
                self._news.wait(deadline - time.monotonic())
            self._finished.clear()
            self._pending = 0

    def _grow(self) -> None:
        """One more thread. If the system has none, those that run do its work too; without any, what waits has failed.
        The lock is held."""
        try:
            self._start_thread()
            self._threads += 1  # the thread waits for the lock
        except (RuntimeError, MemoryError) as error:
            if not self._threads:
                for task in self._queue:
                    task.result = NoThread(str(error))
                self._finished += self._queue
                self._queue.clear()
                self._news.notify_all()

    def _start_thread(self) -> None:
        usual = threading.stack_size(self._stack_bytes)  # of all threads that start from now on
        try:
            threading.Thread(target=self._run, name="adapter-loader", daemon=True).start()
        finally:
            threading.stack_size(usual)

    def _run(self) -> None:
        while True:
            with self._lock:
                task = self._next()
                if task is None:
                    self._threads -= 1
                    self._news.notify_all()
                    return
            task.run(self._prepare)
            with self._lock:
                if not self._closed:
                    self._finished.append(task)
                self._news.notify_all()
            del task  # else an idle thread would keep the last result alive

    def _next(self) -> _Task | None:
        """The most urgent task, or None after a while without one; the lock is held on entry and on return."""
        while not self._queue and not self._closed:
            self._resting += 1
            came = self._to_do.wait(IDLE_SECONDS)
            self._resting -= 1
            if not came and not self._queue:
                return None
        return heapq.heappop(self._queue) if self._queue else None
