"""The places of pairs, and what is counted of them: taken by who judges, given back by who does not, and by flags.

All inside the caller's transaction, which holds the lock of the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BindParameter, Connection, bindparam, func, select, update
from sqlalchemy.orm import aliased

from diffalign.errors import NotFoundError, RefusedError
from diffalign.study.chain import Chain
from diffalign.study.schema import AssignmentRow, ContestRow, EventRow, PairRow

_PAIR: BindParameter[int] = bindparam("pair")
_COUNTED = ("taken", "for_first", "for_second", "ties")
_COUNT_PAIR = (
    update(PairRow)
    .where(PairRow.__table__.c.id == bindparam("about"))
    .values({name: getattr(PairRow, name) + bindparam(f"more_{name}") for name in _COUNTED})
)
_COUNT_CONTEST = (
    update(ContestRow)
    .where(
        ContestRow.id
        == select(PairRow.contest_id)
        .where(PairRow.id == bindparam("about"), PairRow.flagged.is_(False))
        .scalar_subquery()
    )
    .values(
        {
            "given" if name == "taken" else name: getattr(ContestRow, "given" if name == "taken" else name)
            + bindparam(f"more_{name}")
            for name in _COUNTED
        }
    )
)


def count(connection: Connection, pair: int, **more: int) -> None:
    """Adds to ``taken``, ``for_first``, ``for_second`` or ``ties`` of a pair and its contest."""
    values = {"about": pair, **{f"more_{name}": more.get(name, 0) for name in _COUNTED}}
    connection.execute(_COUNT_CONTEST, values)
    connection.execute(_COUNT_PAIR, values)


_COUNTS = select(PairRow.taken, PairRow.for_first, PairRow.for_second, PairRow.ties, PairRow.flagged).where(
    PairRow.id == _PAIR
)


_FLAGGED = aliased(AssignmentRow)
_STILL_OPEN = (
    select(
        AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.rater_id, AssignmentRow.repeat,
        AssignmentRow.adjudication,
    )
    .where(AssignmentRow.pair_id == _PAIR, AssignmentRow.state == "open")
    .order_by(AssignmentRow.id)
)  # fmt: skip


def flag(connection: Connection, chain: Chain, pair: int, now: float) -> None:
    """Takes the pair out: whoever else has it is shown it no more, and what was counted of it counts no more."""
    for other in connection.execute(_STILL_OPEN, {"pair": pair}).mappings().all():
        close(connection, other, "flagged")
        chain.note(now, "withdrawn", other["rater_id"], other["id"])
    row = connection.execute(_COUNTS, {"pair": pair}).one()
    if not row.flagged:
        minus = {f"more_{name}": -getattr(row, name) for name in _COUNTED}
        connection.execute(_COUNT_CONTEST, {"about": pair, **minus})
        connection.execute(update(PairRow).where(PairRow.id == pair).values(flagged=True))


_LAST_FLAG = (
    select(func.coalesce(func.max(EventRow.id), 0))
    .join(_FLAGGED, _FLAGGED.id == EventRow.assignment_id)
    .where(_FLAGGED.pair_id == _PAIR, EventRow.kind == "flagged")
    .scalar_subquery()
)
_WITHDRAWN = (
    select(
        AssignmentRow.id, AssignmentRow.rater_id, AssignmentRow.repeat, AssignmentRow.adjudication,
        AssignmentRow.lease_until,
    )
    .join(EventRow, EventRow.assignment_id == AssignmentRow.id)
    .where(
        AssignmentRow.pair_id == _PAIR,
        AssignmentRow.state == "flagged",
        EventRow.kind == "withdrawn",
        EventRow.id > _LAST_FLAG,
    )
    .order_by(AssignmentRow.id)
)  # fmt: skip


def unflag(connection: Connection, chain: Chain, pair: int, now: float, back: bool) -> None:
    """Takes a flagged pair in again, with its votes. What the flag took from others' hands is free again.

    ``back`` gives it to them again for the rest of their lease. An answer of theirs that comes later is kept in either
    case, as long as nobody else has taken the place.
    """
    row = connection.execute(_COUNTS, {"pair": pair}).one()
    connection.execute(update(PairRow).where(PairRow.id == pair).values(flagged=False))
    connection.execute(_COUNT_CONTEST, {"about": pair, **{f"more_{name}": getattr(row, name) for name in _COUNTED}})
    for other in connection.execute(_WITHDRAWN, {"pair": pair}).mappings().all():
        returned = back and other["lease_until"] >= now
        connection.execute(_STATE, {"number": other["id"], "to": "open" if returned else "expired"})
        if returned and not (other["repeat"] or other["adjudication"]):
            count(connection, pair, taken=1)
        chain.note(now, "returned" if returned else "expired", other["rater_id"], other["id"])


def admit(connection: Connection, pair: int, now: float) -> None:
    """The same by an administrator, under the lock of the study; nobody is given it again."""
    flagged = connection.scalar(select(PairRow.flagged).where(PairRow.id == pair))
    if flagged is None:
        raise NotFoundError(f"there is no pair {pair} in this study")
    if not flagged:
        raise RefusedError(f"pair {pair} is in the study: it is not flagged, or its flag was taken back")
    chain = Chain.of(connection)
    unflag(connection, chain, pair, now, back=False)
    chain.note(now, "unflagged", data={"pair": pair})
    chain.write(connection)


# --- ends without a vote ---

IS_LATE = (
    AssignmentRow.state == "open",
    AssignmentRow.lease_until < bindparam("now"),
    AssignmentRow.rater_id != bindparam("rater"),
)
_LATE = (
    select(
        AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.rater_id, AssignmentRow.repeat,
        AssignmentRow.adjudication,
    )
    .where(*IS_LATE)
    .order_by(AssignmentRow.id)
)  # fmt: skip
_STATE = update(AssignmentRow).where(AssignmentRow.__table__.c.id == bindparam("number")).values(state=bindparam("to"))


def release(connection: Connection, chain: Chain, now: float, rater: int) -> None:
    """Takes back what others were given and did not answer in time. This rater is here, and keeps what they have."""
    for row in connection.execute(_LATE, {"now": now, "rater": rater}).mappings().all():
        close(connection, row, "expired")
        chain.note(now, "expired", row["rater_id"], row["id"])


def close(connection: Connection, row: Mapping[Any, Any], state: str) -> None:
    """Ends an assignment without a vote, and gives its place back."""
    connection.execute(_STATE, {"number": row["id"], "to": state})
    if not (row["repeat"] or row["adjudication"]):
        count(connection, row["pair_id"], taken=-1)
