"""What a server does beside its requests."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.blobs import BlobUnavailable
from adapters_store.registry import RegistryUnavailable
from server import opening


async def test_a_database_that_is_away_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted, swept = asyncio.Event(), asyncio.Event()
    failures: list[Exception] = [RegistryUnavailable("its database does not answer"), BlobUnavailable("no room")]

    async def nothing() -> None: ...

    async def count() -> int:
        if counts:
            raise counts.pop()
        return 3

    async def sweep(_: float) -> tuple[str, ...]:
        if sweeps:
            raise sweeps.pop()
        swept.set()
        return ()

    def registered(number: int) -> None:
        assert number == 3
        counted.set()

    counts, sweeps = failures[:1], list(failures)
    for name in ("COUNT_SECONDS", "SWEEP_SECONDS"):
        monkeypatch.setattr(opening, name, 0.0)
    services: Any = SimpleNamespace(
        store=SimpleNamespace(count=count, sweep=sweep),
        metrics=SimpleNamespace(registered=registered),
        routers=SimpleNamespace(refresh=nothing),
    )
    async with opening.upkeep(services), asyncio.timeout(60):
        await counted.wait()
        await swept.wait()
    assert {(record.levelno, record.exc_info) for record in caplog.records} == {(logging.WARNING, None)}
    assert {record.getMessage() for record in caplog.records} == {
        "adapters are not counted: the registry is unavailable: its database does not answer",
        "files that nothing needs stay for now: the registry is unavailable: its database does not answer",
        "files that nothing needs stay for now: no room",
    }
