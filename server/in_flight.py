"""The HTTP requests that are being answered, and how those end that a stopping server cannot wait for."""

import asyncio
import logging

from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05


class InFlight:
    """ASGI middleware around the whole application, for one event loop.

    A request that is cut is cancelled; `RequestIds` answers it with 503 if it has no answer yet. The cancellation ends
    here: the server that runs the application would report it as a failure of the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def count(self) -> int:
        return len(self._tasks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            logger.info("%s %s was cut off: the server stops", scope["method"], scope["path"])
        finally:
            self._tasks.discard(task)

    async def idle(self, seconds: float) -> bool:
        """Whether all requests end within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while self._tasks:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    async def cut(self, seconds: float) -> None:
        """Cancel what runs, and wait for so many seconds at most until all of it has been answered."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
