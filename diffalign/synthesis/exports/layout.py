"""The form that the cases of a dataset have in every export: columns, their names and types, splits, places of files.

A case becomes a *record*: ``id, index, split, stratum, prompt``, ``text`` where the dataset has texts, and the columns
of the table row. What a format cannot hold is refused here or there, before anything is written, in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, get_args

from diffalign.errors import InputError, RefusedError
from diffalign.synthesis import traces
from diffalign.synthesis.cases import Case, Value
from diffalign.synthesis.store import Generated, unfinished

Kind = Literal["string", "int64", "float64", "bool"]
Record = dict[str, Value]
OWN = ("id", "index", "split", "stratum", "prompt", "text", "image", "file_name")
"""Names that a column of the table cannot have in an export; it gets ``row_`` before it."""
SHARD_ROWS = 1000
"""Cases in one Parquet or tar file, and in one folder of images."""
LONGEST_NAME = 200
_KINDS: Mapping[str, Kind] = {"integer": "int64", "number": "float64", "boolean": "bool", "text": "string"}
_SPLIT = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    """In the specification."""
    shown: str
    """In the export."""
    kind: Kind


@dataclass(frozen=True)
class Layout:
    """What an export holds."""

    columns: tuple[Column, ...]
    splits: Mapping[str, int]
    """Cases in each split."""
    images: bool
    texts: bool
    grey: bool = False
    """Whether colour images become grey ones: see ``pixels.grey``."""
    table: bool = False
    """Whether ``metadata.parquet`` stands beside files that are no table: see ``table``; old exports have none."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """Name and type of everything in a record, in order."""
        own: dict[str, Kind] = {"id": "string", "index": "int64", "split": "string", "stratum": "string"}
        own["prompt"] = "string"
        return own | ({"text": "string"} if self.texts else {}) | {c.shown: c.kind for c in self.columns}

    def record(self, case: Case) -> Record:
        """A case as it stands in the export, its image aside."""
        own: Record = {"id": case.id, "index": case.index, "split": case.split, "stratum": case.stratum}
        own["prompt"] = case.prompt
        if self.texts:
            own["text"] = case.text
        for column in self.columns:
            value = case.row[column.name]
            own[column.shown] = float(value) if column.kind == "float64" and value is not None else value
        return own

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest of an export."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Layout:
        """Of what ``as_json`` gave."""
        columns = tuple(Column(**column) for column in facts["columns"])
        splits = {str(name): int(count) for name, count in facts["splits"].items()}
        if wrong := [c.kind for c in columns if c.kind not in get_args(Kind)]:
            raise InputError(f"there is no type {wrong[0]!r} of columns")
        for name in splits:
            _check_split(name)
        added_later = bool(facts.get("grey")), bool(facts.get("table"))
        return cls(columns, splits, bool(facts["images"]), bool(facts["texts"]), *added_later)


def survey(source: Generated) -> Layout:
    """The layout of a dataset, every case of which has been looked at; refuses what no export can hold."""
    if not source.complete:
        raise RefusedError(unfinished(source.folder))
    columns, found, counts = _named(source.manifest.columns), _Found(), dict[str, int]()
    machine = traces.of_this_machine()
    for case in source.cases():
        counts[case.split] = counts.get(case.split, 0) + 1
        found.look_at(case, source.manifest.columns, machine)
    if not counts:
        raise InputError("this dataset has no case")
    for name in counts:
        _check_split(name)
    if len({name.lower() for name in counts}) < len(counts):
        raise InputError(f"the splits {', '.join(counts)} differ in case alone, and not every disk tells them apart")
    kinds = {name: _KINDS.get(kind) or found.kind(name) for name, kind in source.manifest.columns.items()}
    return Layout(
        tuple(Column(name, shown, kinds[name]) for name, shown in columns.items()),
        {name: counts[name] for name in [*(s for s in source.manifest.splits if s in counts), *counts]},
        found.images,
        found.texts,
    )


class _Found:
    """What is learnt of a dataset by looking at its cases one after the other."""

    def __init__(self) -> None:
        self.images = self.texts = False
        self.types: dict[str, set[type]] = {}
        """Of the values of each category."""

    def look_at(self, case: Case, columns: Mapping[str, str], machine: traces.Traces) -> None:
        """Takes one more case into account; refuses what no export can hold."""
        self.images |= case.image is not None
        self.texts |= case.text is not None
        if set(case.row) != set(columns):
            odd = sorted(set(case.row) ^ set(columns))[0]
            raise InputError(f"case {case.index} has not the columns that the manifest names: {odd!r}")
        texts = {"id": case.id, "stratum": case.stratum, "prompt": case.prompt, "text": case.text or ""}
        for name, value in case.row.items():
            _check_value(case, name, value, columns[name])
            if columns[name] not in _KINDS and value is not None:
                self.types.setdefault(name, set()).add(type(value))
            if isinstance(value, str):
                texts[f"column {name}"] = value
        for what, text in texts.items():
            _check_text(case, what, text, machine)

    def kind(self, name: str) -> Kind:
        """The type of a category's values."""
        match sorted(t.__name__ for t in self.types.get(name, ())):
            case [] | ["str"]:
                return "string"
            case ["int"]:
                return "int64"
            case ["bool"]:
                return "bool"
            case ["float"] | ["float", "int"]:
                return "float64"
            case other:
                raise InputError(f"column {name!r} holds values of different types ({', '.join(other)}): use one")


def shards(source: Generated, layout: Layout, rows: int = SHARD_ROWS) -> Iterator[tuple[str, Iterator[Case]]]:
    """Name, such as ``train-00000-of-00002``, and cases of each piece, in order; a piece is to be used up at once."""
    for split, count in layout.splits.items():
        cases = (case for case in source.cases() if case.split == split)
        total = math.ceil(count / rows)
        for number in range(total):
            yield f"{split}-{number:05d}-of-{total:05d}", islice(cases, rows)


def place(index: int, suffix: str) -> str:
    """Where the image of a case lies: named by its number alone, and no folder holds more than SHARD_ROWS."""
    return f"{index // SHARD_ROWS:05d}/{index:08d}{suffix}"


def stated(name: object, index: object, suffix: str) -> str:
    """The place that an export states for the image of a case, if it is one that ``place`` could have given."""
    if not re.fullmatch(rf"\d{{5,}}/{index:08d}{re.escape(suffix)}" if isinstance(index, int) else "(?!)", str(name)):
        raise InputError(f"case {index} names {str(name)[:80]!r} as its image, which is not where an export has it")
    return str(name)


def digest(record: Mapping[str, object]) -> str:
    """SHA-256 of a record, the same in every format."""
    return hashlib.sha256(as_text(record).encode()).hexdigest()


def as_text(record: Mapping[str, object]) -> str:
    """A record as one line of JSON: ASCII, keys in order."""
    return json.dumps(dict(record), sort_keys=True, allow_nan=False, separators=(",", ":"))


def need_images(layout: Layout, form: str) -> None:
    """Refuses a dataset of texts alone for a format that consists of image files."""
    if not layout.images:
        raise RefusedError(
            f"these cases have no images, and {form} is a format of images; choose parquet or webdataset"
        )


def _named(columns: Mapping[str, str]) -> dict[str, str]:
    """The name in exports of each column; no two are the same."""
    taken, named = {*OWN, *(name for name in columns if name not in OWN)}, {}
    for name in columns:
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise InputError(f"the column name {name[:40]!r} is empty, longer than {LONGEST_NAME}, or not printable")
        shown = name
        while name in OWN and shown in taken:
            shown = f"row_{shown}"
        taken.add(shown)
        named[name] = shown
    return named


def _check_split(name: str) -> None:
    if not _SPLIT.fullmatch(name):
        raise InputError(f"split {name[:80]!r} names files, so it has letters, digits and _ only, and at most 64")


def _check_value(case: Case, name: str, value: Value, kind: str) -> None:
    if value is None:
        return
    fits = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "boolean": isinstance(value, bool),
        "text": isinstance(value, str),
    }.get(kind, True)
    if not fits:
        raise InputError(f"case {case.index}: column {name!r} is of kind {kind}, but holds {str(value)[:40]!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"case {case.index}: column {name!r} holds {value}, which is no number; leave it empty")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"case {case.index}: column {name!r} holds a number of more than 64 bits")
    if kind == "number" and float(value) != value:
        raise InputError(f"case {case.index}: column {name!r} holds {value}, which a 64-bit number cannot hold exactly")


def _check_text(case: Case, what: str, text: str, machine: traces.Traces) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"case {case.index}: {what} is no Unicode text: it has half of a character") from None
    if trace := machine.of_text(text):
        raise RefusedError(f"case {case.index}: {what} names a place of a machine or a user ({trace!r}); remove it")
