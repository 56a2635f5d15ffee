"""Sessions, adjudication, counts by contest for active selection, and the hash chain of events."""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy as sa
from alembic import op

from diffalign.study.chain import START, digest

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ACTIVE = "state IN ('open', 'done')"
DISPUTED = sa.text("for_first > 0 AND for_second > 0")


def upgrade() -> None:
    """Adds them, and counts and chains what is there."""
    op.create_table(
        "session",
        sa.Column("id_sha256", sa.String(64), primary_key=True),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_session_expires_at", "session", ["expires_at"])
    _contests()
    _assignments()
    op.create_index("ix_vote_assignment_id", "vote", ["assignment_id"])
    _chain()


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, server_default="0")


def _contests() -> None:
    op.create_table(
        "contest",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("first_arm", sa.Text(), nullable=False),
        sa.Column("second_arm", sa.Text(), nullable=False),
        *(_number(name) for name in ("given", "for_first", "for_second", "ties")),
    )
    # In plain SQL: SQLite adds no constraint to a table that is there, but a column with one.
    op.execute("ALTER TABLE pair ADD COLUMN contest_id INTEGER REFERENCES contest (id)")
    for name in ("for_first", "for_second", "ties"):
        op.add_column("pair", _number(name))
    op.create_index("pair_contest", "pair", ["contest_id", "flagged", "taken", "place"])
    op.create_index("pair_disputed", "pair", ["place"], sqlite_where=DISPUTED, postgresql_where=DISPUTED)
    connection = op.get_bind()
    meets = "FROM pair JOIN sample one ON one.id = pair.first_id JOIN sample two ON two.id = pair.second_id"
    arms = f"SELECT DISTINCT one.arm, two.arm {meets} WHERE pair.kind = 'ordinary' ORDER BY one.arm, two.arm"
    for number, (first, second) in enumerate(connection.execute(sa.text(arms)).all(), 1):
        connection.execute(
            sa.text("INSERT INTO contest (id, first_arm, second_arm) VALUES (:id, :first, :second)"),
            {"id": number, "first": first, "second": second},
        )
    connection.execute(
        sa.text(
            "UPDATE pair SET contest_id = (SELECT contest.id FROM contest, sample one, sample two"
            " WHERE one.id = pair.first_id AND two.id = pair.second_id"
            " AND contest.first_arm = one.arm AND contest.second_arm = two.arm) WHERE kind = 'ordinary'"
        )
    )
    _count(connection)


def _count(connection: sa.Connection) -> None:
    live = sa.text(
        "SELECT assignment.pair_id, assignment.first_is_left, vote.choice FROM vote"
        " JOIN assignment ON assignment.id = vote.assignment_id"
        " JOIN pair ON pair.id = assignment.pair_id AND pair.kind = 'ordinary'"
        " WHERE vote.undoes IS NULL AND NOT assignment.repeat"
        " AND NOT EXISTS (SELECT 1 FROM vote undo WHERE undo.undoes = vote.id)"
    )
    for pair, first_is_left, choice in connection.execute(live).all():
        if choice == "cannot_judge":
            continue
        first = "for_first" if first_is_left else "for_second"
        second = "for_second" if first_is_left else "for_first"
        column = {"left": first, "right": second}.get(choice, "ties")
        connection.execute(sa.text(f"UPDATE pair SET {column} = {column} + 1 WHERE id = :pair"), {"pair": pair})
    for column, of_pair in (("given", "taken"), *((name, name) for name in ("for_first", "for_second", "ties"))):
        connection.execute(
            sa.text(
                f"UPDATE contest SET {column} = (SELECT coalesce(sum(pair.{of_pair}), 0) FROM pair"
                " WHERE pair.contest_id = contest.id AND NOT pair.flagged)"
            )
        )


def _assignments() -> None:
    op.add_column("assignment", sa.Column("adjudication", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("assignment", sa.Column("chosen", sa.String(8), nullable=False, server_default="random"))
    op.execute(
        "UPDATE assignment SET chosen = 'planned'"
        " WHERE repeat OR pair_id IN (SELECT id FROM pair WHERE kind <> 'ordinary')"
    )
    op.drop_index("assignment_once", "assignment")
    op.drop_index("assignment_by_rater", "assignment")
    op.create_index("assignment_by_rater", "assignment", ["rater_id", "state", "adjudication", "first_is_left"])
    for name, columns, where in (
        ("assignment_once", ["rater_id", "pair_id", "repeat", "adjudication"], ACTIVE),
        ("assignment_one_verdict", ["pair_id"], f"adjudication AND {ACTIVE}"),
    ):
        only = sa.text(where)
        op.create_index(name, "assignment", columns, unique=True, sqlite_where=only, postgresql_where=only)


def _chain() -> None:
    """Chains the events that are there. What was changed before cannot be seen any more, and an event says so."""
    connection = op.get_bind()
    sqlite = connection.dialect.name == "sqlite"
    op.execute("DROP TRIGGER event_no_update" if sqlite else "DROP TRIGGER event_append_only ON event")
    op.add_column("event", sa.Column("hash", sa.String(64), nullable=False, server_default=""))
    meta = sa.MetaData()
    event, vote, assignment = (
        sa.Table(name, meta, autoload_with=connection) for name in ("event", "vote", "assignment")
    )
    votes = {row["id"]: _plain(row) for row in connection.execute(sa.select(vote)).mappings()}
    undoing = {row["undoes"]: row for row in votes.values() if row["undoes"] is not None}
    given = {row["id"]: dict(row) for row in connection.execute(sa.select(assignment)).mappings()}
    last, number = START, 0
    for row in connection.execute(sa.select(event).order_by(event.c.id)).mappings().all():
        now = {**row, "data": _loaded(row["data"])}
        about = now["data"].get("vote")
        added = votes.get(about) if row["kind"] == "voted" else undoing.get(about) if row["kind"] == "undone" else None
        gave = given.get(row["assignment_id"]) if row["kind"] == "claimed" else None
        last, number = digest(last, now, added, gave), row["id"]
        connection.execute(sa.update(event).where(event.c.id == number).values(hash=last))
    if number:
        new: dict[str, Any] = {"id": number + 1, "at": time.time(), "kind": "chained", "data": {"until": number}}
        new |= {"rater_id": None, "assignment_id": None}
        connection.execute(sa.insert(event).values(**new, hash=digest(last, new, None, None)))
    if sqlite:
        op.execute(
            "CREATE TRIGGER event_no_update BEFORE UPDATE ON event"
            " BEGIN SELECT RAISE(ABORT, 'rows of event are only added'); END"
        )
    else:
        op.execute(
            "CREATE TRIGGER event_append_only BEFORE UPDATE OR DELETE ON event"
            " FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        )


def _plain(row: sa.RowMapping) -> dict[str, Any]:
    """A row of votes, as the store reads it: comments are JSON strings."""
    return {
        **row,
        "answers": _loaded(row["answers"]),
        "points": _loaded(row["points"]),
        "comment": json.loads(row["comment"]),
    }


def _loaded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
