"""Streamed completions, of a server that is made up."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from loadtests.streamed import Answered, AnswerError, Round, complete, play

ROUTE = {"router": "retriever", "cached": False, "route_ms": 0.5, "adapters": [{"name": "sql"}, {"name": "sea"}]}
BODY = {"model": "auto", "prompt": "x", "max_tokens": 2}


def stream(*chunks: dict[str, Any]) -> httpx.Response:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return httpx.Response(200, text=text, headers={"x-loramux-route": json.dumps(ROUTE)})


def client(answer: Callable[[httpx.Request], Any]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


WORD = {"choices": [{"text": "a"}]}
END = {"choices": [], "usage": {"completion_tokens": 2}}


async def test_an_answer() -> None:
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return stream(WORD, WORD, END)

    async with client(answer) as http:
        done = await complete(http, BODY)
    assert (done.tokens, done.names, done.route) == (2, ("sql", "sea"), ROUTE)
    assert done.first > 0
    wanted = BODY | {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    assert sent == [wanted]


@pytest.mark.parametrize(
    ("response", "part"),
    [
        (httpx.Response(404, text="no such model"), "404: b'no such model'"),
        (stream(WORD, {"choices": [], "usage": {"completion_tokens": 1}}), "has 1 tokens, expected 2"),
        (stream(END), "expected 2"),
        (stream(WORD, {"error": {"message": "died"}}), "died"),
    ],
)
async def test_what_is_no_answer(response: httpx.Response, part: str) -> None:
    async with client(lambda _: response) as http:
        with pytest.raises(AnswerError, match=part):
            await complete(http, BODY)


async def test_no_more_than_so_many_at_once() -> None:
    running, most = 0, 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (int(json.loads(request.content)["prompt"]) % 3))
        running -= 1
        return stream(WORD, WORD, END)

    async with client(answer) as http:
        done = await play(http, [BODY | {"prompt": str(number)} for number in range(20)], at_once=4)
    assert most == 4
    assert len(done.answers) == 20


def test_throughput_is_over_the_whole_round() -> None:
    assert Round(2.0, (Answered(0.1, 30, ROUTE), Answered(0.2, 10, ROUTE))).tokens_per_second == 20
