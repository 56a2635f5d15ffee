"""Versions of the schema (alembic). A new one is a module in ``versions``; an old one is never changed."""
