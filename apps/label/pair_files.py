"""Pairs from a file: any preference format that diffalign reads, or plain rows without an answer.

Plain rows have ``prompt``, and ``image_0, image_1`` or ``text_0, text_1``; they may have ``arm_0, arm_1`` (what made
them), ``expected`` (``first``, ``second`` or ``tie``, the known answer), ``prompt_id`` and ``attributes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from apps.label import pictures
from diffalign.errors import InputError
from diffalign.preferences import Broken, cells, read
from diffalign.preferences.reading import opened
from diffalign.preferences.rows import Row
from diffalign.study import StudyPair
from diffalign.types import Preference, Sample

Expected = Literal["first", "second", "tie"]
EXPECTED: Mapping[str, Expected] = {
    "first": "first", "image_0": "first", "text_0": "first",
    "second": "second", "image_1": "second", "text_1": "second",
    "tie": "tie",
}  # fmt: skip
"""What ``expected`` may say. No 0 and 1: some would mean the place, and some the probability."""
OF_LABEL: Mapping[float, Expected] = {1.0: "first", 0.0: "second", 0.5: "tie"}
KINDS = ("image", "text")
MEND = "mend it, or leave broken rows out with `diffalign preferences convert`"


def pairs(path: Path, *, gold: bool = False) -> Iterator[StudyPair]:
    """The pairs of a file. Answers in it are not used, but for ``expected``; with ``gold`` every pair must have one.

    Raises InputError for the first row that cannot be read.
    """
    kind = _plain(path)
    if kind is not None:
        yield from _plain_pairs(path, kind, gold)
        return
    found = read(path)
    unknown = path.name.partition(".")[0] or "file"
    names = ("chosen", "rejected") if found.format == "TRL texts" else (unknown, unknown)
    for item in found:
        if isinstance(item, Broken):
            raise InputError(f"{path}: {item}; {MEND}")
        yield _judged(item, names, gold)


def _plain(path: Path) -> str | None:
    """Which kind of plain rows a file has, if any. Rows with a label are one of the formats, unless they are texts."""
    if path.is_dir():
        return None
    if not path.exists():
        raise InputError(f"there is no file {path}")
    _, columns = opened(path)
    kind = next((kind for kind in KINDS if {"prompt", f"{kind}_0", f"{kind}_1"} <= columns), None)
    answered = "label" in columns or "prefer_0" in columns
    return None if kind == "image" and answered and "expected" not in columns else kind


def _plain_pairs(path: Path, kind: str, gold: bool) -> Iterator[StudyPair]:
    source, columns = opened(path)
    if gold and not {"expected", "label"} & columns:
        raise InputError(f"{path} has no column expected, so its pairs cannot be gold: it says first, second or tie")
    for place, row in source(path):
        where = f"{path}: {f'row {place}' if isinstance(place, int) else place}"
        if isinstance(row, str):
            raise InputError(f"{where}: {row}; {MEND}")
        try:
            yield _plain_pair(path, row, kind, gold)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _plain_pair(path: Path, row: Row, kind: str, gold: bool) -> StudyPair:
    asked = cells.prompt(row)
    columns = [f"{kind}_{number}" for number in (0, 1)]
    if kind == "text":
        first, second = (Sample(asked, text=cells.text(row, column)) for column in columns)
    else:
        first, second = (Sample(asked, image=_image(row.get(column), column, path.parent)) for column in columns)
    unknown = path.name.partition(".")[0] or "file"
    arms = [cells.text(row, f"arm_{number}", "") or unknown for number in (0, 1)]
    return StudyPair(asked, first, second, arms[0], arms[1], _expected(row, gold))


def _image(value: object, column: str, folder: Path) -> Image:
    """As ``cells.image``, but of a file only what lies below the folder, and of formats only the plain ones."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return pictures.decode(value, column)
    if isinstance(value, str) and value.strip() and "://" not in value and not value.startswith("data:"):
        return pictures.read(folder / value, folder)
    return cells.image(value, column, folder)


def _expected(row: Row, gold: bool) -> Expected | None:
    given = row.get("expected")
    if given in (None, ""):
        return _of_label(cells.label(row)) if gold else None
    found = EXPECTED.get(str(given).strip().lower())
    if found is None:
        raise InputError(f"expected is {given!r}; it says which is better: first, second, or tie")
    return found


def _of_label(label: float) -> Expected:
    if label not in OF_LABEL:
        raise InputError(f"a label of {label:g} is no known answer; gold pairs have 1, 0 or 0.5")
    return OF_LABEL[label]


def _judged(item: Preference, names: tuple[str, str], gold: bool) -> StudyPair:
    """A pair of a preference file; the arms are what its provenance says."""
    expected = _of_label(item.label) if gold else None
    origin = item.provenance
    facts = [_facts(origin, side, number) for number, side in enumerate(("first", "second"))]
    arms = [str(fact.get("arm") or name) for fact, name in zip(facts, names, strict=True)]
    return StudyPair(item.prompt, item.first, item.second, arms[0], arms[1], expected)


def _facts(origin: Mapping[str, object], side: str, number: int) -> Mapping[str, object]:
    said = origin.get(side)
    if isinstance(said, Mapping):
        return said
    return {"arm": origin.get(f"model_{number}")}
