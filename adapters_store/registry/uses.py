"""How often, and when last, each tenant used a name."""

from collections.abc import Iterable
from dataclasses import asdict, replace

from sqlalchemy import case

from adapters_store.registry.database import Database, insert
from adapters_store.registry.names import existing
from adapters_store.registry.rows import Use
from adapters_store.registry.schema import uses


class Uses:
    """Counters of requests; `views` shows them beside the names."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def touch(self, batch: Iterable[Use]) -> None:
        """Count requests on adapters. Names that are gone meanwhile are left out."""
        merged: dict[tuple[str, str, str], Use] = {}
        for use in batch:
            key = use.owner, use.name, use.tenant
            old = merged.get(key, replace(use, requests=0))
            last_used = max(old.last_used, use.last_used)
            merged[key] = replace(use, requests=old.requests + use.requests, last_used=last_used)
        if not merged:
            return
        with self._database.write("touch") as connection:
            known = existing(connection, sorted({(owner, name) for owner, name, _ in merged}))
            rows = [asdict(merged[key]) for key in sorted(merged) if key[:2] in known]
            statement = insert(connection, uses)
            new = statement.excluded
            later = case((new.last_used > uses.c.last_used, new.last_used), else_=uses.c.last_used)
            changes = {"requests": uses.c.requests + new.requests, "last_used": later}
            if rows:
                connection.execute(statement.on_conflict_do_update(index_elements=uses.primary_key, set_=changes), rows)
