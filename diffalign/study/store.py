"""A study: pairs that are given to raters, and the votes that come back. What was acknowledged is on the disk.

A study is a folder::

    STUDY/study.json       which study this is, and whether its database is here or elsewhere
    STUDY/study.sqlite     the database (or PostgreSQL by URL)
    STUDY/files/ab/ab12…   images and texts, named by their SHA-256
    STUDY/backups/         copies of the database from before migrations

Any number of processes may open it at the same time.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection, Engine, RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.study import database, queue
from diffalign.study.answers import Answer
from diffalign.study.content import Files
from diffalign.study.loading import StudyPair, load
from diffalign.study.protocol import Protocol
from diffalign.study.schema import (
    AssignmentRow,
    ItemRow,
    PairRow,
    ProtocolRow,
    RaterRow,
    SampleRow,
    StudyRow,
    VoteRow,
)

if TYPE_CHECKING:
    from diffalign.study.export import Export
    from diffalign.study.report import Stats

LONGEST_NAME = 200
_HELD = (
    AssignmentRow.id,
    AssignmentRow.pair_id,
    AssignmentRow.protocol_id,
    AssignmentRow.repeat,
    AssignmentRow.first_is_left,
    AssignmentRow.state,
)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a rater may know of what is to be judged: nothing about where the samples come from."""

    token: str
    """Names it; the samples are had by ``Study.content``."""
    prompt: str
    kind: Literal["image", "text"]
    protocol: Protocol
    lease_until: float
    """Until then the pair is kept for this rater; seconds since 1970."""


class Study:
    """One study. Made by ``create`` or ``open``; methods may be called from any thread."""

    def __init__(self, folder: Path, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.engine = engine
        self.files = Files(folder / "files")
        self._now = clock

    # --- making and opening ---

    @classmethod
    def create(
        cls,
        folder: str | Path,
        protocol: Protocol,
        pairs: Iterable[StudyPair],
        title: str = "",
        seed: int = 0,
        database_url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """Makes a study, whole or not at all, in a folder that is not there yet, or is empty.

        ``database_url`` puts the tables into an empty PostgreSQL database; the files stay in the folder.
        """
        from diffalign.runs import new_folder

        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RefusedError(f"{folder} is there already, and not empty; a study starts in a folder of its own")
        uid = uuid.uuid4().hex
        with new_folder(folder) as made:
            engine = database.connect(database_url or made / "study.sqlite")
            try:
                with database.writing(engine) as connection:
                    database.create(connection)
                    now = clock()
                    connection.execute(insert(StudyRow).values(uid=uid, title=title, seed=str(seed), created_at=now))
                    _add_protocol(connection, protocol, now)
                    load(connection, Files(made / "files"), pairs, protocol.rules, seed)
            finally:
                engine.dispose()
            kind = "postgresql" if database_url else "sqlite"
            (made / "study.json").write_text(json.dumps({"study": uid, "database": kind}) + "\n", encoding="utf-8")
        return cls.open(folder, database_url, clock=clock)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        database_url: str | None = None,
        backed_up: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """Opens a study. An older schema is migrated after a backup; one of a newer release is refused.

        ``backed_up`` allows the migration of a PostgreSQL study, of which no backup can be made from here.
        """
        folder = Path(folder)
        try:
            known = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            uid, kind = str(known["study"]), str(known["database"])
        except FileNotFoundError:
            raise NotFoundError(f"{folder} is no study: it has no study.json") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'study.json'} is damaged: {error}") from None
        if kind == "postgresql" and database_url is None:
            raise NotFoundError(f"the database of {folder} is a PostgreSQL server; give its URL")
        if kind == "sqlite" and database_url is not None:
            raise InputError(f"{folder} has its database with it; open it without a URL")
        engine = database.connect(database_url or database.existing(folder / "study.sqlite"))
        database.bring_up_to_date(engine, folder / "backups", backed_up)
        study = cls(folder, engine, clock)
        with database.reading(engine) as connection:
            found = connection.scalar(select(StudyRow.uid))
        if found != uid:
            raise InputError(f"the database belongs to another study ({found}) than the folder {folder} ({uid})")
        return study

    def close(self) -> None:
        """Gives up the connections to the database."""
        self.engine.dispose()

    # --- who, and by which rules ---

    def add_rater(self, name: str) -> str:
        """Makes a rater known; returns the pseudonym that exports use. A known one keeps theirs."""
        if not name.strip() or len(name) > LONGEST_NAME:
            raise InputError(f"a rater has a name of 1 to {LONGEST_NAME} characters")
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            known = connection.scalar(select(RaterRow.pseudonym).where(RaterRow.name == name))
            if known is not None:
                return known
            pseudonym = f"r-{secrets.token_hex(6)}"
            connection.execute(insert(RaterRow).values(name=name, pseudonym=pseudonym, created_at=self._now()))
            return pseudonym

    def protocol(self) -> Protocol:
        """The version that new assignments follow."""
        with database.reading(self.engine) as connection:
            return _protocol(connection)[1]

    def revise(self, protocol: Protocol) -> None:
        """A new version of the protocol, for assignments from now on. Votes keep the hash of theirs."""
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            if connection.scalar(select(ProtocolRow.id).where(ProtocolRow.sha256 == protocol.sha256)):
                raise RefusedError("the study has had this protocol before; change its version and text")
            _add_protocol(connection, protocol, self._now())

    # --- the work of a rater ---

    def claim(self, rater: str, ahead: int = 0) -> Assignment | None:
        """The pair that this rater judges now, kept for them for the lease; None where nothing is left for them.

        Who has one already gets it again, so a reloaded page and a second tab show the same. ``ahead`` 1 is the one
        after it, to be loaded in advance.
        """
        if not 0 <= ahead <= 3:
            raise InputError(f"ahead is {ahead}; a rater holds up to three pairs in advance")
        with database.writing(self.engine) as connection:
            study = queue.lock(connection)
            who, now = _rater(connection, rater), self._now()
            queue.release(connection, now)
            number, protocol = _protocol(connection)
            rules = protocol.rules
            until = now + 60 * rules.lease_minutes
            mine = (AssignmentRow.rater_id == who, AssignmentRow.state == "open")
            held = list(connection.scalars(select(AssignmentRow.id).where(*mine).order_by(AssignmentRow.id)))
            while len(held) <= ahead:
                chosen, chance = queue.choose(connection, who, rules, study["seed"])
                if chosen is None:
                    return None
                held.append(queue.give(connection, chosen, who, number, now, until, chance))
            connection.execute(
                update(AssignmentRow).where(AssignmentRow.id.in_(held[: ahead + 1])).values(lease_until=until)
            )
            return _assignment(connection, held[ahead])

    def content(self, rater: str, token: str, side: Literal["left", "right"]) -> bytes:
        """What stands on that side: a PNG, or UTF-8 text. Only for the rater who has the assignment."""
        with database.reading(self.engine) as connection:
            row = _held(connection, _rater(connection, rater), token)
            if side not in ("left", "right"):
                raise InputError(f"there is no side {side!r}; there are left and right")
            column = PairRow.first_id if (side == "left") == row["first_is_left"] else PairRow.second_id
            query = select(SampleRow.sha256).join(PairRow, SampleRow.id == column).where(PairRow.id == row["pair_id"])
            sha256 = connection.scalar(query)
        assert sha256 is not None
        return self.files.get(sha256)

    def vote(self, rater: str, token: str, answer: Answer) -> int:
        """Keeps a vote; when this returns its number, the vote is on the disk.

        Raises RefusedError where the assignment has a vote, was skipped or flagged, or was given to somebody else
        because its lease was over; NotFoundError where this rater has no such assignment.
        """
        try:
            with database.writing(self.engine) as connection:
                return self._vote(connection, rater, token, answer)
        except IntegrityError:
            # A second vote that arrived in the same moment: the unique index knows.
            raise RefusedError("this pair has your vote already; undo it to change it") from None

    def _vote(self, connection: Connection, rater: str, token: str, answer: Answer) -> int:
        queue.lock(connection)
        who, now = _rater(connection, rater), self._now()
        row = _held(connection, who, token)
        protocol = _protocol(connection, row["protocol_id"])[1]
        answer.check(protocol.rules)
        if row["state"] == "expired":
            _revive(connection, row, protocol.rules.overlap)
        elif row["state"] == "done":
            raise RefusedError("this pair has your vote already; undo it to change it")
        elif row["state"] != "open":
            raise RefusedError(f"this pair was {row['state']} by you; ask for the next one")
        undone = connection.scalar(
            select(func.count()).where(VoteRow.assignment_id == row["id"], VoteRow.undoes.is_not(None))
        )
        added = connection.execute(
            insert(VoteRow).values(
                assignment_id=row["id"],
                revision=undone,
                choice=answer.choice,
                strength=answer.strength,
                answers={
                    name: dict(value) if isinstance(value, Mapping) else value
                    for name, value in answer.criteria.items()
                },
                points=[asdict(point) for point in answer.points],
                comment=answer.comment,
                shown_at=answer.shown_at,
                decided_at=answer.decided_at,
                received_at=now,
                protocol_sha256=protocol.sha256,
            )
        ).inserted_primary_key
        assert added is not None
        connection.execute(update(AssignmentRow).where(AssignmentRow.id == row["id"]).values(state="done"))
        queue.note(connection, now, "voted", who, row["id"], vote=int(added[0]))
        return int(added[0])

    def undo(self, rater: str) -> Assignment:
        """Takes back the last vote of a rater and gives the pair again. The vote stays in the record, as undone."""
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            who, now = _rater(connection, rater), self._now()
            last = (
                connection.execute(
                    select(AssignmentRow.id, AssignmentRow.protocol_id, func.max(VoteRow.id))
                    .join(VoteRow, VoteRow.assignment_id == AssignmentRow.id)
                    .where(AssignmentRow.rater_id == who, AssignmentRow.state == "done", VoteRow.undoes.is_(None))
                    .group_by(AssignmentRow.id, AssignmentRow.protocol_id)
                    .order_by(func.max(VoteRow.id).desc())
                    .limit(1)
                )
                .mappings()
                .one_or_none()
            )
            vote = queue.live_vote(connection, last["id"]) if last else None
            if last is None or vote is None:
                raise RefusedError("there is no vote of yours to undo")
            connection.execute(
                insert(VoteRow).values(
                    assignment_id=last["id"],
                    revision=vote["revision"],
                    undoes=vote["id"],
                    answers={},
                    points=[],
                    comment="",
                    received_at=now,
                    protocol_sha256=vote["protocol_sha256"],
                )
            )
            until = now + 60 * _protocol(connection, last["protocol_id"])[1].rules.lease_minutes
            connection.execute(
                update(AssignmentRow).where(AssignmentRow.id == last["id"]).values(state="open", lease_until=until)
            )
            queue.note(connection, now, "undone", who, last["id"], vote=vote["id"])
            return _assignment(connection, last["id"])

    def skip(self, rater: str, token: str) -> None:
        """Puts the pair back: others may get it, and this rater gets it again when nothing else is left."""
        with database.writing(self.engine) as connection:
            self._end(connection, rater, token, "skipped", "")

    def flag(self, rater: str, token: str, reason: str = "") -> None:
        """Takes the pair out of the study for everybody: it is broken or must not be shown. Its votes do not count."""
        with database.writing(self.engine) as connection:
            pair = self._end(connection, rater, token, "flagged", reason)
            connection.execute(update(PairRow).where(PairRow.id == pair).values(flagged=True))

    def _end(self, connection: Connection, rater: str, token: str, state: str, reason: str) -> int:
        queue.lock(connection)
        who = _rater(connection, rater)
        row = _held(connection, who, token)
        if row["state"] != "open":
            raise RefusedError(f"this pair is {row['state']}, so it cannot be {state}; ask for the next one")
        queue.close(connection, row["id"], row["pair_id"], row["repeat"], state)
        queue.note(connection, self._now(), state, who, row["id"], reason=reason)
        return int(row["pair_id"])

    def release_expired(self) -> int:
        """Takes back pairs that were not answered within the lease; returns how many. ``claim`` does it, too."""
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            return queue.release(connection, self._now())

    # --- what comes out ---

    def export(self) -> Export:
        """The live votes as preferences: see ``export``."""
        from diffalign.study.export import Export

        return Export(self)

    def stats(self) -> Stats:
        """Progress, agreement, raters, ranking: see ``report``."""
        from diffalign.study.report import stats

        return stats(self)

    def backup(self, folder: str | Path) -> None:
        """A copy of the whole study, whole or not at all, that opens as one; raters may go on meanwhile."""
        import shutil

        from diffalign.runs import new_folder

        folder = Path(folder)
        if folder.exists():
            raise RefusedError(f"{folder} is there already; a backup gets a new folder")
        with new_folder(folder) as made:
            # The database first: files are never changed or removed, so all that it names are there afterwards.
            database.copy(self.engine, made / "study.sqlite")
            shutil.copytree(self.folder / "files", made / "files")
            shutil.copy2(self.folder / "study.json", made)


def _add_protocol(connection: Connection, protocol: Protocol, now: float) -> None:
    connection.execute(insert(ProtocolRow).values(sha256=protocol.sha256, text=protocol.text, created_at=now))


def _protocol(connection: Connection, number: int | None = None) -> tuple[int, Protocol]:
    query = select(ProtocolRow.id, ProtocolRow.text).order_by(ProtocolRow.id.desc()).limit(1)
    if number is not None:
        query = query.where(ProtocolRow.id == number)
    row = connection.execute(query).one()
    return row.id, _parsed(row.text)


_parsed = lru_cache(maxsize=16)(Protocol.parse)


def _rater(connection: Connection, name: str) -> int:
    found = connection.scalar(select(RaterRow.id).where(RaterRow.name == name))
    if found is None:
        raise NotFoundError(f"there is no rater {name!r} in this study; add them first")
    return found


def _held(connection: Connection, rater: int, token: str) -> RowMapping:
    """The assignment, if it is this rater's: of others' one does not learn that they exist."""
    query = select(*_HELD).where(AssignmentRow.token == token, AssignmentRow.rater_id == rater)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFoundError("you have no such assignment; ask for the next one")
    return row


def _revive(connection: Connection, row: RowMapping, overlap: int) -> None:
    """Takes an answer that comes after the lease, unless the place has been given away."""
    pair = connection.execute(select(PairRow.kind, PairRow.taken).where(PairRow.id == row["pair_id"])).one()
    if pair.kind == "ordinary" and not row["repeat"] and pair.taken >= overlap:
        raise RefusedError("the time for this pair was over, and others have judged it meanwhile; ask for the next one")
    if not row["repeat"]:
        connection.execute(update(PairRow).where(PairRow.id == row["pair_id"]).values(taken=PairRow.taken + 1))


def _assignment(connection: Connection, number: int) -> Assignment:
    row = connection.execute(
        select(
            AssignmentRow.token, AssignmentRow.lease_until, AssignmentRow.protocol_id, ItemRow.text, ItemRow.kind
        )
        .join(PairRow, PairRow.id == AssignmentRow.pair_id)
        .join(ItemRow, ItemRow.id == PairRow.item_id)
        .where(AssignmentRow.id == number)
    ).one()  # fmt: skip
    kind: Literal["image", "text"] = "image" if row.kind == "image" else "text"
    return Assignment(row.token, row.text, kind, _protocol(connection, row.protocol_id)[1], row.lease_until)
