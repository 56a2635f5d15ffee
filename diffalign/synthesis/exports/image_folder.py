"""ImageFolder of Hugging Face ``datasets``: a folder per split, with ``metadata.parquet`` beside the images.

The table is Parquet, which states the type of every column. From JSON lines or CSV ``datasets`` guesses the types of
each split by itself: it takes dates for times, and refuses a dataset with a column that is empty throughout one split.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import parquet
from diffalign.errors import InputError
from diffalign.synthesis.exports.layout import Layout, Record, need_images, place, stated
from diffalign.synthesis.exports.parquet import TYPES
from diffalign.synthesis.exports.pixels import Pixels, of_png
from diffalign.synthesis.store import Generated

METADATA = "metadata.parquet"
GROUP_ROWS = 1000


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes the folders of a dataset."""
    need_images(layout, "imagefolder")
    schema = pa.schema({"file_name": pa.string(), **{name: TYPES[kind] for name, kind in layout.kinds.items()}})
    for split in layout.splits:
        (folder / split).mkdir()
        cases = (case for case in source.cases() if case.split == split)
        with pq.ParquetWriter(folder / split / METADATA, schema, compression="zstd") as table:
            while group := list(islice(cases, GROUP_ROWS)):
                rows = []
                for case in group:
                    name = place(case.index, ".png")
                    path = folder / split / name
                    path.parent.mkdir(exist_ok=True)
                    assert case.image is not None
                    path.write_bytes(source.image(case.image))
                    rows.append({"file_name": name, **layout.record(case)})
                table.write_table(pa.Table.from_pylist(rows, schema))


def located(folder: Path, layout: Layout) -> Iterator[tuple[str, Record, Pixels | None]]:
    """Every record and its pixels, with the file below ``data/`` that they are in."""
    for split in layout.splits:
        for number, record in parquet.rows(folder / split / METADATA):
            if isinstance(record, str):
                raise InputError(f"{split}/{METADATA}: row {number} is {record}")
            name = f"{split}/{stated(record.pop('file_name'), record['index'], '.png')}"
            yield name, record, of_png((folder / name).read_bytes())
