"""Names, tenants, revisions and leases."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.store import AdapterStore, RegisteredAdapter, UnknownAdapter
from adapters_store.types import AdapterError, LinearShape


class Registrar:
    """A store whose adapters differ in alpha only."""

    def __init__(
        self, store: AdapterStore, write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.store, self.write, self.config, self.tensors = store, write, config, tensors

    def folder(self, alpha: float, name: str = "source") -> Path:
        folder: Path = self.write(self.config | {"lora_alpha": alpha}, self.tensors, name)
        return folder

    def add(self, name: str, alpha: float, **options: Any) -> RegisteredAdapter:
        return self.store.register(name, self.folder(alpha, f"sources/{alpha}"), **options)


@pytest.fixture
def registrar(shape: LinearShape, write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Registrar:
    clock = itertools.count(100.0)
    return Registrar(AdapterStore(shape, lambda: next(clock), reserved=["base-model"]), write, config, tensors)


def test_register_folder(registrar: Registrar, tmp_path: Path) -> None:
    registrar.folder(1, "many/sql")
    registrar.folder(2, "many/german-v1.2")
    registrar.folder(3, "many/.hidden")
    (tmp_path / "many" / "notes").mkdir()
    (tmp_path / "many" / "file.txt").touch()
    found = registrar.store.register_folder(tmp_path / "many")
    assert [adapter.name for adapter in found] == ["german-v1.2", "sql"]
    sql = registrar.store.resolve("anyone", "sql")
    assert sql == found[1]
    assert (sql.tenant, sql.public, sql.rank, sql.alpha, sql.modules) == ("default", True, 4, 1.0, 4)
    assert (sql.targets, sql.created, sql.path) == (("down_proj", "q_proj"), 101.0, str(tmp_path / "many" / "sql"))
    assert sql.bytes == sum(tensor.nbytes for tensor in registrar.tensors.values())
    assert [revision.digest for revision in sql.revisions] == [sql.digest]
    registrar.store.check_integrity()


@pytest.mark.parametrize("name", ["auto", "base-model", "-x", "_x", "a b", "a@b", "auto:retriever", "ü", "x" * 129])
def test_bad_names(registrar: Registrar, tmp_path: Path, name: str) -> None:
    registrar.folder(1, f"many/{name}")
    with pytest.raises(AdapterError, match="not allowed") as caught:
        registrar.store.register_folder(tmp_path / "many")
    assert (caught.value.code, caught.value.status) == ("invalid_name", 400)
    assert repr(name) in caught.value.message
    assert registrar.store.list("default") == ()


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a\n"])
def test_bad_names_that_no_folder_has(registrar: Registrar, name: str) -> None:
    with pytest.raises(AdapterError, match="not allowed"):
        registrar.add(name, 1)


@pytest.mark.parametrize("name", ["a", "0", "Auto", "auto.1", "x" * 128, "A-b_c.d"])
def test_good_names(registrar: Registrar, name: str) -> None:
    registrar.add(name, 1)
    assert registrar.store.resolve("default", name).name == name


def test_a_bad_adapter_names_its_folder(registrar: Registrar, tmp_path: Path) -> None:
    registrar.folder(1, "many/good")
    (registrar.folder(2, "many/rotten") / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(
        AdapterError, match=r"adapter folder 'rotten': adapter_model\.safetensors cannot be read"
    ) as caught:
        registrar.store.register_folder(tmp_path / "many")
    assert (caught.value.code, caught.value.status) == ("adapter_corrupt", 422)


def test_wrong_folder(registrar: Registrar, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="expected a folder of adapters"):
        registrar.store.register_folder(tmp_path / "missing")
    with pytest.raises(AdapterError, match="is itself an adapter"):
        registrar.store.register_folder(registrar.folder(1))


def test_visibility(registrar: Registrar) -> None:
    public = registrar.add("shared", 1, public=True)
    private = registrar.add("shared", 2, tenant="alice")
    secret = registrar.add("secret", 3, tenant="alice")
    store = registrar.store
    assert store.resolve("alice", "shared") == private
    assert store.resolve("bob", "shared") == public
    assert store.resolve("alice", "secret") == secret
    assert [adapter.digest for adapter in store.list("alice")] == [secret.digest, private.digest]
    assert [adapter.digest for adapter in store.list("bob")] == [public.digest]
    with pytest.raises(UnknownAdapter) as hidden:
        store.resolve("bob", "secret")
    with pytest.raises(UnknownAdapter) as absent:
        store.resolve("bob", "sEcret")
    assert str(hidden.value).lower() == str(absent.value).lower()
    with pytest.raises(UnknownAdapter):
        store.resolve("bob", f"secret@{secret.digest[:8]}")


def test_public_names_are_one_for_all(registrar: Registrar) -> None:
    registrar.add("shared", 1, tenant="alice", public=True)
    with pytest.raises(AdapterError) as caught:
        registrar.add("shared", 2, tenant="bob", public=True)
    assert (caught.value.code, caught.value.status) == ("adapter_exists", 409)
    registrar.add("shared", 3, tenant="alice", replace_existing=True)
    with pytest.raises(UnknownAdapter):
        registrar.store.resolve("carol", "shared")
    registrar.add("shared", 2, tenant="bob", public=True)
    assert registrar.store.resolve("carol", "shared").alpha == 2.0


def test_revisions(registrar: Registrar) -> None:
    store = registrar.store
    first = registrar.add("sql", 1)
    with pytest.raises(AdapterError) as caught:
        registrar.add("sql", 2)
    assert (caught.value.code, caught.value.status) == ("adapter_exists", 409)
    second = registrar.add("sql", 2, replace_existing=True)
    assert store.resolve("default", "sql") == second
    assert [revision.digest for revision in second.revisions] == [first.digest, second.digest]
    assert store.resolve("default", f"sql@{first.digest[:4]}") == first
    assert store.resolve("default", f"sql@{second.digest.upper()}") == second
    again = registrar.add("sql", 1, replace_existing=True)
    assert [revision.digest for revision in again.revisions] == [second.digest, first.digest]
    assert again.path == first.path
    store.check_integrity()


def test_prefixes_have_four_digits(registrar: Registrar) -> None:
    digest = registrar.add("sql", 1).digest
    assert registrar.store.resolve("default", f"sql@{digest[:4]}").digest == digest
    with pytest.raises(UnknownAdapter):
        registrar.store.resolve("default", f"sql@{digest[:3]}")


def test_bad_prefixes(registrar: Registrar) -> None:
    """Unknown, ambiguous, empty, too long."""
    digests = {}
    for alpha in range(1, 400):  # until two revisions share four digits, which 400 of 65,536 make likely
        adapter = registrar.add("sql", alpha, replace_existing=True)
        other = digests.setdefault(adapter.digest[:4], adapter.digest)
        if other != adapter.digest:
            with pytest.raises(UnknownAdapter):
                registrar.store.resolve("default", f"sql@{adapter.digest[:4]}")
            break
    digest = registrar.store.resolve("default", "sql").digest
    wrong = "0" * 16 if not digest.startswith("0" * 16) else "1" * 16
    for name in (f"sql@{wrong}", "sql@", "sql@zzzz", f"@{digest[:8]}", f"sql@{digest}0", "sql@@"):
        with pytest.raises(UnknownAdapter) as caught:
            registrar.store.resolve("default", name)
        assert caught.value.name == name


def test_leases(registrar: Registrar) -> None:
    store = registrar.store
    one, two = registrar.add("one", 1), registrar.add("two", 2, tenant="alice")
    same = registrar.add("same", 1, tenant="alice")
    assert same.digest == one.digest
    lease = store.lease([one.digest, two.digest])
    other = store.lease([same.digest])
    assert lease.paths == {one.digest: one.path, two.digest: two.path}
    assert (store.leases(one.digest), store.leases(two.digest)) == (2, 1)
    store.check_integrity()
    store.release(lease)
    assert (store.leases(one.digest), store.leases(two.digest)) == (1, 0)
    with pytest.raises(RuntimeError, match="already"):
        store.release(lease)
    with pytest.raises(UnknownAdapter):
        store.lease([one.digest, "f" * 64])
    store.check_integrity()
    store.release(other)
    assert store.leases(one.digest) == 0
    store.check_integrity()


def test_integrity_notices_a_wrong_count(registrar: Registrar) -> None:
    adapter = registrar.add("one", 1)
    registrar.store.lease([adapter.digest])
    registrar.store._counts[adapter.digest] += 1
    with pytest.raises(RuntimeError, match="differ"):
        registrar.store.check_integrity()
