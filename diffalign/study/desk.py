"""One rater at work: claim, vote, undo, skip, flag, within one transaction that holds the lock of the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from sqlalchemy import Connection, RowMapping, bindparam, exists, func, insert, select, text, update
from sqlalchemy.orm import aliased

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.study import places, queue
from diffalign.study.answers import Answer
from diffalign.study.database import together
from diffalign.study.progress import progress
from diffalign.study.protocol import Protocol, Rules
from diffalign.study.schema import ACTIVE, AssignmentRow, EventRow, ItemRow, PairRow, SampleRow, VoteRow
from diffalign.study.sides import outcome
from diffalign.study.turns import QUEUES, Draft, Progress, Queue, drafts

# A vote has a choice, an undo has none. Asked so, SQLite leaves the index of ``undoes`` alone, where most are alike.
_REVISION = (
    select(func.count())
    .where(VoteRow.assignment_id == AssignmentRow.id, VoteRow.choice.is_(None))
    .correlate(AssignmentRow)
    .scalar_subquery()
)
_ONE, _TWO = aliased(SampleRow), aliased(SampleRow)
HELD = (
    select(
        AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.protocol_id, AssignmentRow.repeat,
        AssignmentRow.adjudication, AssignmentRow.first_is_left, AssignmentRow.state, PairRow.kind,
        PairRow.flagged, ItemRow.kind.label("of"), _REVISION.label("revision"),
        _ONE.sha256.label("first"), _TWO.sha256.label("second"),
    )
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .join(ItemRow, ItemRow.id == PairRow.item_id)
    .join(_ONE, _ONE.id == PairRow.first_id)
    .join(_TWO, _TWO.id == PairRow.second_id)
    .where(AssignmentRow.token == bindparam("token"), AssignmentRow.rater_id == bindparam("rater"))
)  # fmt: skip
_KEEP_MINE = (
    update(AssignmentRow)
    .where(
        AssignmentRow.rater_id == bindparam("rater"),
        AssignmentRow.state == "open",
        AssignmentRow.adjudication == bindparam("of_disputes"),
        ~exists().where(PairRow.id == AssignmentRow.pair_id, PairRow.flagged).correlate(AssignmentRow),
    )
    .values(lease_until=bindparam("until"))
    .returning(AssignmentRow.id)
)
_KEEP = (
    update(AssignmentRow)
    .where(AssignmentRow.__table__.c.id == bindparam("number"))
    .values(state="open", lease_until=bindparam("until"))
)
_DONE = update(AssignmentRow).where(AssignmentRow.__table__.c.id == bindparam("number")).values(state="done")
_ADD_VOTE = insert(VoteRow)
_OF_VOTE = ("pair_id", "protocol_id", "repeat", "adjudication", "first_is_left")
_LAST_VOTE = (
    select(
        *VoteRow.__table__.c,
        *(AssignmentRow.__table__.c[name].label(f"of_{name}") for name in _OF_VOTE),
        PairRow.kind.label("of_kind"),
        PairRow.flagged.label("of_flagged"),
    )
    .join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id)
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .where(
        AssignmentRow.rater_id == bindparam("rater"),
        AssignmentRow.state == "done",
        AssignmentRow.adjudication == bindparam("adjudication"),
        VoteRow.choice.is_not(None),
    )
    .order_by(VoteRow.id.desc())
    .limit(1)
)
_DEEDS = ("voted", "undone", "skipped", "flagged", "unflagged")
_LAST_DEED = (
    select(
        EventRow.kind.label("event"), AssignmentRow.id, AssignmentRow.pair_id, AssignmentRow.protocol_id,
        AssignmentRow.repeat, AssignmentRow.adjudication, PairRow.flagged,
    )
    .join(AssignmentRow, AssignmentRow.id == EventRow.assignment_id)
    .join(PairRow, PairRow.id == AssignmentRow.pair_id)
    .where(
        EventRow.rater_id == bindparam("rater"),
        EventRow.kind.in_(_DEEDS),
        AssignmentRow.adjudication == bindparam("adjudication"),
    )
    .order_by(EventRow.id.desc())
    .limit(1)
)  # fmt: skip
_TAKEN = select(PairRow.taken).where(PairRow.id == bindparam("pair"))
_THERE = select(func.count()).where(AssignmentRow.pair_id == bindparam("pair"), text(ACTIVE))
_AGAIN = _THERE.where(AssignmentRow.rater_id == bindparam("rater"))
_JUDGED = _THERE.where(AssignmentRow.adjudication)


def held(connection: Connection, rater: int, token: str) -> RowMapping:
    """The assignment, if it is this rater's: of others' one does not learn that they exist."""
    row = connection.execute(HELD, {"token": token, "rater": rater}).mappings().one_or_none()
    if row is None:
        raise NotFoundError("you have no such assignment; ask for the next one")
    return row


class Desk:
    """What a rater does in one transaction and one queue, under the lock of the study.

    Within its block: the events are written when it is left, unless by an exception, which undoes the transaction.
    """

    def __init__(
        self,
        connection: Connection,
        rater: int,
        which: Queue,
        now: float,
        protocol: Callable[[Connection, int], Protocol],
    ) -> None:
        if which not in QUEUES:
            raise InputError(f"there is no queue {which!r}; there are {', '.join(QUEUES)}")
        self._connection, self._rater, self._which = connection, rater, which
        self._now, self._read = now, protocol
        self._mine = {"rater": rater, "adjudication": which == "disputed"}

    def __enter__(self) -> Self:
        stand = queue.stand(self._connection, self._rater, self._now)
        self._newest, self._before, self._late = stand.protocol, stand.before, stand.late
        self._chain, self._seed = stand.chain(), stand.drawn
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._chain.write(self._connection)

    def _protocol(self, number: int) -> Protocol:
        return self._read(self._connection, number)

    # --- getting ---

    def claim(self, ahead: int = 0) -> list[Draft]:
        """What this rater has open, the oldest first, filled up to one and ``ahead`` more where there is anything."""
        return drafts(self._connection, self._claim(ahead)[1], self._protocol)

    def turn(self) -> tuple[list[Draft], Progress]:
        """The pair now, the one after it, and how far the rater has come."""
        rules, numbers = self._claim(1)
        found = drafts(self._connection, numbers, self._protocol)
        return found, progress(self._connection, self._rater, rules, self._which, bool(found))

    def _claim(self, ahead: int) -> tuple[Rules, list[int]]:
        """The rules, and what this rater has: first of all what they had before, although the lease may be over."""
        rules = self._protocol(self._newest).rules
        until = self._now + 60 * rules.lease_minutes
        mine = {"rater": self._rater, "of_disputes": self._which == "disputed", "until": until}
        open_ones = sorted(self._connection.scalars(_KEEP_MINE, mine))
        if self._late:
            places.release(self._connection, self._chain, self._now, self._rater)
        while len(open_ones) <= ahead:
            chosen, chance = queue.choose(self._connection, self._rater, rules, self._seed, self._before, self._which)
            if chosen is None:
                break
            given = queue.give(
                self._connection, self._chain, chosen, self._rater, self._newest, self._now, until, chance
            )
            open_ones.append(given)
            self._before += 1
        return rules, open_ones[: ahead + 1]

    # --- answering ---

    def vote(self, token: str, answer: Answer) -> int:
        """Keeps a vote; returns its number."""
        row = self._held(token)
        if row["flagged"]:
            raise RefusedError("this pair was flagged and is out of the study; ask for the next one")
        protocol = self._protocol(row["protocol_id"])
        answer.check(protocol.rules)
        if answer.points and row["of"] != "image":
            raise InputError("places are marked in images; this pair has texts")
        if row["state"] == "expired":
            self._revive(row, protocol.rules)
        elif row["state"] == "done":
            raise RefusedError("this pair has your vote already; undo it to change it")
        elif row["state"] != "open":
            raise RefusedError(f"this pair was {row['state']} by you; ask for the next one")
        number = self._add(
            "voted",
            row["id"],
            assignment_id=row["id"],
            revision=row["revision"],
            undoes=None,
            choice=answer.choice,
            strength=answer.strength,
            answers={
                name: dict(value) if isinstance(value, Mapping) else value for name, value in answer.criteria.items()
            },
            points=[asdict(point) for point in answer.points],
            comment=answer.comment,
            shown_at=answer.shown_at,
            decided_at=answer.decided_at,
            protocol_sha256=protocol.sha256,
        )
        with together(self._connection):
            self._connection.execute(_DONE, {"number": row["id"]})
            self._count(row, answer.choice, 1)
        return number

    def _held(self, token: str) -> RowMapping:
        row = held(self._connection, self._rater, token)
        if row["adjudication"] != self._mine["adjudication"]:
            raise NotFoundError(f"you have no such assignment in the queue {self._which}; ask for the next one")
        return row

    def _add(self, kind: str, assignment: int, **values: Any) -> int:
        added = self._connection.execute(_ADD_VOTE, {**values, "received_at": self._now}).inserted_primary_key
        assert added is not None
        vote = {"id": int(added[0]), **values, "received_at": self._now}
        about = vote["undoes"] or vote["id"]
        self._chain.note(self._now, kind, self._rater, assignment, vote=vote, data={"vote": about})
        return int(added[0])

    def _count(self, row: Mapping[Any, Any], choice: str, by: int) -> None:
        """Where the vote counts for one of the arms, or for neither."""
        if row["repeat"] or row["adjudication"] or row["kind"] != "ordinary" or choice == "cannot_judge":
            return
        places.count(self._connection, row["pair_id"], **{outcome(choice, row["first_is_left"]): by})

    def _revive(self, row: RowMapping, rules: Rules) -> None:
        """Takes an answer that comes after the lease, unless the place has been given away."""
        pair = {"pair": row["pair_id"], "rater": self._rater}
        if not row["repeat"] and self._connection.scalar(_AGAIN, pair):
            raise RefusedError(
                "the time for this pair was over, and you have been given it again; ask for the next one"
            )
        given_away = (
            bool(self._connection.scalar(_JUDGED, pair))
            if row["adjudication"]
            else row["kind"] == "ordinary"
            and not row["repeat"]
            and (self._connection.execute(_TAKEN, pair).scalar_one() >= rules.overlap or self._spent(rules))
        )
        if given_away:
            raise RefusedError(
                "the time for this pair was over, and others have judged it meanwhile; ask for the next one"
            )
        if not (row["repeat"] or row["adjudication"]):
            places.count(self._connection, row["pair_id"], taken=1)

    def _spent(self, rules: Rules) -> bool:
        return rules.budget is not None and queue.given(self._connection) >= rules.budget

    # --- taking back ---

    def undo(self) -> int:
        """Takes back the last vote of this rater in this queue; returns the assignment, which is open again."""
        row = self._connection.execute(_LAST_VOTE, self._mine).mappings().one_or_none()
        if row is None:
            raise RefusedError("there is no vote of yours to undo")
        if row["of_flagged"]:
            raise RefusedError(
                "the pair of your last vote was flagged and is out of the study; its vote stays as it is"
            )
        number = int(row["assignment_id"])
        self._add(
            "undone",
            number,
            assignment_id=number,
            revision=row["revision"],
            undoes=row["id"],
            choice=None,
            strength=None,
            answers={},
            points=[],
            comment="",
            shown_at=None,
            decided_at=None,
            protocol_sha256=row["protocol_sha256"],
        )
        until = self._now + 60 * self._protocol(row["of_protocol_id"]).rules.lease_minutes
        self._connection.execute(_KEEP, {"number": number, "until": until})
        self._count({name: row[f"of_{name}"] for name in (*_OF_VOTE, "kind")}, row["choice"], -1)
        return number

    def unflag(self) -> None:
        """Takes back a flag, if it is the last that this rater did in this queue; the pair is in their hands again."""
        last = self._connection.execute(_LAST_DEED, self._mine).mappings().one_or_none()
        if last is None or last["event"] != "flagged":
            raise RefusedError("a flag is taken back right after it; the last that you did is no flag")
        if not last["flagged"]:
            raise RefusedError("the flag that you set last was taken back by an administrator")
        rules = self._protocol(last["protocol_id"]).rules
        places.unflag(self._connection, self._chain, last["pair_id"], self._now, back=True)
        self._connection.execute(_KEEP, {"number": last["id"], "until": self._now + 60 * rules.lease_minutes})
        if not (last["repeat"] or last["adjudication"]):
            places.count(self._connection, last["pair_id"], taken=1)
        newest = self._protocol(self._newest).rules
        if newest.budget is not None and queue.given(self._connection) > newest.budget:
            raise RefusedError(
                "the study has got all the votes that it asked for meanwhile, so the pair stays out; an administrator"
                " can take it in again"
            )
        self._chain.note(self._now, "unflagged", self._rater, last["id"], data={"pair": last["pair_id"]})

    def shown(self, number: int) -> Draft:
        """That assignment."""
        return drafts(self._connection, [number], self._protocol)[0]

    def end(self, token: str, state: Literal["skipped", "flagged"], reason: str = "") -> None:
        """Gives the pair back without a vote; a flagged one is taken out for everybody."""
        row = self._held(token)
        if row["state"] != "open":
            raise RefusedError(f"this pair is {row['state']}, so it cannot be {state}; ask for the next one")
        places.close(self._connection, row, state)
        self._chain.note(self._now, state, self._rater, row["id"], data={"reason": reason})
        if state == "flagged":
            places.flag(self._connection, self._chain, row["pair_id"], self._now)
