"""How far a rater has come, and why nothing is left."""

from __future__ import annotations

from math import ceil

from sqlalchemy import ColumnElement, Connection, Row, bindparam, case, func, literal, select, text

from diffalign.study import queue
from diffalign.study.protocol import Rules
from diffalign.study.schema import ACTIVE, AssignmentRow, PairRow
from diffalign.study.turns import Progress, Queue


def _sum(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


_MINE = select(
    _sum(AssignmentRow.state == "done").label("done"),
    _sum(AssignmentRow.state == "flagged").label("flagged"),
    _sum(AssignmentRow.chosen != "planned").label("ordinary"),
).where(
    AssignmentRow.rater_id == bindparam("rater"),
    AssignmentRow.state.in_(("open", "done", "flagged")),
    AssignmentRow.adjudication == bindparam("adjudication"),
)
_PLANNED = select(PairRow.kind, func.count()).where(PairRow.kind.in_(("gold", "aa"))).group_by(PairRow.kind)
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
        # Neither a join nor EXISTS: SQLite would begin with all pairs, and PostgreSQL, as long as it has no statistics
        # of a new study, would go through all pairs for each assignment.
        select(PairRow.taken)
        .where(PairRow.id == AssignmentRow.pair_id, PairRow.kind == "ordinary", PairRow.flagged.is_(False))
        .scalar_subquery()
        < bindparam("overlap"),
    )
    .correlate(None)
)
_MINE_AND_FREE = _MINE.add_columns(_FREE.scalar_subquery().label("free"), literal(0).label("known"))
_MINE_AND_SHARED = _MINE.add_columns(
    _FREE.scalar_subquery().label("free"), _FREE_BUT_MINE.scalar_subquery().label("known")
)
_DISPUTED = select(func.count()).select_from(PairRow).where(*queue.IN_DISPUTE)


def progress(connection: Connection, rater: int, rules: Rules, which: Queue, has: bool) -> Progress:
    """Of a rater in a queue; ``has`` says whether a claim found anything."""
    about = {"rater": rater, "adjudication": which == "disputed"}
    if which == "disputed":
        mine = connection.execute(_MINE, about).one()
        return _disputes(connection, mine.done, has, connection.scalar(_OTHERS, about) or 0, rules)
    # Where each pair is judged once, none with a free place is anybody's.
    query = _MINE_AND_SHARED if rules.overlap > 1 else _MINE_AND_FREE
    mine = connection.execute(query, {**about, "overlap": rules.overlap}).one()
    if not has:
        others, enough = connection.scalar(_OTHERS, about) or 0, queue.enough(connection, rules)
        return Progress(mine.done, 0, not others and bool(enough or not mine.free), _why(enough, mine.free, others))
    return Progress(mine.done, _left(connection, rules, mine), False, "")


def _left(connection: Connection, rules: Rules, mine: Row[*tuple[int, ...]]) -> int:
    """About how many are still there: what one rater gets in all, less the answers so far, rounded up to tens.

    All in all, that is the ordinary pairs this rater has, had or may get, and the planned ones that come among so many
    on average. No answer changes it, so what is left falls by one with each answer, whatever kind the pair is of. To
    count the ordinary ones alone would tell the others by the turns after which nothing falls.
    """
    free = mine.free - mine.known
    if rules.budget is not None:
        free = min(free, max(0, rules.budget - queue.given(connection)))
    ordinary = mine.ordinary + free
    shares = {"gold": rules.gold_share, "aa": rules.aa_share}
    there = dict(connection.execute(_PLANNED).all()) if any(shares.values()) else {}
    about = ordinary / (1 - rules.repeat_share - sum(shares.values()))
    planned = rules.repeat_share * about + sum(min(share * about, there.get(kind, 0)) for kind, share in shares.items())
    return _tens(ordinary + planned - mine.done - mine.flagged)


def _tens(count: float) -> int:
    """Rounded up to tens, 10 or more."""
    return 10 * max(1, ceil(count / 10))


def _why(enough: str, free: int, others: int) -> str:
    if enough and not others:
        return enough
    if others:
        return "You have judged all that is there for you. The last pairs are with other raters now; look again later."
    if free:
        return "You have judged all that is there for you. The pairs that are left wait for other raters."
    return "Every pair has been judged by as many raters as the study wants."


def disputes(connection: Connection, rules: Rules) -> int:
    """How many pairs wait for a verdict, those that somebody adjudicates now included."""
    return connection.scalar(_DISPUTED, {"overlap": queue.complete_at(connection, rules)}) or 0


def _disputes(connection: Connection, done: int, has: bool, others: int, rules: Rules) -> Progress:
    left = disputes(connection, rules)
    if has:
        return Progress(done, _tens(left - others), False, "")
    if others:
        return Progress(done, 0, False, "The last disputed pairs are with other adjudicators now.")
    if left:
        return Progress(
            done, 0, False, "The disputed pairs that are left you have judged yourself; others decide them."
        )
    return Progress(done, 0, True, "There is no pair on which raters disagree.")
