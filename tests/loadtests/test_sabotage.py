"""A disk without room, a clock that jumps, an object store that fails: each as another process meets it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest
from sqlalchemy import make_url

from loadtests.object_store import FAILING, FINE, ObjectStore
from loadtests.postgres import MISSING, PostgresServer, find_binaries
from loadtests.shifted_clock import ShiftedClock
from loadtests.small_disk import FileLimit, SmallDisk

WRITES = """
import sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "ab", buffering=0) as file:
            print(file.write(b"x" * 65536), flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def ask(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["file system", "limit"])
def test_a_full_disk(kind: str, tmp_path: Path) -> None:
    if kind == "file system":
        try:
            disk: SmallDisk | FileLimit = SmallDisk(tmp_path).__enter__()
        except OSError as error:
            pytest.skip(str(error))
    else:
        disk = FileLimit()
    command = [*disk.prefix, sys.executable, "-c", WRITES, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert ask(writer) == "65536"
        with disk.full(writer.pid):
            assert ask(writer) in ("28", "27")
        assert ask(writer) == "65536"
        writer.communicate()
    if isinstance(disk, SmallDisk):
        assert not list(tmp_path.iterdir())
        disk.__exit__(None, None, None)


def test_a_clock_jumps_while_a_module_runs(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text("import sys, time\nfor _ in sys.stdin: print(time.time(), flush=True)\n")
    clock = ShiftedClock(tmp_path / "clock")
    paths = os.pathsep.join((str(tmp_path), *sys.path))
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": paths}}
    with subprocess.Popen(clock.command("telling"), text=True, **options) as process:  # type: ignore[call-overload]
        first = float(ask(process))
        clock.set(-86_400.0)
        assert float(ask(process)) < first
        clock.set(86_400.0)
        assert float(ask(process)) > first + 86_000
        process.communicate()


def test_a_databases_port_is_nobody_elses_while_it_is_down() -> None:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with PostgresServer(binaries) as server:
        address = ("127.0.0.1", make_url(server.url).port)
        for how in (signal.SIGINT, signal.SIGQUIT):
            server.stop(how)
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(address)
            server.start()
            psycopg.connect(f"{server.url}/postgres").close()


def test_an_object_store_that_fails_and_is_well_again() -> None:
    with ObjectStore() as store:
        store.make_bucket("bucket")
        store.become(FAILING)
        with pytest.raises(HTTPError) as found:
            urlopen(f"{store.url}/bucket")
        assert found.value.code == 500
        found.value.close()
        store.become(FINE)
        with urlopen(f"{store.url}/bucket") as answer:
            assert answer.status == 200
