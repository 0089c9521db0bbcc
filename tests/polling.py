"""Waiting for what other tasks, threads or processes do."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], pause: float = 0.002) -> None:
    """Raises TimeoutError after a minute. pause: seconds between two looks; 0 leaves the loop for a turn."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(pause)
