"""Registration: one adapter, a folder of them, many at once."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from polling import until
from safetensors.torch import load_file, save_file

from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapters_store.registry import NameTaken, NotFound, NotPermitted, Outcome, QuotaExceeded, Quotas
from adapters_store.store import AdapterStore, NewAdapter
from adapters_store.types import AdapterError, AdapterLimits
from tests.adapters_store.damage import change
from tests.adapters_store.stores import Stores, meaning, outcome


class TestRegister:
    async def test_what_is_registered_is_read_back(self, stores: Stores, store: AdapterStore) -> None:
        folder = stores.write(8, "source")
        (folder / "README.md").write_text("Translates to SQL.\n")
        done = await store.register(folder, NewAdapter("sql", tags=("b", "a"), samples=("hello",)))
        file = read_adapter(folder, stores.shape)
        named = done.adapter
        assert done.outcome is Outcome.CREATED
        assert (named.tenant, named.name, named.public, named.pinned) == ("default", "sql", False, False)
        assert (named.description, named.tags, named.recipe) == ("Translates to SQL.", ("a", "b"), None)
        row = named.adapter
        assert (row.digest, row.rank, row.alpha, row.modules) == (file.digest, 4, 8.0, 4)
        assert (row.targets, row.warnings) == (("down_proj", "q_proj"), ())
        assert await store.names.get("default", "sql") == named
        lease = await store.lease("default", [await meaning(store, "default", "sql")])
        assert read_adapter(Path(lease.paths[file.digest]), stores.shape).digest == file.digest
        assert row.bytes == sum(path.stat().st_size for path in Path(lease.paths[file.digest]).iterdir())
        store.release(lease)

    async def test_another_base_model_is_a_warning(self, stores: Stores, store: AdapterStore) -> None:
        folder = stores.write(8, "source")
        config = (folder / "adapter_config.json").read_text()
        for name, warned in (("hub/Base-Model", 0), ("other/model-7b", 1)):
            (folder / "adapter_config.json").write_text(config[:-1] + f', "base_model_name_or_path": "{name}"}}')
            file = read_adapter(folder, stores.shape)
            warnings = store._intake._warnings(file)
            assert len(warnings) == warned
        assert "'model-7b'" in warnings[0]

    @pytest.mark.parametrize("name", ["auto", "base-model", "-x", "a b", "a@b", "auto:retriever", "ü", "x" * 129, ""])
    async def test_bad_names(self, stores: Stores, store: AdapterStore, name: str) -> None:
        with pytest.raises(AdapterError, match="not allowed") as caught:
            await stores.add(store, name, 1)
        assert (caught.value.code, caught.value.status) == ("invalid_name", 400)
        assert (await store.names.models("default")).items == ()

    async def test_who_comes_second_is_not_served_what_the_first_one_sent(
        self, stores: Stores, store: AdapterStore
    ) -> None:
        """The weights are the same; header, patterns and names are whatever the first one likes."""
        heavy, plain = stores.write(8, "heavy"), stores.write(8, "plain")
        tensors = load_file(heavy / "adapter_model.safetensors")
        save_file(tensors, heavy / "adapter_model.safetensors", {str(number): "" for number in range(50_000)})
        change(
            rank_pattern={f"(a|b)?.*.*x{number}": 2 for number in range(200)},
            alpha_pattern={".*": 8},
            lora_alpha=99,
            base_model_name_or_path="org/secret",
        )(heavy)
        first = await store.register(heavy, NewAdapter("sql", "alice"))
        second = await store.register(plain, NewAdapter("sql", "bob"))
        assert first.adapter.adapter.warnings
        assert replace(first.adapter.adapter, warnings=()) == second.adapter.adapter
        assert second.adapter.adapter.alpha == 8
        assert (await store.names.get("alice", "sql")).adapter.warnings == ()
        lease = await store.lease("bob", [await meaning(store, "bob", "sql")])
        (path,) = map(Path, lease.paths.values())
        assert sum(file.stat().st_size for file in path.iterdir()) < 10_000
        assert b"secret" not in (path / "adapter_config.json").read_bytes()
        store.release(lease)

    async def test_files_of_a_former_version_are_replaced(self, stores: Stores, store: AdapterStore) -> None:
        """It stored what came as it came; that serves on, until the same adapter is registered again."""
        folder = stores.write(8, "source")
        done = await stores.add(store, "sql", 8)
        row = done.adapter.adapter
        old = [store.blobs.put_file(folder / name).sha256 for name in (CONFIG_NAME, WEIGHTS_NAME)]
        former = replace(row, config_blob=old[0], weights_blob=old[1], bytes=5)
        store.registry.register("alice", "sql", former)
        assert (await store.names.get("default", "sql")).adapter == former
        await store.close()
        store = stores.open()
        lease = await store.lease("alice", [await meaning(store, "alice", "sql")])
        assert read_adapter(Path(lease.paths[row.digest]), stores.shape).digest == row.digest
        store.release(lease)
        await stores.add(store, "again", 8, tenant="bob")
        assert (await store.names.get("alice", "sql")).adapter == row
        assert store.registry.referenced_blobs() == {row.config_blob, row.weights_blob}

    async def test_what_is_refused_leaves_no_blobs(self, stores: Stores, store: AdapterStore) -> None:
        first = await stores.add(store, "sql", 1, tenant="alice")
        size = first.adapter.adapter.bytes
        before = {blob.sha256 for blob in store.blobs.list()}
        store.registry.accounts.update(
            "alice", lambda row: replace(row, quotas=Quotas(adapters=2, bytes=size * 3 // 2))
        )
        with pytest.raises(NameTaken):
            await stores.add(store, "sql", 2, tenant="alice")
        with pytest.raises(QuotaExceeded, match="bytes is used up"):
            await stores.add(store, "new", 2, tenant="alice")
        with pytest.raises(NotFound, match="tenant 'nobody'"):
            await stores.add(store, "new", 2, tenant="nobody")
        await stores.add(store, "public", 1, public=True)
        with pytest.raises(NotPermitted):
            await stores.add(store, "public", 3, replace=True, may_be_public=False)
        assert {blob.sha256 for blob in store.blobs.list()} == before
        assert (await stores.add(store, "copy", 1, tenant="alice")).adapter.adapter == first.adapter.adapter
        with pytest.raises(QuotaExceeded, match="2 adapters"):
            await stores.add(store, "third", 1, tenant="alice")

    async def test_ranks_beyond_the_limit(self, stores: Stores) -> None:
        stores.config = replace(stores.config, limits=AdapterLimits(max_rank=3))
        store = stores.open()
        with pytest.raises(AdapterError, match=r"rank 4 of .*: expected at most 3") as caught:
            await stores.add(store, "sql", 1)
        assert caught.value.code == "adapter_unsupported"
        assert list(store.blobs.list()) == []

    async def test_a_bad_adapter_leaves_nothing(self, stores: Stores, store: AdapterStore) -> None:
        folder = stores.write(1, "rotten")
        (folder / "adapter_model.safetensors").write_bytes(b"no")
        with pytest.raises(AdapterError, match="cannot be read"):
            await store.register(folder, NewAdapter("sql"))
        assert list(store.blobs.list()) == []
        assert await store.count() == 0

    async def test_a_name_is_taken_once(self, stores: Stores, store: AdapterStore) -> None:
        first = await stores.add(store, "sql", 1)
        with pytest.raises(NameTaken):
            await stores.add(store, "sql", 2)
        assert (await meaning(store, "default", "sql")).digest == first.adapter.adapter.digest
        done = await stores.add(store, "sql", 2, replace=True)
        assert done.outcome is Outcome.REVISED
        assert (await meaning(store, "default", "sql")).digest == done.adapter.adapter.digest
        assert len(done.adapter.revisions) == 2

    async def test_of_parallel_registrations_one_wins(self, stores: Stores, store: AdapterStore) -> None:
        other = stores.open()
        works = [stores.add((store, other)[index % 2], "sql", 1 + index % 3) for index in range(12)]
        done = await asyncio.gather(*map(outcome, works))
        won = [each for each in done if not isinstance(each, Exception)]
        assert len(won) == 1
        assert {type(each) for each in done} == {type(won[0]), NameTaken}
        for each in (store, other):
            assert (await meaning(each, "default", "sql")).digest == won[0].adapter.adapter.digest

    @pytest.mark.slow
    async def test_of_200_registrations_one_wins(self, stores: Stores, store: AdapterStore) -> None:
        stores.write(1, "sources/1")
        folder = stores.write(1, "source")
        works = [store.register(folder, NewAdapter("sql")) for _ in range(200)]
        done = await asyncio.gather(*map(outcome, works))
        refused = [each for each in done if isinstance(each, NameTaken)]
        assert len(refused) == 199
        assert {each.status for each in refused} == {409}
        assert len((await store.names.get("default", "sql")).revisions) == 1

    async def test_a_caller_that_leaves_does_not_stop_it(self, stores: Stores, store: AdapterStore) -> None:
        task = asyncio.create_task(stores.add(store, "sql", 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.resolve("default", ["sql"]) == {}  # known not to be there, until the write is done
        await until(lambda: not store._workers._tasks)
        assert "sql" in await store.resolve("default", ["sql"])


class TestRegisterFolder:
    async def test_every_adapter_gets_its_folders_name(
        self, stores: Stores, store: AdapterStore, tmp_path: Path
    ) -> None:
        for alpha, name in enumerate(["sql", "german-v1.2", ".hidden"], 1):
            stores.write(alpha, f"many/{name}")
        (tmp_path / "many" / "notes").mkdir()
        (tmp_path / "many" / "file.txt").touch()
        found = await store.register_folder(tmp_path / "many")
        assert [(each.name, each.public, each.tenant) for each in found] == [
            ("german-v1.2", True, "default"),
            ("sql", True, "default"),
        ]
        assert set(await store.resolve("bob", ["sql", "german-v1.2", ".hidden"])) == {"sql", "german-v1.2"}

    async def test_only_what_has_changed_is_registered_again(
        self, stores: Stores, store: AdapterStore, tmp_path: Path
    ) -> None:
        stores.write(1, "many/same")
        stores.write(2, "many/changed")
        await store.register_folder(tmp_path / "many")
        await store.names.update("default", "same", public=False, description="mine")
        await store.close()
        stores.write(3, "many/changed")
        stores.clock.now += 100
        store = stores.open()
        changed, same = await store.register_folder(tmp_path / "many")
        assert (same.public, same.description, len(same.revisions)) == (False, "mine", 1)
        assert [each.created for each in changed.revisions] == [stores.clock.now - 100, stores.clock.now]
        assert changed.adapter.digest == changed.revisions[1].digest

    async def test_lost_files_come_back(self, stores: Stores, store: AdapterStore, tmp_path: Path) -> None:
        stores.write(1, "many/sql")
        (named,) = await store.register_folder(tmp_path / "many")
        await store.close()
        store = stores.open()
        store.blobs.delete(named.adapter.weights_blob)
        (again,) = await store.register_folder(tmp_path / "many")
        assert again == named
        assert store.blobs.exists(named.adapter.weights_blob)

    async def test_errors_name_the_folder(self, stores: Stores, store: AdapterStore, tmp_path: Path) -> None:
        (stores.write(2, "many/rotten") / "adapter_model.safetensors").write_bytes(b"no")
        with pytest.raises(AdapterError, match=r"adapter folder 'rotten': adapter_model\.safetensors cannot") as caught:
            await store.register_folder(tmp_path / "many")
        assert (caught.value.code, caught.value.status) == ("adapter_corrupt", 422)
        stores.write(2, "named/auto")
        with pytest.raises(AdapterError, match="adapter folder 'auto': adapter name 'auto' is not allowed"):
            await store.register_folder(tmp_path / "named")
        await stores.add(store, "sql", 1, tenant="alice", public=True)
        stores.write(2, "taken/sql")
        with pytest.raises(AdapterError, match="adapter folder 'sql': a public adapter 'sql' exists"):
            await store.register_folder(tmp_path / "taken")

    async def test_wrong_folder(self, stores: Stores, store: AdapterStore, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="expected a folder of adapters"):
            await store.register_folder(tmp_path / "missing")
        with pytest.raises(AdapterError, match="is itself an adapter"):
            await store.register_folder(stores.write(1, "source"))

    async def test_a_folder_without_adapters_is_told_of(
        self, store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "empty" / "deep" / "down").mkdir(parents=True)
        assert await store.register_folder(tmp_path / "empty") == ()
        assert f"no folder in {tmp_path / 'empty'} has an adapter_config.json" in caplog.text


class TestSamples:
    async def test_a_folder_brings_its_samples(self, stores: Stores, store: AdapterStore, tmp_path: Path) -> None:
        folder = stores.write(1, "many/sql")
        (folder / "samples.json").write_text('["how many", "which"]')
        await store.register_folder(tmp_path / "many")
        assert store.registry.samples("default", ["sql"]) == {"sql": ("how many", "which")}
        done = await store.register(folder, NewAdapter("copy", samples=("mine",)))
        assert store.registry.samples("default", ["copy"]) == {"copy": ("mine",)}
        await store.register(folder, NewAdapter("other"))
        assert store.registry.samples("default", ["other"]) == {"other": ("how many", "which")}
        assert done.outcome is Outcome.CREATED

    async def test_they_come_later_too_but_replace_nothing(
        self, stores: Stores, store: AdapterStore, tmp_path: Path
    ) -> None:
        folder = stores.write(1, "many/sql")
        (named,) = await store.register_folder(tmp_path / "many")
        (folder / "samples.json").write_text('["first"]')
        (folder / "README.md").write_text("Writes SQL.")
        (again,) = await store.register_folder(tmp_path / "many")
        assert (again.adapter.digest, again.revisions) == (named.adapter.digest, named.revisions)
        assert (again.description, store.registry.samples("default", ["sql"])["sql"]) == ("Writes SQL.", ("first",))
        (folder / "samples.json").write_text('["second"]')
        (folder / "README.md").write_text("Something else.")
        (again,) = await store.register_folder(tmp_path / "many")
        assert (again.description, store.registry.samples("default", ["sql"])["sql"]) == ("Writes SQL.", ("first",))
        stores.write(2, "many/sql")
        (again,) = await store.register_folder(tmp_path / "many")
        assert len(again.revisions) == 2
        assert store.registry.samples("default", ["sql"])["sql"] == ("first",)

    async def test_bad_ones_are_refused_by_the_folders_name(
        self, stores: Stores, store: AdapterStore, tmp_path: Path
    ) -> None:
        (stores.write(1, "many/sql") / "samples.json").write_text('{"samples": []}')
        with pytest.raises(AdapterError, match=r"adapter folder 'sql': samples\.json is not a list") as caught:
            await store.register_folder(tmp_path / "many")
        assert (caught.value.code, caught.value.status) == ("adapter_bad_config", 422)
        assert (await store.names.models("default")).items == ()
