"""A trace is played at its own times, whatever the server does."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from loadtests.open_loop import Target, play_trace
from loadtests.records import Record
from loadtests.trace import Trace, TraceRequest

TARGET = Target("base", key="secret", keys={"acme": "own"}, vocab_size=500)


def answer(tokens: int, *more: dict[str, Any]) -> httpx.Response:
    chunks = [{"choices": [{"text": "a"}]}] * tokens
    chunks += [{"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 7}}, *more]
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


async def played(trace: Trace, server: Callable[[httpx.Request], Any]) -> list[Record]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as client:
        return await play_trace(client, trace, TARGET)


async def test_what_is_sent_and_what_is_kept() -> None:
    sent: list[tuple[dict[str, Any], str | None]] = []

    def server(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        sent.append((body, request.headers.get("authorization")))
        return answer(body["max_tokens"])

    trace = Trace.of(
        [
            TraceRequest(0.0, 3, 5),
            TraceRequest(0.0, 2, 4, adapter="sql", tenant="acme", extra={"lora": {"explain": True}}),
            TraceRequest(0.0, 2, prompt="hello", adapter="sql"),
        ]
    )
    records = await played(trace, server)
    bodies = [body for body, _ in sent]
    assert [body["model"] for body in bodies] == ["base", "sql", "sql"]
    assert [key for _, key in sent] == ["Bearer secret", "Bearer own", "Bearer secret"]
    assert (len(bodies[0]["prompt"]), bodies[2]["prompt"]) == (5, "hello")
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in bodies)
    assert bodies[1]["lora"] == {"explain": True}
    assert [(r.index, r.status, r.output_tokens, r.prompt_tokens, len(r.times)) for r in records] == [
        (0, "ok", 3, 7, 3),
        (1, "ok", 2, 7, 2),
        (2, "ok", 2, 7, 2),
    ]
    assert [record.cold for record in records] == [False, True, False]
    assert all(list(record.times) == sorted(record.times) and record.times[-1] <= record.end for record in records)


async def test_a_slow_server_delays_no_request() -> None:
    running = most = 0
    go = asyncio.Event()

    async def server(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 5:
            go.set()
        await go.wait()  # nobody is answered before all five have been asked
        running -= 1
        return answer(json.loads(request.content)["max_tokens"])

    await played(Trace.of(TraceRequest(0.001 * number, 1, 1) for number in range(5)), server)
    assert most == 5


async def test_a_closed_loop_keeps_to_its_width() -> None:
    running = most = 0

    async def server(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return answer(json.loads(request.content)["max_tokens"])

    records = await played(Trace.of([TraceRequest(0.0, 1, 1)] * 20, at_once=3), server)
    assert most <= 3
    assert len(records) == 20


async def test_failures_are_records_with_their_reason() -> None:
    def server(request: httpx.Request) -> httpx.Response:
        kind = json.loads(request.content)["prompt"]
        if kind == "refused":
            return httpx.Response(429, json={"error": {"message": "slow down"}})
        if kind == "lost":
            raise httpx.ReadError("gone")
        if kind == "short":
            return answer(1)
        return answer(2, {"error": {"code": "engine_unavailable", "message": "died"}})

    kinds = ["refused", "lost", "short", "died"]
    records = await played(Trace.of(TraceRequest(0.0, 2, prompt=kind) for kind in kinds), server)
    assert [record.status for record in records] == ["http 429", "ReadError", "short", "error engine_unavailable"]
    assert [record.output_tokens for record in records] == [0, 0, 1, 2]
