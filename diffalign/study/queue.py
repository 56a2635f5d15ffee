"""Which pair a rater gets next, and which of its samples stands left. All inside the caller's transaction.

A claim sees every other claim: SQLite admits one writer at a time, and elsewhere the row of the study is locked. So no
pair is given to more raters than the protocol wants, whoever else is asking.

The statements are made once: to build one again for each claim would take longer than to run it.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Connection,
    Integer,
    Select,
    bindparam,
    cast,
    exists,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import aliased

from diffalign.seeds import derive
from diffalign.study import active
from diffalign.study.chain import note
from diffalign.study.protocol import Rules
from diffalign.study.schema import ACTIVE, ADJUDICATED, DISPUTED, AssignmentRow, ContestRow, PairRow, StudyRow


@dataclass(frozen=True, slots=True)
class Next:
    """What will be given out."""

    pair_id: int
    chosen: str
    repeat: bool = False
    adjudication: bool = False

    @property
    def takes_place(self) -> bool:
        """Whether it is one of the judgements that the pair is to have."""
        return not (self.repeat or self.adjudication)


_PAIR: BindParameter[int] = bindparam("pair")
_RATER: BindParameter[int] = bindparam("rater")
_ACTIVE = text(ACTIVE)  # as the partial index has it: a database does not see that parameters say the same
_LOCK = select(StudyRow.seed, StudyRow.uid).with_for_update()


def lock(connection: Connection) -> int:
    """Holds the row of the study until the transaction ends; returns the seed of what is drawn in claims.

    The uid is in it, which no rater is told: who knows the seed that was asked for, mostly 0, and this code could else
    work out which pairs were planned, and their sides.
    """
    row = connection.execute(_LOCK).one()
    return derive(int(row.seed), row.uid)


# --- counts ---

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


_STILL_OPEN = (
    select(
        AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.rater_id, AssignmentRow.repeat,
        AssignmentRow.adjudication,
    )
    .where(AssignmentRow.pair_id == _PAIR, AssignmentRow.state == "open")
    .order_by(AssignmentRow.id)
)  # fmt: skip


def flag(connection: Connection, pair: int, now: float) -> None:
    """Takes the pair out: whoever else has it is shown it no more, and what was counted of it counts no more."""
    for other in connection.execute(_STILL_OPEN, {"pair": pair}).mappings().all():
        close(connection, other, "flagged")
        note(connection, now, "withdrawn", other["rater_id"], other["id"])
    row = connection.execute(_COUNTS, {"pair": pair}).one()
    if not row.flagged:
        minus = {f"more_{name}": -getattr(row, name) for name in _COUNTED}
        connection.execute(_COUNT_CONTEST, {"about": pair, **minus})
        connection.execute(update(PairRow).where(PairRow.id == pair).values(flagged=True))


# --- ends without a vote ---

_LATE = (
    select(
        AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.rater_id, AssignmentRow.repeat,
        AssignmentRow.adjudication,
    )
    .where(
        AssignmentRow.state == "open",
        AssignmentRow.lease_until < bindparam("now"),
        AssignmentRow.rater_id != _RATER,
    )
    .order_by(AssignmentRow.id)
)  # fmt: skip
_STATE = update(AssignmentRow).where(AssignmentRow.__table__.c.id == bindparam("number")).values(state=bindparam("to"))


def release(connection: Connection, now: float, rater: int) -> None:
    """Takes back what others were given and did not answer in time. This rater is here, and keeps what they have."""
    for row in connection.execute(_LATE, {"now": now, "rater": rater}).mappings().all():
        close(connection, row, "expired")
        note(connection, now, "expired", row["rater_id"], row["id"])


def close(connection: Connection, row: Mapping[Any, Any], state: str) -> None:
    """Ends an assignment without a vote, and gives its place back."""
    connection.execute(_STATE, {"number": row["id"], "to": state})
    if not (row["repeat"] or row["adjudication"]):
        count(connection, row["pair_id"], taken=-1)


# --- the next one ---

_HELD = (
    select(AssignmentRow.id)
    .where(AssignmentRow.pair_id == PairRow.id, AssignmentRow.rater_id == _RATER, _ACTIVE)
    .correlate(PairRow)
    .exists()
)
# Lists that are made once. Asked for each pair, SQLite would go through all of them each time.
_DROPPED = PairRow.id.in_(
    select(AssignmentRow.pair_id).where(AssignmentRow.rater_id == _RATER, AssignmentRow.state == "skipped")
)
_OPEN = PairRow.id.in_(select(AssignmentRow.pair_id).where(AssignmentRow.state == "open"))
_VERDICT = (
    select(AssignmentRow.id)
    .where(AssignmentRow.pair_id == PairRow.id, text(ADJUDICATED), AssignmentRow.state != "open")
    .correlate(PairRow)
    .exists()
)
_FREE = (PairRow.flagged.is_(False), ~_HELD)
_BEGUN = select(PairRow.id).where(PairRow.kind == "ordinary", PairRow.taken == bindparam("taken"), *_FREE)
_BEGUN = _BEGUN.order_by(PairRow.place).limit(1)
_BEGUN_NEW = _BEGUN.where(~_DROPPED)
_ANYBODYS = select(PairRow.id).where(PairRow.kind == bindparam("kind"), *_FREE)
_ANYBODYS = _ANYBODYS.order_by(PairRow.taken, PairRow.place).limit(1)
_ANYBODYS_NEW = _ANYBODYS.where(~_DROPPED)
IN_DISPUTE = (
    PairRow.flagged.is_(False),
    PairRow.taken >= bindparam("overlap"),
    text(DISPUTED),
    ~_VERDICT,
)
"""Complete pairs on which raters disagree, without a verdict. Only of ordinary pairs votes are counted."""
_DISPUTED = select(PairRow.id).where(*IN_DISPUTE, ~_HELD)
_DISPUTED = _DISPUTED.where(~_OPEN).order_by(PairRow.place).limit(1)
_DISPUTED_NEW = _DISPUTED.where(~_DROPPED)
_CHOSEN = (
    select(AssignmentRow.chosen)
    .where(
        AssignmentRow.pair_id == _PAIR,
        _ACTIVE,
        AssignmentRow.adjudication.is_(False),
        AssignmentRow.repeat.is_(False),
    )
    .order_by(AssignmentRow.id)
    .limit(1)
)
_GIVEN_TO = select(func.count()).select_from(AssignmentRow).where(AssignmentRow.rater_id == _RATER)
_GIVEN = select(func.coalesce(func.sum(ContestRow.given), 0))
_RECENT = aliased(AssignmentRow)
_AGAIN = aliased(AssignmentRow)
_REPEATS = (
    select(AssignmentRow.pair_id)
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .where(
        AssignmentRow.rater_id == _RATER,
        AssignmentRow.state == "done",
        AssignmentRow.repeat.is_(False),
        AssignmentRow.adjudication.is_(False),
        AssignmentRow.id
        < select(_RECENT.id)
        .where(_RECENT.rater_id == _RATER)
        .order_by(_RECENT.id.desc())
        .offset(bindparam("after"))
        .limit(1)
        .scalar_subquery(),
        PairRow.kind == "ordinary",
        PairRow.flagged.is_(False),
        ~exists().where(_AGAIN.pair_id == AssignmentRow.pair_id, _AGAIN.rater_id == _RATER, _AGAIN.repeat),
    )
    .order_by(AssignmentRow.id)
    .limit(50)
)


def choose(
    connection: Connection, rater: int, rules: Rules, seed: int, which: str = "pairs"
) -> tuple[Next | None, random.Random]:
    """The next pair for a rater, None where nothing is left, and the random numbers of this claim.

    A pair that others have begun goes first, so that pairs reach their overlap even if the study stops early. What the
    rater has skipped comes last.
    """
    before = connection.scalar(_GIVEN_TO, {"rater": rater}) or 0
    chance = random.Random(derive(seed, "claim", rater, before))
    if which == "disputed":
        return _disputed(connection, rater, rules), chance
    if enough(connection, rules):
        return None, chance
    ordinary = _ordinary(connection, rater, rules, chance)
    if ordinary is None:
        return None, chance
    draw = chance.random()
    for kind, share in (("gold", rules.gold_share), ("aa", rules.aa_share), ("repeat", rules.repeat_share)):
        if draw < share:
            other = (
                _repeat(connection, rater, rules.repeat_after, chance)
                if kind == "repeat"
                else _first(connection, (_ANYBODYS_NEW, _ANYBODYS), rater=rater, kind=kind)
            )
            if other is not None:
                return Next(other, "planned", repeat=kind == "repeat"), chance
            break
        draw -= share
    return ordinary, chance


def given(connection: Connection) -> int:
    """Assignments of ordinary pairs that are open or done, without repeats, adjudications and flagged pairs."""
    return connection.scalar(_GIVEN) or 0


def enough(connection: Connection, rules: Rules) -> str:
    """Why no further pair is given out, as a sentence: the budget is spent, or the ranking is precise. Empty if not."""
    if rules.budget is not None and given(connection) >= rules.budget:
        return f"The study has the {rules.budget} votes that it asked for."
    if rules.precision is not None and active.precise(connection, rules.precision):
        return f"The ranking is as precise as was asked for: every strength to {rules.precision:g} or better."
    return ""


def _ordinary(connection: Connection, rater: int, rules: Rules, chance: random.Random) -> Next | None:
    """A pair with a free place, that this rater does not have, has not answered and, if possible, did not skip."""
    for taken in range(rules.overlap - 1, 0, -1):
        found = connection.scalar(_BEGUN_NEW, {"rater": rater, "taken": taken})
        if found is not None:
            return Next(found, str(connection.scalar(_CHOSEN, {"pair": found})))
    if rules.random_share < 1 and chance.random() >= rules.random_share:
        telling = active.most_telling(connection, rater)
        if telling is not None:
            return Next(telling, "active")
    found = connection.scalar(_BEGUN_NEW, {"rater": rater, "taken": 0})
    if found is not None:
        return Next(found, "random")
    for taken in range(rules.overlap - 1, -1, -1):
        found = connection.scalar(_BEGUN, {"rater": rater, "taken": taken})
        if found is not None:
            return Next(found, str(connection.scalar(_CHOSEN, {"pair": found}) or "random"))
    return None


def _first(connection: Connection, queries: Sequence[Select[int]], **values: object) -> int | None:
    """What the first query finds, else the second."""
    for query in queries:
        found = connection.scalar(query, values)
        if found is not None:
            return found
    return None


def _disputed(connection: Connection, rater: int, rules: Rules) -> Next | None:
    """A complete pair on which raters disagree, that nobody adjudicates, and that this one did not judge before."""
    judged = complete_at(connection, rules)
    found = _first(connection, (_DISPUTED_NEW, _DISPUTED), rater=rater, overlap=judged)
    return None if found is None else Next(found, "planned", adjudication=True)


def complete_at(connection: Connection, rules: Rules) -> int:
    """How many judgements a pair has that gets no more: two disagree, where the study is over before the overlap."""
    return min(2, rules.overlap) if enough(connection, rules) else rules.overlap


def _repeat(connection: Connection, rater: int, after: int, chance: random.Random) -> int | None:
    """An ordinary pair that this rater answered long enough ago, and was not asked again."""
    found = connection.scalars(_REPEATS, {"rater": rater, "after": after - 1}).all()
    return chance.choice(found) if found else None


# --- sides ---

# How many more of these assignments have the first sample left than right.
_SURPLUS = select(func.coalesce(func.sum(2 * cast(AssignmentRow.first_is_left, Integer) - 1), 0)).where(_ACTIVE)
_OF_PAIR = _SURPLUS.where(AssignmentRow.pair_id == _PAIR)
_OF_RATER = _SURPLUS.where(AssignmentRow.rater_id == _RATER).scalar_subquery()
_SURPLUSES = select(_OF_PAIR.scalar_subquery(), _OF_RATER)
_OF_REPEAT = select(_OF_PAIR.where(AssignmentRow.rater_id == _RATER).scalar_subquery(), _OF_RATER)


def side(connection: Connection, chosen: Next, rater: int, chance: random.Random) -> bool:
    """Whether the first sample stands left: the rarer order of this pair, else by a coin biased to the rater's rarer.

    The biased coin (Efron 1971, 2 to 1) keeps each rater in balance without alternating, which one could notice. A
    repeat is shown the other way round, so that who looks at the side alone contradicts himself.
    """
    query = _OF_REPEAT if chosen.repeat else _SURPLUSES
    of_pair, of_rater = connection.execute(query, {"pair": chosen.pair_id, "rater": rater}).one()
    if of_pair:
        return bool(of_pair < 0)
    share = 1 / 2 if of_rater == 0 else 1 / 3 if of_rater > 0 else 2 / 3
    return chance.random() < share


_GIVE = insert(AssignmentRow)


def give(
    connection: Connection, chosen: Next, rater: int, protocol: int, now: float, until: float, chance: random.Random
) -> int:
    """Writes the assignment down; returns its id."""
    row: dict[str, Any] = {
        "token": secrets.token_hex(16),
        "pair_id": chosen.pair_id,
        "rater_id": rater,
        "protocol_id": protocol,
        "repeat": chosen.repeat,
        "adjudication": chosen.adjudication,
        "chosen": chosen.chosen,
        "first_is_left": side(connection, chosen, rater, chance),
        "state": "open",
        "claimed_at": now,
        "lease_until": until,
    }
    added = connection.execute(_GIVE, row).inserted_primary_key
    assert added is not None
    if chosen.takes_place:
        count(connection, chosen.pair_id, taken=1)
    note(connection, now, "claimed", rater, int(added[0]), given={"id": int(added[0]), **row})
    return int(added[0])
