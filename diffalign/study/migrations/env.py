"""Run by alembic: migrates the database whose connection is handed over."""

from __future__ import annotations

from alembic import context

from diffalign.study.schema import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
