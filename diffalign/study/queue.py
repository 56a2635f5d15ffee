"""Which pair a rater gets next, and which of its samples stands left. All inside the caller's transaction.

A claim sees every other claim: SQLite admits one writer at a time, and elsewhere the row of the study is locked. So no
pair is given to more raters than the protocol wants, whoever else is asking.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, func, insert, select, update
from sqlalchemy.orm import aliased

from diffalign.seeds import derive
from diffalign.study.protocol import Rules
from diffalign.study.schema import AssignmentRow, EventRow, PairRow, StudyRow, VoteRow


@dataclass(frozen=True, slots=True)
class Next:
    """What will be given out."""

    pair_id: int
    repeat: bool
    ordinary: bool


def lock(connection: Connection) -> RowMapping:
    """The row of the study, held until the transaction ends."""
    return connection.execute(select(StudyRow.uid, StudyRow.seed).with_for_update()).mappings().one()


def note(
    connection: Connection, at: float, kind: str, rater: int | None, assignment: int | None, **data: object
) -> None:
    """Adds to the event log."""
    connection.execute(insert(EventRow).values(at=at, kind=kind, rater_id=rater, assignment_id=assignment, data=data))


def release(connection: Connection, now: float) -> int:
    """Takes back what was given out and not answered in time; returns how many assignments that were."""
    late = (
        connection.execute(
            select(AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.rater_id, AssignmentRow.repeat)
            .where(AssignmentRow.state == "open", AssignmentRow.lease_until < now)
            .order_by(AssignmentRow.id)
        )
        .mappings()
        .all()
    )
    for row in late:
        close(connection, row["id"], row["pair_id"], row["repeat"], "expired")
        note(connection, now, "expired", row["rater_id"], row["id"])
    return len(late)


def close(connection: Connection, assignment: int, pair: int, repeat: bool, state: str) -> None:
    """Ends an assignment without a vote, and gives its place back."""
    connection.execute(update(AssignmentRow).where(AssignmentRow.id == assignment).values(state=state))
    if not repeat:
        connection.execute(update(PairRow).where(PairRow.id == pair).values(taken=PairRow.taken - 1))


def choose(connection: Connection, rater: int, rules: Rules, seed: str) -> tuple[Next | None, random.Random]:
    """The next pair for a rater, None where nothing is left, and the random numbers of this claim.

    A pair that others have begun goes first, so that pairs reach their overlap even if the study stops early. What the
    rater has skipped comes last.
    """
    given = connection.scalar(select(func.count()).where(AssignmentRow.rater_id == rater)) or 0
    chance = random.Random(derive(int(seed), "claim", rater, given))
    ordinary = _unseen(connection, rater, "ordinary", rules.overlap)
    if ordinary is None:
        return None, chance
    draw = chance.random()
    for kind, share in (("gold", rules.gold_share), ("aa", rules.aa_share), ("repeat", rules.repeat_share)):
        if draw < share:
            other = (
                _repeat(connection, rater, rules.repeat_after, chance)
                if kind == "repeat"
                else _unseen(connection, rater, kind, None)
            )
            if other is not None:
                return Next(other, kind == "repeat", False), chance
            break
        draw -= share
    return Next(ordinary, False, True), chance


def _unseen(connection: Connection, rater: int, kind: str, overlap: int | None) -> int | None:
    """A pair of that kind with a free place, that this rater does not have or has not answered."""
    mine = aliased(AssignmentRow)
    held = exists().where(mine.pair_id == PairRow.id, mine.rater_id == rater, mine.state.in_(("open", "done")))
    dropped = exists().where(mine.pair_id == PairRow.id, mine.rater_id == rater, mine.state == "skipped")
    query = select(PairRow.id).where(PairRow.kind == kind, PairRow.flagged.is_(False), ~held)
    if overlap is None:  # gold and A/A pairs are for everybody: the least used first
        query = query.order_by(PairRow.taken, PairRow.place)
    else:
        query = query.where(PairRow.taken < overlap).order_by(PairRow.taken.desc(), PairRow.place)
    found = connection.scalar(query.where(~dropped).limit(1))
    return connection.scalar(query.limit(1)) if found is None else found


def _repeat(connection: Connection, rater: int, after: int, chance: random.Random) -> int | None:
    """An ordinary pair that this rater answered long enough ago, and was not asked again."""
    recent = (
        select(AssignmentRow.id)
        .where(AssignmentRow.rater_id == rater)
        .order_by(AssignmentRow.id.desc())
        .offset(after - 1)
        .limit(1)
        .scalar_subquery()
    )
    again = aliased(AssignmentRow)
    asked_again = exists().where(again.pair_id == AssignmentRow.pair_id, again.rater_id == rater, again.repeat)
    found = connection.scalars(
        select(AssignmentRow.pair_id)
        .join(PairRow, PairRow.id == AssignmentRow.pair_id)
        .where(
            AssignmentRow.rater_id == rater,
            AssignmentRow.state == "done",
            AssignmentRow.repeat.is_(False),
            AssignmentRow.id < recent,
            PairRow.kind == "ordinary",
            PairRow.flagged.is_(False),
            ~asked_again,
        )
        .order_by(AssignmentRow.id)
        .limit(50)
    ).all()
    return chance.choice(found) if found else None


def side(connection: Connection, chosen: Next, rater: int, chance: random.Random) -> bool:
    """Whether the first sample stands left: the rarer order of this pair, else by a coin biased to the rater's rarer.

    The biased coin (Efron 1971, 2 to 1) keeps each rater in balance without alternating, which one could notice. A
    repeat is shown the other way round, so that who looks at the side alone contradicts himself.
    """

    def surplus(*where: ColumnElement[bool]) -> int:
        """How many more of these assignments have the first sample left than right."""
        query = select(AssignmentRow.first_is_left).where(*where, AssignmentRow.state.in_(("open", "done")))
        shown = connection.scalars(query).all()
        return 2 * sum(shown) - len(shown)

    this_pair, this_rater = AssignmentRow.pair_id == chosen.pair_id, AssignmentRow.rater_id == rater
    of_pair = surplus(this_pair, this_rater) if chosen.repeat else surplus(this_pair)
    if of_pair:
        return of_pair < 0
    of_rater = surplus(this_rater)
    share = 1 / 2 if of_rater == 0 else 1 / 3 if of_rater > 0 else 2 / 3
    return chance.random() < share


def give(
    connection: Connection, chosen: Next, rater: int, protocol: int, now: float, until: float, chance: random.Random
) -> int:
    """Writes the assignment down; returns its id."""
    added = connection.execute(
        insert(AssignmentRow).values(
            token=secrets.token_hex(16),
            pair_id=chosen.pair_id,
            rater_id=rater,
            protocol_id=protocol,
            repeat=chosen.repeat,
            first_is_left=side(connection, chosen, rater, chance),
            state="open",
            claimed_at=now,
            lease_until=until,
        )
    ).inserted_primary_key
    assert added is not None
    if not chosen.repeat:
        connection.execute(update(PairRow).where(PairRow.id == chosen.pair_id).values(taken=PairRow.taken + 1))
    note(connection, now, "claimed", rater, int(added[0]))
    return int(added[0])


def live_vote(connection: Connection, assignment: int) -> RowMapping | None:
    """The vote of an assignment that was not undone."""
    undo = aliased(VoteRow)
    query = select(VoteRow.id, VoteRow.revision, VoteRow.protocol_sha256).where(
        VoteRow.assignment_id == assignment, VoteRow.undoes.is_(None), ~exists().where(undo.undoes == VoteRow.id)
    )
    return connection.execute(query).mappings().one_or_none()
