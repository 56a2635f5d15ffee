"""Parquet with the images in it, as Hugging Face ``datasets`` reads it: ``data/SPLIT-NNNNN-of-NNNNN.parquet``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import parquet
from diffalign.errors import InputError
from diffalign.synthesis.exports.layout import Layout, Record, shards
from diffalign.synthesis.exports.pixels import Pixels, of_png
from diffalign.synthesis.store import Generated

GROUP_ROWS = 64
TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
"""The types of a layout's columns."""
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes the files of a dataset into a folder."""
    schema = _schema(layout)
    for name, cases in shards(source, layout):
        with pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd") as writer:
            while group := list(islice(cases, GROUP_ROWS)):
                rows = [
                    {**layout.record(case), "image": case.image and {"bytes": source.image(case.image), "path": None}}
                    for case in group
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))


def located(folder: Path, layout: Layout) -> Iterator[tuple[str, Record, Pixels | None]]:
    """Every record and its pixels, with the file below ``data/`` that they are in."""
    for path in sorted(folder.glob("*.parquet")):
        for number, row in parquet.rows(path):
            if isinstance(row, str):
                raise InputError(f"{path.name}: row {number} is {row}")
            image = row.pop("image", None)
            yield path.name, row, None if image is None else of_png(image["bytes"])


def _schema(layout: Layout) -> pa.Schema:
    features: dict[str, object] = {name: {"dtype": kind, "_type": "Value"} for name, kind in layout.kinds.items()}
    types = {name: TYPES[kind] for name, kind in layout.kinds.items()}
    if layout.images:
        features["image"] = {"_type": "Image"}
        types["image"] = _IMAGE
    return pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
