"""Whose registry a database holds."""

from sqlalchemy import Connection, select

from adapters_store.registry.database import insert
from adapters_store.registry.errors import OtherBaseModel
from adapters_store.registry.schema import identity


def claim(connection: Connection, base_model: str, new_id: str) -> str:
    """The registry's id, which is `new_id` if it had none. Raises OtherBaseModel."""
    rows = [{"key": "base_model", "value": base_model}, {"key": "registry", "value": new_id}]
    connection.execute(insert(connection, identity).values(rows).on_conflict_do_nothing())
    found = {row.key: row.value for row in connection.execute(select(identity))}
    if found["base_model"] != base_model:
        raise OtherBaseModel
    return str(found["registry"])
