"""The ledger of use."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import date

from sqlalchemy import ColumnElement, Connection, delete, select, tuple_

from adapters_store.registry.database import Database, insert
from adapters_store.registry.errors import InvalidValue
from adapters_store.registry.page import Page, paginate
from adapters_store.registry.rows import UsageRow
from adapters_store.registry.schema import usage, usage_writers

_COUNTS = ("requests", "prompt_tokens", "generation_tokens")


class Ledger:
    """What tenants used of which adapter, by day."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, batch: Iterable[UsageRow], writer: str = "", number: int = 0) -> None:
        """Add to the ledger; from a named `writer`, whose batches have growing numbers from 1, each number once.

        So a batch may be sent again whose writer does not know what became of it.
        """
        merged: dict[tuple[date, str, str], UsageRow] = {}
        for row in batch:
            key = row.day, row.tenant, row.adapter
            old = merged.get(key, UsageRow(row.tenant, row.adapter, row.day, 0, 0, 0))
            counts = {each: getattr(old, each) + getattr(row, each) for each in _COUNTS}
            merged[key] = replace(row, **counts)
        if not merged:
            return
        with self._database.write("ledger.add") as connection:
            if writer and not _is_next(connection, writer, number):
                return
            statement = insert(connection, usage)
            sums = {each: usage.c[each] + statement.excluded[each] for each in _COUNTS}
            # In one order: servers that flush at the same time do not wait for each other in a circle.
            rows = [asdict(merged[key]) for key in sorted(merged)]
            connection.execute(statement.on_conflict_do_update(index_elements=usage.primary_key, set_=sums), rows)

    def leave(self, writer: str) -> None:
        """Forget the numbers of a writer, which sends nothing more."""
        with self._database.write("ledger.leave") as connection:
            connection.execute(delete(usage_writers).where(usage_writers.c.writer == writer))

    def read(
        self,
        tenant: str | None,
        *,
        since: date | None = None,
        until: date | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[UsageRow]:
        """The ledger of one tenant (None: of all) from `since` to `until`, both included, by day, tenant, adapter."""
        where: list[ColumnElement[bool]] = [] if tenant is None else [usage.c.tenant == tenant]
        if since is not None:
            where.append(usage.c.day >= since)
        if until is not None:
            where.append(usage.c.day <= until)
        if cursor is not None:
            where.append(tuple_(*usage.primary_key) > tuple_(*_usage_cursor(cursor)))
        statement = select(usage).where(*where).order_by(*usage.primary_key).limit(limit + 1)
        with self._database.read() as connection:
            rows = [UsageRow(**row._mapping) for row in connection.execute(statement)]
        return paginate(rows, limit, lambda row: f"{row.day.isoformat()}/{row.tenant}/{row.adapter}")


def _is_next(connection: Connection, writer: str, number: int) -> bool:
    """Whether the writer's batch is new. Then it is the last one from now on."""
    last = connection.scalar(select(usage_writers.c.batch).where(usage_writers.c.writer == writer))
    if last is not None and number <= last:
        return False
    row = insert(connection, usage_writers).values(writer=writer, batch=number)
    connection.execute(row.on_conflict_do_update(index_elements=usage_writers.primary_key, set_={"batch": number}))
    return True


def _usage_cursor(cursor: str) -> tuple[date, str, str]:
    try:
        day, tenant, adapter = cursor.split("/")
        return date.fromisoformat(day), tenant, adapter
    except ValueError:
        raise InvalidValue(f"cursor {cursor!r} is not one of this list's") from None
