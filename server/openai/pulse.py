"""What watches over an open stream: comments while there is nothing to say, and an end where nobody reads."""

import asyncio

from starlette.types import Send

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients of server-sent events skip and proxies count as life."""


class Pulse:
    """Sends the parts of one stream. `beat` runs beside it, one timer for a stream instead of one for each part.

    A stream that was silent for a whole `interval` says so; 0 keeps it silent. `patience` is how long a reader may
    take for what was sent. Both are in seconds.
    """

    def __init__(self, send: Send, interval: float, patience: float) -> None:
        self._send = send
        self._interval = interval
        self._patience = patience
        self._num_sent = 0
        self._is_sending = False

    async def send(self, body: bytes) -> None:
        """The next part. Waits while the reader does not keep up."""
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_sending = False
        self._num_sent += 1

    async def end(self, body: bytes) -> None:
        """The last part."""
        self._is_sending = True  # and nothing comes after it
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def beat(self) -> None:
        """Returns when the reader has taken nothing for so long as `patience` allows."""
        period = self._interval or self._patience
        waited, seen = 0.0, self._num_sent
        while waited < self._patience:
            await asyncio.sleep(period)
            if self._num_sent != seen:
                waited = 0.0
            elif self._is_sending:
                waited += period
            elif self._interval and not await self._comment():
                return
            seen = self._num_sent

    async def _comment(self) -> bool:
        try:
            async with asyncio.timeout(self._patience):
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        except TimeoutError:
            return False
        return True
