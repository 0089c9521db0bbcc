"""A client that leaves, in every phase: its work ends in the engine, and it is accounted for once."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from caller import Caller
from fakes import Harness
from polling import until

from routing.router import RouteQuery

BODY = {"model": "sql", "prompt": "Hi", "max_tokens": 20}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(harness: Harness, stream: bool, n: int) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY | {"stream": stream, "n": n})
    await until(lambda: len(harness.engine.requests) == n)
    assert harness.store.leases("default", "default", "sql") == 1
    caller.leave()
    await asyncio.wait_for(caller.task, 60)
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
    await asyncio.wait_for(caller.task, 60)
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
    await asyncio.wait_for(caller.task, 60)
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"abort": 1.0}
    harness.check_all_given_back()


async def test_in_the_middle_of_the_upload(harness: Harness) -> None:
    caller = Caller(harness, "/v1/completions", BODY, uploaded=False)
    await until(lambda: caller.has_uploaded)
    caller.leave()
    await asyncio.wait_for(caller.task, 60)
    assert caller.sent[0]["status"] == 499
    assert not harness.engine.requests
    harness.check_all_given_back()


class Held:
    """Stands in front of a coroutine function: calls wait for ever, and are counted while they do."""

    def __init__(self) -> None:
        self.num_calls = self.num_waiting = 0

    async def __call__(self, *_: Any, **__: Any) -> Any:
        self.num_calls += 1
        self.num_waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.num_waiting -= 1


def tokenizing(harness: Harness) -> tuple[Any, str]:
    return harness.services.tokenizer, "encode"


def routing(harness: Harness) -> tuple[Any, str]:
    return harness.services.generator.routers.select(RouteQuery("default", "sql")), "route"


def leasing(harness: Harness) -> tuple[Any, str]:
    return harness.services.store, "lease"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", [tokenizing, routing, leasing])
async def test_before_the_engine_knows_of_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, phase: Callable[[Harness], tuple[Any, str]], stream: bool
) -> None:
    held, (owner, name) = Held(), phase(harness)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, held)
        caller = Caller(harness, "/v1/completions", BODY | {"stream": stream})
        await until(lambda: held.num_waiting)
        caller.leave()
        await asyncio.wait_for(caller.task, 60)
    assert (held.num_calls, held.num_waiting) == (1, 0)
    assert not harness.engine.requests
    assert harness.services.quotas.running("default") == 0
    harness.check_all_given_back()


async def test_while_followers_wait_for_the_first_choice(harness: Harness) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY | {"prompt": "a long prompt " * 5, "n": 3})
    await until(lambda: harness.engine.requests)
    caller.leave()
    await asyncio.wait_for(caller.task, 60)
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
    await asyncio.wait_for(caller.task, 60)
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
    async with httpx.AsyncClient(timeout=60) as client:
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
    async with httpx.AsyncClient(timeout=60) as client:
        chunks = chunks_of(client, f"{live}/v1/completions")
        await anext(chunks)
        await chunks.aclose()
        await until(lambda: harness.engine.ended)
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"abort": 1.0}
