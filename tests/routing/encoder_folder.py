"""The folder of the fake encoder, through which a test steers its processes and sees what they have done."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from routing.encoder import EncoderProcess

Make = Callable[..., EncoderProcess]


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "weights").write_text("1")

    def put(self, name: str, text: str = "") -> None:
        (self.path / name).write_text(text)

    def drop(self, name: str) -> None:
        (self.path / name).unlink()

    def lines(self, kind: str) -> list[Any]:
        log = self.path / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line[kind] for line in lines if kind in line]

    @property
    def passes(self) -> list[list[str]]:
        return self.lines("pass")

    async def until(self, condition: Callable[[], object], seconds: float = 150.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


async def busy(folder: Folder, process: EncoderProcess) -> Awaitable[np.ndarray]:
    """A next pass that does not end before `hold` is dropped."""
    folder.put("hold")
    before = len(folder.passes)
    first = asyncio.create_task(process.encoder().embed(["first"]))
    await folder.until(lambda: len(folder.passes) > before)
    return first
