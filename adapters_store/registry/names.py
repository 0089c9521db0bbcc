"""Names of adapters: each is one tenant's and points to one digest."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, FromClause, and_, delete, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from adapters_store.registry.checks import check_text, must_exist
from adapters_store.registry.database import chunks, insert
from adapters_store.registry.errors import BeingDeleted, NameTaken, NotPermitted
from adapters_store.registry.schema import names, revisions, tags


def is_name(table: FromClause, tenant: "str | Column[Any]", name: "str | Column[Any]") -> ColumnElement[bool]:
    """Rows of `table` that belong to this tenant's name."""
    return and_(table.c.tenant == tenant, table.c.name == name)


def check_own(connection: Connection, tenant: str, name: str, may_be_public: bool = True) -> None:
    """Raises NotFound unless the tenant has this name, not being deleted; NotPermitted for a public one."""
    statement = select(names.c.public).where(is_name(names, tenant, name), ~names.c.deleting)
    row = must_exist(connection.execute(statement).first(), "adapter", name)
    if row.public and not may_be_public:
        raise NotPermitted(name)


def check_marked(connection: Connection, tenant: str, name: str) -> None:
    """Raises NotFound unless the tenant has this name, being deleted."""
    statement = select(names.c.name).where(is_name(names, tenant, name), names.c.deleting)
    must_exist(connection.execute(statement).first(), "adapter", name)


def existing(connection: Connection, pairs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which (tenant, name) exist; they cannot go before the transaction ends."""
    found: set[tuple[str, str]] = set()
    for some in chunks(pairs):
        these = tuple_(names.c.tenant, names.c.name).in_(some)
        statement = select(names.c.tenant, names.c.name).where(these).with_for_update(read=True, key_share=True)
        found |= {(row.tenant, row.name) for row in connection.execute(statement)}
    return found


def digests_of(connection: Connection, tenant: str, name: str) -> tuple[str, ...]:
    """The digests of a name's revisions, in order; empty if there is no such name."""
    statement = select(revisions.c.digest).where(is_name(revisions, tenant, name)).order_by(revisions.c.digest)
    return tuple(connection.execute(statement).scalars())


def insert_name(
    connection: Connection, tenant: str, name: str, digest: str, settings: Mapping[str, Any], now: float
) -> bool:
    """Whether the name was free; the unique constraints decide, also between parallel registrations."""
    defaults = {"public": False, "pinned": False, "description": "", "samples": [], "deleting": False}
    values = {"tenant": tenant, "name": name, "digest": digest, "created": now, **defaults, **settings}
    statement = insert(connection, names).values(values).on_conflict_do_nothing().returning(names.c.name)
    return connection.execute(statement).first() is not None


def check_free(connection: Connection, tenant: str, name: str, may_replace: bool, may_be_public: bool) -> str | None:
    """The digest that an own name points to and that a registration may move, None for a new name.

    Raises NameTaken, BeingDeleted, NotPermitted.
    """
    columns = names.c.digest, names.c.deleting, names.c.public
    row = connection.execute(select(*columns).where(is_name(names, tenant, name))).first()
    if row is None:
        return None
    if row.deleting:
        raise BeingDeleted(name)
    if not may_replace:
        raise NameTaken("adapter", f"adapter {name!r} exists: expected a new name, or `replace`")
    if row.public and not may_be_public:
        raise NotPermitted(name)
    return str(row.digest)


def move_name(
    connection: Connection, tenant: str, name: str, digest: str, may_replace: bool, may_be_public: bool
) -> str:
    """Move an existing name; returns the digest that it pointed to. Raises NameTaken, NotPermitted."""
    before = check_free(connection, tenant, name, may_replace, may_be_public)
    if before is None:
        raise _public_taken(name)
    connection.execute(update(names).where(is_name(names, tenant, name)).values(digest=digest))
    return before


def check_public(connection: Connection, tenant: str, name: str) -> None:
    """Raises NameTaken if another tenant has made the name public."""
    statement = select(names.c.name).where(names.c.name == name, names.c.public, names.c.tenant != tenant)
    if connection.execute(statement).first():
        raise _public_taken(name)


def given_settings(
    public: bool | None, pinned: bool | None, description: str | None, samples: Sequence[str] | None
) -> dict[str, Any]:
    """Columns of a name that are given. Raises InvalidValue."""
    check_text("description", description or "")
    for sample in samples or ():
        check_text("samples", sample)
    given = {"public": public, "pinned": pinned, "description": description}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return values if samples is None else values | {"samples": [*samples]}


def update_settings(connection: Connection, tenant: str, name: str, settings: Mapping[str, Any]) -> None:
    """Raises NameTaken for a public name that another tenant has made public."""
    if not settings:
        return
    try:
        connection.execute(update(names).where(is_name(names, tenant, name)).values(**settings))
    except IntegrityError as error:  # the only constraint on these columns: one public name
        raise _public_taken(name) from error


def check_tags(new: Sequence[str] | None) -> tuple[str, ...] | None:
    """Tags in order, each once. Raises InvalidValue."""
    if new is None:
        return None
    for tag in new:
        check_text("tags", tag)
    return tuple(sorted(set(new)))


def replace_tags(connection: Connection, tenant: str, name: str, new: Sequence[str] | None) -> None:
    """None keeps the tags that the name has."""
    if new is None:
        return
    connection.execute(delete(tags).where(is_name(tags, tenant, name)))
    if new:
        connection.execute(tags.insert(), [{"tenant": tenant, "name": name, "tag": tag} for tag in new])


def _public_taken(name: str) -> NameTaken:
    return NameTaken("adapter", f"a public adapter {name!r} exists: expected a new name")
