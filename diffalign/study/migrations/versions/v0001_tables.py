"""The tables of a study."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ACTIVE = sa.text("state IN ('open', 'done')")
VOTES = sa.text("undoes IS NULL")


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer(), primary_key=True)


def _to(table: str, name: str | None = None, *, nullable: bool = False, unique: bool = False) -> sa.Column[int]:
    key = sa.ForeignKey(f"{table}.id")
    return sa.Column(name or f"{table}_id", sa.Integer(), key, nullable=nullable, unique=unique)


def upgrade() -> None:
    """Makes them all."""
    op.create_table(
        "study",
        _id(),
        sa.Column("uid", sa.String(32), nullable=False, unique=True),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("seed", sa.String(20), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "protocol",
        _id(),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "rater",
        _id(),
        sa.Column("name", sa.Text(), nullable=False, unique=True),
        sa.Column("pseudonym", sa.String(16), nullable=False, unique=True),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    _material()
    _work()
    _record()


def _material() -> None:
    op.create_table(
        "item",
        _id(),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("negative", sa.Text(), nullable=False),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.CheckConstraint("kind IN ('image', 'text')", name="item_kind"),
    )
    op.create_table(
        "sample",
        _id(),
        _to("item"),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("seed", sa.String(24), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=False),
    )
    op.create_index("ix_sample_item_id", "sample", ["item_id"])
    op.create_table(
        "pair",
        _id(),
        _to("item"),
        _to("sample", "first_id"),
        _to("sample", "second_id"),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("expected", sa.String(8)),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("taken", sa.Integer(), nullable=False),
        sa.Column("flagged", sa.Boolean(), nullable=False),
        sa.CheckConstraint("kind IN ('ordinary', 'gold', 'aa')", name="pair_kind"),
        sa.CheckConstraint("(kind = 'gold') = (expected IS NOT NULL)", name="pair_expected"),
        sa.CheckConstraint("taken >= 0", name="pair_taken"),
    )
    op.create_index("pair_queue", "pair", ["kind", "flagged", "taken", "place"])


def _work() -> None:
    op.create_table(
        "assignment",
        _id(),
        sa.Column("token", sa.String(32), nullable=False, unique=True),
        _to("pair"),
        _to("rater"),
        _to("protocol"),
        sa.Column("repeat", sa.Boolean(), nullable=False),
        sa.Column("first_is_left", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("claimed_at", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.CheckConstraint("state IN ('open', 'done', 'skipped', 'expired', 'flagged')", name="assignment_state"),
    )
    op.create_index("ix_assignment_pair_id", "assignment", ["pair_id"])
    op.create_index("assignment_by_rater", "assignment", ["rater_id", "state"])
    op.create_index("assignment_lease", "assignment", ["state", "lease_until"])
    op.create_index(
        "assignment_once",
        "assignment",
        ["rater_id", "pair_id", "repeat"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )


def _record() -> None:
    op.create_table(
        "vote",
        _id(),
        _to("assignment"),
        sa.Column("revision", sa.Integer(), nullable=False),
        _to("vote", "undoes", nullable=True, unique=True),
        sa.Column("choice", sa.String(12)),
        sa.Column("strength", sa.Integer()),
        sa.Column("answers", sa.JSON(), nullable=False),
        sa.Column("points", sa.JSON(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("shown_at", sa.Float()),
        sa.Column("decided_at", sa.Float()),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("protocol_sha256", sa.String(64), nullable=False),
        sa.CheckConstraint("(undoes IS NULL) = (choice IS NOT NULL)", name="vote_or_undo"),
        sa.CheckConstraint("choice IN ('left', 'right', 'tie_good', 'tie_bad', 'cannot_judge')", name="vote_choice"),
        sa.CheckConstraint("strength BETWEEN 1 AND 3", name="vote_strength"),
    )
    op.create_index(
        "vote_once", "vote", ["assignment_id", "revision"], unique=True, sqlite_where=VOTES, postgresql_where=VOTES
    )
    op.create_table(
        "event",
        _id(),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        _to("rater", nullable=True),
        _to("assignment", nullable=True),
        sa.Column("data", sa.JSON(), nullable=False),
    )
