"""A store whose process is killed, whose disk is full, whose database or object store does not answer."""

import asyncio
import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from adapters_store.blobs import BlobUnavailable
from adapters_store.peft_format import read_adapter
from adapters_store.registry import NotFound, RegistryUnavailable
from adapters_store.store import AdapterStore, StoreOpenError
from tests.adapters_store.s3_server import make_bucket, running_server
from tests.adapters_store.stores import Stores, meaning, outcome

TRANSACTION = ["tenant", "adapter", "name", "revision", "metadata", "quota"]
KILLED = """
import asyncio, collections, json, os, signal, sys
from pathlib import Path
import psycopg, sqlalchemy.dialects.postgresql.psycopg  # once, not in each child
from adapters_store.store import AdapterStore, NewAdapter, StoreConfig
from adapters_store.types import LinearShape

database, blobs, folder, shape, sources, jobs = json.loads(sys.argv[1])

def run(verb, step, number, name):
    seen = collections.Counter()
    def kill(at):
        seen[at] += is_open
        if (at, seen[at]) == (step, number):
            os.kill(os.getpid(), signal.SIGKILL)
    config, is_open = StoreConfig(database, blobs, Path(folder)), False
    store = AdapterStore.open(LinearShape(*shape), "base-model", config, lambda: 3.0, fault=kill)
    is_open = True
    if verb == "delete":
        work = store.delete("default", name, wait=True)
    else:
        work = store.register(Path(sources[name]), NewAdapter(name, replace=verb == "replace", tags=("t",)))
    asyncio.run(work)

codes = []
for job in jobs:
    child = os.fork()
    if child == 0:
        try:
            run(*job)
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def plan(is_remote: bool) -> list[tuple[str, str, int]]:
    """(verb, step, how many times it has come) of every step of a registration, a replacement and a deletion."""
    blob = ["opened", "written", "synced", "renamed", "stored", *(["uploading", "uploaded"] if is_remote else [])]
    register = [
        ("store.checked", 1),
        *((f"blob.{step}", number) for number in (1, 2) for step in blob),
        ("store.config", 1),
        ("store.weights", 1),
        *((f"register.{step}", 1) for step in ["begin", *TRANSACTION, "commit", "committed"]),
    ]
    delete = [f"mark_deleting.{step}" for step in ("begin", "commit", "committed")]
    delete += [f"remove.{step}" for step in ("begin", "name", "commit", "committed")]
    jobs = [(verb, step, number) for verb in ("create", "replace") for step, number in register]
    return jobs + [("delete", step, 1) for step in delete]


@pytest.mark.slow
async def test_a_killed_process_leaves_before_or_after(stores: Stores) -> None:
    """The next start finds each name as it was or as it was to be, with files that are whole, and no leftovers."""
    store = stores.open()
    jobs, sources, before, after = [], {}, {}, {}
    for index, (verb, step, number) in enumerate(plan(stores.config.blob_url.startswith("s3:"))):
        name = f"{verb}.{step}.{number}"
        # Scales and factors of its own give every adapter blobs of its own.
        folder = stores.write(100 + index, f"new/{index}")
        (folder / "adapter_model.safetensors").write_bytes(_moved(folder, 0.001 * (index + 1)))
        sources[name], after[name] = str(folder), read_adapter(folder, stores.shape).digest
        before[name] = None
        if verb != "create":
            before[name] = (await stores.add(store, name, 500 + index)).adapter.adapter.digest
        if verb == "delete":
            after[name] = None
        jobs.append((verb, step, number, name))
    await store.close()
    shape = (stores.shape.num_layers, dict(stores.shape.inputs), dict(stores.shape.outputs))
    config = stores.config
    given = [config.database_url, config.blob_url, str(config.folder), shape, sources, jobs]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, json.dumps(given)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(done.stdout) == [-9] * len(jobs)
    assert len(list(config.folder.glob("run-*"))) == 1  # each start has removed what the one before had left
    store = stores.open()
    assert len(list(config.folder.glob("run-*"))) == 1
    assert store.registry.removals.marked() == ()
    stores.clock.now += 7200
    await store.sweep(3600)
    for verb, step, _, name in jobs:
        is_after = step.endswith("committed") or step.startswith("remove.")
        expected = (after if is_after else before)[name]
        found = await store.resolve("default", [name])
        assert (found[name].digest if found else None) == expected, (verb, step)
        if expected is not None:
            lease = await store.lease("default", list(found.values()))
            assert read_adapter(Path(lease.paths[expected]), stores.shape).digest == expected
            store.release(lease)
    assert {blob.sha256 for blob in store.blobs.list()} == store.registry.referenced_blobs()


def _moved(folder: Path, by: float) -> bytes:
    from safetensors.torch import load_file, save

    return save({name: tensor + by for name, tensor in load_file(folder / "adapter_model.safetensors").items()})


class Outage:
    """While it lasts no connection to the database can be had."""

    def __init__(self, store: AdapterStore) -> None:
        self._database: Any = store.registry._database
        self._engines = self._database._reader, self._database._writer

    def begin(self) -> None:
        raise OperationalError("connect", None, OSError("10.1.2.3 is lost"))

    def __call__(self, is_on: bool) -> None:
        self._database._reader, self._database._writer = (self, self) if is_on else self._engines


async def test_without_the_registry_known_adapters_go_on(stores: Stores) -> None:
    now = [0.0]
    store = stores.open(timer=lambda: now[0])
    await stores.add(store, "sql", 1)
    await stores.add(store, "old", 2)
    adapter = await meaning(store, "default", "sql")
    assert await store.resolve("default", ["missing"]) == {}
    store.release(await store.lease("default", [adapter]))
    outage = Outage(store)
    outage(True)
    now[0] = 100.0
    for _ in range(3):
        assert await store.resolve("default", ["sql"]) == {"sql": adapter}
        lease = await store.lease("default", [adapter])
        assert read_adapter(Path(lease.paths[adapter.digest]), stores.shape).digest == adapter.digest
        store.release(lease)
        now[0] += 5.0
    calls = [
        store.resolve("default", ["sql", "old"]),
        store.resolve("default", ["missing"]),
        store.resolve("alice", ["sql"]),
        stores.add(store, "new", 3),
        store.names.get("default", "sql"),
        store.names.list("default"),
        store.names.models("default"),
        store.names.update("default", "sql", public=True),
        store.names.roll_back("default", "sql", adapter.digest),
        store.delete("default", "old"),
        store.sweep(3600.0),
    ]
    for call in calls:
        error: Any = await outcome(call)
        assert (type(error), error.status, error.code) == (RegistryUnavailable, 503, "registry_unavailable")
        assert "10.1.2.3" not in error.message
    outage(False)
    now[0] += 5.0
    assert set(await store.resolve("default", ["sql", "old", "missing"])) == {"sql", "old"}
    assert await stores.add(store, "new", 3)


async def test_a_deletion_is_finished_when_the_registry_comes_back(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.deletion._RETRY_SECONDS", 0.01)
    store = stores.open()
    await stores.add(store, "sql", 1)
    lease = await store.lease("default", [await meaning(store, "default", "sql")])
    assert await store.delete("default", "sql") is False
    outage = Outage(store)
    outage(True)
    store.release(lease)
    await asyncio.sleep(0.05)
    (task,) = store._deletions._draining.values()
    outage(False)
    await asyncio.wait_for(task, 60)
    assert store.registry.removals.marked() == ()
    with pytest.raises(NotFound):
        await store.names.get("default", "sql")


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only")]
)
async def test_a_disk_that_takes_nothing(stores: Stores, number: int, reason: str) -> None:
    broken: list[str] = []

    def fault(step: str) -> None:
        if broken and step == broken[0]:
            raise OSError(number, "at /secret/path")

    store = stores.open(fault=fault)
    await stores.add(store, "sql", 1)
    adapter = await meaning(store, "default", "sql")
    store.release(await store.lease("default", [adapter]))
    broken.append("blob.written")
    with pytest.raises(BlobUnavailable, match=reason) as refused:
        await stores.add(store, "new", 2)
    assert refused.value.status == 503
    assert "secret" not in refused.value.message
    assert await store.resolve("default", ["new"]) == {}
    lease = await store.lease("default", [adapter])
    store.release(lease)
    broken.clear()
    assert await stores.add(store, "new", 2)


@pytest.mark.parametrize("store_config", ["postgresql-s3"], indirect=True)
async def test_without_the_object_store_adapters_that_are_there_go_on(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server() as server:
        make_bucket(server, "short", monkeypatch)
        stores.config = replace(stores.config, blob_url=f"s3://short?endpoint={server}&region=eu-west-1")
        first = stores.open()
        await stores.add(first, "sql", 1)
        await stores.add(first, "cold", 2)
        await first.close()
        stores.config = replace(stores.config, folder=tmp_path / "another")
        store = stores.open()
        adapter, cold = await meaning(store, "default", "sql"), await meaning(store, "default", "cold")
        store.release(await store.lease("default", [adapter]))
    store.release(await store.lease("default", [adapter]))
    for work in (store.lease("default", [cold]), store.lease("default", [adapter, cold]), stores.add(store, "new", 3)):
        with pytest.raises(BlobUnavailable, match="the object store does not answer"):
            await work
    assert store.digest_leases(adapter.digest) == 0
    with pytest.raises(StoreOpenError, match="the object store does not answer"):
        stores.open()


async def test_a_folder_that_could_not_be_made_leaves_nothing_behind(stores: Stores) -> None:
    store = stores.open()
    await stores.add(store, "sql", 1)
    adapter = await meaning(store, "default", "sql")
    await store.close()

    def fail(*_: object) -> Path:
        raise BlobUnavailable("files cannot be stored or read now: the disk is full")

    store = stores.open()
    store.blobs.fetch = fail  # type: ignore[method-assign]
    with pytest.raises(BlobUnavailable):
        await store.lease("default", [adapter])
    assert store._folders.digests == ()
    assert list(store._folder.adapters.iterdir()) == []
    del store.blobs.fetch
    store.release(await store.lease("default", [adapter]))


async def test_an_unreachable_registry_at_the_start(stores: Stores) -> None:
    stores.config = replace(stores.config, database_url="postgresql://loramux:secret@127.0.0.1:1/registry")
    with pytest.raises(StoreOpenError, match="the registry is unavailable: its database does not answer") as refused:
        stores.open()
    assert "secret" not in str(refused.value)


async def test_a_folder_that_cannot_be_made(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stores.config = replace(stores.config, folder=tmp_path / "file" / "store")
    with pytest.raises(StoreOpenError, match="files cannot be stored or read now"):
        stores.open()
