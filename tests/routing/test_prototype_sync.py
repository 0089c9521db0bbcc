"""Prototypes follow the registry: made, read, changed and removed, by this process and by others."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters_store.registry import (
    DEFAULT_TENANT,
    AdapterRow,
    Registry,
    RegistryUnavailable,
    TenantRow,
    source_of,
)
from routing.prototype_index import PrototypeIndex
from routing.prototype_sync import PrototypeSync
from tests.routing.prototype_world import ChosenEncoder, unit

ROW = AdapterRow("a" * 64, 8, 16.0, ("q_proj",), 2, 100, "b" * 64, "c" * 64)


class Process:
    """One process on the registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.encoder = ChosenEncoder(3)
        self.index = PrototypeIndex(3)
        store: Any = SimpleNamespace(registry=registry)
        self.sync = PrototypeSync(store, self.encoder, self.index)

    def add(self, name: str, *samples: str, tenant: str = DEFAULT_TENANT, **options: Any) -> None:
        self.registry.register(tenant, name, ROW, samples=samples, replace=True, **options)

    def found(self, tenant: str = DEFAULT_TENANT) -> list[str]:
        self.index.check_integrity()
        return sorted(hit.name for hit in self.index.search(tenant, unit(1, 1, 1)))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sync") / "template.db"
    registry = Registry.open(f"sqlite:///{path}", lambda: 1.0)
    registry.accounts.add(TenantRow("acme"))
    registry.close()
    return path


@pytest.fixture
def url(template: Path, tmp_path: Path) -> str:
    (tmp_path / "registry.db").write_bytes(template.read_bytes())
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def process(url: str) -> Iterator[Process]:
    registry = Registry.open(url, lambda: 1.0)
    yield Process(registry)
    registry.close()


@pytest.fixture
def other(url: str) -> Iterator[Process]:
    registry = Registry.open(url, lambda: 1.0)
    yield Process(registry)
    registry.close()


class Gated(ChosenEncoder):
    """Answers when the gate is open."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = asyncio.Event()

    async def embed(self, texts: Sequence[str], *, tenant: str = "", bulk: bool = False) -> NDArray[np.float32]:
        found = await super().embed(texts, tenant=tenant, bulk=bulk)
        await self.gate.wait()
        return found

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(60):
            while len(self.asked) < times:
                await asyncio.sleep(0.005)


class TestEnsure:
    async def test_a_tenant_that_floods_delays_the_others_by_a_few_names_only(self, process: Process) -> None:
        encoder = process.encoder = Gated(3)
        store: Any = SimpleNamespace(registry=process.registry)
        process.sync = PrototypeSync(store, encoder, process.index)
        flood = [f"a{number:02}" for number in range(12)]
        for name in flood:
            process.add(name, "1,0,0", tenant="acme")
        process.add("sql", "0,1,0")
        asked = [asyncio.create_task(process.sync.ensure("acme", name)) for name in flood]
        await encoder.until_asked(4)
        asked.append(asyncio.create_task(process.sync.ensure(DEFAULT_TENANT, "sql")))
        await encoder.until_asked(5)
        assert encoder.asked == [["1,0,0"]] * 4 + [["0,1,0"]]
        encoder.gate.set()
        assert all(await asyncio.gather(*asked))
        assert process.found("acme") == flood
        assert len(encoder.asked) == 13

    async def test_a_registered_name_is_found_at_once(self, process: Process) -> None:
        process.add("sql", "1,0,0", "0,1,0")
        assert await process.sync.ensure(DEFAULT_TENANT, "sql")
        (hit,) = process.index.search(DEFAULT_TENANT, unit(1, 1, 0))
        assert hit == ("default", "sql", pytest.approx(1.0, abs=1e-6))
        assert process.index.search("acme", unit(1, 1, 0)) == []
        row = process.registry.prototypes.get(DEFAULT_TENANT, "sql", "chosen")
        assert row is not None
        assert (row.count, row.width, row.source) == (1, 3, source_of(("1,0,0", "0,1,0")))
        np.testing.assert_allclose(np.frombuffer(row.vectors, "<f4"), unit(1, 1, 0), atol=1e-6)

    async def test_nothing_is_embedded_twice(self, process: Process) -> None:
        process.add("sql", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert await process.sync.ensure(DEFAULT_TENANT, "sql")
        await process.sync.refresh()
        assert await process.sync.embed_missing()
        assert process.encoder.asked == [["1,0,0"]]

    async def test_other_texts_replace_the_prototypes(self, process: Process) -> None:
        process.add("sql", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        process.registry.update(DEFAULT_TENANT, "sql", samples=["0,0,1"])
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert process.index.search(DEFAULT_TENANT, unit(0, 0, 1))[0].score == 1.0
        process.registry.update(DEFAULT_TENANT, "sql", samples=[], description="0,1,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert process.index.search(DEFAULT_TENANT, unit(0, 1, 0))[0].score == 1.0
        process.registry.update(DEFAULT_TENANT, "sql", description="")
        assert not await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert process.found() == []
        assert process.registry.prototypes.count("chosen") == 0

    async def test_who_may_use_it_follows(self, process: Process) -> None:
        process.add("sql", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        process.registry.update(DEFAULT_TENANT, "sql", public=True)
        assert await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert process.found("acme") == ["sql"]
        process.registry.update(DEFAULT_TENANT, "sql", public=False)
        await process.sync.refresh()
        assert process.found("acme") == []

    async def test_names_that_cannot_be_found(self, process: Process) -> None:
        assert not await process.sync.ensure(DEFAULT_TENANT, "none")
        process.add("silent")
        assert not await process.sync.ensure(DEFAULT_TENANT, "silent")
        assert process.encoder.asked == []

    async def test_a_failing_encoder_is_tried_again_later(
        self, process: Process, caplog: pytest.LogCaptureFixture
    ) -> None:
        process.add("sql", "1,0,0")
        process.encoder.failure = "the encoder does not start"
        assert not await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert "'sql' of tenant 'default' has no prototypes yet: the encoder does not start" in caplog.text
        assert not await process.sync.embed_missing()
        process.encoder.failure = None
        assert await process.sync.embed_missing()
        assert process.found() == ["sql"]

    async def test_a_failing_registry_fails_no_registration(
        self, process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_arguments: object) -> None:
            raise RegistryUnavailable("its disk is full")

        process.add("sql", "1,0,0")
        monkeypatch.setattr(process.registry.prototypes, "put_many", fail)
        assert not await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert "its disk is full" in caplog.text

    async def test_a_name_deleted_meanwhile_stays_away(self, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        process.add("sql", "1,0,0")
        embed = process.encoder.embed

        async def delete_first(texts: list[str], *, bulk: bool = False) -> Any:
            process.registry.removals.remove(DEFAULT_TENANT, "sql")
            return await embed(texts, bulk=bulk)

        monkeypatch.setattr(process.encoder, "embed", delete_first)
        assert not await process.sync.ensure(DEFAULT_TENANT, "sql")
        assert process.found() == []


class TestMissing:
    async def test_all_are_made_in_parts(self, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("routing.prototype_sync._TEXTS", 5)
        monkeypatch.setattr("routing.prototype_sync._PAGE", 4)
        for number in range(9):
            process.add(f"n{number}", f"1,{number},0", f"0,{number},1")
        process.add("long", *["1,1,1"] * 12)
        process.add("described", description="1,0,0", tenant="acme")
        process.add("silent")
        assert await process.sync.embed_missing()
        assert process.found() == ["long", *(f"n{number}" for number in range(9))]
        assert process.found("acme") == ["described"]
        assert max(map(len, process.encoder.asked)) == 12
        assert sorted(map(len, process.encoder.asked))[-2] <= 5
        assert sum(map(len, process.encoder.asked)) == 9 * 2 + 12 + 1

    async def test_another_encoder_gets_its_own(self, process: Process, other: Process) -> None:
        process.add("sql", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        other.encoder.id = "trained"
        await other.sync.refresh()
        assert other.found() == []
        assert await other.sync.embed_missing()
        assert other.found() == ["sql"]
        assert [process.registry.prototypes.count(each) for each in ("chosen", "trained")] == [1, 1]


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
