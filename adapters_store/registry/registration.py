"""What a registration does beside its name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from sqlalchemy import Connection, func, select

from adapters_store.registry.database import insert
from adapters_store.registry.errors import QuotaExceeded
from adapters_store.registry.names import is_name
from adapters_store.registry.rows import AdapterRow, NamedAdapter, TenantRow
from adapters_store.registry.schema import adapters, names, revisions


class Outcome(StrEnum):
    """What a registration did to its name."""

    CREATED = "created"
    REVISED = "revised"
    SAME = "same"


@dataclass(frozen=True)
class Registration:
    """A registration that is done; `adapter` is as stored."""

    outcome: Outcome
    adapter: NamedAdapter


def insert_adapter(connection: Connection, adapter: AdapterRow, now: float) -> None:
    """The adapter of this digest exists and is locked after this, with the files of who came last.

    These are the same as before, unless the first ones were stored by a version that kept them as they came.
    """
    values = asdict(adapter) | {"targets": adapter.targets, "warnings": adapter.warnings, "created": now}
    statement = insert(connection, adapters).values(values)
    follows = ("alpha", "bytes", "warnings", "config_blob", "weights_blob")
    changed = {name: statement.excluded[name] for name in follows}
    connection.execute(statement.on_conflict_do_update(index_elements=adapters.primary_key, set_=changed))


def insert_revision(
    connection: Connection, tenant: str, name: str, digest: str, now: float, recipe: Mapping[str, object] | None = None
) -> bool:
    """Whether this digest is new among the revisions of the name."""
    of_name = is_name(revisions, tenant, name)
    if connection.execute(select(revisions.c.number).where(of_name, revisions.c.digest == digest)).first():
        return False
    last = connection.execute(select(func.max(revisions.c.number)).where(of_name)).scalar()
    values = {"tenant": tenant, "name": name, "number": (last or 0) + 1, "digest": digest, "created": now}
    connection.execute(revisions.insert().values(values | {"recipe": recipe}))
    return True


def check_quotas(connection: Connection, tenant: str, row: TenantRow, new_name: bool) -> None:
    """Raises QuotaExceeded for what the transaction has made of the tenant."""
    quotas = row.quotas
    if new_name and quotas.adapters is not None:
        count = connection.execute(select(func.count()).where(names.c.tenant == tenant)).scalar_one()
        if count > quotas.adapters:
            raise QuotaExceeded("adapters", quotas.adapters)
    if quotas.bytes is not None:
        theirs = adapters.c.digest.in_(select(revisions.c.digest).where(revisions.c.tenant == tenant))
        total = connection.execute(select(func.sum(adapters.c.bytes)).where(theirs)).scalar_one()
        if total > quotas.bytes:
            raise QuotaExceeded("bytes", quotas.bytes)


def check_room(
    connection: Connection, tenant: str, row: TenantRow, new_name: bool, digest: str | None, size: int
) -> None:
    """Raises QuotaExceeded for what one more adapter of `size` bytes would make of the tenant.

    Without a digest it is taken for one that the tenant does not have.
    """
    quotas = row.quotas
    if new_name and quotas.adapters is not None:
        count = connection.execute(select(func.count()).where(names.c.tenant == tenant)).scalar_one()
        if count + 1 > quotas.adapters:
            raise QuotaExceeded("adapters", quotas.adapters)
    if size and quotas.bytes is not None:
        own = select(revisions.c.digest).where(revisions.c.tenant == tenant)
        if digest and connection.execute(own.where(revisions.c.digest == digest)).first():
            return
        total = connection.execute(select(func.sum(adapters.c.bytes)).where(adapters.c.digest.in_(own))).scalar()
        if (total or 0) + size > quotas.bytes:
            raise QuotaExceeded("bytes", quotas.bytes)
