"""Adapters as a tenant sees them: its own and the public ones."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, Row, Subquery, and_, exists, select, union_all

from adapters_store.registry.names import is_name
from adapters_store.registry.rows import AdapterRow, NamedAdapter, RevisionRow
from adapters_store.registry.schema import adapters, names, revisions, tags, uses

_KEY = (names.c.tenant, names.c.name)
MODEL = (*_KEY, names.c.digest, names.c.public, names.c.created)
"""The columns of a ModelRow."""


def visible(
    tenant: str, own: bool, cursor: str, limit: int | None, tag: str | None, columns: Sequence[Column[Any]] = _KEY
) -> Subquery:
    """`columns` of the first `limit` names after `cursor` that a tenant may use; None is no limit.

    Own and public names are limited each before they are merged, so that a page costs the same in a list of any length.
    """
    after = [names.c.name > cursor, ~names.c.deleting]
    if tag is not None:
        after.append(exists().where(is_name(tags, names.c.tenant, names.c.name), tags.c.tag == tag))
    mine = select(*columns).where(names.c.tenant == tenant, *after)
    mine = mine.order_by(names.c.name).limit(limit)
    if own:
        return mine.subquery("page")
    other = names.alias("other")
    hidden = exists().where(is_name(other, tenant, names.c.name), ~other.c.deleting)
    public = select(*columns).where(names.c.public, names.c.tenant != tenant, ~hidden, *after)
    public = public.order_by(names.c.name).limit(limit)
    both = union_all(select(mine.subquery("mine")), select(public.subquery("public"))).subquery("both")
    return select(both).order_by(both.c.name).limit(limit).subquery("page")


def load_one(connection: Connection, caller: str, tenant: str, name: str) -> NamedAdapter:
    wanted = select(names.c.tenant, names.c.name).where(is_name(names, tenant, name)).subquery("page")
    return load(connection, caller, wanted)[0]


def load(connection: Connection, caller: str, wanted: Subquery) -> list[NamedAdapter]:
    """The adapters of the (tenant, name) in `wanted`, by name, with the counters of `caller`.

    Of other tenants' names, it sees the current revision only.
    """
    history: dict[tuple[str, str], list[RevisionRow]] = defaultdict(list)
    this = wanted.c.tenant == revisions.c.tenant, wanted.c.name == revisions.c.name
    statement = select(revisions).join(wanted, and_(*this)).order_by(revisions.c.number)
    for row in connection.execute(statement):
        history[row.tenant, row.name].append(RevisionRow(row.number, row.digest, row.created, row.recipe))
    tagged: dict[tuple[str, str], list[str]] = defaultdict(list)
    this = wanted.c.tenant == tags.c.tenant, wanted.c.name == tags.c.name
    for row in connection.execute(select(tags).join(wanted, and_(*this)).order_by(tags.c.tag)):
        tagged[row.tenant, row.name].append(row.tag)
    counted = and_(uses.c.owner == names.c.tenant, uses.c.name == names.c.name, uses.c.tenant == caller)
    shown = [column for column in names.c if column is not names.c.samples]
    stored = [column.label(f"of_{column.name}") for column in adapters.c]
    rows = connection.execute(
        select(*shown, uses.c.requests, uses.c.last_used, *stored)
        .join(wanted, and_(wanted.c.tenant == names.c.tenant, wanted.c.name == names.c.name))
        .join(adapters, adapters.c.digest == names.c.digest)
        .outerjoin(uses, counted)
        .order_by(names.c.name)
    )
    return [_named(row, caller, history[row.tenant, row.name], tagged[row.tenant, row.name]) for row in rows]


def _named(
    row: Row[*tuple[Any, ...]], caller: str, history: Sequence[RevisionRow], tagged: Sequence[str]
) -> NamedAdapter:
    stored = {column.name: getattr(row, f"of_{column.name}") for column in adapters.c}
    stored |= {"targets": tuple(row.of_targets), "warnings": tuple(row.of_warnings)}
    return NamedAdapter(
        tenant=row.tenant,
        name=row.name,
        adapter=AdapterRow(**stored),
        public=row.public,
        pinned=row.pinned,
        description=row.description,
        tags=tuple(tagged),
        created=row.created,
        requests=row.requests or 0,
        last_used=row.last_used,
        revisions=tuple(each for each in history if caller == row.tenant or each.digest == row.digest),
    )
