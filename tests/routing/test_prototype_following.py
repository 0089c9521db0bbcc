"""Prototypes that other processes have made, changed or removed, and those that nobody has made yet."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from adapters_store.registry import DEFAULT_TENANT, RegistryUnavailable, source_of
from tests.routing.prototype_process import Process
from tests.routing.prototype_world import unit

NO_MACHINE_HAS = 1 << 50
"""Bytes of a stack, more than there are addresses: the system starts no thread with it."""


class TestRefresh:
    async def test_what_others_do_is_seen(self, process: Process, other: Process) -> None:
        for name in "abc":
            process.add(name, "1,0,0", public=name == "a")
            await process.sync.ensure(DEFAULT_TENANT, name)
        await other.sync.refresh()
        assert (other.found(), other.found("acme")) == (["a", "b", "c"], ["a"])
        process.registry.update(DEFAULT_TENANT, "b", public=True)
        process.registry.update(DEFAULT_TENANT, "c", samples=["0,1,0"])
        await process.sync.ensure(DEFAULT_TENANT, "c")
        process.registry.removals.mark(DEFAULT_TENANT, "a")
        await other.sync.refresh()
        assert (other.found(), other.found("acme")) == (["b", "c"], ["b"])
        assert other.index.search(DEFAULT_TENANT, unit(0, 1, 0))[0][:2] == ("default", "c")
        process.registry.removals.mark(DEFAULT_TENANT, "a", deleting=False)
        process.registry.removals.remove(DEFAULT_TENANT, "b")
        await other.sync.refresh()
        assert other.found() == ["a", "c"]
        assert other.encoder.asked == []

    async def test_removed_and_added_at_once(self, process: Process, other: Process) -> None:
        for name in ("old", "same"):
            process.add(name, "1,0,0")
            await process.sync.ensure(DEFAULT_TENANT, name)
        await other.sync.refresh()
        for name in ("old", "same"):
            process.registry.removals.remove(DEFAULT_TENANT, name)
            process.sync.forget(DEFAULT_TENANT, name)
        for name in ("new", "same"):
            process.add(name, "0,1,0")
            await process.sync.ensure(DEFAULT_TENANT, name)
        await other.sync.refresh()
        assert process.found() == other.found() == ["new", "same"]
        assert all(hit.score == 1.0 for hit in other.index.search(DEFAULT_TENANT, unit(0, 1, 0)))

    async def test_nothing_is_read_when_nothing_has_changed(
        self, process: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process.add("a", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "a")
        await process.sync.refresh()
        monkeypatch.delattr(type(process.registry.prototypes), "changed")
        await process.sync.refresh()
        assert process.found() == ["a"]

    async def test_more_than_a_page(self, process: Process, other: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("routing.prototype_sync._PAGE", 3)
        for number in range(10):
            process.add(f"n{number}", "1,0,0")
        await process.sync.embed_missing()
        await asyncio.gather(*(other.sync.refresh() for _ in range(3)))
        assert len(other.found()) == 10

    async def test_prototypes_of_another_width_are_not_used(
        self, process: Process, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("wide", "good", "rotten"):
            process.add(name, "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "good")
        await process.sync.ensure(DEFAULT_TENANT, "wide")
        source = source_of(("1,0,0",))
        prototypes = process.registry.prototypes
        prototypes.put(DEFAULT_TENANT, "wide", "chosen", source, bytes(16), 1, 4)
        rotten = np.full(3, np.nan, "<f4").tobytes()
        prototypes.put(DEFAULT_TENANT, "rotten", "chosen", source, rotten, 1, 3)
        await process.sync.refresh()
        assert process.found() == ["good"]
        assert "'wide' of tenant 'default' cannot be routed to" in caplog.text
        assert "'rotten' are not finite" in caplog.text


class TestRun:
    async def test_it_reads_and_makes_what_is_missing(self, process: Process, other: Process) -> None:
        """A fake clock: each sleep is a turn."""
        turns: list[float] = []
        process.add("sql", "1,0,0")
        other.encoder.failure = "not yet"

        async def sleep(seconds: float) -> None:
            turns.append(seconds)
            if len(turns) == 6:
                other.encoder.failure = None
            if len(turns) == 10:
                process.add("new", "0,1,0")
                await process.sync.ensure(DEFAULT_TENANT, "new")
            if len(turns) == 12:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await other.sync.run(1.0, sleep)
        assert turns == [1.0] * 12
        assert other.found() == ["new", "sql"]
        assert len(other.encoder.asked) == 4, "tried after 0, 1, 3 and 7 seconds"

    async def test_what_a_registration_could_not_make_is_made_later(self, process: Process) -> None:
        turns: list[float] = []

        async def sleep(seconds: float) -> None:
            turns.append(seconds)
            if len(turns) == 5:
                process.encoder.failure = "away"
                process.add("sql", "1,0,0")
                assert not await process.sync.ensure(DEFAULT_TENANT, "sql")
                process.encoder.failure = None
            if len(turns) == 6:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await process.sync.run(1.0, sleep)
        assert process.found() == ["sql"]

    async def test_a_failing_registry_does_not_end_it(
        self, process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        turns: list[float] = []
        process.add("sql", "1,0,0")
        missing = process.registry.prototypes.missing

        def fail_first(*arguments: Any) -> Any:
            if len(turns) < 2:
                raise RegistryUnavailable("its database does not answer")
            return missing(*arguments)

        async def sleep(seconds: float) -> None:
            turns.append(seconds)
            if len(turns) == 8:
                raise asyncio.CancelledError

        monkeypatch.setattr(process.registry.prototypes, "missing", fail_first)
        with pytest.raises(asyncio.CancelledError):
            await process.sync.run(1.0, sleep)
        assert "prototypes cannot be read: the registry is unavailable" in caplog.text
        assert process.found() == ["sql"]

    async def test_a_system_without_threads_does_not_end_it(
        self, process: Process, caplog: pytest.LogCaptureFixture
    ) -> None:
        turns: list[float] = []
        process.add("sql", "1,0,0")
        usual = threading.stack_size(NO_MACHINE_HAS)

        async def sleep(seconds: float) -> None:
            turns.append(seconds)
            if len(turns) == 2:
                process.add("new", "0,1,0")
                assert not await process.sync.ensure(DEFAULT_TENANT, "new")
                threading.stack_size(usual)
            if len(turns) == 8:
                raise asyncio.CancelledError

        try:
            with pytest.raises(asyncio.CancelledError):
                await process.sync.run(1.0, sleep)
        finally:
            threading.stack_size(usual)
        assert process.found() == ["new", "sql"]
        assert caplog.text.count("prototypes are read later") == 2
        assert "'new' of tenant 'default' has no prototypes yet: can't start new thread" in caplog.text
