"""What Alembic runs: migrates the connection that the caller of its command has put into the configuration."""

from alembic import context

from adapters_store.registry.schema import metadata

connection = context.config.attributes["connection"]
# SQLite too rolls back DDL, given the explicit BEGIN that this connection sends.
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
