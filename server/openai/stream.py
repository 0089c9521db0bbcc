"""Answers over a connection that may close at any moment: whole ones and server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server import journal
from server.choice import Piece
from server.config import HttpSettings
from server.errors import NO_FAILURE, ClientGone, ServerError
from server.openai.answer import Answer
from server.openai.pulse import Pulse

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A line of an event ends with CR or LF alone, but readers that split as Python's str.splitlines does (httpx's
# aiter_lines among them) cut it at these too, and JSON leaves them as they are.
_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the client leaves first. The request's body must have been read.

    Raises ClientGone.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _end(working, leaving)


async def begun(request: Request, first: "asyncio.Task[Piece]", is_routed: Callable[[], bool], seconds: float) -> None:
    """Returns when `first` is there, or is so late that the answer begins without it, once its route is known.

    0 `seconds` wait as long as it takes. Raises ClientGone, and what `first` raises; it is cancelled then.
    """
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        while not first.done():
            await asyncio.wait((first, leaving), timeout=seconds or None, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not first.done():
                raise ClientGone
            if is_routed():
                break
        if first.done():
            first.result()
    except BaseException:
        await _end(first)
        raise
    finally:
        await _end(leaving)


class EventStream(Response):
    """Server-sent events for the pieces of a generation, of which the first has come already or is waited for.

    The response owns `first` and `pieces`: whatever happens, they are closed. An error after the headers is an event
    of its own, the last one.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Answer,
        first: "asyncio.Task[Piece]",
        pieces: AsyncGenerator[Piece, None],
        headers: Mapping[str, str],
        http: HttpSettings,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._answer = answer
        self._first = first
        self._pieces = pieces
        self._http = http
        self.init_headers({**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        pulse = Pulse(send, self._http.keep_alive, self._http.reader_timeout)
        sending, leaving = asyncio.create_task(self._stream(send, pulse)), asyncio.create_task(_gone(receive))
        beating = asyncio.create_task(pulse.beat())
        try:
            await asyncio.wait((sending, leaving, beating), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                journal.failed(journal.CLIENT_GONE if leaving.done() else journal.READER_STALLED)
        finally:
            await _end(sending, leaving, beating, self._first)
            await self._pieces.aclose()

    async def _stream(self, send: Send, pulse: Pulse) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send_piece(pulse, await self._first)
            async for piece in self._pieces:
                await self._send_piece(pulse, piece)
            last = b"data: [DONE]\n\n"
        except ServerError as error:
            journal.failed(error.code)
            last = _event(error.body())
        except NO_FAILURE:
            raise
        except BaseException:
            logger.exception("a stream failed")
            journal.failed(ServerError.code)
            last = _event(ServerError().body())
        await pulse.end(last)

    async def _send_piece(self, pulse: Pulse, piece: Piece) -> None:
        def encode() -> bytes:
            return b"".join(map(_event, self._answer.events(piece)))

        is_long = bool(piece.prompt_scores) and self._answer.is_long(piece)
        body = await asyncio.to_thread(encode) if is_long else encode()
        if body:
            await pulse.send(body)


def _event(data: object) -> bytes:
    body = msgspec.json.encode(data)
    if not body.isascii():
        for end, escape in _LINE_ENDS:
            body = body.replace(end, escape)
    return b"data: " + body + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
