"""The tables of a study. What has happened is never changed: votes and events are only added.

::

    study ── protocol (versions)          item (prompt) ── sample (content by SHA-256, arm)
                                            └── pair (two samples)
    rater ── assignment (pair, side, lease, state) ── vote (a vote, or the undoing of one)
    event (who did what, when)

Times are seconds since 1970 (UTC). Texts that come from people are kept as JSON strings, so that any text, with zero
bytes and broken Unicode too, comes back as it was from every database.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

CHOICES = ("left", "right", "tie_good", "tie_bad", "cannot_judge")
ACTIVE = "state IN ('open', 'done')"


class AnyText(TypeDecorator[str]):
    """A text as an ASCII JSON string."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> str | None:
        """From the database."""
        return None if value is None else str(json.loads(value))


class Base(DeclarativeBase):
    """Of all tables."""


class StudyRow(Base):
    """The study; one row. Who chooses the next pair locks it where the database does not serialise writers itself."""

    __tablename__ = "study"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    uid: Mapped[str] = mapped_column(String(32), unique=True)
    title: Mapped[str] = mapped_column(AnyText)
    seed: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[float] = mapped_column(Float)


class ProtocolRow(Base):
    """A version of the protocol; the one with the highest id holds for new assignments."""

    __tablename__ = "protocol"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    text: Mapped[str] = mapped_column(AnyText)
    created_at: Mapped[float] = mapped_column(Float)


class ItemRow(Base):
    """A prompt."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(8))
    text: Mapped[str] = mapped_column(AnyText)
    prompt_id: Mapped[str] = mapped_column(AnyText)
    negative: Mapped[str] = mapped_column(AnyText)
    attributes: Mapped[dict[str, Any]] = mapped_column(JSON)

    __table_args__ = (CheckConstraint("kind IN ('image', 'text')", name="item_kind"),)


class SampleRow(Base):
    """An image or a text that was generated; its content is a file of the study named by its hash."""

    __tablename__ = "sample"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("item.id"), index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    arm: Mapped[str] = mapped_column(AnyText)
    """The model, or whatever is compared. Never shown to raters."""
    seed: Mapped[str] = mapped_column(String(24))
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON)


class PairRow(Base):
    """Two samples of one prompt."""

    __tablename__ = "pair"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("item.id"))
    first_id: Mapped[int] = mapped_column(ForeignKey("sample.id"))
    second_id: Mapped[int] = mapped_column(ForeignKey("sample.id"))
    kind: Mapped[str] = mapped_column(String(8))
    expected: Mapped[str | None] = mapped_column(String(8))
    """The known answer of a gold pair: first, second or tie."""
    place: Mapped[int] = mapped_column(Integer)
    """Its place in the random order in which pairs are given out."""
    taken: Mapped[int] = mapped_column(Integer, default=0)
    """Assignments that are open or done, repeats left out: kept here so that a claim need not count them."""
    flagged: Mapped[bool] = mapped_column(Boolean, default=False)

    __table_args__ = (
        CheckConstraint("kind IN ('ordinary', 'gold', 'aa')", name="pair_kind"),
        CheckConstraint("(kind = 'gold') = (expected IS NOT NULL)", name="pair_expected"),
        CheckConstraint("taken >= 0", name="pair_taken"),
        Index("pair_queue", "kind", "flagged", "taken", "place"),
    )


class RaterRow(Base):
    """Somebody who judges. Only the pseudonym leaves the study."""

    __tablename__ = "rater"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(AnyText, unique=True)
    pseudonym: Mapped[str] = mapped_column(String(16), unique=True)
    created_at: Mapped[float] = mapped_column(Float)


class AssignmentRow(Base):
    """A pair given to a rater, with the sides as they are shown."""

    __tablename__ = "assignment"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    token: Mapped[str] = mapped_column(String(32), unique=True)
    """What the rater's screen knows of it; says nothing by itself."""
    pair_id: Mapped[int] = mapped_column(ForeignKey("pair.id"), index=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    protocol_id: Mapped[int] = mapped_column(ForeignKey("protocol.id"))
    repeat: Mapped[bool] = mapped_column(Boolean)
    first_is_left: Mapped[bool] = mapped_column(Boolean)
    state: Mapped[str] = mapped_column(String(8))
    claimed_at: Mapped[float] = mapped_column(Float)
    lease_until: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        CheckConstraint("state IN ('open', 'done', 'skipped', 'expired', 'flagged')", name="assignment_state"),
        Index(
            "assignment_once", "rater_id", "pair_id", "repeat", unique=True,
            sqlite_where=text(ACTIVE), postgresql_where=text(ACTIVE),
        ),
        Index("assignment_by_rater", "rater_id", "state"),
        Index("assignment_lease", "state", "lease_until"),
    )  # fmt: skip


class VoteRow(Base):
    """A vote, or the undoing of one. Rows are never changed."""

    __tablename__ = "vote"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignment.id"))
    revision: Mapped[int] = mapped_column(Integer)
    """How often the assignment was undone before. With ``undoes`` it lets one vote of an assignment live at a time."""
    undoes: Mapped[int | None] = mapped_column(ForeignKey("vote.id"), unique=True)
    """The vote that this row takes back; such a row has no choice."""
    choice: Mapped[str | None] = mapped_column(String(12))
    strength: Mapped[int | None] = mapped_column(Integer)
    answers: Mapped[dict[str, Any]] = mapped_column(JSON)
    points: Mapped[list[Any]] = mapped_column(JSON)
    comment: Mapped[str] = mapped_column(AnyText)
    shown_at: Mapped[float | None] = mapped_column(Float)
    """By the rater's clock."""
    decided_at: Mapped[float | None] = mapped_column(Float)
    """By the rater's clock."""
    received_at: Mapped[float] = mapped_column(Float)
    """By ours; so is the ``claimed_at`` of the assignment."""
    protocol_sha256: Mapped[str] = mapped_column(String(64))

    __table_args__ = (
        CheckConstraint("(undoes IS NULL) = (choice IS NOT NULL)", name="vote_or_undo"),
        CheckConstraint(f"choice IN {CHOICES}", name="vote_choice"),
        CheckConstraint("strength BETWEEN 1 AND 3", name="vote_strength"),
        Index(
            "vote_once", "assignment_id", "revision", unique=True,
            sqlite_where=text("undoes IS NULL"), postgresql_where=text("undoes IS NULL"),
        ),
    )  # fmt: skip


class EventRow(Base):
    """Who did what, and when."""

    __tablename__ = "event"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(16))
    rater_id: Mapped[int | None] = mapped_column(ForeignKey("rater.id"))
    assignment_id: Mapped[int | None] = mapped_column(ForeignKey("assignment.id"))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
