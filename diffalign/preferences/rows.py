"""Rows of text files, one at a time: JSON lines, a JSON list, CSV. The files may be larger than memory."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import parquet
from diffalign.errors import InputError

Row = Mapping[str, Any]
Rows = Iterator[tuple[int | str, Row | str]]
"""Where a row stands, and the row, or the reason why it cannot be read."""

LISTED = 20
"""Broken rows that are named one by one; all are counted."""
CHUNK = 2**16
LONGEST = 2**26
"""Characters of one row, or of one cell of a CSV file: an image in it may be long, but not without end."""
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read."""

    row: int | str
    """Its number from 0 in Parquet and JSON lists, ``line N`` in text files, its name in folders."""
    reason: str
    """``KIND: DETAILS``. All rows with the same defect have the same kind."""

    @property
    def kind(self) -> str:
        """The defect without its details."""
        return self.reason.partition(": ")[0]

    def __str__(self) -> str:
        return f"{f'row {self.row}' if isinstance(self.row, int) else self.row}: {self.reason}"


class Defects:
    """Broken rows: how many there are of each kind, and the first of them."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: list[Broken] = []

    def add(self, broken: Broken) -> None:
        """Counts one more."""
        self.kinds[broken.kind] += 1
        if len(self.first) < LISTED:
            self.first.append(broken)

    def __len__(self) -> int:
        return self.kinds.total()

    def lines(self) -> list[str]:
        """The first rows with their reasons, then how many there are of each kind."""
        return [str(broken) for broken in self.first] + [f"{n} x {kind}" for kind, n in self.kinds.most_common()]


def reader(path: Path) -> Callable[[Path], Rows]:
    """The function that reads the rows of this file, chosen by what stands in it and not by its name."""
    try:
        with path.open("rb") as file:
            head = file.read(CHUNK)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not head.strip():
        raise InputError(f"{path} is empty")
    if head.startswith(b"PAR1"):
        return parquet.rows
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is text in UTF-16, as some spreadsheets write it; save it as UTF-8")
    if b"\0" in head:
        raise InputError(f"{path} is a binary file, but not Parquet; preferences are Parquet, JSON, JSON lines or CSV")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b"[": json_list, b"{": json_lines}.get(first, csv_rows)


def json_lines(path: Path) -> Rows:
    """One JSON object a line; empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: bytes) -> Row | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"
    return row if isinstance(row, dict) else f"not an object: the row is a {type(row).__name__}"


def json_list(path: Path) -> Rows:
    """The objects of one JSON list, read piece by piece. What follows a syntax error cannot be told apart."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        number, at, reason = 0, 1, ""
        try:
            text = file.read(CHUNK).lstrip()
            while not reason:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
                if text[at : at + 1] == "]":
                    return
                try:
                    row, at = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    # A row that is cut by the end of the piece looks like a broken one, so more is read first.
                    more = file.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST else ""
                    reason = "" if more else f"{error.msg}; the rest of the file was not read"
                    text, at = text[at:] + more, 0
                    continue
                yield number, row if isinstance(row, dict) else f"not an object: the row is a {type(row).__name__}"
                number += 1
        except (UnicodeDecodeError, RecursionError) as error:
            reason = f"{error}; the rest of the file was not read"
        yield number, f"not JSON: {reason}"


def csv_rows(path: Path) -> Rows:
    """The rows below a header; commas, semicolons or tabs separate. An empty cell is a cell that is not there."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=separator), [])
            table = csv.DictReader(file, fieldnames=names, delimiter=separator)
            for row in table:
                cells = {name: cell for name, cell in row.items() if cell not in ("", None)}
                extra = None in cells
                yield f"line {table.line_num + 1}", "too many cells: more than the header has names" if extra else cells
        except UnicodeDecodeError as error:
            byte = f"{error.object[error.start]:#04x}"
            yield (
                "the rest of the file",
                f"not UTF-8: the byte {byte} is none of it; in a spreadsheet save as CSV UTF-8",
            )
        except csv.Error as error:
            yield "the rest of the file", f"not CSV: {error}"
