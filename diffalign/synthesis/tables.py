"""Rows from a CSV or Parquet file, one at a time: what kind each column is, and what is wrong in it.

Memory does not grow with the file: names of rows are compared on the disk.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from diffalign.errors import InputError, NotFoundError
from diffalign.synthesis.axes import fault_of_column
from diffalign.synthesis.cases import Value

MOST_CATEGORIES = 100
"""A column of texts with more different ones than this is no category, unless it is said to be one."""
Cells = dict[str, Any]
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]+)?|\.[0-9]+)([eE][+-][0-9]+)?")
"""Numbers as programs write them. Anything else that Python would read as one may be a code: 007, 2024_01, 12E4."""


@dataclass
class _Column:
    """What is known of a column so far."""

    kind: str | None = None
    """``boolean``, ``integer``, ``number`` or ``text``; None where every cell was empty."""
    values: set[str] = field(default_factory=set)


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kinds(path: Path, declared: Mapping[str, str], name: str | None) -> dict[str, str]:
    """The kind of every column, those that are declared as they are; looks through the whole file.

    Raises InputError for an empty table, two rows of one name (in the column ``name``), a declared column that is not
    there, and text in a column of numbers.
    """
    found: dict[str, _Column] = {}
    count = 0
    with closing(sqlite3.connect("")) as seen:  # a file of its own, which is gone when it is closed
        seen.execute("CREATE TABLE seen (name TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        for place, cells in _cells(path):
            if not count:
                found = {column: _Column() for column in cells}
                if faults := [fault for column in found if (fault := fault_of_column(column))]:
                    raise InputError(f"the table {path}: {faults[0]}")
                _there(path, found, [*declared, *([name] if name else [])])
            count += 1
            for column, cell in cells.items():
                if column not in declared:
                    _learn(found[column], cell, f"{place}: {column}")
                else:
                    converted(cell, declared[column], f"{place}: {column}")
            if name is not None:
                _once(seen, cells[name], name, place)
    if not count:
        raise InputError(f"the table {path} is empty: it has no row")
    return {column: declared.get(column) or _settled(one, count) for column, one in found.items()}


def rows(path: Path, kinds: Mapping[str, str]) -> Iterator[dict[str, Value]]:
    """The rows with their cells converted to the kinds of their columns."""
    for place, cells in _cells(path):
        yield {column: converted(cell, kinds[column], f"{place}: {column}") for column, cell in cells.items()}


def converted(cell: object, kind: str, where: str) -> Value:
    """A cell as its column's kind has it; an empty one is None. Raises InputError where it does not fit."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return _CONVERT[kind](cell)
    except (ValueError, OverflowError):
        shown = repr(cell if len(str(cell)) <= 60 else f"{str(cell)[:60]}…")
        raise InputError(f"{where} is {shown}, and the column is of kind {kind}") from None


def _boolean(cell: object) -> bool:
    if isinstance(cell, bool):
        return cell
    if not _is_boolean(cell):
        _no(cell)
    return str(cell).strip().lower() == "true"


def _integer(cell: object) -> int:
    if isinstance(cell, bool):
        _no(cell)
    text = str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()
    if not _INTEGER.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        _no(cell)
    return int(text)


def _number(cell: object) -> float:
    if isinstance(cell, bool):
        _no(cell)
    text = str(cell).strip()
    if not _NUMBER.fullmatch(text):
        _no(cell)
    value = float(text)
    # A long whole number would lose digits; it may be a name.
    if not math.isfinite(value) or (text.removeprefix("-").isdecimal() and abs(value) > 2**53 - 1):
        _no(cell)
    return value


def _text(cell: object) -> str:
    text = str(cell)
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        _no(cell)
    return text


def _no(cell: object) -> NoReturn:
    raise ValueError(cell)


_CONVERT: Mapping[str, Callable[[object], Value]] = {
    "boolean": _boolean, "integer": _integer, "number": _number, "text": _text, "category": _text,
}  # fmt: skip


def _is_boolean(cell: object) -> bool:
    return isinstance(cell, bool) or str(cell).strip().lower() in ("true", "false")


def _kind(cell: object) -> str:
    """The narrowest kind that a cell fits."""
    if _is_boolean(cell):
        return "boolean"
    for kind, convert in (("integer", _integer), ("number", _number)):
        try:
            convert(cell)
        except (ValueError, OverflowError):
            continue
        return kind
    return "text"


def _learn(column: _Column, cell: object, where: str) -> None:
    """Takes a cell into account. A column that begins with numbers is one of numbers."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return
    kind = _kind(cell)
    if column.kind in ("integer", "number"):
        if kind not in ("integer", "number"):
            shown = repr(cell if len(str(cell)) <= 60 else f"{str(cell)[:60]}…")
            raise InputError(
                f"{where} is {shown}, and above it the column has numbers; mend it, or declare the column a text or a"
                " category under table.columns"
            )
        column.kind = "number" if "number" in (kind, column.kind) else "integer"
        return
    column.kind = kind if column.kind in (None, kind) else "text"
    _text(cell) if _sound(cell) else converted(cell, "text", where)
    if len(column.values) <= MOST_CATEGORIES:
        column.values.add(str(cell))


def _sound(cell: object) -> bool:
    try:
        _text(cell)
    except ValueError:
        return False
    return True


def _settled(column: _Column, count: int) -> str:
    if column.kind == "text" and len(column.values) <= min(MOST_CATEGORIES, max(1, count // 2)):
        return "category"
    return column.kind or "text"


def _there(path: Path, found: Mapping[str, object], names: list[str]) -> None:
    for name in names:
        if name not in found:
            raise InputError(f"the table {path} has no column {name}; it has {', '.join(found)}")


def _once(seen: sqlite3.Connection, cell: object, column: str, place: str) -> None:
    if cell is None or not str(cell).strip():
        raise InputError(f"{place}: {column} is empty, and it names the rows")
    try:
        seen.execute("INSERT INTO seen VALUES (?, ?)", (str(cell).encode("utf-8", "replace").decode(), place))
    except sqlite3.IntegrityError:
        ((first,),) = seen.execute("SELECT place FROM seen WHERE name = ?", (str(cell),)).fetchall()
        raise InputError(f"{place}: {column} is {str(cell)!r} again, as in {first.rpartition(':')[2]}") from None


def _cells(path: Path) -> Iterator[tuple[str, Cells]]:
    """Every row as it is in the file, and where it stands."""
    if not path.is_file():
        raise NotFoundError(f"there is no table {path}")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".csv":
        yield from _csv(path)
    else:
        raise InputError(f"the table {path} is neither a .csv nor a .parquet file")


def _parquet(path: Path) -> Iterator[tuple[str, Cells]]:
    from diffalign import parquet

    for number, row in parquet.rows(path):
        if isinstance(row, str):
            raise InputError(f"{path}: {row}")
        for column, cell in row.items():
            if cell is not None and not isinstance(cell, str | int | float | bool):
                raise InputError(
                    f"{path}: row {number}: {column} holds a value of type {type(cell).__name__}, which is no cell"
                )
        yield f"{path}: row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Cells]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            if not all(name.strip() for name in names) or len(set(names)) < len(names):
                raise InputError(f"{path}:1: every column needs a name of its own; got {', '.join(map(repr, names))}")
            for line in lines:
                if not line:
                    continue
                if len(line) != len(names):
                    raise InputError(f"{path}:{lines.line_num}: {len(line)} cells, and there are {len(names)} columns")
                yield f"{path}:{lines.line_num}", dict(zip(names, line, strict=True))
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8 text") from None
        except csv.Error as error:
            raise InputError(f"{path}:{lines.line_num}: no valid CSV: {error}") from None
