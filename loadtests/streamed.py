"""Streamed completions, many at a time, and when their first tokens came."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.events import data_of

Json = dict[str, Any]
HEADER = "x-loramux-route"


class AnswerError(RuntimeError):
    """The server did not answer as the measurement needs it."""


@dataclass(frozen=True)
class Answered:
    """One request's answer. `first` is seconds until the first token, `route` the object that says which adapters."""

    first: float
    tokens: int
    route: Json

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter["name"] for adapter in self.route["adapters"])


@dataclass(frozen=True)
class Round:
    """All requests of a round, in their order, and the seconds that they took together."""

    seconds: float
    answers: tuple[Answered, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


async def play(client: httpx.AsyncClient, bodies: Sequence[Json], at_once: int) -> Round:
    """Send every body, no more than `at_once` at a time. Raises AnswerError, httpx.HTTPError."""
    slots = asyncio.Semaphore(at_once)

    async def one(body: Json) -> Answered:
        async with slots:
            return await complete(client, body)

    started = time.perf_counter()
    answers = await asyncio.gather(*map(one, bodies))
    return Round(time.perf_counter() - started, tuple(answers))


async def complete(client: httpx.AsyncClient, body: Json) -> Answered:
    """One greedy completion of exactly `max_tokens` tokens. Raises AnswerError, httpx.HTTPError."""
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    started, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/completions", json=body | fixed) as response:
        if not response.is_success:
            raise AnswerError(f"the server answered {response.status_code}: {(await response.aread())[:300]!r}")
        async for data in data_of(response):
            if not data.startswith("{"):
                continue
            chunk = json.loads(data)
            if first is None and chunk.get("choices"):
                first = time.perf_counter() - started
            if "error" in chunk:
                raise AnswerError(f"a stream ended with {chunk['error']}")
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        route = json.loads(response.headers[HEADER])
    if first is None or tokens != body["max_tokens"]:
        raise AnswerError(f"an answer has {tokens} tokens, expected {body['max_tokens']}")
    return Answered(first, tokens, route)
