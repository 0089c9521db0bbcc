"""Adapters of an engine away from the front ends: by digest, from registry and blobs alone."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from stores import Stores

from adapters_store.fetched import FetchedAdapters, UnknownDigest
from adapters_store.opening import StoreOpenError
from adapters_store.store import AdapterStore
from adapters_store.types import LinearShape


@pytest.fixture
async def fetched(stores: Stores, tmp_path: Path) -> AsyncIterator[FetchedAdapters]:
    """On another machine."""
    config = replace(stores.config, folder=tmp_path / "elsewhere")
    fetched = FetchedAdapters.open(stores.shape, config, stores.clock)
    yield fetched
    await fetched.close()


async def test_what_another_process_registers_can_be_had_at_once(
    fetched: FetchedAdapters, stores: Stores, store: AdapterStore, tmp_path: Path
) -> None:
    digests = [(await stores.add(store, f"a{alpha}", alpha)).adapter.adapter.digest for alpha in (1.0, 2.0)]
    async with fetched.leased(digests) as paths:
        assert list(paths) == digests
        for path in map(Path, paths.values()):
            assert path.is_relative_to(tmp_path / "elsewhere")
            assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        async with fetched.leased(digests[:1]) as again:
            assert again[digests[0]] == paths[digests[0]]


async def test_many_at_once_share_one_fetch(fetched: FetchedAdapters, stores: Stores, store: AdapterStore) -> None:
    digest = (await stores.add(store, "a", 1.0)).adapter.adapter.digest

    async def use() -> str:
        async with fetched.leased([digest]) as paths:
            await asyncio.sleep(0)
            return paths[digest]

    assert len(set(await asyncio.gather(*(use() for _ in range(20))))) == 1


async def test_an_unknown_digest_is_refused_and_holds_nothing(
    fetched: FetchedAdapters, stores: Stores, store: AdapterStore
) -> None:
    digest = (await stores.add(store, "a", 1.0)).adapter.adapter.digest
    with pytest.raises(UnknownDigest, match="adapter ffffffffffff does not exist"):
        async with fetched.leased([digest, "f" * 64]):
            pytest.fail("it was leased")
    await store.delete("default", "a", True)
    await fetched.sweep()
    with pytest.raises(UnknownDigest):
        async with fetched.leased([digest]):
            pytest.fail("it was leased")


async def test_a_sweep_tells_what_nobody_has_and_leaves_what_is_used(
    fetched: FetchedAdapters, stores: Stores, store: AdapterStore
) -> None:
    gone: list[str] = []
    fetched.on_gone.append(gone.append)
    added = [await stores.add(store, name, alpha) for name, alpha in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    kept, used, unused = [each.adapter.adapter.digest for each in added]
    async with fetched.leased([kept, used, unused]):
        pass
    async with fetched.leased([used]) as paths:
        for name in "bc":
            await store.delete("default", name, True)
        await fetched.sweep()
        assert gone == [unused]
        assert Path(paths[used]).is_dir()
    await fetched.sweep()
    assert gone == [unused, used]
    assert not Path(paths[used]).exists()


def test_another_models_registry_is_refused(stores: Stores, store: AdapterStore, shape: LinearShape) -> None:
    del store
    with pytest.raises(StoreOpenError, match="belongs to another base model"):
        FetchedAdapters.open(replace(shape, num_layers=shape.num_layers + 1), stores.config, stores.clock)
