"""``data/metadata.parquet``: the records of all cases, beside files that are no table themselves (WebDataset, DICOM).

Croissant points to it: ``mlcroissant`` reads no row out of DICOM, and unpacks tar files into a folder that is named by
the file's name alone, so that two datasets would be taken for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import parquet
from diffalign.errors import InputError
from diffalign.synthesis.cases import Case
from diffalign.synthesis.exports.layout import Layout, Record
from diffalign.synthesis.exports.parquet import TYPES

NAME = "metadata.parquet"
FILE = "file_name"
"""The column that names a case's file, below ``data/``."""
GROUP_ROWS = 1000
BESIDE = ("webdataset", "dicom")
"""Formats that have the table."""


@contextmanager
def writer(folder: Path, layout: Layout) -> Iterator[Callable[[Case, str], None]]:
    """A function that adds a case, and the name of its file, to the table in a folder."""
    schema = pa.schema({FILE: pa.string(), **{name: TYPES[kind] for name, kind in layout.kinds.items()}})
    rows: list[Record] = []
    with pq.ParquetWriter(folder / NAME, schema, compression="zstd") as table:

        def add(case: Case, name: str) -> None:
            rows.append({FILE: name, **layout.record(case)})
            if len(rows) == GROUP_ROWS:
                table.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield add
        if rows:
            table.write_table(pa.Table.from_pylist(rows, schema))


def read(folder: Path) -> Iterator[tuple[str, Record]]:
    """The name of the file, and the record, of each case."""
    for number, record in parquet.rows(folder / NAME):
        if isinstance(record, str):
            raise InputError(f"{NAME}: row {number} is {record}")
        yield str(record.pop(FILE, "")), record
