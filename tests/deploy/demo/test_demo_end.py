"""How the demo ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import subprocess, sys, time
from pathlib import Path
from deploy.demo import run
from rich.console import Console

real = subprocess.Popen
run.subprocess.Popen = lambda command: real([sys.executable, "-c", "import time; time.sleep(1000)"])

def wait(url, process):
    print(process.pid, flush=True)
    time.sleep(1000)

run._wait_until_ready = wait
run._check_port = lambda host, port: None
run.main(Path("model"), Path("encoder"), once=True)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_takes_the_server_along(number: signal.Signals) -> None:
    _ended([sys.executable, "-c", CHILD], [number], number)


def test_nohup_holds() -> None:
    _ended(["nohup", sys.executable, "-c", CHILD], [signal.SIGHUP, signal.SIGTERM], signal.SIGTERM)


def _ended(command: list[str], signals: list[signal.Signals], number: signal.Signals) -> None:
    """The demo that was sent these ended by this one, and its server is gone."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        lines = (line.strip() for line in demo.stdout)
        server = next(int(line) for line in lines if line.isdigit())
        for each in signals:
            demo.send_signal(each)
        assert demo.wait(60) == 128 + number
    deadline = time.monotonic() + 60
    while _lives(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
