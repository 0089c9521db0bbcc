"""Faults that are put into a running server: engine processes that die or hang, adapters that come and go."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from loadtests.upload import PARTS

PAUSE_SECONDS = 1.0


def children(pid: int, name: str) -> list[int]:
    """Processes that `pid` started and whose command line has `name`."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    found = []
    for child in map(int, listed):
        with suppress(FileNotFoundError):
            if name.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


class Faults:
    """Injects faults until it is cancelled; `counts` says how many of each kind there were.

    `server` is the front end's process id, `admin` a client with the admin key, `folders` adapters to register.
    """

    def __init__(self, server: int, admin: httpx.AsyncClient, folders: Sequence[Path], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._server = server
        self._admin = admin
        self._folders = folders
        self._rng = random.Random(seed)
        self._alive: list[str] = []
        self._number = 0
        self._kinds: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "engine killed": (1.0, self._kill),
            "engine paused": (2.0, self._pause),
            "adapter registered": (4.0, self._register),
            "adapter replaced": (3.0, self._replace),
            "adapter deleted": (3.0, self._delete),
        }

    async def run(self, every: float) -> None:
        """About one fault in `every` seconds."""
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * every)
            (name,) = self._rng.choices(names, weights)
            await self._kinds[name][1]()
            self.counts[name] += 1

    async def clean(self) -> None:
        """Delete what was registered."""
        while self._alive:
            await self._delete()

    async def _kill(self) -> None:
        for engine in children(self._server, "server.engine.loop"):
            os.kill(engine, signal.SIGKILL)

    async def _pause(self) -> None:
        """As a step that takes long, or a machine that stands still."""
        engines = children(self._server, "server.engine.loop")
        for engine in engines:
            os.kill(engine, signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE_SECONDS)
        finally:
            for engine in engines:
                with suppress(ProcessLookupError):
                    os.kill(engine, signal.SIGCONT)

    async def _register(self) -> None:
        self._number += 1
        name = f"soak-{self._number}"
        if await self._put(name, replace=False):
            self._alive.append(name)

    async def _replace(self) -> None:
        if self._alive:
            await self._put(self._rng.choice(self._alive), replace=True)

    async def _delete(self) -> None:
        if self._alive:
            name = self._alive.pop(self._rng.randrange(len(self._alive)))
            self._check("DELETE", await self._admin.delete(f"/admin/v1/adapters/{name}"))

    async def _put(self, name: str, *, replace: bool) -> bool:
        folder = self._rng.choice(self._folders)
        with ExitStack() as opened:
            files = {part: opened.enter_context((folder / file).open("rb")) for part, file in PARTS.items()}
            fields = {"name": name, "replace": str(replace).lower(), "public": "true"}
            answer = await self._admin.post("/admin/v1/adapters", data=fields, files=files)
        return self._check("POST", answer)

    def _check(self, method: str, answer: httpx.Response) -> bool:
        if not answer.is_success:
            self.refused[f"{method} {answer.status_code}"] += 1
        return answer.is_success
