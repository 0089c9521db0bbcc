"""Folders of trained routers, the same on every machine."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import make_store, wait_for

from adapters_store.blobs import BlobMissing
from adapters_store.registry import RouterRow
from adapters_store.store import AdapterStore
from routing.card_file import CARD_FILE, CHANGE_FILE
from server.router_folders import RouterFolders


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    store = make_store(tmp_path, [])
    yield store
    wait_for(store.close())


@pytest.fixture
def machine(store: AdapterStore, tmp_path: Path) -> Callable[[str], RouterFolders]:
    """`machine(name)`: over the same registry and blobs."""
    return lambda name: RouterFolders(store.registry, store.blobs, tmp_path / name)


def added(store: AdapterStore, tmp_path: Path, content: bytes = b"weights", **meta: object) -> RouterRow:
    (tmp_path / "change").write_bytes(content)
    blob = store.blobs.put_file(tmp_path / "change")
    return store.registry.routers.add(RouterRow("gate", "meteora", blob.sha256, dict(meta)), replace_existing=True)


def test_what_one_machine_calls_it_another_finds(
    store: AdapterStore, machine: Callable[[str], RouterFolders], tmp_path: Path
) -> None:
    row = added(store, tmp_path, top_k=2)
    here = machine("a").make(row)
    there = machine("b").find(here.name)
    assert there == tmp_path / "b" / here.name
    assert [(folder / CHANGE_FILE).read_bytes() for folder in (here, there)] == [b"weights"] * 2
    assert (here / CARD_FILE).read_text() == (there / CARD_FILE).read_text() == '{"top_k": 2}'
    assert machine("b").find("0" * 64) is None


def test_another_card_or_other_weights_are_another_folder(
    store: AdapterStore, machine: Callable[[str], RouterFolders], tmp_path: Path
) -> None:
    rows = [added(store, tmp_path, top_k=2), added(store, tmp_path, top_k=3), added(store, tmp_path, b"other", top_k=3)]
    assert len({machine("a").make(row) for row in rows}) == 3
    assert machine("b").find(machine("a").make(rows[0]).name) is None  # it has been replaced since


def test_many_at_once_make_one(store: AdapterStore, machine: Callable[[str], RouterFolders], tmp_path: Path) -> None:
    row = added(store, tmp_path)
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(lambda _: machine("a").make(row), range(16)))
    assert list((tmp_path / "a").iterdir()) == list(made)


def test_what_cannot_be_fetched_leaves_nothing(machine: Callable[[str], RouterFolders], tmp_path: Path) -> None:
    row = RouterRow("gate", "meteora", "f" * 64, {})
    with pytest.raises(BlobMissing):
        machine("a").make(row)
    assert not list((tmp_path / "a").iterdir())
