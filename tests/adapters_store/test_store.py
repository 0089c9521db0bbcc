"""Names, leases, merges, sweeps and starts, in SQLite with local blobs and in PostgreSQL with S3."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from polling import until

from adapters_store.peft_format import read_adapter
from adapters_store.registry import NameTaken, NotFound, Quotas, Resolved
from adapters_store.store import AdapterStore, NewAdapter, StoreOpenError, UnknownAdapter
from adapters_store.types import AdapterError, AdapterLimits, LinearShape
from tests.adapters_store.stores import Stores, meaning, outcome

HOUR = 3600.0


class TestNames:
    async def test_a_tenants_own_name_hides_a_public_one(self, stores: Stores, store: AdapterStore) -> None:
        public = await stores.add(store, "shared", 1, public=True)
        private = await stores.add(store, "shared", 2, tenant="alice")
        await stores.add(store, "secret", 3, tenant="alice")
        assert (await meaning(store, "alice", "shared")).digest == private.adapter.adapter.digest
        assert (await meaning(store, "bob", "shared")).digest == public.adapter.adapter.digest
        assert set(await store.resolve("bob", ["shared", "secret", "sEcret"])) == {"shared"}
        rows = (await store.names.models("alice")).items
        assert [(row.tenant, row.name, row.public) for row in rows] == [
            ("alice", "secret", False),
            ("alice", "shared", False),
        ]
        assert rows[1].digest == private.adapter.adapter.digest
        assert [row.tenant for row in (await store.names.models("bob")).items] == ["default"]
        assert [each.name for each in (await store.names.list("alice", own=True)).items] == ["secret", "shared"]

    async def test_models_in_parts(self, stores: Stores, store: AdapterStore) -> None:
        for name in ("a", "b", "c"):
            await stores.add(store, name, 1, public=name == "b")
        page = await store.names.models("default", 2)
        assert ([row.name for row in page.items], page.next) == (["a", "b"], "b")
        page = await store.names.models("default", 2, page.next)
        assert ([row.name for row in page.items], page.next) == (["c"], None)
        assert [row.created for row in page.items] == [stores.clock.now]

    async def test_revisions_are_pinned_by_prefix(self, stores: Stores, store: AdapterStore) -> None:
        first = (await stores.add(store, "sql", 1)).adapter.adapter.digest
        second = (await stores.add(store, "sql", 2, replace=True)).adapter.adapter.digest
        names = [f"sql@{first[:8]}", f"sql@{second.upper()}", f"sql@{first[:3]}", "sql@", "sql@zzzz"]
        found = await store.resolve("default", names)
        assert {name: each.digest for name, each in found.items()} == {names[0]: first, names[1]: second}
        back = await store.names.roll_back("default", "sql", first)
        assert back.adapter.digest == first
        assert (await meaning(store, "default", "sql")).digest == first
        with pytest.raises(NotFound):
            await store.names.roll_back("default", "sql", "f" * 64)

    async def test_own_writes_are_seen_at_once_by_everybody(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        assert await store.resolve("bob", ["sql"]) == {}
        await store.names.update("default", "sql", public=True)
        assert (await meaning(store, "bob", "sql")).tenant == "default"
        await store.names.update("default", "sql", public=False)
        assert await store.resolve("bob", ["sql"]) == {}

    async def test_writes_of_other_processes_are_seen_after_a_second(self, stores: Stores) -> None:
        now = [0.0]
        store, other = stores.open(timer=lambda: now[0]), stores.open()
        assert await store.resolve("default", ["sql"]) == {}
        done = await stores.add(other, "sql", 1)
        assert await store.resolve("default", ["sql"]) == {}
        now[0] = 1.0
        assert (await meaning(store, "default", "sql")).digest == done.adapter.adapter.digest
        await other.delete("default", "sql")
        assert "sql" in await store.resolve("default", ["sql"])
        now[0] = 2.0
        assert await store.resolve("default", ["sql"]) == {}


class TestLeases:
    async def test_they_count(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "one", 1, public=True)
        await stores.add(store, "two", 2, tenant="alice")
        await stores.add(store, "same", 1, tenant="alice")
        found = await store.resolve("alice", ["one", "two", "same"])
        one, two, same = (found[name] for name in ("one", "two", "same"))
        assert one.digest == same.digest
        lease = await store.lease("alice", [one, two, same])
        other = await store.lease("bob", [one])
        assert set(lease.paths) == {one.digest, two.digest}
        assert lease.paths[one.digest] == other.paths[one.digest]
        assert [store.leases("alice", *key) for key in (("default", "one"), ("alice", "two"), ("alice", "same"))] == [
            1
        ] * 3
        assert (store.leases("bob", "default", "one"), store.leases("bob", "alice", "two")) == (1, 0)
        assert (store.digest_leases(one.digest), store.digest_leases(two.digest)) == (2, 1)
        store.check_integrity()
        store.release(lease)
        assert (store.leases("alice", "default", "one"), store.digest_leases(one.digest)) == (0, 1)
        with pytest.raises(RuntimeError, match="already"):
            store.release(lease)
        store.release(other)
        assert store.digest_leases(one.digest) == 0
        assert (await store.lease("bob", [])).paths == {}

    async def test_first_uses_at_once_share_one_fetch(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        await store.close()
        store, fetched = stores.open(), list[str]()
        fetch = store.blobs.fetch

        def counting(sha256: str, folder: Path, name: str | None = None) -> Path:
            fetched.append(sha256)
            return fetch(sha256, folder, name)

        store.blobs.fetch = counting  # type: ignore[method-assign]
        adapter = await meaning(store, "default", "sql")
        leases = await asyncio.gather(*(store.lease("default", [adapter]) for _ in range(20)))
        assert sorted(fetched) == sorted([adapter.config_blob, adapter.weights_blob])
        assert len({lease.paths[adapter.digest] for lease in leases}) == 1
        for lease in leases:
            store.release(lease)

    async def test_lost_blobs_are_an_unknown_adapter(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        adapter = await meaning(store, "default", "sql")
        gone = replace(adapter, digest="f" * 64, weights_blob="e" * 64)
        with pytest.raises(UnknownAdapter, match="'sql' does not exist"):
            await store.lease("default", [adapter, gone])
        assert store.digest_leases(adapter.digest) == 0
        store.check_integrity()

    async def test_without_fetching_only_the_name_is_kept(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        await store.close()
        store = stores.open()
        adapter = await meaning(store, "default", "sql")
        lease = await store.lease("default", [adapter], fetch=False)
        assert lease.paths == {adapter.digest: ""}
        assert store.digest_leases(adapter.digest) == store.leases("default", "default", "sql") == 1
        assert not list(stores.config.folder.glob("run-*/adapters/*"))
        assert not await store.delete("default", "sql")
        with pytest.raises(UnknownAdapter):
            await store.lease("default", [adapter], fetch=False)
        store.release(lease)
        await until(lambda: not store.digest_leases(adapter.digest))

    async def test_a_caller_that_leaves_holds_no_lease(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        await store.close()
        store = stores.open()
        adapter = await meaning(store, "default", "sql")
        task = asyncio.create_task(store.lease("default", [adapter]))
        await asyncio.sleep(0)
        assert store.digest_leases(adapter.digest) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.digest_leases(adapter.digest) == 0


class TestMerge:
    async def test_the_result_is_registered_with_its_recipe(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "a", 8, public=True)
        await stores.add(store, "b", 16, tenant="alice")
        done = await store.merge(NewAdapter("sum", "alice"), [("a", 0.5), ("b", 0.25)], "cat")
        digests = [(await meaning(store, "alice", name)).digest for name in ("a", "b")]
        adapters = [
            {"name": "a", "digest": digests[0], "weight": 0.5},
            {"name": "b", "digest": digests[1], "weight": 0.25},
        ]
        expected = {"method": "cat", "adapters": adapters, "rank": None, "density": None, "seed": None}
        named = await store.names.get("alice", "sum")
        assert named == done.adapter
        assert named.recipe == expected
        assert (named.description, named.adapter.rank, named.public) == ("cat merge of a (0.5), b (0.25)", 8, False)
        lease = await store.lease("alice", [await meaning(store, "alice", "sum")])
        merged = read_adapter(Path(lease.paths[named.adapter.digest]), stores.shape).weights.pairs[0, "q_proj"]
        # Both adapters have the same factors, with scales 8/4 and 16/4: 0.5 * 2 + 0.25 * 4 = 2 times their product.
        one = read_adapter(stores.write(8, "sources/8"), stores.shape).weights.pairs[0, "q_proj"]
        assert (merged.b @ merged.a * merged.scale).allclose(one.b @ one.a * 2.0, atol=1e-5)
        store.release(lease)
        assert store.leases("alice", "alice", "b") == 0

    async def test_errors(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "a", 8)
        with pytest.raises(UnknownAdapter, match="'b'"):
            await store.merge(NewAdapter("m"), [("a", 1.0), ("b", 1.0)], "cat")
        with pytest.raises(UnknownAdapter, match="'a'"):
            await store.merge(NewAdapter("m", "alice"), [("a", 1.0)], "cat")
        with pytest.raises(AdapterError, match="method is 'sum'"):
            await store.merge(NewAdapter("m"), [("a", 1.0)], "sum")
        with pytest.raises(NameTaken):
            await store.merge(NewAdapter("a"), [("a", 1.0)], "cat")
        assert store.leases("default", "default", "a") == 0

    async def test_names_of_one_adapter_count_once(self, stores: Stores, store: AdapterStore) -> None:
        for name in ("a", "copy", "other"):
            await stores.add(store, name, 16 if name == "other" else 8)
        done = await store.merge(NewAdapter("m"), [("a", 0.5), ("other", 1.0), ("copy", 0.25), ("a", 1.0)], "cat")
        assert [(each["name"], each["weight"]) for each in done.adapter.recipe["adapters"]] == [
            ("a", 1.75),
            ("other", 1.0),
        ]
        assert done.adapter.adapter.rank == 8
        with pytest.raises(AdapterError, match="weights of adapter 'a' add up to 0") as caught:
            await store.merge(NewAdapter("none"), [("a", 0.5), ("copy", -0.5), ("other", 1.0)], "cat")
        assert (caught.value.code, caught.value.status, caught.value.param) == ("invalid_merge", 400, "adapters")

    async def test_what_is_refused_is_refused_before_anything_is_read(
        self, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stores.config = replace(stores.config, limits=AdapterLimits(max_bytes=4000, max_rank=8))
        store = stores.open()
        for alpha, name in ((8, "a"), (9, "b"), (10, "c")):
            await stores.add(store, name, alpha)
        await stores.add(store, "own", 8, tenant="alice", public=True)
        size = (await store.names.get("alice", "own")).adapter.bytes
        monkeypatch.setattr("adapters_store.intake.mapped_weights", lambda *_: pytest.fail("it was read"))
        three = [("a", 1.0), ("b", 1.0), ("c", 1.0)]
        store.registry.accounts.update("alice", lambda row: replace(row, quotas=Quotas(bytes=size + 100)))
        cases: list[tuple[NewAdapter, Any, str, str, str | None]] = [
            (NewAdapter("a"), three[:1], "linear", "adapter_exists", None),
            (NewAdapter("own", "alice", replace=True, may_be_public=False), [("own", 1.0)], "cat", "forbidden", None),
            (NewAdapter("m", "nobody"), three, "cat", "tenant_not_found", None),
            (NewAdapter("m", "alice"), [("own", 1.0)], "cat", "quota_bytes", None),
            (NewAdapter("m"), three, "cat", "adapter_unsupported", None),
            (NewAdapter("m"), three, "svd", "adapter_unsupported", None),
            (NewAdapter("m"), three[:2], "cat", "adapter_too_large", None),
            (NewAdapter("m"), [*three[:2], ("c", 0.0)], "cat", "invalid_merge", "adapters.2.weight"),
        ]
        for new, entries, method, code, param in cases:
            error: Any = await outcome(store.merge(new, entries, method))
            assert (error.code, getattr(error, "param", None)) == (code, param), error
            assert param is None or "'c'" in error.message
        store.registry.accounts.update("alice", lambda row: replace(row, quotas=Quotas(adapters=1)))
        error = await outcome(store.merge(NewAdapter("m", "alice"), [("own", 1.0)], "cat"))
        assert error.code == "quota_adapters"


class TestSweep:
    async def test_orphans_go_after_the_grace(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        orphan = store.blobs.put_stream([b"of a process that was killed"])
        stores.clock.now += HOUR / 2
        assert await store.sweep(HOUR) == ()
        stores.clock.now += HOUR
        assert await store.sweep(HOUR) == (orphan.sha256,)
        adapter = await meaning(store, "default", "sql")
        assert store.blobs.exists(adapter.config_blob)
        assert store.blobs.exists(adapter.weights_blob)

    async def test_folders_of_adapters_that_others_deleted_go(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1)
        kept = (await stores.add(store, "kept", 2)).adapter.adapter.digest
        await until(lambda: len(store._folders.digests) == 2)
        digest, gone = (await meaning(store, "default", "sql")).digest, list[str]()
        store.on_gone.append(gone.append)
        await stores.open().delete("default", "sql")
        await store.sweep(HOUR)
        assert gone == [digest]
        assert store._folders.digests == (kept,)


class TestOpen:
    async def test_everything_survives(self, stores: Stores, store: AdapterStore) -> None:
        await stores.add(store, "sql", 1, tenant="alice", tags=("t",))
        before = await store.names.get("alice", "sql")
        await store.close()
        store = stores.open()
        assert await store.names.get("alice", "sql") == before
        lease = await store.lease("alice", [await meaning(store, "alice", "sql")])
        assert read_adapter(Path(lease.paths[before.adapter.digest]), stores.shape).digest == before.adapter.digest
        store.release(lease)

    async def test_another_base_model_is_refused(self, stores: Stores, store: AdapterStore) -> None:
        stores.shape = LinearShape(3, stores.shape.inputs, stores.shape.outputs)
        with pytest.raises(StoreOpenError, match="belongs to another base model: expected another --database-url"):
            stores.open()
        assert await store.count() == 0

    async def test_blobs_of_another_registry_are_refused(
        self, stores: Stores, store: AdapterStore, tmp_path: Path
    ) -> None:
        stores.config = replace(stores.config, database_url=f"sqlite:///{tmp_path / 'another.db'}")
        with pytest.raises(StoreOpenError, match="blob store belongs to another registry: expected another --blob-url"):
            stores.open()
        assert store.registry.referenced_blobs() == frozenset()

    @pytest.mark.parametrize("field", ["database_url", "blob_url"])
    async def test_urls_that_make_no_sense(self, stores: Stores, field: str) -> None:
        stores.config = replace(stores.config, **{field: "ftp://host/secret"})
        with pytest.raises(StoreOpenError, match="expected") as refused:
            stores.open()
        assert "secret" not in str(refused.value)

    async def test_staging_is_removed(self, store: AdapterStore) -> None:
        async with store.staging() as one:
            with store.staging() as other:
                assert one != other
                (one / "file").touch()
            assert not other.exists()
        assert not one.exists()


async def test_a_hit_takes_no_thread(stores: Stores, store: AdapterStore) -> None:
    await stores.add(store, "sql", 1)
    adapter: Resolved = await meaning(store, "default", "sql")
    store.release(await store.lease("default", [adapter]))

    def forbidden(*_: object) -> None:
        raise AssertionError("a thread was asked")

    store._workers.run = forbidden  # type: ignore[assignment, method-assign]
    for work in (store.resolve("default", ["sql"]), store.lease("default", [adapter])):
        with pytest.raises(StopIteration):  # the coroutine ends without waiting for anything
            work.send(None)
    del store._workers.run
    store.release(next(iter(store._leases._leases)))
