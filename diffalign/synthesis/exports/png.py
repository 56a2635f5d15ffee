"""PNG files of 8 or 16 bits, as they were made, and one table ``rows.csv`` of all splits that names them.

CSV has one kind of cell. A number stands as it is, a truth value is ``true`` or ``false``, an empty cell is a missing
value. A text that is empty, or that begins with an apostrophe or with a character that spreadsheets take for the
beginning of a formula, gets an apostrophe before it: who reads texts drops one leading apostrophe.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from diffalign.errors import InputError, RefusedError
from diffalign.preferences.writing import FORMULA
from diffalign.synthesis.cases import Value
from diffalign.synthesis.exports.layout import Kind, Layout, Record, need_images, place, stated
from diffalign.synthesis.exports.pixels import Pixels, of_png
from diffalign.synthesis.store import Generated

TABLE, IMAGES = "rows.csv", "images"
LONGEST_CELL = 1 << 30


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes the images of a dataset and their table."""
    need_images(layout, "png")
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", *layout.kinds])
        for case in source.cases():
            name = f"{IMAGES}/{place(case.index, '.png')}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            assert case.image is not None
            (folder / name).write_bytes(source.image(case.image))
            cells = [_cell(value, case.index, column) for column, value in layout.record(case).items()]
            table.writerow([name, *cells])


def located(folder: Path, layout: Layout) -> Iterator[tuple[str, Record, Pixels | None]]:
    """Every record and its pixels, with the file below ``data/`` that they are in."""
    # The limit belongs to the whole process, so it is put back; reading in pieces between would see ours.
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with (folder / TABLE).open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            if table.fieldnames != ["file_name", *layout.kinds]:
                raise InputError(f"{TABLE} has not the columns that the manifest names")
            for row in table:
                record = {name: _value(row[name], kind) for name, kind in layout.kinds.items()}
                place_of = stated(row["file_name"].removeprefix(f"{IMAGES}/"), record["index"], ".png")
                name = f"{IMAGES}/{place_of}"
                yield name, record, of_png((folder / name).read_bytes())
    finally:
        csv.field_size_limit(limit)


def _cell(value: Value, index: int, column: str) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case str():
            if "\0" in value:
                raise RefusedError(f"case {index}: column {column!r} has a NUL, which CSV cannot hold; choose parquet")
            return f"'{value}" if value == "" or value.startswith((*FORMULA, "'")) else value
        case _:
            return repr(value)


def _value(cell: str, kind: Kind) -> Value:
    if cell == "":
        return None
    match kind:
        case "string":
            return cell.removeprefix("'")
        case "bool":
            return {"true": True, "false": False}[cell]
        case "int64":
            return int(cell)
        case "float64":
            return float(cell)
