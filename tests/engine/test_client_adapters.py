"""Adapters of an engine in its own process: pinned, prefetched, evicted, and where they are, also after it died."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from polling import until

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.config import RequestError
from server.engine.sequence import FinishReason, Request
from server.model.config import ModelConfig
from tests.engine.engine_client import LONG, SHORT, begun, collect, is_idle, small_config, started

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def living(endless_model: Path) -> AsyncIterator[EngineClient]:
    """One for all tests that neither kill it nor count what it has done."""
    async with started(small_config(endless_model)) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(living: EngineClient) -> AsyncIterator[EngineClient]:
    """It has no adapters, before and after."""
    yield living
    living.on_stats = living.on_residency = None
    await until(lambda: is_idle(living))
    for digest in list(living.residency):
        living.evict(digest)
    await until(lambda: not living.residency)


@pytest_asyncio.fixture(loop_scope="module")
async def own_client(endless_model: Path) -> AsyncIterator[EngineClient]:
    """One of the test's own."""
    async with started(small_config(endless_model)) as client:
        yield client


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
    own_client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    reads: list[float] = []
    own_client.on_stats = lambda stats: reads.extend(stats.adapter_reads)
    own_client.prefetch({digests[name]: str(folder) for name, folder in adapters.items()})
    await until(lambda: own_client.residency == dict.fromkeys(digests.values(), "host"))
    await until(lambda: own_client.stats.adapters_host == len(reads) == 4)


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


async def test_pins_survive_an_engine(
    own_client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    """And nothing else does: the new engine knows of no other adapter."""
    told: list[tuple[str, str]] = []
    pinned, other = digests["all4"], digests["qv16"]
    assert await own_client.pin(pinned, str(adapters["all4"]))
    assert await own_client.pin(other, str(adapters["qv16"]))
    await until(lambda: own_client.residency == {pinned: "device", other: "device"})
    own_client.unpin(other)
    own_client.on_residency = lambda digest, tier: told.append((digest, tier))
    stuck = await begun(own_client, replace(ask("r", pinned, adapters["all4"]), params=LONG))
    assert own_client.pid is not None
    os.kill(own_client.pid, signal.SIGKILL)
    assert (await stuck)[-1].finish_reason is FinishReason.ERROR
    assert own_client.residency == {}
    assert sorted(told) == sorted([(pinned, "disk"), (other, "disk")])
    with pytest.raises(EngineUnavailable):
        await own_client.pin(other, str(adapters["qv16"]))
    with pytest.raises(EngineUnavailable):
        await own_client.prefetch_now(other, str(adapters["qv16"]))
    own_client.evict(other)
    own_client.unpin(other)
    await until(lambda: own_client.alive and own_client.residency == {pinned: "device"})


async def test_a_call_under_way_when_the_engine_dies_is_answered(
    own_client: EngineClient, adapters: dict[str, Path], digests: dict[str, str]
) -> None:
    assert own_client.pid is not None
    os.kill(own_client.pid, signal.SIGSTOP)
    task = asyncio.create_task(own_client.pin(digests["all4"], str(adapters["all4"])))
    await asyncio.sleep(0.05)
    os.kill(own_client.pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(task, 60)
