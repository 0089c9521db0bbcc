"""A database of the registry: its connections, its transactions, and what it says when it fails."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapters_store.private_files import make_private_file, make_private_folder
from adapters_store.registry.errors import InvalidValue, RegistryUnavailable

_WRITES = "loramux_writes"
"""Execution option of connections whose transactions write."""
_BUSY_SECONDS = 30
_SWITCH_WAIT = 0.02
"""Seconds between two tries to switch a database to its write-ahead log."""
_CHUNK = 10_000
"""Most parameters of one statement: SQLite takes 32,766, PostgreSQL 65,535."""

T = TypeVar("T")


def no_fault(_step: str) -> None:
    """No fault is injected."""


class Database:
    """Transactions on one engine. `clock` gives seconds since the epoch, `fault` hears of each step of a write."""

    def __init__(self, engine: Engine, clock: Callable[[], float], fault: Callable[[str], None] = no_fault) -> None:
        self.clock = clock
        self.fault = fault
        self._engine = engine
        self._writer = engine.execution_options(**{_WRITES: True})
        # Several statements of one read see the same state: SQLite's transactions do so by themselves.
        snapshot = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
        self._reader = engine.execution_options(**snapshot)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state."""
        with _translated(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self, operation: str) -> Iterator[Connection]:
        """A transaction that holds the write lock of SQLite, committed at the end of the block."""
        with _translated():
            with self._writer.begin() as connection:
                self.fault(f"{operation}.begin")
                yield connection
                self.fault(f"{operation}.commit")
            self.fault(f"{operation}.committed")


def open_engine(url: str) -> Engine:
    """Connections to the database at `url`: `sqlite:///<file>` or `postgresql://...`.

    Raises ValueError for any other URL. Nothing is connected yet; the folder of a SQLite file is made.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError("database URL is malformed: expected sqlite:///<file> or postgresql://...") from None
    scheme = parsed.drivername.partition("+")[0]
    if scheme == "sqlite":
        return _open_sqlite(parsed)
    if scheme in ("postgresql", "postgres"):
        # A connection that the server has closed meanwhile is replaced instead of failing one request.
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_timeout=_BUSY_SECONDS,
            connect_args={"connect_timeout": 10},
        )
    raise ValueError(f"database URL has scheme {scheme!r}: expected sqlite or postgresql")


def _open_sqlite(url: URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise ValueError("database URL names no file: expected sqlite:///<file>")
    make_private_folder(Path(url.database).parent)
    if not url.database.startswith("file:"):
        make_private_file(Path(url.database))  # its journal gets the same mode
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"), pool_timeout=_BUSY_SECONDS, connect_args={"timeout": _BUSY_SECONDS}
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own: `_begin_sqlite` does
    cursor = connection.cursor()
    _write_ahead(cursor)
    for pragma in ("foreign_keys = ON", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    # Of several connections that switch a new file at once, SQLite refuses some without waiting as long as they have
    # asked it to (8 of 3,200 with eight threads): they would be waiting for each other.
    for wait in repeat(_SWITCH_WAIT, round(_BUSY_SECONDS / _SWITCH_WAIT)):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            sleep(wait)
    cursor.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes fails at once if another one wrote in between; one that takes the
    # write lock at its start waits for it.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """INSERT with ON CONFLICT, which both databases spell alike."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Parts of `items` that fit into one statement each."""
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


@contextmanager
def _translated() -> Iterator[None]:
    """Failures of the database as RegistryError; violated constraints and wrong statements pass."""
    try:
        yield
    except (DataError, UnicodeError, OverflowError) as error:
        raise InvalidValue("a value has characters or a size that cannot be stored") from error
    except (IntegrityError, ProgrammingError, NotSupportedError):
        raise
    except PoolTimeout as error:
        raise RegistryUnavailable("all connections are in use") from error
    except DBAPIError as error:
        raise RegistryUnavailable(_reason(error)) from error


def _reason(error: DBAPIError) -> str:
    """Why a database failed, without the paths and addresses that its own words may hold."""
    state = getattr(error.orig, "sqlstate", None)
    if state is None and isinstance(error.orig, sqlite3.Error):
        return str(error.orig)  # a fixed sentence of SQLite's
    reasons = {"53100": "its disk is full", "25006": "it is read-only", "53300": "it has too many connections"}
    return reasons.get(state or "", "its database does not answer")
