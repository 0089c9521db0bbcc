"""The threads and tasks of one store."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from adapters_store.registry import RegistryUnavailable
from adapters_store.threads import NoThread, Threads

P = ParamSpec("P")
T = TypeVar("T")

SQL_THREADS = 8
DISK_THREADS = 4


class Workers:
    """Threads by what may hang: a lost database must not keep a lease from the disk, nor an upload a lease."""

    def __init__(self) -> None:
        self.sql = Threads(SQL_THREADS, "registry")
        self.leases = Threads(DISK_THREADS, "lease")
        self.writes = Threads(DISK_THREADS, "register")
        self.merges = Threads(1, "merge")  # one at a time: a merge holds all its adapters in memory
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, threads: Executor, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, partial(call, *args, **options))

    async def query(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run what asks the registry. Raises RegistryUnavailable where the system has no thread for it."""
        try:
            return await self.run(self.sql, call, *args, **options)
        except NoThread as error:
            raise RegistryUnavailable(str(error)) from error

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """A task that `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it. It is finished even if the caller stops waiting: its thread could not be stopped anyway."""
        return await asyncio.shield(self.start(work))

    async def close(self) -> None:
        """Wait for all that was started."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        for threads in (self.merges, self.writes, self.leases, self.sql):
            threads.shutdown()

    def _end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller's, who may have left
