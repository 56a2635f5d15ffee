"""What a rater's screen gets: the pair to judge now, the one after it, and how far the rater has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, bindparam, exists, select
from sqlalchemy.orm import aliased

from diffalign.study.answers import Answer, Choice, Point
from diffalign.study.content import Files
from diffalign.study.protocol import Protocol
from diffalign.study.schema import AssignmentRow, ItemRow, PairRow, RaterRow, SampleRow, VoteRow

Queue = Literal["pairs", "disputed"]
QUEUES: tuple[Queue, ...] = ("pairs", "disputed")
_OTHER_SIDE = {"left": "right", "right": "left"}


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
    """Left and right, where texts are compared."""
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
    """At most so many pairs are still there for this rater, gold pairs and repeats not counted."""
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
    planned: bool = False
    """Whether it is a gold or A/A pair or a repeat, which the study does not wait for."""

    def finished(self, files: Files) -> Assignment:
        """With its texts."""
        if self.texts is None:
            return self.assignment
        left, right = (files.get(sha256).decode("utf-8", "surrogatepass") for sha256 in self.texts)
        return replace(self.assignment, texts=(left, right))


_ONE, _TWO = aliased(SampleRow), aliased(SampleRow)
_SHOWN = (
    select(
        AssignmentRow.id, AssignmentRow.token, AssignmentRow.lease_until, AssignmentRow.protocol_id,
        AssignmentRow.pair_id, AssignmentRow.adjudication, AssignmentRow.chosen,
        AssignmentRow.first_is_left, ItemRow.text, ItemRow.kind,
        _ONE.sha256.label("first"), _TWO.sha256.label("second"),
    )
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .join(ItemRow, ItemRow.id == PairRow.item_id)
    .join(_ONE, _ONE.id == PairRow.first_id)
    .join(_TWO, _TWO.id == PairRow.second_id)
    .where(AssignmentRow.id == bindparam("assignment"))
)  # fmt: skip
_UNDONE = (
    select(
        VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.points, VoteRow.comment, VoteRow.shown_at,
        VoteRow.decided_at,
    )
    .where(VoteRow.assignment_id == bindparam("assignment"), VoteRow.choice.is_not(None))
    .order_by(VoteRow.id.desc())
    .limit(1)
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


def draft(connection: Connection, number: int, protocol: Callable[[int], Protocol]) -> Draft:
    """The assignment of that id, which is open."""
    row = connection.execute(_SHOWN, {"assignment": number}).one()
    assignment = Assignment(
        token=row.token,
        prompt=row.text,
        kind="image" if row.kind == "image" else "text",
        protocol=protocol(row.protocol_id),
        lease_until=row.lease_until,
        answer=_before(connection, number),
        others=_others(connection, row.pair_id, row.first_is_left) if row.adjudication else (),
    )
    planned = row.chosen == "planned" and not row.adjudication
    if row.kind == "image":
        return Draft(assignment, None, planned)
    texts = (row.first, row.second) if row.first_is_left else (row.second, row.first)
    return Draft(assignment, texts, planned)


def _before(connection: Connection, number: int) -> Answer | None:
    row = connection.execute(_UNDONE, {"assignment": number}).one_or_none()
    if row is None:
        return None
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


def swapped(answer: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """The same answer, had the samples stood the other way round."""
    if isinstance(answer, str):
        return _OTHER_SIDE.get(answer, answer)
    return {_OTHER_SIDE[side]: value for side, value in answer.items()}


def turn(files: Files, drafts: Sequence[Draft], progress: Progress) -> Turn:
    """The turn of up to two drafts."""
    shown = [draft.finished(files) for draft in drafts[:2]]
    return Turn(shown[0] if shown else None, shown[1] if len(shown) > 1 else None, progress)
