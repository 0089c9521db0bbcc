"""How the demo ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import signal, subprocess, sys, time
from pathlib import Path
from deploy.demo import run
from rich.console import Console

real = subprocess.Popen
run.subprocess.Popen = lambda command: real([sys.executable, "-c", "import time; time.sleep(1000)"])

def wait(url, process):
    print(process.pid, signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
    time.sleep(1000)

run._wait_until_ready = wait
run._check_port = lambda host, port: None
run.main(Path("model"), Path("encoder"), once=True)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_takes_the_server_along(number: signal.Signals) -> None:
    usual = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where these tests run under nohup
    assert not _ended([sys.executable, "-c", usual + CHILD], number)


def test_nohup_holds() -> None:
    assert _ended(["nohup", sys.executable, "-c", CHILD], signal.SIGTERM)


def _ended(command: list[str], number: signal.Signals) -> bool:
    """Whether a demo that ended by this signal, with its server, ignored the end of its terminal."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        pid, ignores = next(line.split() for line in demo.stdout if line[:1].isdigit())
        server = int(pid)
        demo.send_signal(number)
        assert demo.wait(60) == 128 + number
    deadline = time.monotonic() + 60
    while _lives(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ignores == "True"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
