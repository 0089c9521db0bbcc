"""A `loramux serve` of its own for one measurement."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

KEY = "the-admin-key"


class ServerProcess:
    """`loramux serve` on a free port, from `with` to its end. `seconds`: from its start until it takes requests.
    `log`: what it wrote to its standard error, once it has ended.

    `runs`: the command that is `loramux`, if not this Python's own.
    """

    def __init__(self, model: Path, data_dir: Path, *options: str, runs: Sequence[str] = ()) -> None:
        # -P: a folder named `server` in the working directory must not hide ours.
        command = [*(runs or (sys.executable, "-P", "-m", "server.cli")), "serve", "--model", str(model), "--port", "0"]
        self._command = [*command, "--data-dir", str(data_dir), "--admin-key", KEY, *options]
        self.url = ""
        self.seconds = 0.0
        self.log = ""

    def __enter__(self) -> "ServerProcess":
        started = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # a pipe that nobody empties would stop the server
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        found = re.search(r"(http://\S+)/v1", self._process.stdout.readline())
        if found is None:
            self._process.communicate()
            self._read_log()
            raise RuntimeError(f"the server did not start: {self.log.strip()[-300:]}")
        self.seconds = time.perf_counter() - started
        self.url = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        finally:
            self._read_log()

    @property
    def pid(self) -> int:
        """Of the front end."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the front end; None while it lives."""
        return self._process.poll()

    def _read_log(self) -> None:
        with self._log as log:
            log.seek(0)
            self.log = log.read()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)

    def resident_bytes(self) -> int:
        """Memory of the front end's process alone, without the engine's."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024
