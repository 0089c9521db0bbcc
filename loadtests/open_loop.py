"""Plays a trace against any server that speaks OpenAI's completions API, at the trace's own times.

Requests are sent when the trace says, however slow the server is: a client that waits for answers would hide what users
wait for. Only a trace with `at_once` holds requests back, and then counts from when each was sent.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.events import data_of
from loadtests.records import OK, Record
from loadtests.trace import Trace, TraceRequest

Json = dict[str, Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """A server. `model` is the base model's name there; `keys` by tenant, else `key`."""

    model: str
    key: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int = 32_000
    seed: int = 0

    def headers(self, tenant: str) -> dict[str, str]:
        key = self.keys.get(tenant, self.key)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def body(self, index: int, request: TraceRequest) -> Json:
        """A greedy completion of exactly `output_tokens` tokens, streamed."""
        return {
            "model": request.adapter or self.model,
            "prompt": request.prompt_of(index, self.seed, self.vocab_size),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request.extra,
        }


async def play_trace(
    client: httpx.AsyncClient, trace: Trace, target: Target, clock: Clock = time.perf_counter
) -> list[Record]:
    """Send every request, and wait for all answers. The client's `base_url` is the server; it must allow as many
    connections as run at once. A request that fails is a record with its reason.
    """
    slots = None if trace.at_once is None else asyncio.Semaphore(trace.at_once)
    used: set[str] = set()
    started = clock()

    async def one(index: int, request: TraceRequest) -> Record:
        await asyncio.sleep(max(0.0, request.at - (clock() - started)))
        async with AsyncExitStack() as held:
            if slots is not None:
                await held.enter_async_context(slots)
            cold = request.adapter is not None and request.adapter not in used
            used.add(request.adapter or "")
            return await _send(client, target, index, request, started, cold, clock)

    return list(await asyncio.gather(*(one(index, request) for index, request in enumerate(trace.requests))))


async def _send(
    client: httpx.AsyncClient,
    target: Target,
    index: int,
    request: TraceRequest,
    started: float,
    cold: bool,
    clock: Clock,
) -> Record:
    body = target.body(index, request)
    sent = clock()
    times: list[float] = []
    usage: Json = {}
    status = OK
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=target.headers(request.tenant)) as found:
            if not found.is_success:
                await found.aread()
                status = f"http {found.status_code}"
            async for data in data_of(found):
                if not data.startswith("{"):
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    status = f"error {chunk['error'].get('code')}"
                    break
                if any(choice.get("text") or choice.get("finish_reason") for choice in chunk.get("choices") or ()):
                    times.append(clock() - sent)
                usage = chunk.get("usage") or usage
    except httpx.HTTPError as error:
        status = type(error).__name__
    tokens = int(usage.get("completion_tokens", len(times)))
    if status == OK and tokens != request.output_tokens:
        status = "short"
    return Record(
        index=index,
        tenant=request.tenant,
        adapter=request.adapter,
        at=request.at,
        sent=sent - started,
        times=tuple(times),
        end=clock() - sent,
        prompt_tokens=int(usage.get("prompt_tokens", request.prompt_tokens)),
        output_tokens=tokens,
        asked_tokens=request.output_tokens,
        status=status,
        cold=cold,
    )
