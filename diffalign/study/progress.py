"""How far a rater has come, and why nothing is left."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, exists, func, select, text

from diffalign.study import queue
from diffalign.study.protocol import Rules
from diffalign.study.schema import ACTIVE, AssignmentRow, PairRow
from diffalign.study.turns import Progress, Queue

_DONE = (
    select(func.count())
    .select_from(AssignmentRow)
    .where(
        AssignmentRow.rater_id == bindparam("rater"),
        AssignmentRow.state == "done",
        AssignmentRow.adjudication == bindparam("adjudication"),
    )
)
_OTHERS = (
    select(func.count())
    .select_from(AssignmentRow)
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .where(
        AssignmentRow.state == "open",
        AssignmentRow.rater_id != bindparam("rater"),
        AssignmentRow.adjudication == bindparam("adjudication"),
        AssignmentRow.repeat.is_(False),
        PairRow.kind == "ordinary",
        PairRow.flagged.is_(False),
    )
)
_FREE = select(func.count()).where(
    PairRow.kind == "ordinary", PairRow.flagged.is_(False), PairRow.taken < bindparam("overlap")
)
_FREE_BUT_MINE = (
    select(func.count())
    .select_from(AssignmentRow)
    .where(
        AssignmentRow.rater_id == bindparam("rater"),
        AssignmentRow.repeat.is_(False),
        text(ACTIVE),
        # Not a join: SQLite would begin with all pairs.
        exists().where(
            PairRow.id == AssignmentRow.pair_id,
            PairRow.kind == "ordinary",
            PairRow.flagged.is_(False),
            PairRow.taken < bindparam("overlap"),
        ),
    )
)
_DISPUTED = select(func.count()).select_from(PairRow).where(*queue.IN_DISPUTE)


def progress(connection: Connection, rater: int, rules: Rules, which: Queue, mine: int | None) -> Progress:
    """Of a rater in a queue, who has so many pairs open that the queue waits for; None where a claim found nothing."""
    adjudication = which == "disputed"
    done = connection.scalar(_DONE, {"rater": rater, "adjudication": adjudication}) or 0
    about = {"rater": rater, "adjudication": adjudication}
    if adjudication:
        return _disputes(connection, done, mine, connection.scalar(_OTHERS, about) or 0, rules)
    if mine is None:
        others = connection.scalar(_OTHERS, about) or 0
        free, enough = _free(connection, rater, rules), queue.enough(connection, rules)
        return Progress(done, 0, not others and (bool(enough) or free[0] == 0), _why(enough, free, others))
    left = _free(connection, rater, rules)[1]
    if rules.budget is not None:
        left = min(left, max(0, rules.budget - queue.given(connection)))
    return Progress(done, left + mine, False, "")


def _free(connection: Connection, rater: int, rules: Rules) -> tuple[int, int]:
    """Pairs with a free place, and those of them that this rater does not have and has not judged."""
    free = connection.scalar(_FREE, {"overlap": rules.overlap}) or 0
    # Where each pair is judged once, none with a free place is anybody's.
    known = connection.scalar(_FREE_BUT_MINE, {"rater": rater, "overlap": rules.overlap}) if rules.overlap > 1 else 0
    return free, free - (known or 0)


def _why(enough: str, free: tuple[int, int], others: int) -> str:
    if enough and not others:
        return enough
    if others:
        return "You have judged all that is there for you. The last pairs are with other raters now; look again later."
    if free[0]:
        return "You have judged all that is there for you. The pairs that are left wait for other raters."
    return "Every pair has been judged by as many raters as the study wants."


def disputes(connection: Connection, rules: Rules) -> int:
    """How many pairs wait for a verdict, those that somebody adjudicates now included."""
    return connection.scalar(_DISPUTED, {"overlap": queue.complete_at(connection, rules)}) or 0


def _disputes(connection: Connection, done: int, mine: int | None, others: int, rules: Rules) -> Progress:
    left = disputes(connection, rules)
    if mine is not None:
        return Progress(done, max(mine, left - others), False, "")
    if others:
        return Progress(done, 0, False, "The last disputed pairs are with other adjudicators now.")
    if left:
        return Progress(
            done, 0, False, "The disputed pairs that are left you have judged yourself; others decide them."
        )
    return Progress(done, 0, True, "There is no pair on which raters disagree.")
