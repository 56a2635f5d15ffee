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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection, Engine, bindparam, func, insert, select
from sqlalchemy.exc import DatabaseError

from diffalign.errors import InputError, NotFoundError, RefusedError, UserError
from diffalign.study import database, queue
from diffalign.study.answers import Answer
from diffalign.study.chain import note
from diffalign.study.content import Files
from diffalign.study.desk import Desk, held
from diffalign.study.loading import StudyPair, fits, lacking, load, material
from diffalign.study.noted import mark_simulated
from diffalign.study.places import admit
from diffalign.study.progress import disputes
from diffalign.study.protocol import Protocol
from diffalign.study.schema import ProtocolRow, RaterRow, StudyRow
from diffalign.study.sides import standing
from diffalign.study.turns import Assignment, Draft, Progress, Queue, Turn, log, turn

if TYPE_CHECKING:
    from diffalign.study.export import Export
    from diffalign.study.inspection import Finding
    from diffalign.study.report import Stats

LONGEST_NAME = 200
_RATER = select(RaterRow.id).where(RaterRow.name == bindparam("name"))
_KNOWN = select(RaterRow.id, RaterRow.pseudonym).where(RaterRow.name == bindparam("name"))
_TEXT = select(ProtocolRow.text).where(ProtocolRow.id == bindparam("number"))
_NEWEST = select(func.max(ProtocolRow.id))


def new_uid() -> str:
    """What a study is known by. No rater is told: what a claim draws at random comes from it."""
    return uuid.uuid4().hex


class Study:
    """One study. Made by ``create`` or ``open``; methods may be called from any thread."""

    def __init__(self, folder: Path, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.engine = engine
        self.files = Files(folder / "files")
        self._now = clock
        self._raters: dict[str, int] = {}
        self._protocols: dict[int, Protocol] = {}
        with database.reading(engine) as connection:
            row = connection.execute(select(StudyRow.uid, StudyRow.title)).one()
        self.uid: str = row.uid
        self.title: str = row.title

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
        uid = new_uid()
        with new_folder(folder) as made:
            made.chmod(0o700)
            if database_url is None:
                # SQLite gives its log and its shared memory the mode of the database.
                (made / "study.sqlite").touch(0o600)
            engine = database.connect(database_url or made / "study.sqlite")
            try:
                with database.writing(engine) as connection:
                    database.create(connection)
                    now = clock()
                    connection.execute(insert(StudyRow).values(uid=uid, title=title, seed=str(seed), created_at=now))
                    _add_protocol(connection, protocol, now)
                    load(connection, Files(made / "files", flushed=False), pairs, protocol.rules, seed, uid)
                    facts = {"study": uid, "protocol": protocol.sha256, "material": material(connection)}
                    note(connection, now, "created", data=facts)
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
        uid, engine = cls._connected(folder, database_url)
        try:
            database.bring_up_to_date(engine, uid, folder, backed_up)
        except DatabaseError as error:
            # SQLite says this of a file that is none of its own; a server that does not answer is another error.
            if "not a database" not in str(error) and "malformed" not in str(error):
                raise
            engine.dispose()
            raise InputError(
                f"the database of {folder} is damaged ({error.orig}); bring it back from a backup"
            ) from None
        return cls(folder, engine, clock)

    @classmethod
    def upgrade(cls, folder: str | Path, database_url: str | None = None, backed_up: bool = False) -> database.Migrated:
        """Migrates a study of an older schema, as ``open`` does, and says what was done."""
        folder = Path(folder)
        uid, engine = cls._connected(folder, database_url)
        try:
            return database.bring_up_to_date(engine, uid, folder, backed_up)
        finally:
            engine.dispose()

    @staticmethod
    def _connected(folder: Path, database_url: str | None) -> tuple[str, Engine]:
        """The uid that the folder has, and the engine of its database."""
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
        return uid, database.connect(database_url or database.existing(folder / "study.sqlite"))

    def close(self) -> None:
        """Gives up the connections to the database."""
        self.engine.dispose()

    # --- who, and by which rules ---

    def add_rater(self, name: str, simulated: bool = False) -> str:
        """Makes a rater known; returns the pseudonym that exports use. A known one keeps theirs.

        ``simulated`` says that a program judges under that name, which ``stats`` and exports tell of each vote. Once
        said it stays, in the chain of events. RefusedError where the name has votes that were taken for a person's.
        """
        if not name.strip() or len(name) > LONGEST_NAME:
            raise InputError(f"a rater has a name of 1 to {LONGEST_NAME} characters")
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            known = connection.execute(_KNOWN, {"name": name}).one_or_none()
            if known is not None:
                if simulated:
                    mark_simulated(connection, known, name, self._now())
                return str(known.pseudonym)
            pseudonym = f"r-{secrets.token_hex(6)}"
            now = self._now()
            added = connection.execute(insert(RaterRow).values(name=name, pseudonym=pseudonym, created_at=now))
            assert added.inserted_primary_key is not None
            data = {"pseudonym": pseudonym, **({"simulated": True} if simulated else {})}
            note(connection, now, "joined", int(added.inserted_primary_key[0]), data=data)
            return pseudonym

    def protocol(self) -> Protocol:
        """The version that new assignments follow."""
        with database.reading(self.engine) as connection:
            return self.newest(connection)

    def newest(self, connection: Connection) -> Protocol:
        """The same, as a transaction sees it."""
        return self._protocol(connection, connection.execute(_NEWEST).scalar_one())

    def revise(self, protocol: Protocol) -> tuple[str, ...]:
        """A new version of the protocol, for assignments from now on. Votes keep the hash of theirs.

        Returns, in sentences, what it asks for that this study does not have.
        """
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            if connection.scalar(select(ProtocolRow.id).where(ProtocolRow.sha256 == protocol.sha256)):
                raise RefusedError("the study has had this protocol before; change its version and text")
            fits(connection, protocol.rules)
            now = self._now()
            _add_protocol(connection, protocol, now)
            note(connection, now, "revised", data={"protocol": protocol.sha256})
            return lacking(connection, protocol.rules)

    # --- the work of a rater ---

    @contextmanager
    def _desk(self, rater: str, which: Queue = "pairs") -> Iterator[Desk]:
        """One transaction of a rater. What it did is on the disk when the block has been left."""
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            with Desk(connection, self._rater(connection, rater), which, self._now(), self._protocol) as desk:
                yield desk

    def _rater(self, connection: Connection, name: str) -> int:
        """The id; a rater is never removed, so what was found once holds."""
        found = self._raters.get(name) or connection.scalar(_RATER, {"name": name})
        if found is None:
            raise NotFoundError(f"there is no rater {name!r} in this study; add them first")
        self._raters[name] = found
        return found

    def _protocol(self, connection: Connection, number: int) -> Protocol:
        """A version by its id; versions never change."""
        if number not in self._protocols:
            self._protocols[number] = Protocol.parse(connection.execute(_TEXT, {"number": number}).scalar_one())
        return self._protocols[number]

    def claim(self, rater: str, ahead: int = 0, queue: Queue = "pairs") -> Assignment | None:
        """The pair that this rater judges now, kept for them for the lease; None where nothing is left for them.

        Who has one already gets it again, so a reloaded page and a second tab show the same. ``ahead`` 1 is the one
        after it, to be loaded in advance.
        """
        if not 0 <= ahead <= 3:
            raise InputError(f"ahead is {ahead}; a rater holds up to three pairs in advance")
        with self._desk(rater, queue) as desk:
            drafts = desk.claim(ahead)
        return drafts[ahead].finished(self.files) if len(drafts) > ahead else None

    def turn(self, rater: str, queue: Queue = "pairs") -> Turn:
        """The pair now, the one after it, and how far the rater has come, in one transaction.

        The queue ``disputed`` has complete pairs on which raters disagree, for who is to decide. Whether this rater may
        is the caller's to know.
        """
        with self._desk(rater, queue) as desk:
            found = desk.turn()
        return self._finished(found)

    def _finished(self, found: tuple[list[Draft], Progress]) -> Turn:
        return turn(self.files, *found)

    def content(self, rater: str, token: str, side: Literal["left", "right"]) -> bytes:
        """What stands on that side: a PNG, or UTF-8 text. Only for the rater who has the assignment.

        Raises RefusedError where the pair was flagged, and NotFoundError, without saying more, where its file is
        missing or damaged: ``inspect`` says which.
        """
        with database.asking(self.engine) as connection:
            row = held(connection, self._rater(connection, rater), token)
            if side not in ("left", "right"):
                raise InputError(f"there is no side {side!r}; there are left and right")
            if row["flagged"]:
                raise RefusedError("this pair was flagged and is out of the study; ask for the next one")
        try:
            return self.files.get(row[standing(row["first_is_left"])[side]])
        except (UserError, OSError) as error:
            # A hash would tell a rater which samples are the same.
            log.error("a pair cannot be shown: %s", error)
            raise NotFoundError("this pair cannot be shown: flag it, or skip it") from None

    def vote(self, rater: str, token: str, answer: Answer, queue: Queue = "pairs") -> int:
        """Keeps a vote; when this returns its number, the vote is on the disk.

        Raises RefusedError where the assignment has a vote, was skipped or flagged, or was given to somebody else
        because its lease was over; NotFoundError where this rater has no such assignment in this queue.
        """
        with self._desk(rater, queue) as desk:
            return desk.vote(token, answer)

    def vote_and_turn(self, rater: str, token: str, answer: Answer, queue: Queue = "pairs") -> tuple[int, Turn]:
        """``vote`` and then ``turn``, in one transaction."""
        with self._desk(rater, queue) as desk:
            number, found = desk.vote(token, answer), desk.turn()
        return number, self._finished(found)

    def undo(self, rater: str, queue: Queue = "pairs") -> Assignment:
        """Takes back the last vote of a rater and gives the pair again. The vote stays in the record, as undone."""
        with self._desk(rater, queue) as desk:
            found = desk.shown(desk.undo())
        return found.finished(self.files)

    def undo_and_turn(self, rater: str, queue: Queue = "pairs") -> Turn:
        """``undo`` and then ``turn``, in one transaction."""
        with self._desk(rater, queue) as desk:
            desk.undo()
            found = desk.turn()
        return self._finished(found)

    def skip(self, rater: str, token: str, queue: Queue = "pairs") -> None:
        """Puts the pair back: others may get it, and this rater gets it again when nothing else is left."""
        with self._desk(rater, queue) as desk:
            desk.end(token, "skipped")

    def skip_and_turn(self, rater: str, token: str, queue: Queue = "pairs") -> Turn:
        """``skip`` and then ``turn``, in one transaction."""
        with self._desk(rater, queue) as desk:
            desk.end(token, "skipped")
            found = desk.turn()
        return self._finished(found)

    def flag(self, rater: str, token: str, reason: str = "", queue: Queue = "pairs") -> None:
        """Takes the pair out of the study for everybody: it is broken or must not be shown. Its votes do not count."""
        with self._desk(rater, queue) as desk:
            desk.end(token, "flagged", reason)

    def flag_and_turn(self, rater: str, token: str, reason: str = "", queue: Queue = "pairs") -> Turn:
        """``flag`` and then ``turn``, in one transaction."""
        with self._desk(rater, queue) as desk:
            desk.end(token, "flagged", reason)
            found = desk.turn()
        return self._finished(found)

    def unflag_and_turn(self, rater: str, queue: Queue = "pairs") -> Turn:
        """Takes back this rater's flag and gives the pair again, and then ``turn``, in one transaction.

        The pair is in the study again, its votes count, and who else had it has it for the rest of their lease.
        Raises RefusedError where they did anything after it, where an administrator took it back, and where the study
        has got all its votes meanwhile.
        """
        with self._desk(rater, queue) as desk:
            desk.unflag()
            found = desk.turn()
        return self._finished(found)

    def unflag(self, pair: int) -> None:
        """Takes a flagged pair into the study again, by its number; its votes count again, even above the budget.

        For an administrator, who may have looked at it. Nobody gets it back: it comes to raters as others do.
        """
        with database.writing(self.engine) as connection:
            queue.lock(connection)
            admit(connection, pair, self._now())

    def disputes(self) -> int:
        """How many pairs wait for a verdict of an adjudicator."""
        with database.reading(self.engine) as connection:
            return disputes(connection, self.newest(connection).rules)

    # --- what comes out ---

    def export(self, final: bool = False) -> Export:
        """The live votes as preferences, or one verdict per pair and criterion: see ``export``."""
        from diffalign.study.export import Export

        return Export(self, final)

    def scores(self) -> Iterator[dict[str, object]]:
        """One row per vote, sample and criterion of the kind ``scale``: see ``export``."""
        from diffalign.study.export import scores

        return scores(self)

    def points(self) -> Iterator[dict[str, object]]:
        """One row per place that was marked in an image: see ``export``."""
        from diffalign.study.export import points

        return points(self)

    def inspect(self) -> list[Finding]:
        """Whether everything is as it was written: see ``inspection``. Reads every file of the study."""
        from diffalign.study.inspection import inspect

        return inspect(self)

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
            made.chmod(0o700)
            # The database first: files are never changed or removed, so all that it names are there afterwards.
            database.copy(self.engine, made / "study.sqlite")
            (made / "study.sqlite").chmod(0o600)
            shutil.copytree(self.folder / "files", made / "files")
            shutil.copy2(self.folder / "study.json", made)


def _add_protocol(connection: Connection, protocol: Protocol, now: float) -> None:
    connection.execute(insert(ProtocolRow).values(sha256=protocol.sha256, text=protocol.text, created_at=now))
