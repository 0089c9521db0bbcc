"""More connections than there is room for, and requests that do not come to their end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_engine import REPLY
from fakes import Harness
from uvicorn import Config, Server
from uvicorn.server import ServerState

from server.config import HttpSettings
from server.connections import HEAD_BYTES, LINGERING, SLOWEST, Connection
from server.serve import uvicorn_config

BODY = json.dumps({"model": "sql", "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY

Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(harness: Harness, **http: Any) -> AsyncIterator[Callable[[], Awaitable[Link]]]:
    """A server with these settings; what it yields connects to it."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn_config(harness.app, HttpSettings(**http))
    server = Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    links: list[Link] = []

    async def connect() -> Link:
        links.append(await asyncio.open_connection(*listener.getsockname()))
        return links[-1]

    async with asyncio.timeout(60):
        while not server.started:
            await asyncio.sleep(0.01)
        yield connect
        for _, writer in links:
            writer.close()
        server.should_exit = True
        await task
    listener.close()


async def said(link: Link, sent: bytes) -> tuple[int, dict[str, Any], bytes]:
    """Status, JSON body and headers of the only answer on a connection, which the server closes."""
    reader, writer = link
    writer.write(sent)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body), head.lower()


async def test_a_connection_is_closed_that_has_been_idle_for_long(harness: Harness) -> None:
    async with serving(harness, idle_timeout=1) as connect:
        status, _, head = await said(await connect(), WHOLE)
        assert (status, b"connection: close" in head) == (200, False), "the answer left it open"
    assert uvicorn_config(harness.app, HttpSettings()).timeout_keep_alive == 75


async def test_connections_beyond_the_limit_are_refused_and_the_others_go_on(harness: Harness) -> None:
    harness.engine.gate.clear()
    async with serving(harness, max_connections=3) as connect:
        open_ones = [await connect() for _ in range(3)]
        for _, writer in open_ones:
            writer.write(WHOLE.replace(b"Host", b"Connection: close\r\nHost", 1))
        while len(harness.engine.requests) < 3:
            await asyncio.sleep(0.01)
        status, answer, head = await said(await connect(), WHOLE)
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert b"retry-after: 2" in head
        refused = [await connect() for _ in range(LINGERING + 5)]
        assert all([(await reader.read()).startswith(b"HTTP/1.1 503") for reader, _ in refused])
        assert len(harness.engine.requests) == 3
        harness.engine.gate.set()
        for reader, _ in open_ones:
            assert REPLY in (await reader.read()).decode()


async def test_there_is_room_again_when_somebody_leaves(harness: Harness) -> None:
    async with serving(harness, max_connections=1) as connect:
        _, first = await connect()
        first.close()
        status = 503
        while status == 503:
            status, answer, _ = await said(await connect(), WHOLE.replace(b"Host", b"Connection: close\r\nHost", 1))
        assert answer["choices"][0]["text"] == REPLY


@pytest.mark.parametrize("sent", [HEAD, WHOLE[:-5], HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
async def test_a_request_that_does_not_come_to_its_end(harness: Harness, sent: bytes) -> None:
    async with serving(harness, request_timeout=0.5) as connect:
        status, answer, _ = await said(await connect(), sent)
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
        assert harness.services.quotas.running("default") == 0


LARGE = {
    "address": (b"GET /", b"a" * 1200, b" HTTP/1.1\r\n\r\n"),
    "one header": (HEAD + b"A: ", b"a" * 1200, b"\r\n\r\n"),
    "many headers": (HEAD, b"a: b\r\n" * 200, b"\r\n"),
}


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("start", "part", "end"), LARGE.values(), ids=LARGE)
async def test_headers_that_are_too_large(
    connection: Connection, start: bytes, part: bytes, end: bytes, in_parts: bool, ends: bool
) -> None:
    transport = connection.transport
    assert isinstance(transport, Transport)
    parts = [start, *[part] * (2 * HEAD_BYTES // len(part)), end if ends else b""]
    for piece in parts if in_parts else [b"".join(parts)]:
        connection.data_received(piece)
    assert transport.written.count(b"HTTP/1.1") == 1
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    assert connection.cycle is None, "nobody is asked to answer"


async def test_who_sends_too_large_headers_sees_why(harness: Harness) -> None:
    async with serving(harness) as connect:
        status, answer, head = await said(await connect(), HEAD + b"A: " + b"a" * (2 * HEAD_BYTES))
        assert (status, answer["error"]["code"]) == (431, "headers_too_large")
        assert b"connection: close" in head


async def test_trailers_without_end(connection: Connection) -> None:
    connection.data_received(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    transport = connection.transport
    assert isinstance(transport, Transport)
    for _ in range(HEAD_BYTES // 1200):
        connection.data_received(b"a: b\r\n" * 200)
    assert not transport.written
    connection.data_received(b"a: b\r\n" * 200)
    assert transport.written.startswith(b"HTTP/1.1 431 ")


async def test_large_headers_and_bodies_that_end(harness: Harness) -> None:
    """The bound is on what the parser has to keep, however much of it there was before."""
    async with serving(harness) as connect:
        reader, writer = await connect()
        body = json.dumps({"model": "sql", "prompt": "Hi", "user": "u" * 200}).encode()
        chunked = HEAD + b"Transfer-Encoding: chunked\r\nX-Large: " + b"x" * (HEAD_BYTES // 2) + b"\r\n\r\n"
        for byte in body:
            chunked += b"1;" + b"e" * 500 + b"\r\n%c\r\n" % byte
        for close in (False, True):
            end = b"0\r\n\r\n"
            sent = chunked if not close else chunked.replace(b"Host", b"Connection: close\r\nHost", 1)
            writer.write(sent + end)
            await writer.drain()
        assert (await reader.read()).decode().count(REPLY) == 2


async def test_who_says_nothing_is_told_nothing(harness: Harness) -> None:
    async with serving(harness, request_timeout=0.05) as connect:
        reader, _ = await connect()
        assert await reader.read() == b""


class Transport(asyncio.Transport):
    """Remembers what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    """Its timer never runs: the tests look in its place."""

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await asyncio.Event().wait()

    made = Connection(Config(app, lifespan="off"), ServerState(), {}, most=1, patience=1000.0)
    made.connection_made(Transport())
    yield made
    for task in made.tasks:
        task.cancel()
    made.connection_lost(None)


@pytest.mark.parametrize(("size", "ends"), [(SLOWEST * 1000, False), (SLOWEST * 1000 - 1, True)])
async def test_a_slow_body_that_keeps_up_is_not_given_up(connection: Connection, size: int, ends: bool) -> None:
    connection.data_received(HEAD + b"Content-Length: 10000000\r\n\r\n")
    connection._look()
    for _ in range(3):
        connection.flow.resume_reading()
        connection.data_received(b"x" * size)
        connection.flow.resume_reading()  # as when the application has taken it
        connection._look()
        assert connection.transport.is_closing() == ends
        if ends:
            break


async def test_a_body_that_the_server_does_not_take_is_not_slow(connection: Connection) -> None:
    connection.data_received(HEAD + b"Content-Length: 10000000\r\n\r\n")
    connection.data_received(b"x" * 100_000)
    assert connection.flow.read_paused
    for _ in range(3):
        connection._look()
    assert not connection.transport.is_closing()


async def test_an_answer_may_take_longer(connection: Connection) -> None:
    """What is bounded is the way here, not the work."""
    connection.data_received(WHOLE)
    for _ in range(3):
        connection._look()
    transport = connection.transport
    assert isinstance(transport, Transport)
    assert (transport.written, transport.closed) == (b"", False)


async def test_half_a_request_behind_one_that_is_being_answered_waits(connection: Connection) -> None:
    connection.data_received(WHOLE + HEAD[:20])
    for _ in range(3):
        connection._look()
    assert not connection.transport.is_closing()
