"""Makers without a model, for tests of the loop: what they make follows from prompt and seed, as a model's samples do.

``python -m tests.synthesis_stubs ROWS FOLDER`` makes a dataset of so many rows and prints the most memory it took.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.runs import write_text
from diffalign.synthesis import beginning, rows, spec
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.engine import Engine, Maker, Workers
from diffalign.synthesis.gates import Blank, Duplicates, Floor
from diffalign.synthesis.spec import Spec
from diffalign.types import Modality, Prompt, Sample, Scores

FIELDS: dict[str, Any] = {
    "name": "stub",
    "seed": 1,
    "cases": 12,
    "axes": {"plane": ["axial", "coronal"], "lesion": {"present": 0.5, "none": 0.5}, "age": {"integer": [20, 80]}},
    "strata": ["plane", "lesion"],
    "splits": {"train": 0.75, "test": 0.25},
    "image": {"model": "embedded:stub", "template": "{plane} slice, lesion {lesion}, age {age}"},
    "text": {"model": "embedded:stub-lm", "template": "row: {plane} {lesion}"},
    "rewards": ["luck", "words"],
    "gates": ["blank", {"gate": "reward", "reward": "luck", "at_least": 0.4}, "duplicate"],
    "chunk": 5,
    "attempts": 20,
}
SIZE = 16


def spec_of(**fields: Any) -> Spec:
    return spec.parse({**FIELDS, **fields})


def picture(seed: int, pool: int = 10**9) -> Image.Image:
    """Coarse noise, enlarged: images of different seeds differ in their low frequencies. A pool makes equal ones."""
    coarse = np.random.default_rng(seed % pool).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE))


def images(pool: int = 10**9) -> Callable[[Sequence[Prompt], Sequence[int]], list[Sample]]:
    def sample(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        return [Sample(p, image=picture(s, pool), seed=s) for p, s in zip(prompts, seeds, strict=True)]

    return sample


def texts(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
    """Texts of which a quarter was cut."""
    return [
        Sample(p, text=f"{p.text}: text {s}", seed=s, evidence={"finished": s % 4 != 0, "tokens": 64})
        for p, s in zip(prompts, seeds, strict=True)
    ]


class Luck:
    """A share in [0, 1] that follows from the sample alone."""

    unit, range, higher_is_better = "fraction", (0.0, 1.0), True

    def __init__(self, name: str = "luck", modality: Modality = "image") -> None:
        self.name, self.modality = name, modality

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        found = [
            float(np.asarray(s.image)[0, 0, 0]) / 255 if s.image is not None else len(s.text or "") % 10 / 10
            for s in samples
        ]
        return Scores(torch.tensor(found), {"half": torch.tensor(found) / 2})


def makers(pool: int = 10**9, at_least: float = 0.4, batch_size: int = 4) -> list[Maker]:
    luck = Luck()
    return [
        Maker("image", images(pool), batch_size, [luck], [Blank(0.02), Floor(luck, None, at_least)]),
        Maker("text", texts, batch_size, [Luck("words", "text")], [Blank(0.02)]),
    ]


def manifest(wanted: Spec) -> Manifest:
    found = rows.survey(wanted)
    return Manifest(
        wanted.name, wanted.sha256, found.columns, found.strata, wanted.splits,
        {"image": {"name": "embedded:stub"}, "text": {"name": "embedded:stub-lm"}}, {}, (), {"stub": "1"}, "2026-01-01",
    )  # fmt: skip


def begun(folder: Path, wanted: Spec) -> None:
    beginning.begin(wanted, folder, manifest(wanted))


def run(folder: Path, wanted: Spec, pool: int = 10**9, workers: Workers | None = None, **options: Any) -> None:
    Engine(
        wanted, folder, makers(pool, **options), duplicates=Duplicates(4, 0.99), workers=workers,
        at_end=lambda: write_text(folder / "report.html", "a page about all cases\n"),
    ).run()  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    start = time.monotonic()
    asked = spec_of(cases=int(sys.argv[1]), chunk=64)
    begun(Path(sys.argv[2]), asked)
    run(Path(sys.argv[2]), asked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sys.argv[1]} rows: {peak:.0f} MiB at most, {time.monotonic() - start:.0f} s")
