"""Tenants and their keys."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, Select, Text, cast, delete, func, select, update

from adapters_store.registry.checks import check_name, check_text, must_exist, seek_name
from adapters_store.registry.database import Database, insert
from adapters_store.registry.errors import InvalidValue, NameTaken, RegistryError
from adapters_store.registry.page import Page, paginate
from adapters_store.registry.rows import KeyRow, Quotas, TenantRow
from adapters_store.registry.schema import identity, keys, names, tenants, uses

DEFAULT_TENANT = "default"
_VERSION = "accounts"


class Accounts:
    """Tenants and their keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def version(self) -> str:
        """Another one after every change of a tenant or a key: who has read both need not read them again before."""
        with self._database.read() as connection:
            return connection.execute(select(identity.c.value).where(identity.c.key == _VERSION)).scalar() or ""

    def add(self, tenant: TenantRow) -> TenantRow:
        """Create a tenant; `created` is set here. Raises InvalidValue, NameTaken."""
        check_name("tenant", tenant.id)
        tenant = replace(tenant, created=self._database.clock())
        with self._database.write("add_tenant") as connection:
            statement = insert(connection, tenants).values(tenant_values(tenant)).on_conflict_do_nothing()
            if connection.execute(statement.returning(tenants.c.id)).first() is None:
                raise NameTaken("tenant", f"tenant {tenant.id!r} exists: expected a new id")
            count_change(connection)
        return tenant

    def get(self, tenant: str) -> TenantRow:
        """Raises NotFound."""
        seek_name("tenant", tenant)
        with self._database.read() as connection:
            return read_tenant(connection, tenant)

    def list(self, *, limit: int = 100, cursor: str | None = None) -> Page[TenantRow]:
        """All tenants by id."""
        after = tenants.c.id > (cursor or "")
        statement = select(tenants).where(after).order_by(tenants.c.id).limit(limit + 1)
        with self._database.read() as connection:
            rows = [_tenant_row(row) for row in connection.execute(statement)]
        return paginate(rows, limit, lambda row: row.id)

    def update(self, tenant: str, change: Callable[[TenantRow], TenantRow]) -> TenantRow:
        """Replace a tenant's row by `change` of it, id and creation excepted. Raises NotFound."""
        seek_name("tenant", tenant)
        with self._database.write("update_tenant") as connection:
            old = lock_tenant(connection, tenant)
            new = replace(change(old), id=old.id, created=old.created)
            connection.execute(update(tenants).where(tenants.c.id == tenant).values(tenant_values(new)))
            count_change(connection)
        return new

    def remove(self, tenant: str) -> None:
        """Delete a tenant without adapters, and its keys; its ledger stays.

        Raises NotFound, InvalidValue for the built-in tenant, NameTaken (`tenant_in_use`) while it has adapters.
        """
        seek_name("tenant", tenant)
        if tenant == DEFAULT_TENANT:
            raise InvalidValue(f"tenant {tenant!r} is built in: expected another one")
        with self._database.write("remove_tenant") as connection:
            lock_tenant(connection, tenant)
            if connection.execute(select(names.c.name).where(names.c.tenant == tenant).limit(1)).first():
                raise RegistryError("tenant_in_use", f"tenant {tenant!r} has adapters: delete them first", 409)
            connection.execute(delete(uses).where(uses.c.tenant == tenant))
            connection.execute(delete(tenants).where(tenants.c.id == tenant))
            count_change(connection)

    def add_key(self, key: KeyRow) -> KeyRow:
        """Store a key; `created` is set here. Raises NotFound for the tenant, NameTaken, InvalidValue."""
        check_name("key", key.id)
        check_text("label", key.label)
        key = replace(key, created=self._database.clock(), revoked=None)
        with self._database.write("add_key") as connection:
            lock_tenant(connection, key.tenant)
            statement = insert(connection, keys).values(asdict(key)).on_conflict_do_nothing()
            if connection.execute(statement.returning(keys.c.id)).first() is None:
                raise NameTaken("key", f"key {key.id!r} exists: expected a new id")
            count_change(connection)
        return key

    def keys(self, tenant: str) -> tuple[KeyRow, ...]:
        """The keys of one tenant, revoked ones too, oldest first."""
        statement = select(keys).where(keys.c.tenant == tenant).order_by(keys.c.created, keys.c.id)
        with self._database.read() as connection:
            return tuple(KeyRow(**row._mapping) for row in connection.execute(statement))

    def active_keys(self) -> tuple[KeyRow, ...]:
        """The keys of all tenants that are not revoked, by id."""
        with self._database.read() as connection:
            statement = select(keys).where(keys.c.revoked.is_(None)).order_by(keys.c.id)
            return tuple(KeyRow(**row._mapping) for row in connection.execute(statement))

    def revoke_key(self, tenant: str, key: str) -> KeyRow:
        """Revoke one key of a tenant; doing so twice keeps the first time. Raises NotFound."""
        seek_name("key", key)
        with self._database.write("revoke_key") as connection:
            when = func.coalesce(keys.c.revoked, self._database.clock())
            this = keys.c.id == key, keys.c.tenant == tenant
            row = connection.execute(update(keys).where(*this).values(revoked=when).returning(keys)).first()
            revoked = KeyRow(**must_exist(row, "key", key)._mapping)
            count_change(connection)
        return revoked


def lock_tenant(connection: Connection, tenant: str) -> TenantRow:
    """Until the transaction ends nobody else changes this tenant's adapters. Raises NotFound."""
    statement = _tenant_statement(tenant).with_for_update(key_share=True)
    return _tenant_row(must_exist(connection.execute(statement).first(), "tenant", tenant))


def read_tenant(connection: Connection, tenant: str) -> TenantRow:
    """Raises NotFound."""
    return _tenant_row(must_exist(connection.execute(_tenant_statement(tenant)).first(), "tenant", tenant))


def count_change(connection: Connection) -> None:
    """Last in its transaction, since all changes of accounts wait for one another here."""
    statement = insert(connection, identity).values(key=_VERSION, value="1")
    more = cast(cast(identity.c.value, BigInteger) + 1, Text)
    connection.execute(statement.on_conflict_do_update(index_elements=identity.primary_key, set_={"value": more}))


def _tenant_statement(tenant: str) -> Select[Any]:
    return select(tenants).where(tenants.c.id == tenant)


def _tenant_row(row: Row[Any]) -> TenantRow:
    quotas = Quotas(**{each.name: getattr(row, each.name) for each in fields(Quotas)})
    return TenantRow(row.id, row.weight, quotas, row.default_router, row.created)


def tenant_values(tenant: TenantRow) -> dict[str, Any]:
    values: dict[str, Any] = {"id": tenant.id, "weight": tenant.weight, "default_router": tenant.default_router}
    return values | {"created": tenant.created} | asdict(tenant.quotas)
