"""Adapters of an engine in its own process: pinned, prefetched, evicted, and where they are, also after it died."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.config import RequestError
from server.engine.sequence import FinishReason, Request
from server.model.config import ModelConfig
from tests.engine.test_client import LONG, SHORT, collect, small_config, until


@pytest_asyncio.fixture
async def client(tiny_model: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(small_config(tiny_model))
    await client.start()
    yield client
    await client.stop()


@pytest.fixture(scope="module")
def digests(tiny_model: Path, adapters: dict[str, Path]) -> dict[str, str]:
    shape = ModelConfig.from_folder(tiny_model).linear_shape
    return {name: read_adapter(folder, shape).digest for name, folder in adapters.items()}


def ask(name: str, digest: str, folder: Path) -> Request:
    return Request(name, (5, 6, 7), SHORT, Mix.of([(digest, 1.0)]), {digest: str(folder)}, name.encode())


async def test_residency_follows_what_happens(
    client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    told: list[tuple[str, str]] = []
    client.on_residency = lambda digest, tier: told.append((digest, tier))
    digest = digests["all4"]
    assert (await collect(client, ask("r", digest, adapters["all4"])))[-1].finish_reason is FinishReason.LENGTH
    assert client.residency == {digest: "device"}
    assert told in ([(digest, "host"), (digest, "device")], [(digest, "device")])
    assert await client.prefetch_now(digests["qv16"], str(adapters["qv16"])) == "device"
    assert client.residency[digests["qv16"]] == "device"
    client.evict(digest)
    await until(lambda: digest not in client.residency)
    assert told[-1] == (digest, "disk")
    assert (await collect(client, ask("again", digest, adapters["all4"])))[-1].finish_reason is FinishReason.LENGTH


async def test_reading_ahead_reaches_host_memory_and_is_counted(
    client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    reads: list[float] = []
    client.on_stats = lambda stats: reads.extend(stats.adapter_reads)
    client.prefetch({digests[name]: str(folder) for name, folder in adapters.items()})
    await until(lambda: client.residency == dict.fromkeys(digests.values(), "host"))
    await until(lambda: client.stats.adapters_host == len(reads) == 4)


async def test_pins_end_with_unpin(client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]) -> None:
    digest, path = digests["wide24"], str(adapters["wide24"])
    assert await client.pin(digest, path)
    assert await client.pin(digest, path)
    await until(lambda: client.residency.get(digest) == "device" and client.stats.pages["used"] > 0)
    client.unpin(digest)
    await until(lambda: client.stats.pages["used"] == 0)


async def test_what_cannot_be_read_is_said(client: EngineClient, tmp_path: Path) -> None:
    for call in (client.pin, client.prefetch_now):
        with pytest.raises(RequestError, match="is missing") as refused:
            await call("ab" * 32, str(tmp_path))
        assert refused.value.code == "adapter_unavailable"


async def test_a_pin_that_nobody_waits_for_any_more_is_undone(
    client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    task = asyncio.create_task(client.pin(digests["all4"], str(adapters["all4"])))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.prefetch_now(digests["all4"], str(adapters["all4"])) == "device"
    await until(lambda: client.stats.pages.get("cached", 0) > 0 and client.stats.pages["used"] == 0)


async def test_pins_survive_an_engine(client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]) -> None:
    """And nothing else does: the new engine knows of no other adapter."""
    told: list[tuple[str, str]] = []
    pinned, other = digests["all4"], digests["qv16"]
    assert await client.pin(pinned, str(adapters["all4"]))
    assert await client.pin(other, str(adapters["qv16"]))
    await until(lambda: client.residency == {pinned: "device", other: "device"})
    client.unpin(other)
    client.on_residency = lambda digest, tier: told.append((digest, tier))
    stuck = asyncio.create_task(collect(client, replace(ask("r", pinned, adapters["all4"]), params=LONG)))
    await until(lambda: client.stats.running == 1)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    assert (await stuck)[-1].finish_reason is FinishReason.ERROR
    assert client.residency == {}
    assert sorted(told) == sorted([(pinned, "disk"), (other, "disk")])
    with pytest.raises(EngineUnavailable):
        await client.pin(other, str(adapters["qv16"]))
    with pytest.raises(EngineUnavailable):
        await client.prefetch_now(other, str(adapters["qv16"]))
    client.evict(other)
    client.unpin(other)
    await until(lambda: client.alive and client.residency == {pinned: "device"})


async def test_a_call_under_way_when_the_engine_dies_is_answered(
    client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    task = asyncio.create_task(client.pin(digests["all4"], str(adapters["all4"])))
    await asyncio.sleep(0.05)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(task, 60)
