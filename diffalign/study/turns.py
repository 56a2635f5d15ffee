"""What a rater's screen gets: the pair to judge now, the one after it, and how far the rater has come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, bindparam, exists, select
from sqlalchemy.orm import aliased

from diffalign.errors import UserError
from diffalign.study.answers import Answer, Choice, Point
from diffalign.study.content import Files
from diffalign.study.protocol import Protocol
from diffalign.study.schema import AssignmentRow, ItemRow, PairRow, RaterRow, SampleRow, VoteRow
from diffalign.study.sides import standing, swapped

Queue = Literal["pairs", "disputed"]
QUEUES: tuple[Queue, ...] = ("pairs", "disputed")
log = logging.getLogger("diffalign.study")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rater answered, in terms of the sides that an adjudicator sees."""

    rater: str
    """The pseudonym."""
    choice: Choice
    strength: int | None
    criteria: Mapping[str, Any]
    comment: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a rater may know of what is to be judged: nothing about where the samples come from."""

    token: str
    """Names it; the images are had by ``Study.content``."""
    prompt: str
    kind: Literal["image", "text"]
    protocol: Protocol
    lease_until: float
    """Until then the pair is kept for this rater; seconds since 1970."""
    texts: tuple[str, str] | None = None
    """Left and right, where texts are compared and can be read; the pair can be skipped or flagged where not."""
    answer: Answer | None = None
    """What this rater said before they undid it."""
    others: tuple[Verdict, ...] = ()
    """What raters said, for who adjudicates."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rater has come in a queue."""

    done: int
    """Votes of this rater that live, gold pairs and repeats included."""
    left: int
    """About so many are still there for this rater, rounded up to tens; 0 only where nothing is.

    It falls with the votes whatever they are about, so that nobody learns from it which pairs were planned.
    """
    complete: bool
    """Whether the queue is over for everybody."""
    why: str
    """Why nothing is left, as a sentence; empty where something is."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a screen needs to go on."""

    now: Assignment | None
    ahead: Assignment | None
    """The pair after this one, to be loaded in advance. It is kept for this rater, too."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class Draft:
    """An assignment whose texts are still in their files, which are read after the transaction."""

    assignment: Assignment
    texts: tuple[str, str] | None
    """The hashes of the left and the right one."""

    def finished(self, files: Files) -> Assignment:
        """With its texts. What was done is on the disk by now, so a file that cannot be read must not undo that."""
        if self.texts is None:
            return self.assignment
        try:
            left, right = (files.get(sha256).decode("utf-8", "surrogatepass") for sha256 in self.texts)
        except (UserError, OSError) as error:
            log.error("a pair cannot be shown: %s", error)
            return self.assignment
        return replace(self.assignment, texts=(left, right))


_ONE, _TWO = aliased(SampleRow), aliased(SampleRow)
_SHOWN = (
    select(
        AssignmentRow.id, AssignmentRow.token, AssignmentRow.lease_until, AssignmentRow.protocol_id,
        AssignmentRow.pair_id, AssignmentRow.adjudication, AssignmentRow.first_is_left,
        ItemRow.text, ItemRow.kind,
        _ONE.sha256.label("first"), _TWO.sha256.label("second"),
        VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.points, VoteRow.comment, VoteRow.shown_at,
        VoteRow.decided_at,
    )
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .join(ItemRow, ItemRow.id == PairRow.item_id)
    .join(_ONE, _ONE.id == PairRow.first_id)
    .join(_TWO, _TWO.id == PairRow.second_id)
    .outerjoin(VoteRow, (VoteRow.assignment_id == AssignmentRow.id) & VoteRow.choice.is_not(None))
    .where(AssignmentRow.id.in_(bindparam("assignments", expanding=True)))
    # Read in this order into a dictionary: of answers that were undone the last one stays.
    .order_by(VoteRow.id)
)  # fmt: skip
_UNDOING = aliased(VoteRow)
_OTHERS = (
    select(
        VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.comment, AssignmentRow.first_is_left,
        RaterRow.pseudonym,
    )
    .join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id)
    .join(RaterRow, RaterRow.id == AssignmentRow.rater_id)
    .where(
        AssignmentRow.pair_id == bindparam("pair"),
        AssignmentRow.repeat.is_(False),
        AssignmentRow.adjudication.is_(False),
        VoteRow.choice.is_not(None),
        ~exists().where(_UNDOING.undoes == VoteRow.id),
    )
    .order_by(VoteRow.id)
)  # fmt: skip


def drafts(connection: Connection, numbers: Sequence[int], protocol: Callable[[int], Protocol]) -> list[Draft]:
    """The assignments of those ids, which are open."""
    asked = {"assignments": list(numbers)}
    rows = {row.id: row for row in connection.execute(_SHOWN, asked)} if numbers else {}
    return [_draft(connection, rows[number], protocol) for number in numbers]


def _draft(
    connection: Connection,
    row: Row[*tuple[Any, ...]],
    protocol: Callable[[int], Protocol],
) -> Draft:
    assignment = Assignment(
        token=row.token,
        prompt=row.text,
        kind="image" if row.kind == "image" else "text",
        protocol=protocol(row.protocol_id),
        lease_until=row.lease_until,
        answer=None if row.choice is None else _before(row),
        others=_others(connection, row.pair_id, row.first_is_left) if row.adjudication else (),
    )
    if row.kind == "image":
        return Draft(assignment, None)
    of = standing(row.first_is_left)
    return Draft(assignment, (getattr(row, of["left"]), getattr(row, of["right"])))


def _before(row: Row[*tuple[Any, ...]]) -> Answer:
    points = tuple(Point(**point) for point in row.points)
    return Answer(row.choice, row.strength, row.answers, points, row.comment, row.shown_at, row.decided_at)


def _others(connection: Connection, pair: int, first_is_left: bool) -> tuple[Verdict, ...]:
    return tuple(
        _verdict(row, row.first_is_left != first_is_left) for row in connection.execute(_OTHERS, {"pair": pair})
    )


def _verdict(row: Row[Any], turned: bool) -> Verdict:
    choice = cast(Choice, swapped(row.choice) if turned else row.choice)
    criteria = {name: swapped(value) if turned else value for name, value in row.answers.items()}
    return Verdict(row.pseudonym, choice, row.strength, criteria, row.comment)


def turn(files: Files, found: Sequence[Draft], progress: Progress) -> Turn:
    """The turn of up to two drafts."""
    shown = [draft.finished(files) for draft in found[:2]]
    return Turn(shown[0] if shown else None, shown[1] if len(shown) > 1 else None, progress)
