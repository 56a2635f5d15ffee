"""ImageFolder of Hugging Face ``datasets``: a folder per split, with ``metadata.jsonl`` beside the images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from diffalign.errors import RefusedError
from diffalign.synthesis.exports.layout import Layout, Record, need_images, place, stated
from diffalign.synthesis.exports.pixels import Pixels, of_png
from diffalign.synthesis.store import Generated

METADATA = "metadata.jsonl"
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T].*)?", re.DOTALL)


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes the folders of a dataset; refuses one whose columns ``datasets`` would read back as something else."""
    need_images(layout, "imagefolder")
    _refuse_dates(source, layout)
    for split in layout.splits:
        (folder / split).mkdir()
        with (folder / split / METADATA).open("w", encoding="ascii") as table:
            for case in (case for case in source.cases() if case.split == split):
                name = place(case.index, ".png")
                path = folder / split / name
                path.parent.mkdir(exist_ok=True)
                assert case.image is not None
                path.write_bytes(source.image(case.image))
                table.write(json.dumps({"file_name": name, **layout.record(case)}, allow_nan=False) + "\n")


def read(folder: Path, layout: Layout) -> Iterator[tuple[Record, Pixels | None]]:
    """Every record and its pixels."""
    for split in layout.splits:
        with (folder / split / METADATA).open(encoding="ascii") as table:
            for line in table:
                record = json.loads(line)
                name = stated(record.pop("file_name"), record["index"], ".png")
                yield record, of_png((folder / split / name).read_bytes())


def _refuse_dates(source: Generated, layout: Layout) -> None:
    """JSON has no types for texts, and readers take a column of nothing but dates for times of the day."""
    texts = {name for name, kind in layout.kinds.items() if kind == "string"}
    seen, others = set[str](), set[str]()
    for case in source.cases():
        record = layout.record(case)
        for name in texts - others:
            if isinstance(value := record[name], str):
                (seen if _DATE.fullmatch(value) else others).add(name)
    if dates := sorted(seen - others):
        raise RefusedError(
            f"column {dates[0]!r} holds dates alone, which readers of imagefolder change; choose parquet"
        )
