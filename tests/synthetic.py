"""Small finished datasets for tests: images that are drawn here, texts and rows that follow from a number, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from diffalign.synthesis import store
from diffalign.synthesis.cases import Manifest, Value
from diffalign.synthesis.journal import Attempt, Journal, Row
from diffalign.synthesis.spec import sha256_of
from diffalign.synthesis.store import Files, Generated

COLUMNS = {"plane": "category", "lesion": "category", "side": "category", "age": "integer", "weight": "number"}
GATES = ({"gate": "decodable"}, {"gate": "reward", "reward": "brain-mr-checker", "part": "everything", "at_least": 1})
SPEC = {"name": "drawn", "seed": 0, "splits": {"train": 0.75, "test": 0.25}}


def drawn(number: int, *, wide: bool = False, size: int = 24) -> Image.Image:
    """An image that no other number has: 8-bit RGB, or 16-bit greyscale that uses all of its bits."""
    chance = np.random.default_rng(number)
    if wide:
        return Image.fromarray(chance.integers(0, 65536, (size, size), dtype=np.uint16))
    return Image.fromarray(chance.integers(0, 256, (size, size, 3), dtype=np.uint8))


def row_of(number: int) -> dict[str, Value]:
    """Cells of every kind; some are empty."""
    lesion = number % 3 != 2
    return {
        "plane": ("axial", "coronal")[number % 2],
        "lesion": "present" if lesion else "none",
        "side": ("left", "right")[number // 2 % 2] if lesion else None,
        "age": 20 + number % 60,
        "weight": 50 + number / 8,
    }


def text_of(number: int) -> str:
    """A text that no other number has."""
    return f"Case {number}: a lesion, or none, and nothing else."


def generated(
    folder: Path,
    n: int = 8,
    *,
    rows: Callable[[int], Mapping[str, Value]] = row_of,
    image: Callable[[int], Image.Image | None] = drawn,
    text: Callable[[int], str | None] = text_of,
    prompt: Callable[[int], str] = lambda number: f"axial T2 brain MRI number {number}",
    columns: Mapping[str, str] | None = None,
    stratum: Callable[[Mapping[str, Value]], str] = lambda row: f"{row['plane']} / {row['lesion']}",
    split: Callable[[int], str] = lambda number: "test" if number % 4 == 3 else "train",
    rejected: Sequence[int] = (1,),
    rows_from: str = "axes",
    complete: bool = True,
) -> Generated:
    """A dataset of ``n`` cases in a folder that is new or empty.

    Rows in ``rejected`` took two attempts: a gate rejected the first image. ``image`` or ``text`` that gives None for
    every number makes a dataset without that part. A dataset that is not ``complete`` lacks its last case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, journal = Files(folder / store.FILES), Journal.create(folder / store.JOURNAL)
    wanted: dict[str, int] = {}
    pictures = bool(n) and image(0) is not None
    texts = bool(n) and text(0) is not None
    for number in range(n):
        cells = dict(rows(number))
        row = Row(number, f"syn-5a5a5a5a-{number:06d}", cells, stratum(cells), split(number))
        wanted[row.stratum] = wanted.get(row.stratum, 0) + 1
        if not complete and number == n - 1:
            continue
        made, retried = [], number in rejected
        picture, words = image(number), text(number)
        if picture is not None:
            if retried:
                why = "brain-mr-checker/everything is 0, below 1 (side)"
                scored = {"brain-mr-checker": 0.8, "brain-mr-checker/everything": 0.0}
                gate = "brain-mr-checker/everything"
                made.append(Attempt(number, "image", 0, 7000 + number, "00" * 32, None, scored, gate, why))
            sha256 = files.put(store.png(picture))
            scored = {"brain-mr-checker": 1.0, "brain-mr-checker/everything": 1.0}
            made.append(Attempt(number, "image", int(retried), 1000 + number, sha256, None, scored))
        if words is not None:
            made.append(Attempt(number, "text", 0, 5000 + number, None, words, {"findings-checker": 1.0}))
        journal.record([(row, prompt(number), f"row: {number}\ntask: findings\n" if words is not None else "")], made)
    for number in (0, 1):
        journal.close_round(number, [])
    journal.finish()
    manifest = Manifest(
        name="drawn",
        spec_sha256=sha256_of({**SPEC, "cases": n}),
        columns=dict(COLUMNS if columns is None else columns),
        strata=wanted,
        splits={"train": 0.75, "test": 0.25},
        models={
            **({"image": _IMAGE_MODEL} if pictures else {}),
            **({"text": _TEXT_MODEL} if texts else {}),
        },
        rewards={
            "brain-mr-checker": {
                "spec": "brain-mr-checker", "sha256": "diffalign 0.1", "unit": "fraction", "range": [0.0, 1.0],
                "higher_is_better": True, "modality": "image",
            },
        },
        gates=GATES,
        versions={"diffalign": "0.1", "torch": "2.11"},
        created="2026-01-01",
        rows_from=rows_from,
    )  # fmt: skip
    (folder / store.SPEC).write_text(yaml.safe_dump({**SPEC, "cases": n}, sort_keys=False), encoding="utf-8")
    store.write_manifest(folder, manifest, complete=complete)
    return Generated.open(folder)


_IMAGE_MODEL = {
    "name": "embedded:brain-mr", "sha256": "sha256:" + "1b" * 32, "adapter": None, "scheduler": "DDIM", "steps": 10,
    "eta": 1.0, "guidance_scale": 1.0, "licence": "Apache-2.0",
}  # fmt: skip
_TEXT_MODEL = {
    "name": "embedded:findings-lm", "sha256": "sha256:" + "2c" * 32, "adapter": None, "temperature": 1.0,
    "max_new_tokens": 64, "licence": "Apache-2.0",
}  # fmt: skip
