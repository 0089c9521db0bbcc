"""Deletion: of unused names, of names in use, given up half way, beside other processes."""

import asyncio
import os
from pathlib import Path

import pytest
from polling import until

from adapters_store.leases import NOBODY, StoreLease
from adapters_store.neighbours import Neighbours
from adapters_store.peft_format import read_adapter
from adapters_store.registry import BeingDeleted, NotFound, RegistryUnavailable
from adapters_store.store import AdapterInUse, AdapterStore, UnknownAdapter
from tests.adapters_store.stores import Stores, meaning

HOUR = 3600.0


class Beside(Neighbours):
    """Another front end of the same server."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    async def uses(self, owner: str, name: str) -> int:
        return self._store.uses(owner, name)

    async def idle(self, owner: str, name: str) -> None:
        await self._store.idle(owner, name)


class TestDelete:
    async def test_an_unused_name_is_gone_at_once(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        await stores.add(store, "copy", 1)
        digest = (await stores.add(store, "sql", 2, replace=True)).adapter.adapter.digest
        gone: list[str] = []
        store.on_gone.append(gone.append)
        await until(lambda: digest in store._folders.digests)
        assert await store.delete("default", "sql") is True
        assert gone == [digest]
        assert digest not in store._folders.digests
        assert set(await store.resolve("default", ["sql", "copy"])) == {"copy"}
        with pytest.raises(NotFound):
            await store.names.get("default", "sql")
        with pytest.raises(NotFound):
            await store.delete("default", "sql")
        assert await stores.add(store, "sql", 2)

    async def test_a_used_name_drains(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1, public=True)
        adapter = await meaning(store, "alice", "sql")
        lease = await store.lease("alice", [adapter])
        gone: list[str] = []
        store.on_gone.append(gone.append)
        assert await store.delete("default", "sql") is False
        assert await store.resolve("alice", ["sql"]) == {}
        assert (await store.names.models("default")).items == ()
        with pytest.raises(UnknownAdapter):
            await store.lease("bob", [adapter])
        with pytest.raises(BeingDeleted, match="is being deleted"):
            await stores.add(store, "sql", 2)
        assert read_adapter(Path(lease.paths[adapter.digest]), stores.shape).digest == adapter.digest
        assert await store.delete("default", "sql", wait=True, timeout=0.01) is False
        assert gone == []
        waiting = asyncio.create_task(store.delete("default", "sql", wait=True))
        await asyncio.sleep(0.01)
        store.release(lease)
        assert await waiting is True
        assert gone == [adapter.digest]
        assert not os.path.exists(lease.paths[adapter.digest])
        assert await stores.add(store, "sql", 2)

    async def test_who_does_not_want_to_wait_is_refused(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        lease = await store.lease("default", [await meaning(store, "default", "sql")])
        with pytest.raises(AdapterInUse, match="'sql' is in use by 1 request:") as refused:
            await store.delete("default", "sql", wait=False)
        assert (refused.value.code, refused.value.status) == ("adapter_in_use", 409)
        assert "sql" in await store.resolve("default", ["sql"])
        store.release(lease)
        assert await store.delete("default", "sql", wait=False) is True

    async def test_a_request_that_is_faster_keeps_the_name(self, stores: Stores, store: AdapterStore) -> None:
        """It gets its lease while the name is being marked."""
        await stores.add(store, "sql", 1)
        adapter = await meaning(store, "default", "sql")
        deleting = asyncio.create_task(store.delete("default", "sql", wait=False))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lease = await store.lease("default", [adapter])
        with pytest.raises(AdapterInUse):
            await deleting
        assert (await meaning(store, "default", "sql")) == adapter
        store.release(lease)

    async def test_a_name_that_could_not_be_shown_again_at_once(
        self, stores: Stores, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A request is faster, and the registry fails just then: once it answers, everything is as before."""
        monkeypatch.setattr("adapters_store.deletion._RETRY_SECONDS", 0.01)
        await stores.add(store, "sql", 1)
        adapter = await meaning(store, "default", "sql")
        real, loop, tries = store.registry.removals.mark, asyncio.get_running_loop(), []
        leases: list[StoreLease] = []

        def mark(tenant: str, name: str, deleting: bool = True) -> tuple[str, ...]:
            if not deleting:
                tries.append(name)
                if len(tries) < 4:
                    raise RegistryUnavailable("lost")
            elif not leases:
                leases.append(asyncio.run_coroutine_threadsafe(store.lease("default", [adapter]), loop).result())
            return real(tenant, name, deleting)

        monkeypatch.setattr(store.registry.removals, "mark", mark)
        with pytest.raises(AdapterInUse):
            await store.delete("default", "sql", wait=False)
        assert store.registry.removals.marked() == (("default", "sql"),)
        await until(lambda: not store._deletions._reopening)
        assert len(tries) == 4
        assert store.registry.removals.marked() == ()
        assert (await meaning(store, "default", "sql")) == adapter
        store.release(leases[0])
        assert await store.delete("default", "sql", wait=False) is True

    async def test_what_fails_is_no_deletion_and_may_be_tried_again(
        self, stores: Stores, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ValueError("a bug")

        await stores.add(store, "sql", 1)
        with monkeypatch.context() as patch:
            patch.setattr(store.registry.removals, "remove", fail)
            with pytest.raises(ValueError, match="a bug"):
                await store.delete("default", "sql")
        assert store.registry.removals.marked() == (("default", "sql"),)
        assert await store.delete("default", "sql") is True
        assert store.registry.removals.marked() == ()

    async def test_a_deletion_of_a_hidden_name_goes_on(self, stores: Stores, store: AdapterStore) -> None:
        """As if its showing again had never succeeded, or another process had hidden it and been killed."""
        await stores.add(store, "sql", 1)
        store.registry.removals.mark("default", "sql")
        assert await store.delete("default", "sql") is True
        assert store.registry.removals.marked() == ()
        assert await stores.add(store, "sql", 2)

    async def test_a_caller_that_leaves_does_not_stop_it(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        task = asyncio.create_task(store.delete("default", "sql", wait=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not store._workers._tasks and not store._deletions._draining)
        assert store.registry.removals.marked() == ()
        with pytest.raises(NotFound):
            await store.names.get("default", "sql")

    async def test_it_is_finished_at_the_next_start(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        await stores.add(store, "other", 2)
        await store.lease("default", [await meaning(store, "default", "sql")])
        assert await store.delete("default", "sql") is False
        await store.close()
        store = stores.open()
        assert store.registry.removals.marked() == ()
        assert [row.name for row in (await store.names.models("default")).items] == ["other"]
        assert await store.count() == 1

    async def test_another_process_keeps_what_it_uses(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        other = stores.open()
        adapter = await meaning(other, "default", "sql")
        lease = await other.lease("default", [adapter])
        assert await store.delete("default", "sql") is True
        stores.clock.now += 2 * HOUR
        assert len(await store.sweep(HOUR)) == 2
        assert read_adapter(Path(lease.paths[adapter.digest]), stores.shape).digest == adapter.digest
        await other.sweep(HOUR)
        assert other._folders.digests == (adapter.digest,)
        other.release(lease)
        await other.sweep(HOUR)
        assert other._folders.digests == ()

    async def test_a_pin_of_another_front_end_is_no_use(self, stores: Stores, store: AdapterStore) -> None:
        """It goes as soon as that one sees that the name is hidden; a request there is waited for, or refused."""
        await stores.add(store, "sql", 1)
        other = stores.open(is_first=False)
        store.share_with(Beside(other))
        pin, lease = [await other.lease(who, [await meaning(other, "default", "sql")]) for who in (NOBODY, "default")]
        with pytest.raises(AdapterInUse, match="by 1 request:"):
            await store.delete("default", "sql", wait=False)
        other.release(lease)
        deleting = asyncio.create_task(store.delete("default", "sql", wait=False))
        await until(lambda: store.is_deleting("default", "sql"))
        assert not deleting.done()
        other.release(pin)
        assert await deleting is True

    async def test_a_new_adapter_of_the_name_is_not_removed_in_its_place(
        self, stores: Stores, store: AdapterStore
    ) -> None:
        """As if the end of one deletion, and a registration, had come between the two halves of another deletion."""
        await stores.add(store, "sql", 1)
        await store._deletions.finish("default", "sql")
        assert "sql" in await store.resolve("default", ["sql"])
