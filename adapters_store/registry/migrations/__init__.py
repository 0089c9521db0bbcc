"""The steps of the registry's schema, which Alembic takes."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, select

_LOCK = 0x6C6F72616D7578
"""Key of PostgreSQL's advisory lock under which a schema changes."""


class SchemaTooNew(RuntimeError):
    """A database that a newer version has migrated."""


def migrate(connection: Connection) -> None:
    """Create or upgrade the schema in the connection's transaction; several processes may do so at once.

    Raises SchemaTooNew if the database is ahead of this version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    steps = ScriptDirectory.from_config(config)
    known = {step.revision for step in steps.walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise SchemaTooNew(
            f"the registry's schema is at revision {current!r}, unknown to this version: expected a newer loramux"
        )
    if current != steps.get_current_head():
        command.upgrade(config, "head")
