"""A client on the ASGI interface itself: it sends, reads and leaves exactly when a test says so."""

import asyncio
import json
from typing import Any

from fakes import Harness


class Caller:
    """One request. `uploaded` False keeps its body unfinished; while `reads` is cleared nothing sent is taken."""

    def __init__(self, harness: Harness, url: str, body: dict[str, Any], *, uploaded: bool = True) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._left = asyncio.Event()
        text = json.dumps(body).encode()
        self._body = [(text, False)] if uploaded else [(text[: len(text) // 2], True)]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(harness.asgi(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    @property
    def text(self) -> bytes:
        """What was read of the answer's body."""
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def num_events(self) -> int:
        return self.text.count(b"data: ")

    @property
    def has_uploaded(self) -> bool:
        """Whether all that there is of the body was taken."""
        return not self._body

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            body, more = self._body.pop()
            return {"type": "http.request", "body": body, "more_body": more}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)
