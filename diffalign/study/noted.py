"""What the event log knows beside the votes: which raters are simulated, and why pairs were flagged."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Row, bindparam, select

from diffalign.errors import RefusedError
from diffalign.study.chain import note
from diffalign.study.schema import AssignmentRow, EventRow, PairRow, RaterRow, VoteRow

_RATERS = (
    select(RaterRow.pseudonym, EventRow.data)
    .join(RaterRow, RaterRow.id == EventRow.rater_id)
    .where(EventRow.kind.in_(("joined", "simulated")))
)
_VOTED = (
    select(VoteRow.id)
    .join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id)
    .where(AssignmentRow.rater_id == bindparam("rater"))
    .limit(1)
)
_FLAGS = (
    select(AssignmentRow.pair_id, PairRow.kind, EventRow.at, EventRow.data, RaterRow.pseudonym)
    .join(AssignmentRow, AssignmentRow.id == EventRow.assignment_id)
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .join(RaterRow, RaterRow.id == EventRow.rater_id)
    .where(EventRow.kind == "flagged", PairRow.flagged)
    .order_by(EventRow.id)
)


@dataclass(frozen=True, slots=True)
class Flag:
    """A pair that is out of the study now."""

    pair: int
    kind: str
    """``ordinary``, ``gold`` or ``aa``."""
    rater: str
    """The pseudonym of who flagged it last."""
    reason: str
    at: float
    """Seconds since 1970."""


def simulated_raters(connection: Connection) -> frozenset[str]:
    """Pseudonyms of the raters that were said to be simulated."""
    return frozenset(row.pseudonym for row in connection.execute(_RATERS) if row.data.get("simulated"))


def mark_simulated(connection: Connection, rater: Row[int, str], name: str, now: float) -> None:
    """Notes that a known rater (id, pseudonym) is simulated; RefusedError for one who has voted as a person."""
    number, pseudonym = rater
    if pseudonym in simulated_raters(connection):
        return
    if connection.scalar(_VOTED, {"rater": number}):
        raise RefusedError(f"the rater {name!r} has votes of a person, so it cannot be simulated; take another name")
    note(connection, now, "simulated", number, data={"pseudonym": pseudonym, "simulated": True})


def flags(connection: Connection) -> tuple[Flag, ...]:
    """The flagged pairs, each with its last flag; one that was taken back is none of them."""
    last: dict[int, Flag] = {}
    for row in connection.execute(_FLAGS):
        last[row.pair_id] = Flag(row.pair_id, row.kind, row.pseudonym, str(row.data.get("reason", "")), row.at)
    return tuple(flag for _, flag in sorted(last.items()))
