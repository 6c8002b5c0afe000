"""What Alembic runs for each command: the revisions, on the connection that `persistence.migrate` hands
over."""

from alembic import context

from persistence.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
