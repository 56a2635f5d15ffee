"""The pictures of a report: pairs before and after, chosen so that they do not flatter, and grids during training."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from apps.report_measures import decimals
from diffalign import images
from diffalign.errors import DiffalignError
from diffalign.evaluation import SAME

PER_GROUP = 8
"""Pairs in each of the three groups."""
PICTURE_SIDE = 256
GRID_SIDE = 1600
MOST_GRIDS = 8
HEAVY = 300_000
"""Bytes above which a picture is inlined as a JPEG; below it as a PNG, which keeps every pixel."""
PLACES = 3
"""Decimals of a score beside a picture, and more where all scores are small."""


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed before and after."""

    prompt: str
    seed: int | None
    before: float | None
    """Score of the measure that was optimised; None where the judgement failed or is not known."""
    after: float | None
    before_image: str | None
    """Data URI; None where the file is missing or broken."""
    after_image: str | None
    places: int
    """Decimals that its scores are shown with."""
    small: bool
    """Whether the image is shown larger than it is, so that its pixels should stay sharp."""
    before_text: str | None = None
    """Where the samples are texts."""
    after_text: str | None = None

    @property
    def change(self) -> float | None:
        """After minus before, as the page shows the two: a difference that their digits do not have is 0.

        None where one of them is not known.
        """
        if self.before is None or self.after is None:
            return None
        return round(round(self.after, self.places) - round(self.before, self.places), self.places)

    @property
    def same(self) -> bool:
        """Whether both scored the same, in all digits."""
        return self.before is not None and self.after is not None and abs(self.after - self.before) <= SAME


@dataclass(frozen=True)
class Group:
    """Pairs under one heading."""

    title: str
    note: str
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Grid:
    """One moment of training."""

    name: str
    image: str


@dataclass(frozen=True)
class Tally:
    """How the saved pairs changed."""

    better: int
    same: int
    worse: int
    unknown: int


def pairs(samples: Path, sign: int, seed: int) -> tuple[list[Group], Tally | None]:
    """The pairs that a report shows, and how all saved pairs changed; nothing where no pairs were saved.

    ``sign`` is 1 where a higher score is better, else -1. ``seed`` decides the random ones.
    """
    records = _records(samples / "prompts.json")
    if not records:
        return [], None
    gains = [_gain(record, sign) for record in records]
    known = [i for i, gain in enumerate(gains) if math.isfinite(gain)]
    better = sorted((i for i in known if gains[i] > SAME), key=lambda i: (-gains[i], i))
    worse = sorted((i for i in known if gains[i] < -SAME), key=lambda i: (gains[i], i))
    tally = Tally(len(better), len(known) - len(better) - len(worse), len(worse), len(records) - len(known))

    scores = [_score(record.get(side)) for record in records for side in ("before", "after")]
    places = max(PLACES, decimals([score for score in scores if score is not None]))

    def shown(indices: Sequence[int]) -> list[Pair]:
        return [_pair(samples, i, records[i], places) for i in indices]

    if len(records) <= 3 * PER_GROUP:
        note = "Every saved pair, in the order of the evaluation."
        return [Group("All pairs", note, shown(range(len(records))))], tally
    drawn = sorted(random.Random(seed).sample(range(len(records)), PER_GROUP))
    groups = [
        Group(
            "Drawn at random",
            "Picked without looking at the scores: what to expect. A pair may appear in another group, too.",
            shown(drawn),
        ),
        Group("Largest gains", _extreme_note(len(better), len(records), "better"), shown(better[:PER_GROUP])),
        Group("Largest losses", _extreme_note(len(worse), len(records), "worse"), shown(worse[:PER_GROUP])),
    ]
    return groups, tally


def grids(samples: Path) -> list[Grid]:
    """The same prompts and seeds before, during and after training, in that order; at most ``MOST_GRIDS``."""
    during = sorted(
        (path for path in samples.glob("epoch-*.png") if path.stem[6:].isdigit()), key=lambda path: int(path.stem[6:])
    )
    room = MOST_GRIDS - 2
    if len(during) > room:
        during = [during[round(i * (len(during) - 1) / (room - 1))] for i in range(room)]
    named = [("before", samples / "before.png")]
    named += [(f"epoch {path.stem[6:]}", path) for path in during]
    named += [("after", samples / "after.png")]
    return [Grid(name, uri) for name, path in named if (uri := _read(path, GRID_SIDE)[0])]


def _extreme_note(count: int, total: int, word: str) -> str:
    if count == 0:
        return f"None of the {total} saved pairs scored {word} after training."
    if count <= PER_GROUP:
        return f"All {count} of the {total} saved pairs that scored {word} after training."
    return f"The {PER_GROUP} furthest of the {count} (of {total} saved pairs) that scored {word} after training."


def _records(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [record for record in found if isinstance(record, dict)] if isinstance(found, list) else []


def _gain(record: Mapping[str, Any], sign: int) -> float:
    before, after = _score(record.get("before")), _score(record.get("after"))
    return math.nan if before is None or after is None else sign * (after - before)


def _score(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _pair(samples: Path, index: int, record: Mapping[str, Any], places: int) -> Pair:
    before, small = _read(samples / "before" / f"{index:03d}.png", PICTURE_SIDE)
    after, _ = _read(samples / "after" / f"{index:03d}.png", PICTURE_SIDE)
    return Pair(
        prompt=str(record.get("prompt", "")),
        seed=record.get("seed"),
        before=_score(record.get("before")),
        after=_score(record.get("after")),
        before_image=before,
        after_image=after,
        places=places,
        small=small,
        before_text=record.get("before_text"),
        after_text=record.get("after_text"),
    )


def _read(path: Path, longest: int) -> tuple[str | None, bool]:
    """A picture as a data URI, and whether it is a small one. Pixels only: what else the file holds stays there."""
    try:
        image = images.load(path)
    except DiffalignError:
        return None, True
    small = max(image.size) < 128
    return data_uri(image, longest), small


def data_uri(image: Image, longest: int, heavy: int = HEAVY) -> str:
    """A picture for a page: shrunk to ``longest`` pixels, as a PNG or, where that is heavy, as a JPEG; no metadata."""
    image = image.copy()
    image.info = {}
    image.thumbnail((longest, longest))
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, optimize=True, quality=88)
        if buffer.tell() <= heavy:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
