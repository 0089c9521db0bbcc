"""A client that leaves, in every phase: its work ends in the engine, and it is accounted for once."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fakes import Harness

BODY = {"model": "sql", "prompt": "Hi", "max_tokens": 20}


class Caller:
    """One request on the ASGI interface itself, which can say at any moment that the client has left."""

    def __init__(self, harness: Harness, url: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._left = asyncio.Event()
        self._body: list[bytes] = [json.dumps(body).encode()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(harness.asgi(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    @property
    def num_events(self) -> int:
        return sum(message.get("body", b"").count(b"data: ") for message in self.sent)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(harness: Harness, stream: bool, n: int) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY | {"stream": stream, "n": n})
    await until(lambda: len(harness.engine.requests) == n)
    assert harness.store.leases("default", "default", "sql") == 1
    caller.leave()
    await asyncio.wait_for(caller.task, 20)
    assert set(harness.engine.ended.values()) == {"closed"}
    assert harness.endings() == {"abort": float(n)}
    harness.check_all_given_back()


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(harness: Harness, n: int) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 3
    caller = Caller(harness, "/v1/completions", BODY | {"stream": True, "n": n})
    await until(lambda: caller.num_events >= 3 * n)
    caller.leave()
    await asyncio.wait_for(caller.task, 20)
    assert set(harness.engine.ended.values()) == {"closed"}
    assert harness.endings() == {"abort": float(n)}
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in caller.sent)
    harness.check_all_given_back()


async def test_in_the_middle_of_a_whole_answer(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 3
    caller = Caller(harness, "/v1/completions", BODY)
    await until(lambda: harness.engine.num_waiting == 1)
    caller.leave()
    await asyncio.wait_for(caller.task, 20)
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"abort": 1.0}
    harness.check_all_given_back()


async def test_while_followers_wait_for_the_first_choice(harness: Harness) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY | {"prompt": "a long prompt " * 5, "n": 3})
    await until(lambda: harness.engine.requests)
    caller.leave()
    await asyncio.wait_for(caller.task, 20)
    assert len(harness.engine.requests) == 1
    assert harness.endings() == {"abort": 3.0}
    harness.check_all_given_back()


async def test_an_error_in_one_choice_ends_the_others(harness: Harness) -> None:
    def script(request: Any) -> list[int]:
        if request.id.endswith("-1"):
            harness.engine._aborted.add(request.id)
        return harness.engine.encode("some more words to say")

    harness.engine.answer(script)
    caller = Caller(harness, "/v1/completions", BODY | {"n": 3})
    await asyncio.wait_for(caller.task, 20)
    assert caller.sent[0]["status"] == 503
    assert sum(harness.endings().values()) == 3
    harness.check_all_given_back()


async def chunks_of(client: httpx.AsyncClient, url: str) -> AsyncGenerator[bytes, None]:
    async with client.stream("POST", url, json=BODY | {"stream": True}) as response:
        async for chunk in response.aiter_bytes():
            yield chunk


@pytest.mark.parametrize("stream", [False, True])
async def test_over_a_socket_before_the_first_token(harness: Harness, live: str, stream: bool) -> None:
    harness.engine.gate.clear()
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(f"{live}/v1/completions", json=BODY | {"stream": stream}))
        await until(lambda: harness.engine.requests)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: harness.engine.ended)
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"abort": 1.0}


async def test_over_a_socket_in_the_middle_of_a_stream(harness: Harness, live: str) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 3
    async with httpx.AsyncClient() as client:
        chunks = chunks_of(client, f"{live}/v1/completions")
        await anext(chunks)
        await chunks.aclose()
        await until(lambda: harness.engine.ended)
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"abort": 1.0}
