"""What the front end does about an engine that is stuck, and about requests that engines die of."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from polling import until

from server.engine.backoff import Backoff
from server.engine.client import EngineClient
from server.engine.sequence import FinishReason, Request
from server.engine.suspects import Quarantined
from tests.engine.engine_client import LONG, SHORT, begun, collect, small_config, started


@pytest.fixture
async def client(endless_model: Path) -> AsyncIterator[EngineClient]:
    async with started(small_config(endless_model)) as client:
        yield client


async def test_a_stuck_engine_is_seen_and_replaced(client: EngineClient) -> None:
    """SIGSTOP is what a step that never ends looks like from outside."""
    running = await begun(client, Request("r", (2, 3, 4), LONG))
    assert not client.stalled
    stuck = client.pid
    assert stuck is not None
    os.kill(stuck, signal.SIGSTOP)
    client.stall_seconds = 0.2
    await until(lambda: client.stalled)
    outputs = await asyncio.wait_for(running, 60)
    assert outputs[-1].finish_reason is FinishReason.ERROR
    client.stall_seconds = 60.0  # a busy machine may be silent for a while
    await until(lambda: client.alive and client.pid != stuck)
    assert not client.stalled
    assert (await collect(client, Request("next", (5,), SHORT)))[-1].finish_reason is FinishReason.LENGTH


async def test_an_idle_engine_is_not_stuck(client: EngineClient) -> None:
    client.stall_seconds, pid = 0.1, client.pid
    await asyncio.sleep(1.0)
    assert not client.stalled
    client.stall_seconds = 60.0
    assert (await collect(client, Request("r", (2, 3), SHORT)))[-1].finish_reason is FinishReason.LENGTH
    assert client.pid == pid


async def test_successors_that_do_not_start_are_held_back(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that served is replaced at once; those that fail afterwards get no credit for what it did."""
    deaths: list[bool] = []

    def after(_: Backoff, *, proven: bool) -> float:
        deaths.append(proven)
        return 0.0

    monkeypatch.setattr(Backoff, "after", after)
    assert (await collect(client, Request("r", (2, 3), SHORT)))[-1].finish_reason is FinishReason.LENGTH
    client.process.config = replace(client.process.config, model=str(tmp_path / "gone"))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: len(deaths) >= 3)
    assert deaths[:3] == [True, False, False]


@pytest.mark.slow
async def test_a_request_that_engines_never_looked_at_is_not_why_they_died(client: EngineClient) -> None:
    request = Request("r", (2, 3, 4), SHORT)
    for _ in range(2):
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.create_task(collect(client, request))
        await until(lambda: "r" in client._streams)
        os.kill(pid, signal.SIGKILL)
        assert (await running)[-1].finish_reason is FinishReason.ERROR
        await until(lambda pid=pid: client.alive and client.pid != pid)
    assert (await collect(client, request))[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.slow
async def test_a_request_that_engines_die_of_is_not_tried_a_third_time(client: EngineClient) -> None:
    poison, innocent = Request("p", (2, 3, 4), LONG), Request("i", (5, 6), LONG)
    first = await asyncio.gather(*(begun(client, request) for request in (poison, innocent)))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    assert [(await task)[-1].finish_reason for task in first] == [FinishReason.ERROR] * 2
    await until(lambda: client.alive)
    assert (await collect(client, replace(innocent, params=SHORT)))[-1].finish_reason is FinishReason.LENGTH
    second = await begun(client, replace(poison, id="p2"))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    assert (await second)[-1].finish_reason is FinishReason.ERROR
    await until(lambda: client.alive)
    with pytest.raises(Quarantined, match="died 2 times"):
        await collect(client, replace(poison, id="p3"))
    assert (await collect(client, replace(innocent, id="i2", params=SHORT)))[-1].finish_reason is FinishReason.LENGTH
