"""How each case came to be: one self-contained JSON object per case, in ``provenance.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.synthesis.cases import Case, Manifest
from diffalign.synthesis.exports import layout as layouts
from diffalign.synthesis.exports import pixels
from diffalign.synthesis.exports.layout import Layout
from diffalign.synthesis.store import Generated

NAME = "provenance.jsonl"


def write(source: Generated, layout: Layout, path: Path) -> None:
    """Writes the object of every case, in the order of the dataset."""
    with path.open("w", encoding="ascii") as file:
        file.writelines(lines(source, layout))


def lines(source: Generated, layout: Layout) -> Iterator[str]:
    """The lines of the file."""
    for case in source.cases():
        png = None if case.image is None else source.image(case.image)
        yield json.dumps(of_case(case, layout, source.manifest, png), allow_nan=False) + "\n"


def of_case(case: Case, layout: Layout, manifest: Manifest, png: bytes | None) -> dict[str, Any]:
    """The object of one case; ``png`` is its image.

    ``pixels_sha256`` is the hash of ``exports.pixels.digest``, the same in every format; ``record_sha256`` that of the
    row, the texts and the split, as ``exports.layout.digest`` has it.
    """
    image = None
    if png is not None:
        found = pixels.of_png(png)
        found = pixels.grey(found, f"case {case.index}") if layout.grey else found
        image = {"sha256": case.image, "pixels_sha256": pixels.digest(found)}
    return {
        "id": case.id,
        "index": case.index,
        "split": case.split,
        "stratum": case.stratum,
        "image": image,
        "record_sha256": layouts.digest(layout.record(case)),
        "made": dict(case.provenance),
        "models": dict(manifest.models),
        "rewards": rewards(case.scores, manifest.rewards),
        "gates": [dict(gate) for gate in manifest.gates],
        "spec_sha256": manifest.spec_sha256,
        "versions": dict(manifest.versions),
        "licences": licences(manifest),
    }


def rewards(scores: Mapping[str, float], known: Mapping[str, Any]) -> dict[str, Any]:
    """What each reward said, its parts too, beside what the manifest tells of it (hash, unit, range)."""
    said: dict[str, Any] = {}
    for name, score in scores.items():
        reward, _, part = name.partition("/")
        facts = said.setdefault(reward, {**known.get(reward, {}), "score": None, "parts": {}})
        if part:
            facts["parts"][part] = score
        else:
            facts["score"] = score
    return said


def licences(manifest: Manifest) -> dict[str, str]:
    """The licence of each model; a dataset has none of its own until whoever hands it out chooses one."""
    found = {part: model.get("licence") for part, model in manifest.models.items() if isinstance(model, Mapping)}
    return {part: str(licence) if licence else "not stated" for part, licence in found.items()}
