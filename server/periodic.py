"""Work that is done again and again beside the requests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from server.errors import NO_FAILURE

logger = logging.getLogger(__name__)


@asynccontextmanager
async def repeating(work: Callable[[], Awaitable[object]], seconds: float) -> AsyncIterator[None]:
    """Do `work` every `seconds` seconds, counted from its end, as long as the block lasts.

    A run that fails is logged, and the next one comes all the same. One that is under way when the block ends is
    waited for, not cancelled: a thread of its would go on unseen.
    """
    ended = asyncio.Event()

    async def repeat() -> None:
        while not await _happens(ended, seconds):
            try:
                await work()
            except NO_FAILURE:
                raise
            except BaseException:  # also a panic of a library that reads files: nobody would see that this has ended
                logger.exception("a periodic task failed")

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        ended.set()
        await task


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    """Whether it does within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
