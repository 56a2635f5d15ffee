"""``read``: preferences from a file or folder of any known format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from diffalign import images, parquet, prompts
from diffalign.errors import InputError, NotFoundError
from diffalign.preferences import cells
from diffalign.preferences.formats import FORMATS, Format, Made
from diffalign.preferences.formats import native as native_row
from diffalign.preferences.rows import Broken, Row, Rows, reader
from diffalign.types import Preference, Prompt, Sample

LOOKED_AT = 10
"""Rows whose columns together say which format it is."""
UNPAIRED = {"completion", "image", "text"}
FOLDERS = "chosen and rejected folders"


@dataclass(frozen=True)
class Pairs:
    """What a file holds: preferences, and rows that could not be read. It can be gone through many times."""

    path: Path
    format: str
    """Name of the format that was found."""
    make: Callable[[], Iterator[Preference | Broken]]
    native: bool = False
    """Whether it is a file in the native form, which ``Table`` opens as it is."""

    def __iter__(self) -> Iterator[Preference | Broken]:
        return self.make()


def read(path: str | Path) -> Pairs:
    """The preferences of a file, or of a folder with Parquet files or with ``chosen`` and ``rejected``.

    The format is found by what is in the file. Images are decoded while one goes through, one row at a time. Raises
    NotFoundError, or InputError where no format fits; a single bad row is a ``Broken`` among the others.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"there is no preference file {path}")
    if not path.is_dir():
        source, columns = opened(path)
        form = recognise(path, columns)
        native = source is parquet.rows and form.make is native_row
        return Pairs(path, form.name, partial(_file, path, source, form), native)
    if (path / "chosen").is_dir() and (path / "rejected").is_dir():
        return Pairs(path, FOLDERS, partial(_folders, path))
    files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise InputError(f"{path} has neither Parquet files in it nor the two folders chosen/ and rejected/")
    form = _first_recognised(files)
    return Pairs(path, form.name, partial(_files, path, files, form))


def opened(path: Path) -> tuple[Callable[[Path], Rows], set[str]]:
    """How the rows of a file are read, and the columns that its first rows have."""
    source = reader(path)
    if source is parquet.rows:
        file = parquet.open_file(path)
        if file.metadata.num_rows == 0:
            raise InputError(f"{path} has no rows")
        return source, set(file.schema_arrow.names)
    good = list(islice((row for _, row in source(path) if not isinstance(row, str)), LOOKED_AT))
    if not good:
        defect = next((str(Broken(place, row)) for place, row in source(path) if isinstance(row, str)), "there is none")
        raise InputError(f"no row of {path} can be read: {defect}")
    return source, {name for row in good for name in row}


def recognise(path: Path, columns: set[str]) -> Format:
    """The format with these columns."""
    for form in FORMATS:
        if columns.issuperset(form.columns):
            return form
    if {"prompt", "label"} <= columns and columns & UNPAIRED:
        raise InputError(
            f"{path} has one answer a row with a label (columns {_listed(columns)}), which is no pair:"
            " diffalign.preferences.read_unpaired reads it"
        )
    near = max(FORMATS, key=lambda form: len(columns & set(form.columns)) / len(form.columns))
    if not columns & set(near.columns):
        names = ", ".join(form.name for form in FORMATS)
        raise InputError(f"{path} has the columns {_listed(columns)}, which are none of a known format ({names})")
    missing = ", ".join(name for name in near.columns if name not in columns)
    raise InputError(
        f"{path} has the columns {_listed(columns)}, which fit no format; {near.name} is nearest, and lacks {missing}"
    )


def _first_recognised(files: list[Path]) -> Format:
    """The format of the first file that has one: a strange file in a folder is told later, as a broken one."""
    errors = []
    for file in files:
        try:
            return recognise(file, opened(file)[1])
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(cells.shown(name)[1:-1] for name in columns if name)[:20])


def _file(path: Path, source: Callable[[Path], Rows], form: Format, prefix: str = "") -> Iterator[Preference | Broken]:
    rows = parquet.rows(path, form.read) if source is parquet.rows else source(path)
    for place, row in rows:
        where = f"{prefix}row {place}" if prefix and isinstance(place, int) else place
        yield from _row(where, row, form.make, path.parent)


def _row(
    where: int | str, row: Row | str, make: Callable[[Row, Path], Made], folder: Path
) -> Iterator[Preference | Broken]:
    if isinstance(row, str):
        yield Broken(where, row)
        return
    try:
        for item in make(row, folder):
            yield Broken(where, item) if isinstance(item, str) else item
    except InputError as error:
        yield Broken(where, str(error))


def _files(folder: Path, files: list[Path], form: Format) -> Iterator[Preference | Broken]:
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            missing = set(form.columns) - opened(file)[1]
        except InputError as error:
            yield Broken(name, f"unreadable file: {error}")
            continue
        if missing:
            yield Broken(name, f"other columns: {', '.join(sorted(missing))} of {form.name} are not there")
            continue
        yield from _file(file, parquet.rows, form, f"{name} ")


def _folders(folder: Path) -> Iterator[Preference | Broken]:
    """Images of the same name in ``chosen`` and ``rejected``; the suffixes may differ."""
    listed = prompts.of_images(folder)
    sides = {side: _images(folder / side) for side in ("chosen", "rejected")}
    for name in sorted(sides["chosen"].keys() | sides["rejected"].keys()):
        paths = [sides[side].get(name, []) for side in sides]
        if any(len(found) != 1 for found in paths):
            counts = ", ".join(f"{len(found)} in {side}" for side, found in zip(sides, paths, strict=True))
            yield Broken(name, f"no pair: images of this name are {counts}")
            continue
        yield from _row(name, {"chosen": paths[0][0], "rejected": paths[1][0]}, partial(_twins, name, listed), folder)


def _twins(name: str, listed: dict[str, Prompt], row: Row, folder: Path) -> Made:
    texts = (folder / f"{name}.txt", folder / "chosen" / f"{name}.txt")
    said = next((cells.text({"prompt": _said(path)}, "prompt") for path in texts if path.is_file()), "")
    keys = (name, Path(row["chosen"]).relative_to("chosen").as_posix())
    asked = next((listed[key] for key in keys if key in listed), Prompt(said, "" if said else name))
    first, second = (cells.sample(asked, row[side], side, folder) for side in ("chosen", "rejected"))
    yield Preference(asked, first, second, 1.0, provenance={"first": row["chosen"], "second": row["rejected"]})


def _said(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"broken text: {path.name} is not UTF-8") from None


def _images(side: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(side.rglob("*")):
        if path.suffix.lower() in images.SUFFIXES:
            name = path.relative_to(side).with_suffix("").as_posix()
            found.setdefault(name, []).append(path.relative_to(side.parent).as_posix())
    return found


def _unpaired(row: Row, folder: Path) -> tuple[Sample, bool]:
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(row.get("label")).strip().lower())
    if label is None:
        raise InputError(f"unknown label: label is {cells.shown(row.get('label'))}; write true or false")
    asked = cells.prompt(row)
    if "image" in row:
        return cells.sample(asked, row["image"], "image", folder), label
    return Sample(asked, text=cells.text(row, "completion" if "completion" in row else "text")), label


def read_texts(path: str | Path) -> Iterator[tuple[str, Sample | Broken]]:
    """Rows of ``prompt`` and ``completion`` or ``text``, each with its place; ``attributes`` go with the prompt."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    source, columns = opened(path)
    column = next((name for name in ("completion", "text") if name in columns), None)
    if column is None or "prompt" not in columns:
        raise InputError(f"{path} has the columns {_listed(columns)}; texts need prompt, and completion or text")
    for place, row in source(path):
        try:
            if isinstance(row, str):
                raise InputError(row)
            yield str(place), Sample(cells.prompt(row), text=cells.text(row, column))
        except InputError as error:
            yield str(place), Broken(place, str(error))


def read_unpaired(path: str | Path) -> Iterator[tuple[Sample, bool] | Broken]:
    """Rows of ``prompt``, ``label`` (was it good?) and ``image``, ``completion`` or ``text``, as KTO learns from."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    source, columns = opened(path)
    if not {"prompt", "label"} <= columns or not columns & UNPAIRED:
        needed = f"prompt, label, and one of {_listed(UNPAIRED)}"
        raise InputError(f"{path} has the columns {_listed(columns)}; unpaired answers need {needed}")
    for place, row in source(path):
        try:
            yield Broken(place, row) if isinstance(row, str) else _unpaired(row, path.parent)
        except InputError as error:
            yield Broken(place, str(error))
