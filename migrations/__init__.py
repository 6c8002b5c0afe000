"""The history of the schema, as Alembic revisions. `persistence.migrate` runs them."""
