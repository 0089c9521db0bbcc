"""Prototypes in the registry: for names that are there and have these texts, in an order that misses nothing."""

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from adapters_store.registry import (
    DEFAULT_TENANT,
    InvalidValue,
    NewPrototype,
    Registry,
    TextsRow,
    open_engine,
    source_of,
)
from tests.adapters_store.registered import MakeUrl, adapter, parallel

ENCODER = "0123456789abcdef"


def vectors(count: int, seed: float = 0.0) -> bytes:
    return (np.arange(count * 3, dtype="<f4") + np.float32(seed)).tobytes()


def new(tenant: str, name: str, *texts: str, count: int = 1, encoder: str = ENCODER) -> NewPrototype:
    return NewPrototype(tenant, name, encoder, source_of(texts), vectors(count), count, 3)


def put(registry: Registry, tenant: str, name: str, *texts: str, count: int = 1, encoder: str = ENCODER) -> int | None:
    each = new(tenant, name, *texts, count=count, encoder=encoder)
    return registry.prototypes.put(tenant, name, encoder, each.source, each.vectors, count, 3)


class TestTexts:
    def test_samples_come_before_the_description(self) -> None:
        row = TextsRow("t", "n", ("one", " ", "two"), "what it does", False, None)
        assert row.texts == ("one", "two")
        assert replace(row, samples=(" ",)).texts == ("what it does",)
        assert replace(row, samples=(), description=" \n").texts == ()
        assert row.source == source_of(("one", "two"))

    def test_sources_tell_texts_apart(self) -> None:
        lists = [(), ("",), ("", ""), ("ab",), ("a", "b"), ("b", "a"), ("ü",)]
        assert len({source_of(each) for each in lists}) == len(lists)


class TestPut:
    def test_what_is_stored_is_read_back(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), samples=["x", "y"], public=True)
        version = put(registry, "acme", "sql", "x", "y", count=2)
        (row,) = registry.prototypes.changed(ENCODER, 0)
        assert (row.tenant, row.name, row.public, row.encoder) == ("acme", "sql", True, ENCODER)
        assert (row.source, row.vectors, row.count, row.width) == (source_of(("x", "y")), vectors(2), 2, 3)
        assert row.version == version == registry.prototypes.version()
        assert registry.prototypes.get("acme", "sql", ENCODER) == row
        assert registry.prototypes.get("acme", "sql", "other") is None

    def test_only_names_with_these_texts_get_prototypes(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), samples=["x"])
        registry.register("acme", "going", adapter("a"), samples=["x"])
        registry.removals.mark("acme", "going")
        assert put(registry, "acme", "sql", "of before") is None
        assert put(registry, "acme", "none", "x") is None
        assert put(registry, "umbrella", "sql", "x") is None
        assert put(registry, "acme", "going", "x") is None
        assert registry.prototypes.changed(ENCODER, 0) == []
        assert registry.prototypes.version() == 0

    def test_many_at_once(self, registry: Registry) -> None:
        for name in ("a", "b"):
            registry.register("acme", name, adapter("a"), description=name)
        done = registry.prototypes.put_many([new("acme", name, name) for name in ("b", "gone", "a")])
        assert done == {("acme", "b"): 1, ("acme", "a"): 2}
        assert [row.name for row in registry.prototypes.changed(ENCODER, 0)] == ["b", "a"]
        assert registry.prototypes.put_many([]) == {}

    @pytest.mark.parametrize(("count", "width", "size"), [(1, 3, 11), (0, 3, 0), (2, 3, 12), (1, -1, 4)])
    def test_vectors_of_another_size_are_refused(self, registry: Registry, count: int, width: int, size: int) -> None:
        registry.register("acme", "sql", adapter("a"), samples=["x"])
        with pytest.raises(InvalidValue, match=f"{size} bytes: expected {count} x {width} float32"):
            registry.prototypes.put("acme", "sql", ENCODER, source_of(("x",)), bytes(size), count, width)

    def test_parallel_writes_get_versions_of_their_own(self, registry: Registry) -> None:
        for index in range(8):
            registry.register("acme", f"n{index}", adapter("a"), description="d")
        versions = parallel(16, lambda index: put(registry, "acme", f"n{index % 8}", "d"))
        assert sorted(versions) == list(range(1, 17))  # type: ignore[type-var]
        assert registry.prototypes.version() == 16
        assert len(registry.prototypes.changed(ENCODER, 8)) >= 1
        assert registry.prototypes.count(ENCODER) == 8

    def test_writes_beside_removals_end(self, registry: Registry) -> None:
        def churn(index: int) -> None:
            name = f"n{index % 4}"
            registry.register("acme", name, adapter("a"), description="d", replace=True, public=bool(index % 3))
            registry.prototypes.put_many([new("acme", f"n{each}", "d") for each in (3, 1, 0, 2)])
            registry.removals.remove("acme", name)

        errors = [error for error in parallel(24, churn) if error is not None]
        assert {type(error).__name__ for error in errors} <= {"NotFound"}
        assert registry.prototypes.count(ENCODER) == len(registry.list("acme").items)


class TestChanges:
    def test_they_come_in_order_and_in_parts(self, registry: Registry) -> None:
        for name in "abc":
            registry.register("acme", name, adapter("a"), description="d")
            put(registry, "acme", name, "d")
        put(registry, "acme", "a", "d", count=2)
        first = registry.prototypes.changed(ENCODER, 0, limit=2)
        rest = registry.prototypes.changed(ENCODER, first[-1].version, limit=2)
        assert [(row.name, row.count) for row in (*first, *rest)] == [("b", 1), ("c", 1), ("a", 2)]
        assert registry.prototypes.changed(ENCODER, rest[-1].version) == []

    def test_who_may_use_a_name_is_a_change(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), description="d")
        last = put(registry, "acme", "sql", "d")
        other = put(registry, "acme", "sql", "d", encoder="other")
        assert last is not None
        assert other is not None
        registry.update("acme", "sql", tags=["t"])
        assert registry.prototypes.version() == other
        registry.update("acme", "sql", public=True)
        (row,) = registry.prototypes.changed(ENCODER, other)
        assert row.public
        registry.register("acme", "sql", adapter("b"), public=False, replace=True)
        (row,) = registry.prototypes.changed(ENCODER, row.version)
        assert not row.public
        assert [each.public for each in registry.prototypes.changed("other", other)] == [False]

    def test_removals_are_seen(self, registry: Registry) -> None:
        prototypes = registry.prototypes
        for name in "abc":
            registry.register("acme", name, adapter("a"), description="d")
            put(registry, "acme", name, "d")
        versions = [prototypes.version()]
        registry.removals.mark("acme", "a")
        assert prototypes.keys(ENCODER)[1] == {("acme", "b"), ("acme", "c")}
        assert prototypes.get("acme", "a", ENCODER) is None
        versions.append(prototypes.version())
        registry.removals.mark("acme", "a", deleting=False)
        assert [row.name for row in prototypes.changed(ENCODER, versions[-1])] == ["a"]
        versions.append(prototypes.version())
        registry.removals.remove("acme", "a")
        versions.append(prototypes.version())
        prototypes.remove("acme", "b", ENCODER)
        versions.append(prototypes.version())
        assert prototypes.keys(ENCODER) == (versions[-1], {("acme", "c")})
        prototypes.remove("acme", "b", ENCODER)
        assert prototypes.forget("other") == 0
        assert prototypes.version() == versions[-1]
        assert prototypes.forget(ENCODER) == 1
        versions.append(prototypes.version())
        assert versions == sorted(set(versions))
        assert prototypes.count(ENCODER) == 0

    def test_a_name_that_comes_again_has_none(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), description="d")
        put(registry, "acme", "sql", "d")
        registry.removals.remove("acme", "sql")
        registry.register("acme", "sql", adapter("a"), description="d")
        assert registry.prototypes.changed(ENCODER, 0) == []


class TestMissing:
    def test_names_without_prototypes_of_their_texts(self, registry: Registry) -> None:
        registry.register("acme", "done", adapter("a"), samples=["x"])
        put(registry, "acme", "done", "x")
        registry.register("acme", "other-encoder", adapter("a"), samples=["x"])
        put(registry, "acme", "other-encoder", "x", encoder="other")
        registry.register("acme", "changed", adapter("a"), samples=["x"], description="d")
        put(registry, "acme", "changed", "x")
        registry.update("acme", "changed", samples=["y", "z"])
        registry.register("acme", "silent", adapter("a"))
        registry.register("acme", "going", adapter("a"), samples=["x"])
        registry.removals.mark("acme", "going")
        registry.register("umbrella", "described", adapter("a"), description="d", public=True)
        found = registry.prototypes.missing(ENCODER)
        assert found.next is None
        assert [(row.tenant, row.name, row.texts, row.public) for row in found.items] == [
            ("acme", "changed", ("y", "z"), False),
            ("acme", "other-encoder", ("x",), False),
            ("umbrella", "described", ("d",), True),
        ]
        assert registry.prototypes.texts("acme", "changed", ENCODER) == found.items[0]
        assert found.items[0].stored == source_of(("x",))
        assert registry.prototypes.texts("acme", "none", ENCODER) is None
        assert registry.prototypes.texts("acme", "going", ENCODER) is None

    def test_pages(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adapters_store.registry.prototypes._SCANNED", 2)
        for tenant in (DEFAULT_TENANT, "acme"):
            for index in range(5):
                registry.register(tenant, f"n{index}", adapter("a"), description="d" if index != 2 else "")
        cursor, seen = None, []
        for _ in range(10):
            page = registry.prototypes.missing(ENCODER, 3, cursor)
            seen += [(row.tenant, row.name) for row in page.items]
            assert len(page.items) <= 3
            cursor = page.next
            if cursor is None:
                break
        assert seen == [(tenant, f"n{index}") for tenant in ("acme", DEFAULT_TENANT) for index in (0, 1, 3, 4)]


def test_an_older_database_is_upgraded(make_url: MakeUrl) -> None:
    url = make_url()
    registry = Registry.open(url, lambda: 1.0)
    registry.register(DEFAULT_TENANT, "sql", adapter("a"), samples=["x"])
    registry.close()
    engine = open_engine(url)
    with engine.begin() as connection:
        for table in ("prototypes", "budgets", "places", "usage_writers"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    registry = Registry.open(url, lambda: 1.0)
    assert [row.name for row in registry.prototypes.missing(ENCODER).items] == ["sql"]
    assert put(registry, DEFAULT_TENANT, "sql", "x") == 1
    registry.close()


def test_the_search_for_changes_uses_its_index(sqlite_template: Path, tmp_path: Path) -> None:
    shutil.copy(sqlite_template, tmp_path / "registry.db")
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        question = "SELECT * FROM prototypes WHERE encoder = 'e' AND version > 5 ORDER BY version LIMIT 9"
        (plan,) = connection.execute(f"EXPLAIN QUERY PLAN {question}").fetchall()
    connection.close()
    assert "USING INDEX prototypes_encoder_version_index" in plan[3]
