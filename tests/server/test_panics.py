"""A library that panics while it works for a request ends that request, with an answer like any other bug's."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import httpx
import pytest
from fakes import Harness, Json
from starlette.types import Message, Scope

from server.chat import LONG_TEXT, ChatTokenizer
from server.errors import BUG
from server.request_id import RequestIds
from tests.panic import Panic

MARK = "@"
"""A text with this is too much for the tokenizer."""
PROMPT = f"Hi {MARK}"
CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
ERROR = {"error": {"message": BUG, "type": "server_error", "param": None, "code": "internal_error"}}


class Panicking:
    """The tokenizer's library, which panics at texts with `MARK`, and at decoding number `left_to_decode` from now."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._library = tokenizer._backend
        self.left_to_decode = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def encode_batch(self, texts: Sequence[str], **options: Any) -> Any:
        if any(MARK in text for text in texts):
            raise Panic("index out of bounds")
        return self._library.encode_batch(list(texts), **options)

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        self.left_to_decode -= 1
        if not self.left_to_decode:
            raise Panic("not a char boundary")
        return str(self._library.decode(list(tokens), **options))


@pytest.fixture
def library(harness: Harness) -> Panicking:
    tokenizer = harness.services.tokenizer
    library = Panicking(tokenizer)
    tokenizer._backend = cast(Any, library)
    return library


async def serves(client: httpx.AsyncClient, harness: Harness) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
    assert answer.status_code == 200
    harness.check_all_given_back()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": PROMPT}),
        ("/v1/completions", {"model": "tiny", "prompt": PROMPT, "stream": True}),
        ("/v1/completions", {"model": "tiny", "prompt": ["Hi", PROMPT]}),
        ("/v1/completions", {"model": "tiny", "prompt": PROMPT + " " * LONG_TEXT}),  # in a thread
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/tokenize", {"model": "tiny", "prompt": PROMPT}),
    ],
)
async def test_a_panic_of_the_tokenizer_is_an_error_with_a_body_and_an_id(
    live: str, harness: Harness, caplog: pytest.LogCaptureFixture, path: str, body: Json
) -> None:
    async with httpx.AsyncClient(base_url=live) as client:
        answer = await client.post(path, json=body, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
        assert answer.json() == ERROR
        assert "a request failed" in caplog.messages
        await serves(client, harness)


@pytest.mark.parametrize("left", [3, 6])
async def test_a_panic_amid_a_stream_is_its_last_event(
    live: str, harness: Harness, library: Panicking, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    library.left_to_decode = left
    async with httpx.AsyncClient(base_url=live) as client:
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", "stream": True})
        assert answer.status_code == 200
        *pieces, last = answer.text.strip().split("\n\n")
        assert pieces
        assert all('"choices"' in piece for piece in pieces)
        assert json.loads(last.removeprefix("data: ")) == ERROR
        assert "a stream failed" in caplog.messages
        await serves(client, harness)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_panic_with_the_first_token_is_an_error_with_a_status(
    live: str, harness: Harness, library: Panicking, number: int, stream: bool
) -> None:
    library.left_to_decode = number + 1  # each choice has decoded its context before
    async with httpx.AsyncClient(base_url=live) as client:
        body = {"model": "tiny", "prompt": "Hi", "n": number, "stream": stream}
        answer = await client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()) == (500, ERROR)
        await serves(client, harness)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
async def test_what_ends_a_task_or_the_process_goes_on(harness: Harness, raised: type[BaseException]) -> None:
    async def app(*_: object) -> None:
        raise raised

    async def send(message: Message) -> None:
        assert raised is asyncio.CancelledError, "nothing else is answered"
        if message["type"] == "http.response.start":
            assert message["status"] == 503

    async def receive() -> Message:
        raise AssertionError

    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [],
        "state": {"services": harness.services},
    }
    with pytest.raises(raised):
        await RequestIds(app, lambda: "0" * 32)(scope, receive, send)
