"""What arrives on the socket that is no request, or half of one: the connection ends, and the next one is served."""

import asyncio
import json

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness

BODY = json.dumps({"model": "sql", "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
SENT = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "no method": b"/v1/completions HTTP/1.1\r\n\r\n",
    "an unknown version": HEAD.replace(b"1.1", b"9.9") + LENGTH + b"\r\n" + BODY,
    "headers without end": HEAD + b"X-Filler: " + b"x" * 200_000,
    "many headers": HEAD + b"".join(b"X-%d: y\r\n" % number for number in range(20_000)) + b"\r\n",
    "a length that is no number": HEAD + b"Content-Length: many\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n" + BODY,
    "two lengths": HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
    "a chunk without a size": HEAD + CHUNKED + b"zz\r\n" + BODY,
    "a header with a line end inside": HEAD + b"X-A: b\rc\r\n" + LENGTH + b"\r\n" + BODY,
    "a header name with a space": HEAD + b"X A: b\r\n" + LENGTH + b"\r\n" + BODY,
}
CUT = {
    "in the headers": HEAD,
    "in the body": HEAD + LENGTH + b"\r\n" + BODY[:10],
    "in a chunk": HEAD + CHUNKED + b"ff\r\nabc",
    "between chunks": HEAD + CHUNKED + b"3\r\nabc\r\n",
}


async def said(url: str, sent: bytes, *, ends: bool = True) -> bytes:
    """Everything that comes back until the server ends the connection; this side `ends` it behind what it sends."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        if ends:
            writer.write_eof()
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def check_good(url: str, harness: Harness) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post("/v1/completions", content=BODY, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"] == REPLY
    assert len(harness.engine.requests) == 1


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
async def test_no_request(live: str, harness: Harness, sent: bytes) -> None:
    answer = await said(live, sent)
    if answer:
        head, body = answer.split(b"\r\n\r\n", 1)
        is_large = sent in (SENT["headers without end"], SENT["many headers"])
        assert head.startswith(b"HTTP/1.1 431" if is_large else b"HTTP/1.1 400"), head
        error = json.loads(body)["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", None)
        assert error["code"] == ("headers_too_large" if is_large else "invalid_http")
    await check_good(live, harness)


@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
async def test_half_a_request(live: str, harness: Harness, sent: bytes) -> None:
    assert await said(live, sent) == b""
    await check_good(live, harness)


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    for encoding, status in (("gzip", 415), ("br", 415), ("identity", 200), ("", 200)):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        answer = await client.post("/v1/completions", content=BODY, headers=headers)
        assert answer.status_code == status
        if status == 415:
            assert answer.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("wish", [b"h2c", b"websocket", b"TLS/1.0, h2c"])
async def test_wishes_for_another_protocol_are_passed_over(live: str, harness: Harness, wish: bytes) -> None:
    """As Java's HttpClient has one, whose headers and body come apart; the connection stays."""
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nupgrade: " + wish + b"\r\nHTTP2-Settings: AAMA\r\n"
    host, port = live.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(60):
            for parts in ([HEAD + asks + LENGTH + b"\r\n" + BODY], [HEAD + LENGTH + asks + b"\r\n", BODY]):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 OK"), head
                (length,) = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
                answer = json.loads(await reader.readexactly(int(length.split(b":")[1])))
                assert answer["choices"][0]["text"] == REPLY
    finally:
        writer.close()
    assert len(harness.engine.requests) == 2


async def test_words_of_a_body_are_no_wish(live: str, harness: Harness) -> None:
    said = "POST /x HTTP/1.1\r\nUpgrade: h2c\r\n"
    body = json.dumps({"model": "sql", "prompt": said}).encode()
    prompt = harness.services.tokenizer
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        answer = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert harness.engine.requests[0].prompt == tuple(await prompt.encode(said))


async def test_two_requests_at_once_on_a_connection(live: str) -> None:
    whole = HEAD + LENGTH + b"\r\n" + BODY
    answer = await said(live, whole + whole.replace(b"Host", b"Connection: close\r\nHost"), ends=False)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
