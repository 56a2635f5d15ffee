"""Which pair a rater gets next, and which of its samples stands left. All inside the caller's transaction.

A claim sees every other claim: SQLite admits one writer at a time, and elsewhere the row of the study is locked. So no
pair is given to more raters than the protocol wants, whoever else is asking.

The statements are made once: to build one again for each claim would take longer than to run it.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
    null,
    select,
    text,
)
from sqlalchemy.orm import aliased

from diffalign.seeds import derive
from diffalign.study import active
from diffalign.study.chain import LAST, Chain
from diffalign.study.database import together
from diffalign.study.places import IS_LATE, count
from diffalign.study.protocol import Rules
from diffalign.study.schema import (
    ACTIVE,
    ADJUDICATED,
    DISPUTED,
    AssignmentRow,
    ContestRow,
    PairRow,
    ProtocolRow,
    StudyRow,
)


@dataclass(frozen=True, slots=True)
class Next:
    """What will be given out."""

    pair_id: int
    chosen: str
    repeat: bool = False
    adjudication: bool = False
    surpluses: tuple[int, int] | None = None
    """Of the first sample on the left, in assignments of this pair and of this rater, where they are known by now."""

    @property
    def takes_place(self) -> bool:
        """Whether it is one of the judgements that the pair is to have."""
        return not (self.repeat or self.adjudication)


_PAIR: BindParameter[int] = bindparam("pair")
_RATER: BindParameter[int] = bindparam("rater")
_ACTIVE = text(ACTIVE)  # as the partial index has it: a database does not see that parameters say the same
_LOCK = select(StudyRow.id).with_for_update()


def lock(connection: Connection) -> None:
    """Holds the row of the study until the transaction ends. SQLite has locked by the beginning of the transaction."""
    if connection.dialect.name != "sqlite":
        with together(connection):  # with the beginning of the transaction; what it finds need not be read
            connection.execute(_LOCK)


# --- how the study stands ---

_LAST_EVENT = LAST.subquery()
_GIVEN_TO = select(func.count()).select_from(AssignmentRow).where(AssignmentRow.rater_id == _RATER)
_STANDS = select(
    select(_LAST_EVENT.c.id).scalar_subquery().label("event"),
    select(_LAST_EVENT.c.hash).scalar_subquery().label("hash"),
    select(func.max(ProtocolRow.id)).scalar_subquery().label("protocol"),
    _GIVEN_TO.scalar_subquery().label("before"),
    exists().where(*IS_LATE).label("late"),
    StudyRow.seed,
    StudyRow.uid,
)


@dataclass(frozen=True, slots=True)
class Stand:
    """What a transaction of a rater begins from."""

    event: int | None
    hash: str | None
    """Of the last event."""
    protocol: int
    """The newest."""
    before: int
    """How many assignments this rater was ever given."""
    late: bool
    """Whether others have not answered in time."""
    drawn: int
    """The seed of what is drawn in claims.

    The uid is in it, which no rater is told: who knows the seed that was asked for, mostly 0, and this code could else
    work out which pairs were planned, and their sides.
    """

    def chain(self) -> Chain:
        """The event log, to be added to."""
        return Chain(None if self.event is None or self.hash is None else (self.event, self.hash))


def stand(connection: Connection, rater: int, now: float) -> Stand:
    """Read at once, after the lock: where the database is a server, each question is a way there and back."""
    row = connection.execute(_STANDS, {"rater": rater, "now": now}).one()
    return Stand(row.event, row.hash, row.protocol, row.before, row.late, derive(int(row.seed), row.uid))


# --- the next one ---

# How many more of these assignments have the first sample left than right.
_SURPLUS = select(func.coalesce(func.sum(2 * cast(AssignmentRow.first_is_left, Integer) - 1), 0)).where(_ACTIVE)
_OF_PAIR = _SURPLUS.where(AssignmentRow.pair_id == _PAIR)
_OF_RATER = _SURPLUS.where(AssignmentRow.rater_id == _RATER).scalar_subquery()

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
_BEGUN = select(PairRow.id).where(PairRow.kind == "ordinary", *_FREE).order_by(PairRow.place).limit(1)
_BEGUN_NEW = _BEGUN.where(~_DROPPED)
_SKIPPED = _BEGUN.where(PairRow.taken == bindparam("taken"))
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
        _ACTIVE,
        AssignmentRow.adjudication.is_(False),
        AssignmentRow.repeat.is_(False),
    )
    .order_by(AssignmentRow.id)
    .limit(1)
)
_CHOSEN_FOR = _CHOSEN.where(AssignmentRow.pair_id == _PAIR)
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


@cache
def _next(overlap: int) -> Select[*tuple[Any, ...]]:
    """The pair that others have begun and that lacks least, the next fresh one, and how the first was chosen.

    With what ``side`` asks of the first, of the second, and of the rater.
    None of them was skipped by the rater. A database comes to the second ``taken`` only where the first has no pair.
    """
    *levels, fresh = (_BEGUN_NEW.where(PairRow.taken == n).scalar_subquery() for n in range(overlap - 1, -1, -1))
    begun = func.coalesce(*levels, null()) if levels else null()
    found = select(begun.label("begun"), fresh.label("fresh")).subquery()
    chosen = _CHOSEN.where(AssignmentRow.pair_id == found.c.begun).scalar_subquery()
    of_begun, of_fresh = (_SURPLUS.where(AssignmentRow.pair_id == pair).scalar_subquery() for pair in found.c)
    return select(found.c.begun, found.c.fresh, chosen, of_begun, of_fresh, _OF_RATER)


def choose(
    connection: Connection, rater: int, rules: Rules, seed: int, before: int, which: str = "pairs"
) -> tuple[Next | None, random.Random]:
    """The next pair for a rater, None where nothing is left, and the random numbers of this claim.

    A pair that others have begun goes first, so that pairs reach their overlap even if the study stops early. What the
    rater has skipped comes last. ``before`` is how many assignments this rater was given.
    """
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
    found = connection.execute(_next(rules.overlap), {"rater": rater}).one()
    begun, fresh, chosen, of_begun, of_fresh, of_rater = found
    if begun is not None:
        return Next(begun, str(chosen), surpluses=(of_begun, of_rater))
    if rules.random_share < 1 and chance.random() >= rules.random_share:
        telling = active.most_telling(connection, rater)
        if telling is not None:
            return Next(telling, "active")
    if fresh is not None:
        return Next(fresh, "random", surpluses=(of_fresh, of_rater))
    for taken in range(rules.overlap - 1, -1, -1):
        pair = connection.scalar(_SKIPPED, {"rater": rater, "taken": taken})
        if pair is not None:
            return Next(pair, str(connection.scalar(_CHOSEN_FOR, {"pair": pair}) or "random"))
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

_SURPLUSES = select(_OF_PAIR.scalar_subquery(), _OF_RATER)
_OF_REPEAT = select(_OF_PAIR.where(AssignmentRow.rater_id == _RATER).scalar_subquery(), _OF_RATER)


def side(connection: Connection, chosen: Next, rater: int, chance: random.Random) -> bool:
    """Whether the first sample stands left: the rarer order of this pair, else by a coin biased to the rater's rarer.

    The biased coin (Efron 1971, 2 to 1) keeps each rater in balance without alternating, which one could notice. A
    repeat is shown the other way round, so that who looks at the side alone contradicts himself.
    """
    query = _OF_REPEAT if chosen.repeat else _SURPLUSES
    asked = {"pair": chosen.pair_id, "rater": rater}
    of_pair, of_rater = chosen.surpluses or connection.execute(query, asked).one()
    if of_pair:
        return bool(of_pair < 0)
    share = 1 / 2 if of_rater == 0 else 1 / 3 if of_rater > 0 else 2 / 3
    return chance.random() < share


_GIVE = insert(AssignmentRow)


def give(
    connection: Connection,
    chain: Chain,
    chosen: Next,
    rater: int,
    protocol: int,
    now: float,
    until: float,
    chance: random.Random,
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
    chain.note(now, "claimed", rater, int(added[0]), given={"id": int(added[0]), **row})
    with together(connection):
        if chosen.takes_place:
            count(connection, chosen.pair_id, taken=1)
        chain.write(connection)
    return int(added[0])
