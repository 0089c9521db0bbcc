"""Where the server under test keeps its data, and what can be done to it there."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from loadtests.object_store import CREDENTIALS, ObjectStore
from loadtests.postgres import PostgresServer, find_binaries
from loadtests.process import ServerProcess
from loadtests.shifted_clock import ShiftedClock
from loadtests.small_disk import FileLimit, SmallDisk
from loadtests.soak.storage_faults import StorageFaults

BUCKET = "soak"


@dataclass(frozen=True)
class Place:
    """`options` are the server's. `left_out` says which faults cannot be had here, and why."""

    name: str
    data: Path
    options: Sequence[str]
    left_out: Sequence[str]
    disk: SmallDisk | FileLimit
    clock: ShiftedClock
    postgres: PostgresServer | None
    objects: ObjectStore | None

    def server(self, model: Path, *options: str) -> ServerProcess:
        """A server of this place; the next one finds what this one has left."""
        runs = (*self.disk.prefix, *self.clock.command("server.cli"))
        return ServerProcess(model, self.data, *self.options, *options, runs=runs)

    def faults(self, pid: int, seed: int) -> StorageFaults:
        """For a server whose front end is process `pid`."""
        registry = self.data / "registry"
        found = [file.name for file in self.disk.path_of(registry).glob("*.sqlite")]
        sqlite = registry / found[0] if self.postgres is None else None
        return StorageFaults(pid, self.disk, self.clock, self.postgres, self.objects, sqlite, seed)


@contextmanager
def open_place(stores: str, work: Path) -> Iterator[Place]:
    """`stores` is `local` (SQLite and a folder), `remote` (PostgreSQL and S3), or `auto`: remote, if it can be had.

    Raises RuntimeError if it cannot be had.
    """
    binaries, left_out = find_binaries(), []
    if binaries is None:
        left_out.append("database stopped, database crashed: PostgreSQL is missing")
    if importlib.util.find_spec("moto") is None:
        left_out.append("object store failed, object store slow: moto is missing")
    if stores == "remote" and left_out:
        raise RuntimeError("; ".join(left_out))
    is_remote = stores != "local" and not left_out
    if stores == "local":
        left_out = ["database stopped, database crashed, object store failed, object store slow: --stores local"]
    elif is_remote:
        left_out = ["database locked: --stores remote"]
    with ExitStack() as stack:
        data = work / "data"
        data.mkdir()
        disk: SmallDisk | FileLimit
        try:
            disk = stack.enter_context(SmallDisk(data))
        except OSError as error:
            disk = FileLimit()
            left_out.append(f"file system full: {error}; files that cannot grow stand in for it")
        clock = ShiftedClock(work / "clock")
        if not is_remote:
            yield Place("SQLite, local files", data, (), left_out, disk, clock, None, None)
            return
        assert binaries is not None
        postgres, objects = stack.enter_context(PostgresServer(binaries)), stack.enter_context(ObjectStore())
        options = _remote(postgres, objects)
        yield Place("PostgreSQL, S3", data, options, left_out, disk, clock, postgres, objects)


def _remote(postgres: PostgresServer, objects: ObjectStore) -> tuple[str, ...]:
    with psycopg.connect(f"{postgres.url}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE soak")
    objects.make_bucket(BUCKET)
    os.environ.update(CREDENTIALS)  # for the server, where AWS's tools look for them
    blobs = f"s3://{BUCKET}/adapters?endpoint={objects.url}&region=eu-west-1"
    return ("--database-url", f"{postgres.url}/soak", "--blob-url", blobs)
