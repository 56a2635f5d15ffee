"""AlpacaEval's annotations (Li et al. 2023) as preferences: pairs of answers to an instruction, judged by models.

A file is a JSON list of rows with ``instruction``, maybe ``input``, ``output_1``, ``output_2``, ``annotator`` and
``preference``: 1 or 2 for the better answer, 0 for a tie. Whatever else stands there (-1, 3) is an answer of the
annotator that could not be read, and judges nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import InputError
from diffalign.preferences.rows import Broken, Defects
from diffalign.preferences.table import write
from diffalign.types import Preference, Prompt, Sample

log = logging.getLogger(__name__)

LABELS = {1: 1.0, 2: 0.0, 0: 0.5}
"""Probability that the first answer is preferred."""
NATIVE = "preferences.parquet"


def convert(folder: Path) -> None:
    """Puts ``preferences.parquet``, in the native form, in the place of the annotations (``JUDGE-SEED.json``).

    Says how many of them judge nothing, and are left out.
    """
    paths, broken = sorted(folder.glob("*-[0-9].json")), Defects()

    def good() -> Iterator[Preference]:
        for item in read(paths):
            if isinstance(item, Preference):
                yield item
            else:
                broken.add(item)

    count = write(folder / NATIVE, good())
    if len(broken):
        kinds = ", ".join(f"{kind} ({number})" for kind, number in broken.kinds.most_common())
        log.warning(f"{len(broken)} of {len(broken) + count} annotations are left out: {kinds}")
    for path in paths:
        path.unlink()


def read(paths: Iterable[Path]) -> Iterator[Preference | Broken]:
    """The judgements of these files. A pair that an annotator judged several times is there as often."""
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path.name} is not JSON: {error}") from None
        if not isinstance(rows, list):
            raise InputError(f"{path.name} is no list of annotations")
        for number, row in enumerate(rows):
            try:
                yield _preference(row)
            except InputError as error:
                yield Broken(f"{path.name} row {number}", str(error))


def _preference(row: Any) -> Preference:
    if not isinstance(row, dict):
        raise InputError(f"not an object: the row is a {type(row).__name__}")
    asked, more, rater = (_text(row, name) for name in ("instruction", "input", "annotator"))
    answers = [_text(row, name) for name in ("output_1", "output_2")]
    if not asked.strip() or not all(answer.strip() for answer in answers):
        raise InputError("empty: the instruction or an answer has no text")
    said = row.get("preference")
    if not isinstance(said, int) or isinstance(said, bool) or said not in LABELS:
        raise InputError(f"no label: preference is {said!r}")
    prompt = Prompt(f"{asked}\n\n{more}" if more.strip() else asked)
    first, second = (Sample(prompt, text=answer) for answer in answers)
    return Preference(prompt, first, second, LABELS[said], rater=rater)


def _text(row: dict[str, Any], name: str) -> str:
    found = row.get(name)
    if found is None and name == "input":
        return ""
    if not isinstance(found, str):
        raise InputError(f"not a text: {name} is a {type(found).__name__}")
    return found
