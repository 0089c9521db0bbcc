"""Trained routers."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

from sqlalchemy import delete, select, update

from adapters_store.registry.accounts import count_change
from adapters_store.registry.checks import check_name, must_exist
from adapters_store.registry.database import Database, chunks, insert
from adapters_store.registry.errors import NameTaken
from adapters_store.registry.rows import RouterRow
from adapters_store.registry.schema import adapters, names, routers, tenants


class Routers:
    """The trained routers, which belong to no tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, router: RouterRow, *, replace_existing: bool = False) -> RouterRow:
        """Store a router; `created` is set here. Raises NameTaken unless it may be replaced, InvalidValue."""
        check_name("router", router.name)
        router = replace(router, created=self._database.clock())
        with self._database.write("add_router") as connection:
            if replace_existing:
                connection.execute(delete(routers).where(routers.c.name == router.name))
            statement = insert(connection, routers).values(asdict(router)).on_conflict_do_nothing()
            if connection.execute(statement.returning(routers.c.name)).first() is None:
                raise NameTaken("router", f"router {router.name!r} exists: expected a new name, or `replace`")
        return router

    def list(self) -> tuple[RouterRow, ...]:
        """All routers by name."""
        with self._database.read() as connection:
            return tuple(RouterRow(**row._mapping) for row in connection.execute(select(routers).order_by("name")))

    def meanings(self, wanted: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """The digests that names point to now, of any tenant; names that nobody has are absent."""
        found: dict[str, set[str]] = {}
        with self._database.read() as connection:
            for some in chunks(sorted(set(wanted))):
                statement = select(names.c.name, names.c.digest).where(names.c.name.in_(some), ~names.c.deleting)
                for row in connection.execute(statement):
                    found.setdefault(row.name, set()).add(row.digest)
        return {name: frozenset(digests) for name, digests in found.items()}

    def targets(self, digests: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        """The linears that adapters touch, by digest; unknown ones are absent."""
        with self._database.read() as connection:
            return {
                row.digest: tuple(row.targets)
                for some in chunks(sorted(set(digests)))
                for row in connection.execute(
                    select(adapters.c.digest, adapters.c.targets).where(adapters.c.digest.in_(some))
                )
            }

    def remove(self, name: str) -> None:
        """Forget a router, also as tenants' default. Raises NotFound."""
        with self._database.write("remove_router") as connection:
            gone = connection.execute(delete(routers).where(routers.c.name == name).returning(routers.c.name))
            must_exist(gone.first(), "router", name)
            changed = update(tenants).where(tenants.c.default_router == name).values(default_router=None)
            if connection.execute(changed.returning(tenants.c.id)).first() is not None:
                count_change(connection)
