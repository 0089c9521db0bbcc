"""The disk tier: what is there, what goes for want of space, and what comes while something goes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from polling import until

from adapters_store.blobs import BlobStore, BlobUnavailable
from adapters_store.folders import Folders
from adapters_store.registry import Resolved

MakeFolders = Callable[..., Folders]


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore.open(str(tmp_path / "blobs"))


@pytest.fixture
def used() -> Counter[str]:
    return Counter()


@pytest.fixture
def make_folders(tmp_path: Path, blobs: BlobStore, used: Counter[str]) -> Iterator[MakeFolders]:
    (tmp_path / "folders").mkdir()
    with ThreadPoolExecutor(2) as threads:
        yield lambda limit=None: Folders(tmp_path / "folders", blobs, threads, lambda d: used[d] > 0, limit)


def adapter(blobs: BlobStore, digit: str) -> Resolved:
    """100 bytes of config and weights."""
    config = blobs.put_stream([digit.encode() * 40]).sha256
    weights = blobs.put_stream([digit.encode() * 60]).sha256
    return Resolved("default", "name", digit * 64, False, config, weights)


async def test_a_folder_is_made_once(make_folders: MakeFolders, blobs: BlobStore) -> None:
    folders = make_folders()
    one = adapter(blobs, "a")
    assert folders.find(one.digest) is None
    paths = await asyncio.gather(*(folders.make(one) for _ in range(5)))
    assert set(paths) == {folders.find(one.digest)}
    assert sorted(path.name for path in Path(paths[0]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (Path(paths[0]) / "adapter_model.safetensors").read_bytes() == b"a" * 60
    folders.check_integrity()


async def test_the_longest_unused_goes_first(make_folders: MakeFolders, blobs: BlobStore, used: Counter[str]) -> None:
    folders = make_folders(300)
    a, b, c, d = (adapter(blobs, digit) for digit in "abcd")
    for each in (a, b, c):
        await folders.make(each)
    used[b.digest] += 1
    folders.find(a.digest)
    await folders.make(d)
    await until(lambda: not folders._moving)
    assert folders.digests == (b.digest, a.digest, d.digest)
    await folders.make(c)
    await until(lambda: not folders._moving)
    assert folders.digests == (b.digest, d.digest, c.digest)
    assert {path.name for path in folders._root.iterdir()} == {b.digest, c.digest, d.digest}
    folders.check_integrity()


async def test_what_is_used_exceeds_the_limit(make_folders: MakeFolders, blobs: BlobStore, used: Counter[str]) -> None:
    folders = make_folders(50)
    one, two = adapter(blobs, "a"), adapter(blobs, "b")
    used.update([one.digest, two.digest])
    await folders.make(one)
    await folders.make(two)
    await folders.remove(one.digest)
    assert folders.digests == (one.digest, two.digest)


async def test_an_adapter_that_returns_while_it_goes(make_folders: MakeFolders, blobs: BlobStore) -> None:
    folders = make_folders()
    one = adapter(blobs, "a")
    for _ in range(20):
        await folders.make(one)
        removing = asyncio.create_task(folders.remove(one.digest))
        await asyncio.sleep(0)
        path = await folders.make(one)
        await removing
        assert (Path(path) / "adapter_config.json").read_bytes() == b"a" * 40
        assert folders.digests == (one.digest,)
    await asyncio.gather(folders.remove(one.digest), folders.remove(one.digest))
    assert list(folders._root.iterdir()) == []
    folders.check_integrity()


async def test_a_failure_reaches_all_and_stays_with_none(make_folders: MakeFolders, blobs: BlobStore) -> None:
    folders = make_folders()
    one = adapter(blobs, "a")
    folders._root.rename(folders._root.with_name("away"))
    failed = await asyncio.gather(*(folders.make(one) for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in failed] == [BlobUnavailable] * 3
    folders._root.with_name("away").rename(folders._root)
    assert await folders.make(one)
    folders.check_integrity()


async def test_who_gives_up_waiting_leaves_the_others_their_folder(make_folders: MakeFolders, blobs: BlobStore) -> None:
    folders = make_folders()
    one = adapter(blobs, "a")
    first, second = (asyncio.create_task(folders.make(one)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == folders.find(one.digest)
