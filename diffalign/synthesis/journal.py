"""The journal of a dataset: every row and every attempt at it, in one SQLite file beside the images.

A transaction is written only after the files that it names are on the disk, so that a process killed at any moment
leaves nothing that is half there: what the journal does not name is made again, to the same bytes. A round is closed,
in one transaction too, once the gates that compare its attempts with other cases have spoken; what is accepted counts
from then on.

Several processes of one machine may write at the same time. The folder must not be a network share.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.runs import flush_folder
from diffalign.synthesis.cases import Value

Part = Literal["image", "text"]
PARTS: tuple[Part, ...] = ("image", "text")
BUSY_SECONDS = 60
SCHEMA = """
CREATE TABLE row (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL, cells TEXT NOT NULL, stratum TEXT NOT NULL, split TEXT NOT NULL,
    prompt TEXT NOT NULL, text_prompt TEXT NOT NULL
);
CREATE TABLE attempt (
    row INTEGER NOT NULL, part TEXT NOT NULL, attempt INTEGER NOT NULL, seed INTEGER NOT NULL, image TEXT, text TEXT,
    scores TEXT NOT NULL, gate TEXT, reason TEXT NOT NULL, looks BLOB, PRIMARY KEY (row, part, attempt)
) WITHOUT ROWID;
CREATE TABLE round (number INTEGER PRIMARY KEY, attempts INTEGER NOT NULL);
"""
_ATTEMPT = "row, part, attempt, seed, image, text, scores, gate, reason, looks"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table that a specification asks for."""

    index: int
    id: str
    cells: Mapping[str, Value]
    stratum: str
    split: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One image or text that was made for a row, and what became of it."""

    row: int
    part: Part
    attempt: int
    """From 0: the number of the round."""
    seed: int
    image: str | None = None
    """SHA-256 of its PNG. The file is kept unless a gate that looks at this image alone rejected it."""
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    """By reward, and by part as ``REWARD/PART``; a judgement that failed is left out."""
    gate: str | None = None
    """The gate that rejected it; None where it was accepted."""
    reason: str = ""
    """Why, in words."""
    looks: bytes | None = None
    """What a gate that compares images knows this one by."""


class Journal:
    """The journal in a file."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Opens a journal that is there; raises NotFoundError, or InputError for a file that is no journal."""
        if not path.is_file():
            raise NotFoundError(f"there is no journal {path.name} in {path.parent}")
        self.path = path
        mode = "rw" if writable else "ro"
        try:
            self.connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
            )
            if writable:
                self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.execute("SELECT count(*) FROM round").fetchone()
        except sqlite3.Error as error:
            raise _fault(path, error) from None

    @classmethod
    def create(cls, path: Path) -> Journal:
        """A new journal, which has its name only once its tables are there."""
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(part)) as connection:
                # Without a file of its own for undoing, which a killed process would leave beside the next one's.
                connection.execute("PRAGMA journal_mode=MEMORY")
                connection.executescript(SCHEMA)
            _flush(part)
            part.replace(path)
            flush_folder(path.parent)
        except sqlite3.Error as error:
            raise _fault(path, error) from None
        return cls(path, writable=True)

    def close(self) -> None:
        """Lets go of the file."""
        self.connection.close()

    def finish(self) -> None:
        """Packs the journal into one file, whose bytes depend on its contents alone, and lets go of it."""
        packed = self.path.with_name(f".{self.path.name}.packed")
        packed.unlink(missing_ok=True)
        try:
            self.connection.execute("VACUUM INTO ?", (str(packed),))
            with closing(sqlite3.connect(packed, isolation_level=None)) as found:
                found.execute("PRAGMA journal_mode=OFF")
                found.execute("PRAGMA schema_version=1")  # it counts how often the file was packed
            _flush(packed)
            # From here on the file is whole without a log beside it, so that another may take its name.
            self.connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.Error as error:
            raise _fault(self.path, error) from None
        self.close()
        packed.replace(self.path)
        flush_folder(self.path.parent)

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """On the disk once the block has been left, or never was."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise _fault(self.path, error) from None

    def record(self, rows: Sequence[tuple[Row, str, str]], attempts: Sequence[Attempt]) -> None:
        """Writes a chunk: its attempts, and the rows (with the prompts of image and text) that are new. All or none."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO row VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((r.index, r.id, _json(r.cells), r.stratum, r.split, image, text) for r, image, text in rows),
            )
            connection.executemany(
                f"INSERT INTO attempt ({_ATTEMPT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (a.row, a.part, a.attempt, a.seed, a.image, a.text, _json(a.scores), a.gate, a.reason, a.looks)
                    for a in attempts
                ),
            )

    def close_round(self, number: int, rejected: Iterable[tuple[int, str, str]]) -> None:
        """Ends a round: images of these rows are rejected, each by a gate and for a reason; the rest is accepted."""
        found = list(rejected)
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE attempt SET gate = ?, reason = ? WHERE row = ? AND part = 'image' AND attempt = ?",
                [(gate, reason, row, number) for row, gate, reason in found],
            )
            (count,) = connection.execute("SELECT count(*) FROM attempt WHERE attempt = ?", (number,)).fetchone()
            connection.execute("INSERT INTO round VALUES (?, ?)", (number, count))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, query: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """The answer to a query, row by row, by a cursor of its own. While it is open the journal cannot be written."""
        try:
            with closing(self.connection.cursor()) as cursor:
                yield from cursor.execute(query, values)
        except sqlite3.Error as error:
            raise _fault(self.path, error) from None

    def rounds(self) -> int:
        """How many rounds are closed: the number of the next one."""
        ((count,),) = self.read("SELECT count(*) FROM round")
        return int(count)

    def accepted(self, part: Part, before: int, first: int, last: int) -> list[int]:
        """Rows from ``first`` to ``last`` whose image or text was accepted before a round, in order."""
        query = "SELECT row FROM attempt WHERE row BETWEEN ? AND ? AND part = ? AND gate IS NULL AND attempt < ?"
        return [row for (row,) in self.read(query, (first, last, part, before))]

    def has(self, row: int, attempt: int) -> bool:
        """Whether this attempt at the row was written down."""
        query = "SELECT 1 FROM attempt WHERE row = ? AND part IN ('image', 'text') AND attempt = ?"
        return bool(list(self.read(query, (row, attempt))))

    def attempts(self) -> Iterator[Attempt]:
        """Every attempt, by row, part and number."""
        for found in self.read(f"SELECT {_ATTEMPT} FROM attempt ORDER BY row, part, attempt"):
            row, part, attempt, seed, image, text, scores, gate, reason, looks = found
            yield Attempt(row, part, attempt, seed, image, text, json.loads(scores), gate, reason, looks)


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fault(path: Path, error: sqlite3.Error) -> InputError | RefusedError:
    """A full or read-only disk, or a damaged file, in one sentence."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return RefusedError(f"cannot write {path}: {error}; what was written before is intact")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return RefusedError(f"another run works on this dataset ({path.parent}) at the same time; let one of them end")
    if code == sqlite3.SQLITE_BUSY:
        return RefusedError(f"another process holds {path} for more than {BUSY_SECONDS} s; what was written is intact")
    return InputError(f"{path} is no journal of a dataset, or it is damaged: {error}")
