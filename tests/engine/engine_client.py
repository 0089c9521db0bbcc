"""What tests of an engine in a process of its own share: how it is started, asked and waited for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.sequence import Output, Request, SamplingParams

ENDLESS = 20_000
"""Tokens that the model of these tests may have in a sequence. The engine has room for one of them."""
LONG = SamplingParams(temperature=0.0, max_tokens=ENDLESS - 200, ignore_eos=True)
SHORT = replace(LONG, max_tokens=8)


def small_config(model: Path) -> EngineConfig:
    return EngineConfig(str(model), kv_memory=1 << 24, page_memory=1 << 22, device="cpu", num_threads=1)


@asynccontextmanager
async def started(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = EngineClient(config)
    await client.start()
    yield client
    await client.stop()
    assert client.pid is None


async def collect(client: EngineClient, request: Request) -> list[Output]:
    return [output async for output in client.submit(request)]


async def begun(client: EngineClient, request: Request) -> "asyncio.Task[list[Output]]":
    """Its outputs; returns at the first of them, since a short request may run between two snapshots of the engine."""
    first = asyncio.Event()

    async def read() -> list[Output]:
        outputs = []
        try:
            async for output in client.submit(request):
                outputs.append(output)
                first.set()
        finally:
            first.set()
        return outputs

    task = asyncio.create_task(read())
    await asyncio.wait_for(first.wait(), 60)
    return task


def is_idle(client: EngineClient) -> bool:
    """Whether it has no request, and no adapter in use."""
    stats = client.stats
    return (stats.running, stats.waiting, stats.kv_used_blocks, stats.pages.get("used", 0)) == (0, 0, 0, 0)
