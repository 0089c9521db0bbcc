"""Engine processes that die, stand still for a moment, or get stuck for good."""

import asyncio
import os
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx

from loadtests.soak.faults import Fault, Report
from loadtests.soak.seen import Seen

ENGINE = "server.engine.loop"
PAUSE_SECONDS = 1.0
STALL_SECONDS = 10.0
"""The server's --stall-timeout: no step of a healthy engine takes so long. A stuck one is replaced after twice that."""
RECOVERY_SECONDS = 300.0
"""An engine that is not back by then is not coming back."""


def children(pid: int, name: str) -> list[int]:
    """Processes that `pid` started and whose command line has `name`."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    found = []
    for child in map(int, listed):
        with suppress(FileNotFoundError, ProcessLookupError):
            if name.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def short_request(model: str) -> dict[str, object]:
    """For one token. Never the same twice: what was in flight when an engine died waits for others of its kind."""
    return {"model": model, "prompt": [secrets.randbelow(1000) + 1 for _ in range(4)], "max_tokens": 1}


class EngineFaults:
    """For the engines of one server. `server` is the front end's process id, `admin` a client with the admin key."""

    def __init__(self, server: int, admin: httpx.AsyncClient, model: str, report: Report, seen: Seen) -> None:
        self._server = server
        self._admin = admin
        self._model = model
        self._report = report
        self._seen = seen
        self._expected = self._engines()

    def kinds(self, *, stuck: bool) -> dict[str, tuple[float, Fault]]:
        """Faults by name, with weights. `stuck`: there is time for one that takes half a minute."""
        kinds: dict[str, tuple[float, Fault]] = {"engine killed": (2.0, self.kill), "engine paused": (2.0, self.pause)}
        return kinds | ({"engine stuck": (0.5, self.stick)} if stuck else {})

    async def kill(self) -> str:
        """The kernel, or an operator, ends it."""
        self.check()
        started = time.monotonic()
        self._signal(self._expected, signal.SIGKILL)
        return await self._recovered(started)

    async def pause(self) -> str:
        """As a step that takes long, or a machine that stands still."""
        self.check()
        self._signal(self._expected, signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._signal(self._expected, signal.SIGCONT)
        return "went on"

    async def stick(self) -> str:
        """It stands still until the front end takes notice and replaces it."""
        self.check()
        engines = self._expected
        self._signal(engines, signal.SIGSTOP)
        # One without work is not missed, and at the end of the run nobody else may ask.
        asking = asyncio.create_task(self._ask())
        deadline = time.monotonic() + RECOVERY_SECONDS
        while set(self._engines()) & set(engines):
            if time.monotonic() > deadline:
                self._seen.breaks("a stuck engine was not replaced")
                self._signal(engines, signal.SIGCONT)
                break
            await asyncio.sleep(0.1)
        self._report_refusal(await asking)
        return await self._recovered(None)

    def check(self) -> None:
        """Engines die of what is done to them here, and of nothing else."""
        if (found := self._engines()) != self._expected:
            self._seen.breaks(f"the engines {self._expected} have become {found} though nobody killed them")
            self._expected = found

    def _signal(self, engines: list[int], number: int) -> None:
        for engine in engines:
            with self._seen.telling(f"signal {number} to an engine"):
                os.kill(engine, number)

    async def _recovered(self, started: float | None) -> str:
        """Until a new request has its token. Seconds since `started` are noted."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        try:
            while time.monotonic() < deadline:
                answer = await self._ask()
                if answer.is_success:
                    if started is not None:
                        self._report.recoveries.append(time.monotonic() - started)
                    return "recovered"
                self._report_refusal(answer)
                await asyncio.sleep(0.02)
        finally:
            self._expected = self._engines()
        self._seen.breaks(f"no engine is back {RECOVERY_SECONDS:.0f} s after one died")
        return "lost"

    async def _ask(self) -> httpx.Response:
        return await self._admin.post("/v1/completions", json=short_request(self._model))

    def _report_refusal(self, answer: httpx.Response) -> None:
        if not answer.is_success and answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            self._seen.breaks(f"while the engine restarts: {answer.status_code} {answer.text[:200]}")

    def _engines(self) -> list[int]:
        return children(self._server, ENGINE)
