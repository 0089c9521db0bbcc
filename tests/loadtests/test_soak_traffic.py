"""What clients of a soak make of answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from loadtests.soak.answers import PROMPTS, Answers
from loadtests.soak.key_faults import Keys
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told
from loadtests.soak.traffic import Client, Expected, Manners, Stranger, World

TOKEN = {"choices": [{"text": "a", "finish_reason": None}], "usage": {"completion_tokens": 1, "prompt_tokens": 3}}
END = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 2, "prompt_tokens": 3}}
ERROR = {"error": {"type": "server_error", "code": "engine_error", "message": "died"}}
LATE = {"retry-after": "1"}


def stream(*chunks: dict[str, Any], done: bool = True, adapter: str | None = None) -> httpx.Response:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    route = {"adapters": [] if adapter is None else [{"digest": adapter}]}
    headers = {"x-loramux-route": json.dumps(route)}
    return httpx.Response(200, headers=headers, text=text + ("data: [DONE]\n\n" if done else ""))


def refusal(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, json={"error": {"type": "server_error", "code": code}})


def world(told: Told, seen: Seen) -> World:
    answers = Answers({(key, prompt): "a" for key in ("base", "d1") for prompt in PROMPTS})
    return World("base", ("f1", "f2", "f3"), told, answers, seen)


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


async def seen_of(response: httpx.Response, manners: Manners, expected: Expected | None, told: Told) -> Seen:
    """What a client makes of one answer."""
    seen = Seen()
    async with client_of(lambda _: response) as http:
        await Client(http, Keys(http, "tenant", seen), manners, world(told, seen), 0)._stream({}, expected)
    return seen


@pytest.mark.parametrize(
    ("response", "ending", "tokens", "is_broken"),
    [
        (stream(TOKEN, END), "finished", 2, False),
        (stream(TOKEN, ERROR), "error event", 1, False),
        (stream(ERROR), "error event", 0, False),
        (stream(TOKEN, {"error": {"type": "invalid_request_error"}}), "error event", 1, True),
        (stream(TOKEN, END, done=False), "finished", 2, True),
        (stream(TOKEN, END, END), "finished", 2, True),
        (stream(END, ERROR), "finished", 2, True),
        (stream(TOKEN), "error event", 1, True),
        (stream(TOKEN | {"choices": [{"text": "a\x85\u2028b", "finish_reason": "stop"}]}), "finished", 1, False),
        (refusal(503, **LATE), "503 some_code", 0, False),
        (refusal(503), "503 some_code", 0, True),
        (refusal(500, **LATE), "500 some_code", 0, True),
        (refusal(429, **LATE), "429 some_code", 0, True),
        (refusal(401, "invalid_api_key"), "401 invalid_api_key", 0, True),
        (refusal(404, "model_not_found"), "404 model_not_found", 0, True),
    ],
)
async def test_what_is_broken(response: httpx.Response, ending: str, tokens: int, is_broken: bool) -> None:
    seen = await seen_of(response, Manners(billed=True), None, Told())
    assert (dict(seen.endings), seen.tokens, bool(seen.broken)) == ({ending: 1}, tokens, is_broken)
    assert seen.prompt_tokens == (3 if tokens else 0)


async def test_an_event_that_cannot_be_read_is_told_and_the_rest_is_read() -> None:
    response = httpx.Response(200, text=f'data: {{"cho\n\ndata: {json.dumps(END)}\n\ndata: [DONE]\n\n')
    seen = await seen_of(response, Manners(billed=True), None, Told())
    assert (seen.endings, seen.tokens) == ({"JSONDecodeError": 1, "finished": 1}, 2)
    (sentence,) = seen.broken
    assert sentence.startswith("an event of a stream, '{\"cho', failed: JSONDecodeError(")


async def test_a_client_outlives_what_nobody_expects() -> None:
    """And tells each in a sentence, with its place."""
    seen, stop, asked = Seen(), asyncio.Event(), 0

    async def broken() -> AsyncIterator[bytes]:
        yield f"data: {json.dumps(TOKEN)}\n\n".encode()
        raise httpx.ReadError("reset")

    answers = [httpx.Response(502, text="<html>"), httpx.Response(200, content=broken()), stream(TOKEN, END)]

    def server(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise httpx.ConnectError("refused")
        if asked == 1 + len(answers):
            stop.set()
        return answers[asked - 2]

    async with client_of(server) as http:
        await Client(http, Keys(http, "t", seen), Manners(billed=True), world(Told(), seen), 0, 0.0).run(stop)
    assert (asked, seen.requests, seen.tokens) == (4, 4, 3)
    assert seen.endings == {"ConnectError": 1, "ValueError": 1, "ReadError": 1, "finished": 1}
    assert len(seen.broken) == 3
    assert seen.broken[1].startswith(
        "a request failed: ValueError(\"502 without an error's body: '<html>'\") at refusal"
    )


async def test_a_stranger_outlives_a_connection_that_breaks() -> None:
    seen, stop = Seen(), asyncio.Event()

    def server(_: httpx.Request) -> httpx.Response:
        stop.set()
        raise httpx.ReadTimeout("")

    async with client_of(server) as http:
        await Stranger(http, Told(), seen).run(stop)
    assert len(seen.broken) == 1


async def test_quotas_refuse_those_who_have_them() -> None:
    assert not (await seen_of(refusal(429, **LATE), Manners(limited=True), None, Told())).broken


@pytest.mark.parametrize(
    ("adapter", "text", "is_broken"),
    [("d1", "a", False), ("d1", "b", True), ("d2", "a", True)],
    ids=["right", "another text", "another adapter"],
)
async def test_an_answer_is_that_of_the_adapter_that_was_meant(adapter: str, text: str, is_broken: bool) -> None:
    told = Told({"name": frozenset(("d1",))})
    chunk = TOKEN | {"choices": [{"text": text, "finish_reason": "length"}]}
    expected = Expected(PROMPTS[0], "name", 0)
    seen = await seen_of(stream(chunk, adapter=adapter), Manners(), expected, told)
    assert (seen.compared, bool(seen.broken)) == (1, is_broken)


async def test_a_name_that_is_being_changed_may_be_unknown() -> None:
    told = Told({"name": frozenset(("d1",))})
    expected = Expected(PROMPTS[0], "name", 0)
    told.tries("name", None)
    assert not (await seen_of(refusal(404, "model_not_found"), Manners(), expected, told)).broken
