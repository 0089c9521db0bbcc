"""The other front ends of a server, as one of them sees them."""

import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

Handler = Callable[[bytes], Awaitable[bytes]]


class Siblings:
    """Where a server is one process there are none: what is asked has no answers.

    Topics and data are a matter between who asks and who answers, and the same in every front end.
    """

    are_none = True

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def on(self, topic: str, handler: Handler) -> None:
        """Whenever another front end asks about `topic`, the answer is what `handler` makes of its data."""
        self._handlers[topic] = handler

    async def ask(self, topic: str, data: bytes = b"", seconds: float | None = None) -> list[bytes]:  # noqa: ARG002
        """What all others answer; without those that end, and after so many seconds those that have not."""
        return []

    async def answer(self, topic: str, data: bytes) -> bytes:
        """What this front end answers; nothing where it does not know the topic, or fails."""
        handler = self._handlers.get(topic)
        if handler is None:
            return b""
        try:
            return await handler(data)
        except Exception:
            logger.exception("a question of another front end about %s could not be answered", topic)
            return b""
