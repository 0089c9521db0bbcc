"""Prototypes of a registry's names are made once, and again when their texts change."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters_store.registry import DEFAULT_TENANT, RegistryUnavailable, source_of
from routing.prototype_sync import PrototypeSync
from tests.routing.prototype_process import Process
from tests.routing.prototype_world import ChosenEncoder, unit


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

    async def test_what_somebody_gave_up_waiting_for_is_made_later(self, process: Process) -> None:
        encoder, store = Gated(3), SimpleNamespace(registry=process.registry)
        process.sync = PrototypeSync(store, encoder, process.index)  # type: ignore[arg-type]
        process.add("sql", "1,0,0")
        waiting = asyncio.create_task(process.sync.embed_missing())
        await encoder.until_asked(1)
        waiting.cancel()
        await asyncio.wait((waiting,))
        encoder.gate.set()

        async def stop(_: float) -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await process.sync.run(1.0, stop)
        assert process.found() == ["sql"]

    async def test_another_encoder_gets_its_own(self, process: Process, other: Process) -> None:
        process.add("sql", "1,0,0")
        await process.sync.ensure(DEFAULT_TENANT, "sql")
        other.encoder.id = "trained"
        await other.sync.refresh()
        assert other.found() == []
        assert await other.sync.embed_missing()
        assert other.found() == ["sql"]
        assert [process.registry.prototypes.count(each) for each in ("chosen", "trained")] == [1, 1]
