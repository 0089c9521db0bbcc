"""Connections with bounds: how many there are, how large the head of a request is, and how long one takes to arrive.

An event loop serves as many connections as the system gives it descriptors. Behind that limit accepting fails and other
work with it, such as opening an adapter's file; so a process keeps some for itself and says no before.
"""

import asyncio
import json
import logging
import re
import resource
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.config import HttpSettings
from server.errors import BadRequest, HeadTooLarge, RequestTooSlow, ServerError, TooManyConnections

logger = logging.getLogger(__name__)

RESERVED = 256
"""Descriptors for all that is no connection: files, the database's and the engine's sockets."""
LINGERING = 64
"""Refused connections that are read for a moment: closed at once, many a client would not see the answer."""
LINGER_SECONDS = 1.0
SLOWEST = 256
"""Bytes a second of a request that is on its way; a modem has ten times as much."""

HEAD_BYTES = 1 << 16
"""Of an address with its headers, or of trailers: the parser keeps them all, and copies a long one with every part that
comes. One of 100 MB kept the event loop busy for ten seconds, before anybody was asked for a key.
"""


def protocol(settings: HttpSettings) -> type[asyncio.Protocol]:
    """The class of connections for uvicorn. Raises this process's limit of descriptors as far as it may."""
    made = partial(Connection, most=min(settings.max_connections, _room()), patience=settings.request_timeout)
    return cast(type[asyncio.Protocol], made)  # it is called, and nothing else


def _room() -> int:
    """How many connections the descriptors allow."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        most = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most - min(RESERVED, most // 2)


START = re.compile(rb"[A-Z]+ \S+ HTTP/1\.1\r\n")
OTHER_PROTOCOL = re.compile(rb"\r\nUpgrade:[^\r\n]*", re.IGNORECASE)
"""A wish that is passed over, as RFC 9110 (7.8) allows. Java's HttpClient wishes for HTTP/2 on each new connection, and
the parser takes such a request to have no body."""


class _Phase(Enum):
    """How much of a request has come."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2
    ALL = 3


class Connection(HttpToolsProtocol):
    """uvicorn's, of which there are at most `most`. More are answered with 503 and closed.

    An address with headers of more than `HEAD_BYTES` is answered with 431, and so is as much behind a body without its
    end.

    Headers and body must arrive within `patience` seconds, or keep up with `SLOWEST`; else they are answered with 408.
    One timer a connection looks every `patience` seconds, so it may take twice that until it is noticed.
    """

    def __init__(self, *args: Any, most: int, patience: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most = most
        self._patience = patience
        self._refused = False
        self._phase = _Phase.NOTHING
        self._received = 0
        self._head = 0  # bytes since the headers' end, or a part of a body; with those before them in the same piece
        self._was_arriving = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) <= self._most:
            self._timer = self.loop.call_later(self._patience, self._look)
            return
        self._refused = True
        transport.write(_answer(TooManyConnections()))
        if len(self.connections) <= self._most + LINGERING:
            self._timer = self.loop.call_later(LINGER_SECONDS, transport.close)
        else:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            self._received += len(data)
            self._head += len(data)
            if self._phase is not _Phase.BODY and START.match(data):
                head, *_ = data.partition(b"\r\n\r\n")
                data = OTHER_PROTOCOL.sub(b"", head) + data[len(head) :]
            super().data_received(data)
            if self._head > HEAD_BYTES and not (self._refused or self.transport.is_closing()):
                self._refuse_head()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_answer(BadRequest(msg, code="invalid_http")))
        self.transport.close()

    def eof_received(self) -> None:
        if self._refused:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._phase, self._was_arriving = _Phase.HEADERS, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._head > HEAD_BYTES and self._head_bytes > HEAD_BYTES and not self._refused:
            self._refuse_head()
        self._phase, self._head = _Phase.BODY, 0
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase, self._head = _Phase.ALL, 0
        if not self._refused:
            super().on_message_complete()

    @property
    def _head_bytes(self) -> int:
        """Of the address and the headers that have come, line ends and all."""
        return len(self.url) + sum(map(len, chain(*self.headers))) + len(b": \r\n") * len(self.headers)

    def _look(self) -> None:
        """Whether the request that was arriving a while ago still is, and hardly gets on."""
        received, self._received = self._received, 0
        is_arriving = self._phase is not _Phase.ALL and not self.flow.read_paused and not self._is_answering
        if is_arriving and self._was_arriving and received < SLOWEST * self._patience:
            self._give_up()
            return
        self._was_arriving = is_arriving
        self._timer = self.loop.call_later(self._patience, self._look)

    @property
    def _is_answering(self) -> bool:
        """Whether the request before is still being answered."""
        return self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)

    def _give_up(self) -> None:
        logger.info("408: a request did not arrive in time")
        self._answer_half(RequestTooSlow())
        self.transport.close()

    def _refuse_head(self) -> None:
        logger.info("431: the headers of a request are too large")
        self._refused = True
        self._answer_half(HeadTooLarge(HEAD_BYTES))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _answer_half(self, error: ServerError) -> None:
        """Answer a request that has not come to its end, unless something is being answered already."""
        in_headers, in_body = self._phase is _Phase.HEADERS, self._phase is _Phase.BODY
        if (in_headers and not self._is_answering) or (in_body and not self.cycle.response_started):
            self.transport.write(_answer(error))


def _answer(error: ServerError) -> bytes:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {error.status.value} {error.status.phrase}"]
    lines += [f"{name.lower()}: {value}" for name, value in (headers | dict(error.headers)).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
