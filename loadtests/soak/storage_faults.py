"""A database that is stopped or locked, an object store that fails or is slow, a full disk, a clock that jumps."""

import asyncio
import random
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from loadtests.object_store import FAILING, FINE, SLOW, ObjectStore
from loadtests.postgres import PostgresServer
from loadtests.shifted_clock import ShiftedClock
from loadtests.small_disk import FileLimit, SmallDisk
from loadtests.soak.faults import Fault

SECONDS = (1.0, 4.0)
"""How long one lasts."""
LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""
"""Runs where the server's disk is seen: SQLite opens no file by a path through another process's root."""
JUMPS = (3600.0, -3600.0, 86_400.0, -86_400.0)


class StorageFaults:
    """For what the server, whose front end is process `pid`, keeps its data in; what it does not have is None."""

    def __init__(
        self,
        pid: int,
        disk: SmallDisk | FileLimit,
        clock: ShiftedClock,
        postgres: PostgresServer | None,
        objects: ObjectStore | None,
        sqlite: Path | None,
        seed: int,
    ) -> None:
        self._pid = pid
        self._disk = disk
        self._clock = clock
        self._postgres = postgres
        self._objects = objects
        self._sqlite = sqlite
        self._rng = random.Random(seed)

    def kinds(self) -> dict[str, tuple[float, Fault]]:
        """Faults by name, with weights."""
        kinds: dict[str, tuple[float, Fault]] = {"clock jumped": (1.0, self.jump), self._disk.what: (1.0, self.fill)}
        if self._postgres is not None:
            kinds["database stopped"] = (1.0, lambda: self.stop_database(signal.SIGINT))
            kinds["database crashed"] = (1.0, lambda: self.stop_database(signal.SIGQUIT))
        if self._sqlite is not None:
            kinds["database locked"] = (1.0, self.lock)
        if self._objects is not None:
            kinds["object store failed"] = (1.0, lambda: self.unsettle(FAILING))
            kinds["object store slow"] = (1.0, lambda: self.unsettle(SLOW))
        return kinds

    async def stop_database(self, how: int) -> str:
        """The process ends and, a while later, starts again."""
        assert self._postgres is not None
        await asyncio.to_thread(self._postgres.stop, how)
        try:
            await self._a_while()
        finally:
            await asyncio.to_thread(self._postgres.start)
        return "started again"

    async def lock(self) -> str:
        """Another process holds SQLite's write lock."""
        assert self._sqlite is not None
        command = (*self._disk.prefix, sys.executable, "-c", LOCK, str(self._sqlite))
        holder = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        assert holder.stdout is not None
        is_locked = bool(await holder.stdout.readline())
        await self._a_while()
        await holder.communicate(b"")  # the end of its input is the end of its transaction
        return "let go" if is_locked else "not locked"

    async def unsettle(self, state: str) -> str:
        assert self._objects is not None
        await asyncio.to_thread(self._objects.become, state)
        try:
            await self._a_while()
        finally:
            await asyncio.to_thread(self._objects.become, FINE)
        return "fine again"

    async def fill(self) -> str:
        with self._disk.full(self._pid):
            await self._a_while()
        return "free again"

    async def jump(self) -> str:
        self._clock.set(self._rng.choice(JUMPS))
        try:
            await self._a_while()
        finally:
            self._clock.set(0.0)
        return "back"

    async def _a_while(self) -> None:
        await asyncio.sleep(self._rng.uniform(*SECONDS))
