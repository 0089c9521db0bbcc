"""Databases of the registry: their migrations, settings and URLs."""

from pathlib import Path
from threading import Barrier

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, text

from adapters_store.registry import DEFAULT_TENANT, OtherBaseModel, Registry, SchemaTooNew, open_engine
from adapters_store.registry.schema import metadata
from tests.adapters_store.registered import MakeUrl, parallel


def read_mode(engine: Engine, together: Barrier) -> object:
    together.wait()
    with engine.connect() as connection:
        return connection.exec_driver_sql("PRAGMA journal_mode").scalar()


class TestSchema:
    def test_migrations_make_the_tables_of_the_schema(self, make_url: MakeUrl) -> None:
        url = make_url(empty=True)
        Registry.open(url, lambda: 0.0).close()
        engine = open_engine(url)
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        engine.dispose()

    def test_several_servers_start_at_once(self, make_url: MakeUrl) -> None:
        url = make_url(empty=True)
        opened = parallel(4, lambda _: Registry.open(url, lambda: 0.0))
        assert [type(each) for each in opened] == [Registry] * 4
        for each in opened:
            assert isinstance(each, Registry)
            assert [row.id for row in each.accounts.list().items] == [DEFAULT_TENANT]
            each.close()

    def test_connections_to_a_new_file_wait_for_each_other(self, tmp_path: Path) -> None:
        together = Barrier(8)
        for round_ in range(100):  # SQLite refuses some in one round of twenty, if nobody waits
            engines = [open_engine(f"sqlite:///{tmp_path / str(round_)}.db") for _ in range(8)]
            modes = parallel(8, lambda index, engines=engines: read_mode(engines[index], together))
            assert modes == ["wal"] * 8
            for engine in engines:
                engine.dispose()

    def test_a_newer_schema_is_refused(self, make_url: MakeUrl) -> None:
        url = make_url()
        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        engine.dispose()
        with pytest.raises(SchemaTooNew, match="revision '9999', unknown to this version: expected a newer loramux"):
            Registry.open(url, lambda: 0.0)

    def test_a_registry_belongs_to_one_base_model(self, make_url: MakeUrl) -> None:
        url = make_url()
        one, other = (Registry.open(url, lambda: 0.0) for _ in range(2))
        ids = parallel(8, lambda index: (one, other)[index % 2].claim("model", f"id-{index}"))
        assert len(set(ids)) == 1
        assert other.claim("model", "later") == ids[0]
        with pytest.raises(OtherBaseModel, match="expected another --database-url or --data-dir"):
            one.claim("another model", "id")
        one.close()
        other.close()

    def test_sqlite_syncs_every_commit_and_checks_foreign_keys(self, tmp_path: Path) -> None:
        engine = open_engine(f"sqlite:///{tmp_path / 'new' / 'registry.db'}")
        with engine.connect() as connection:
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            values = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() for pragma in pragmas]
        engine.dispose()
        assert values == ["wal", 2, 1, 30_000]

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("mysql://host/name", "scheme 'mysql': expected sqlite or postgresql"),
            ("registry.db", "malformed"),
            ("sqlite://", "names no file"),
            ("sqlite:///:memory:", "names no file"),
        ],
    )
    def test_other_databases_are_refused(self, url: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_engine(url)
