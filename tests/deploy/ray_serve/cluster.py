"""A Ray cluster of this machine with the application on it, its database and its object store."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ENGINE_REPLICA = b"ray::ServeReplica:loramux:engines"
OPTIONS = ["--device", "cpu", "--num-threads", "1", "--encoder", "none", "--port", "0"]
OPTIONS += ["--kv-memory", "16MiB", "--page-memory", "2MiB", "--host-memory", "16MiB"]
OPTIONS += ["--ray-cpus-per-engine", "0.1", "--ray-cpus-per-front-end", "0.1", "--shutdown-timeout", "120"]
QUICK = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for who in ("HANDLE", "REPLICA")}
"""Serve's autoscaler looks at what it was told during the last ten seconds otherwise."""
ALONE = {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_oom_score_adjustment": "0"}
"""Ray ends processes of its own when a machine's memory is used up, whoever uses it, and has the kernel do so first."""
Json = dict[str, Any]


class Cluster:
    """The processes. All are descendants of `process`, and none outlives it."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "deploy.ray_serve", *OPTIONS, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | QUICK | ALONE)
        assert self.process.stdout is not None
        found = None
        while found is None and (line := self.process.stdout.readline()):  # Ray speaks before
            found = re.search(r"serves on (http://\S+)/v1", line)
        assert found, f"it ended with code {self.process.wait(60)}"
        self.url = found[1]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def engine_replicas(self) -> list[int]:
        """Process ids of the actors."""
        return [pid for pid in self._descendants() if _command(pid).startswith(ENGINE_REPLICA)]

    def engine_of(self, replica: int) -> int:
        """Process id of a replica's engine, as soon as it has one."""
        until(lambda: bool(_engines(replica)))
        return _engines(replica)[0]

    def busy(self, replica: int) -> int:
        """Processor time of a replica's engine so far, in ticks."""
        fields = Path(f"/proc/{self.engine_of(replica)}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def metric(self, name: str, label: str = "") -> float:
        """Sum over its labels, or those lines that have this one, as some front end has it."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        mine = [line for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line) and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in mine)

    def stop(self) -> int:
        """End it as an operator does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(240)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def _descendants(self) -> Iterator[int]:
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            waiting.extend(_children(pid))


class Stream(threading.Thread):
    """A streamed completion in a thread of its own, which `start` has begun."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self.body = body | {"stream": True, "temperature": 0, "ignore_eos": True}
        self.text = ""
        self.error: Json | None = None
        self.has_begun = threading.Event()
        self.has_ended = threading.Event()
        self._url = url
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.HTTPError as error:
            self.error = {"code": f"connection: {error!r}"}
        finally:
            self.has_ended.set()

    def _read(self) -> None:
        with (
            httpx.Client(timeout=150) as client,
            client.stream("POST", f"{self._url}/v1/completions", json=self.body) as answer,
        ):
            if answer.status_code != 200:
                text = answer.read()
                is_ours = answer.headers["content-type"] == "application/json"
                self.error = json.loads(text)["error"] if is_ours else {"code": f"{answer.status_code}: {text!r}"}
                return
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.error = event["error"]
                    return
                self.text += event["choices"][0]["text"]
                self.has_begun.set()


@contextmanager
def halted(*pids: int) -> Iterator[None]:
    """These processes stand still meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("waited in vain")
        time.sleep(0.05)


def _engines(replica: int) -> list[int]:
    return [pid for pid in _children(replica) if b"server.engine.loop" in _command(pid)]


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
