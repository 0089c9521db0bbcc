"""The engine in its own process: killed, left and misconfigured, every request still has its one ending."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from polling import until

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.config import EngineConfig, EngineStats, RequestError
from server.engine.engine import Engine
from server.engine.engine_process import EngineStartError
from server.engine.sequence import FinishReason, Request
from server.model.config import ModelConfig
from tests.engine.engine_client import ENDLESS, LONG, SHORT, begun, collect, is_idle, small_config, started

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def living(endless_model: Path) -> AsyncIterator[EngineClient]:
    """One for all tests that leave it as it was."""
    async with started(small_config(endless_model)) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(living: EngineClient) -> AsyncIterator[EngineClient]:
    pid = living.pid
    yield living
    await until(lambda: is_idle(living))
    assert living.pid == pid


@pytest_asyncio.fixture(loop_scope="module")
async def own_client(endless_model: Path) -> AsyncIterator[EngineClient]:
    """One of the test's own."""
    async with started(small_config(endless_model)) as client:
        yield client


async def test_outputs_equal_those_of_the_engine_in_process(
    client: EngineClient, endless_model: Path, adapters: dict[str, Path]
) -> None:
    weights = read_adapter(adapters["all4"], ModelConfig.from_folder(endless_model).linear_shape).weights
    request = Request("r", (5, 6, 7), SHORT, Mix.of([(weights.digest, 0.5)]), {weights.digest: str(adapters["all4"])})
    engine = Engine.from_config(small_config(endless_model))
    engine.add_request(request)
    expected = []
    while engine.has_work:
        expected += engine.step()
    outputs = await collect(client, request)
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert client.info is not None
    assert client.info == engine.info()


async def test_kill_9_under_load(own_client: EngineClient) -> None:
    """Every request in flight ends with one error; the engine comes back by itself and serves the next request."""
    requests = [Request(f"r{i}", tuple(range(2, 20 + i)), LONG) for i in range(80)]
    tasks = [asyncio.create_task(collect(own_client, request)) for request in requests]
    await until(lambda: own_client.stats.running > 0)
    assert own_client.pid is not None
    os.kill(own_client.pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    for outputs in results:
        assert [bool(output.finish_reason) for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert outputs[-1].error
    assert not own_client.alive
    with pytest.raises(EngineUnavailable):
        await collect(own_client, requests[0])
    await until(lambda: own_client.alive)
    assert own_client.restarts >= 1
    assert (await collect(own_client, replace(requests[0], params=SHORT)))[-1].finish_reason is FinishReason.LENGTH


async def test_a_failing_reader_costs_the_engine_not_the_client(own_client: EngineClient) -> None:
    """What listens to the statistics raises: the engine is replaced, and what was in flight has its ending."""

    def fail(_: EngineStats) -> None:
        own_client.on_stats = None
        raise ArithmeticError("listener")

    own_client.on_stats = fail
    outputs = await asyncio.wait_for(collect(own_client, Request("r", (2, 3, 4), LONG)), 60)
    assert outputs[-1].finish_reason is FinishReason.ERROR
    await until(lambda: own_client.alive and own_client.restarts == 1)
    assert (await collect(own_client, Request("next", (2, 3), SHORT)))[-1].finish_reason is FinishReason.LENGTH


async def test_leaving_a_stream_frees_its_sequence(client: EngineClient) -> None:
    async with aclosing(client.submit(Request("left", (2, 3, 4), LONG))) as stream:
        async for _ in stream:
            break
    await until(lambda: client.stats.running == 0 and client.stats.kv_used_blocks == 0)
    task = await begun(client, Request("cancelled", (2, 3, 4), LONG))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: client.stats.running == 0 and client.stats.kv_used_blocks == 0)


async def test_an_abort_reaches_the_reader(client: EngineClient) -> None:
    task = await begun(client, Request("r", (2, 3, 4), LONG))
    client.abort("r")
    outputs = await asyncio.wait_for(task, 60)
    assert outputs[-1].finish_reason is FinishReason.ABORT


async def test_a_refusal_is_raised_with_its_field(client: EngineClient) -> None:
    with pytest.raises(RequestError) as refused:
        await collect(client, Request("r", (2,) * ENDLESS, SHORT))
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    assert (await collect(client, Request("r", (2, 3), SHORT)))[-1].finish_reason is FinishReason.LENGTH


async def test_an_adapter_that_cannot_be_read_is_refused(client: EngineClient, tmp_path: Path) -> None:
    digest = "ab" * 32
    request = Request("r", (2, 3), SHORT, Mix.of([(digest, 1.0)]), {digest: str(tmp_path)})
    with pytest.raises(RequestError, match="is missing"):
        await collect(client, request)


async def test_a_broken_model_is_one_sentence(tmp_path: Path) -> None:
    client = EngineClient(EngineConfig(str(tmp_path / "nothing")))
    with pytest.raises(EngineStartError, match="nothing"):
        await client.start()
    await client.stop()


@pytest.mark.slow
async def test_the_engine_leaves_when_its_front_end_dies(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "front.py"
    script.write_text(
        "import asyncio, sys\n"
        "from server.engine.client import EngineClient\n"
        "from server.engine.config import EngineConfig\n"
        "async def main():\n"
        "    client = EngineClient(EngineConfig(sys.argv[1], kv_memory=1 << 24, page_memory=1 << 22))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    python = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(tiny_model), stdout=asyncio.subprocess.PIPE
    )
    assert python.stdout is not None
    pid = int(await asyncio.wait_for(python.stdout.readline(), 60))
    python.kill()
    await python.wait()
    await until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    """Whether it is there and has not ended; an orphan may stay as a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
