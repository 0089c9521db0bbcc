"""Names that go: hidden first, removed when no request uses them any more."""

from sqlalchemy import delete, exists, select, update

from adapters_store.registry.accounts import lock_tenant
from adapters_store.registry.checks import seek_name
from adapters_store.registry.database import Database
from adapters_store.registry.errors import NotFound
from adapters_store.registry.names import check_marked, digests_of, is_name
from adapters_store.registry.prototypes import count_changes, has_prototypes, touch_prototypes
from adapters_store.registry.schema import adapters, names, revisions


class Removals:
    """Deletions of names, in two steps."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def mark(self, tenant: str, name: str, deleting: bool = True) -> tuple[str, ...]:
        """Hide a tenant's own name from every use, or show it again; returns the digests of its revisions.

        It stays taken until `remove`. Marking it twice is no error. Raises NotFound.
        """
        seek_name("adapter", name)
        with self._database.write("mark_deleting") as connection:
            changed = (
                update(names).where(is_name(names, tenant, name)).values(deleting=deleting).returning(names.c.name)
            )
            if connection.execute(changed).first() is None:
                raise NotFound("adapter", name)
            touch_prototypes(connection, tenant, name)
            return digests_of(connection, tenant, name)

    def marked(self) -> tuple[tuple[str, str], ...]:
        """(tenant, name) of what was marked and not yet removed: a server finishes it when it starts."""
        with self._database.read() as connection:
            statement = select(names.c.tenant, names.c.name).where(names.c.deleting).order_by(*names.primary_key)
            return tuple((row.tenant, row.name) for row in connection.execute(statement))

    def remove(self, tenant: str, name: str, *, only_marked: bool = False) -> tuple[str, ...]:
        """Forget a tenant's own name; returns the digests that nobody has under any name now.

        Raises NotFound, with `only_marked` also for a name that is not being deleted: it is another one by now.
        """
        seek_name("adapter", name)
        with self._database.write("remove") as connection:
            lock_tenant(connection, tenant)
            if only_marked:
                check_marked(connection, tenant, name)
            digests = digests_of(connection, tenant, name)
            if not digests:
                raise NotFound("adapter", name)
            # Locked before the name goes, in the order of `register`: neither waits for the other in a circle.
            these = adapters.c.digest.in_(digests)
            connection.execute(select(adapters.c.digest).where(these).order_by(adapters.c.digest).with_for_update())
            was_routable = has_prototypes(connection, tenant, name)
            connection.execute(delete(names).where(is_name(names, tenant, name)))
            self._database.fault("remove.name")
            unused = ~exists().where(revisions.c.digest == adapters.c.digest)
            gone = connection.execute(delete(adapters).where(these, unused).returning(adapters.c.digest))
            digests = tuple(sorted(row.digest for row in gone))
            if was_routable:
                count_changes(connection, 1)
            return digests
