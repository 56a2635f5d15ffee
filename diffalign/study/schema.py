"""The tables of a study. What has happened is never changed: votes and events are only added.

::

    study ── protocol (versions)          item (prompt) ── sample (content by SHA-256, arm)
                                            └── pair (two samples) ── contest (two arms, counted)
    rater ── assignment (pair, side, lease, state) ── vote (a vote, or the undoing of one)
    event (who did what, when; a hash chain)
    session (who is logged in)

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
ADJUDICATED = f"adjudication AND {ACTIVE}"
DISPUTED = "for_first > 0 AND for_second > 0"


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


class ContestRow(Base):
    """Two arms that meet in ordinary pairs that are not flagged, and how it went: counted as it happens.

    What is chosen next, and when there is enough, depends on these few rows and not on all votes.
    """

    __tablename__ = "contest"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    first_arm: Mapped[str] = mapped_column(AnyText)
    second_arm: Mapped[str] = mapped_column(AnyText)
    given: Mapped[int] = mapped_column(Integer, default=0)
    """The sum of ``taken`` of its pairs."""
    for_first: Mapped[int] = mapped_column(Integer, default=0)
    """Live votes, as in its pairs."""
    for_second: Mapped[int] = mapped_column(Integer, default=0)
    ties: Mapped[int] = mapped_column(Integer, default=0)


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
    """Assignments that are open or done, without repeats and adjudications: kept so that a claim need not count."""
    flagged: Mapped[bool] = mapped_column(Boolean, default=False)
    contest_id: Mapped[int | None] = mapped_column(ForeignKey("contest.id"))
    """Of an ordinary pair."""
    for_first: Mapped[int] = mapped_column(Integer, default=0)
    """Live votes for the first sample, without repeats and adjudications."""
    for_second: Mapped[int] = mapped_column(Integer, default=0)
    ties: Mapped[int] = mapped_column(Integer, default=0)

    __table_args__ = (
        CheckConstraint("kind IN ('ordinary', 'gold', 'aa')", name="pair_kind"),
        CheckConstraint("(kind = 'gold') = (expected IS NOT NULL)", name="pair_expected"),
        CheckConstraint("taken >= 0", name="pair_taken"),
        Index("pair_queue", "kind", "flagged", "taken", "place"),
        Index("pair_contest", "contest_id", "flagged", "taken", "place"),
        Index("pair_disputed", "place", sqlite_where=text(DISPUTED), postgresql_where=text(DISPUTED)),
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
    adjudication: Mapped[bool] = mapped_column(Boolean, default=False)
    """The verdict on a pair on which raters disagree; it is no ordinary vote."""
    chosen: Mapped[str] = mapped_column(String(8), default="random")
    """``random``; ``active``: for what the pair would tell; ``planned``: gold, A/A, repeat, adjudication."""
    first_is_left: Mapped[bool] = mapped_column(Boolean)
    state: Mapped[str] = mapped_column(String(8))
    claimed_at: Mapped[float] = mapped_column(Float)
    lease_until: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        CheckConstraint("state IN ('open', 'done', 'skipped', 'expired', 'flagged')", name="assignment_state"),
        Index(
            "assignment_once", "rater_id", "pair_id", "repeat", "adjudication", unique=True,
            sqlite_where=text(ACTIVE), postgresql_where=text(ACTIVE),
        ),
        Index(
            "assignment_one_verdict", "pair_id", unique=True,
            sqlite_where=text(ADJUDICATED), postgresql_where=text(ADJUDICATED),
        ),
        Index("assignment_by_rater", "rater_id", "state", "adjudication", "first_is_left"),
        Index("assignment_lease", "state", "lease_until"),
    )  # fmt: skip


class VoteRow(Base):
    """A vote, or the undoing of one. Rows are never changed."""

    __tablename__ = "vote"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignment.id"), index=True)
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
    """Who did what, and when. Each carries a hash over its predecessor's: see ``chain``."""

    __tablename__ = "event"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(16))
    rater_id: Mapped[int | None] = mapped_column(ForeignKey("rater.id"))
    assignment_id: Mapped[int | None] = mapped_column(ForeignKey("assignment.id"))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    hash: Mapped[str] = mapped_column(String(64))


class SessionRow(Base):
    """Somebody who is logged in. What their browser knows is hashed here, so that a stolen copy opens no session."""

    __tablename__ = "session"

    id_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    user: Mapped[str] = mapped_column(AnyText)
    role: Mapped[str] = mapped_column(String(16))
    fingerprint: Mapped[str] = mapped_column(String(64))
    """Changes when the account's password or role does, which ends the session."""
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float, index=True)
