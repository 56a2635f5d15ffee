"""The cases of a dataset as its report shows them: contact sheets, distributions, scores, texts.

Everything is gathered while the journal is read through once, case by case, and then once attempt by attempt; what is
kept of it does not grow with the number of cases.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from apps.report_pictures import data_uri
from diffalign import images
from diffalign.errors import InputError, NotFoundError
from diffalign.synthesis import balance, rows
from diffalign.synthesis.balance import Asked
from diffalign.synthesis.cases import Case
from diffalign.synthesis.journal import Attempt
from diffalign.synthesis.store import Acceptance, Generated

MOST_SHEETS = 48
HARDEST = 12
"""Where there are more strata, so many sheets are of those that took the most attempts; the others lie evenly apart."""
MOST_PICTURES = 288
PER_SHEET = (4, 12)
"""Cases of a sheet, at least and at most; where strata are many there are fewer of each."""
PICTURE_SIDE = 128
SMALL = 96
"""Images up to this size are enlarged with sharp pixels."""
HEAVY = 11_000
"""Bytes above which a picture is a JPEG, so that the page stays below 6 MB."""
LONGEST = 300
MOST_COLUMNS = 24
MOST_VALUES = 40
"""Values of a column that are shown; the others are counted together."""
MOST_KEPT = 2_000
"""A column with more different values is not counted."""
BINS = 20


@dataclass(frozen=True)
class Shown:
    """A case on a contact sheet."""

    id: str
    image: str | None
    """Data URI; None where the case has no image, or its file is broken."""
    small: bool
    prompt: str
    row: str
    text: str


@dataclass
class Sheet:
    """Some cases of a stratum."""

    stratum: str
    found: Acceptance
    cases: list[Shown] = field(default_factory=list)


@dataclass
class Column:
    """A column of the table, counted."""

    name: str
    kind: str
    counts: Counter[Any] = field(default_factory=Counter)
    """By value; by bin, for numbers."""
    edges: Sequence[float] = ()
    """``(K + 1,)`` of the bins, for numbers."""
    empty: int = 0
    many: bool = False
    """It has too many different values to be counted."""

    def add(self, value: Any) -> None:
        """Counts a cell."""
        if value is None:
            self.empty += 1
        elif self.edges:
            self.counts[_bin(float(value), self.edges)] += 1
        elif not self.many:
            self.counts[value] += 1
            self.many = len(self.counts) > MOST_KEPT


@dataclass
class Score:
    """What a reward, or a part of one, said of all attempts and of the accepted ones."""

    name: str
    edges: Sequence[float] = ()
    all: list[int] = field(default_factory=list)
    """``(K,)`` attempts by bin; empty for parts, of which the mean alone is kept."""
    accepted: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sums over all attempts, and over the accepted ones."""
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, value: float, *, accepted: bool) -> None:
        """Counts a score."""
        for i in (0, 1) if accepted else (0,):
            self.totals[i] += value
            self.counts[i] += 1
            if self.edges:
                bins = (self.all, self.accepted)[i]
                bins[_bin(value, self.edges)] += 1

    def mean(self, which: int) -> float | None:
        """Of all attempts (0), or of the accepted ones (1)."""
        return self.totals[which] / self.counts[which] if self.counts[which] else None


@dataclass
class Texts:
    """How long the texts are, in words."""

    words: Counter[int] = field(default_factory=Counter)
    different: int = 0

    def mean(self) -> float:
        """Words of a text."""
        return sum(length * n for length, n in self.words.items()) / max(1, self.words.total())

    def histogram(self) -> tuple[list[float], list[int]]:
        """Edges ``(K + 1,)`` and counts ``(K,)``."""
        edges = balance.edges(min(self.words), max(self.words), integer=True)
        counts = [0] * (len(edges) - 1)
        for length, n in self.words.items():
            counts[_bin(length, edges)] += n
        return edges, counts


@dataclass
class Cases:
    """Everything that was gathered."""

    count: int
    splits: Counter[str]
    sheets: list[Sheet]
    columns: list[Column]
    left_out: list[str]
    """Columns that are neither categories nor numbers, or too many."""
    scores: dict[str, Score]
    """By reward, each before its parts."""
    texts: Texts
    acceptance: Mapping[str, Acceptance]
    reasons: Mapping[str, Sequence[tuple[str, int]]]
    wide: bool = False
    """Whether there are images of more than 8 bits, which are stretched to be shown."""


def gather(made: Generated, asked: Asked | None = None) -> Cases:
    """Reads the dataset through. ``asked`` is what its specification asks for, where that is known."""
    found = made.acceptance()
    sheets = {sheet.stratum: sheet for sheet in _sheets(found)}
    wanted = {name: set(places(sheets[name].found.accepted, _each(len(sheets)))) for name in sheets}
    columns = _columns(made, asked)
    cases = Cases(
        count=0, splits=Counter(), sheets=list(sheets.values()), columns=columns[:MOST_COLUMNS],
        left_out=[name for name in made.manifest.columns if name not in {c.name for c in columns[:MOST_COLUMNS]}],
        scores=_scores(made), texts=Texts(), acceptance=found, reasons=made.reasons(3),
    )  # fmt: skip
    seen: Counter[str] = Counter()
    for case in made.cases():
        cases.count += 1
        cases.splits[case.split] += 1
        for column in cases.columns:
            column.add(case.row.get(column.name))
        if case.text is not None:
            cases.texts.words[len(case.text.split())] += 1
        if seen[case.stratum] in wanted.get(case.stratum, ()):
            shown, wide = _shown(made, case)
            sheets[case.stratum].cases.append(shown)
            cases.wide = cases.wide or wide
        seen[case.stratum] += 1
    for attempt in made.attempts():
        _judged(cases.scores, attempt)
    if cases.texts.words:
        cases.texts.different = made.different("text")
    return cases


def places(count: int, most: int) -> list[int]:
    """Which of ``count`` cases are shown: ``most`` that lie evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def hardest(found: Mapping[str, Acceptance]) -> list[str]:
    """The strata, those first of whose attempts the fewest became cases."""
    return sorted(found, key=lambda name: found[name].accepted / max(1, found[name].attempts))


def _each(sheets: int) -> int:
    fewest, most = PER_SHEET
    return max(fewest, min(most, MOST_PICTURES // max(1, sheets)))


def _sheets(found: Mapping[str, Acceptance]) -> list[Sheet]:
    """Of all strata, in their order; of many, the hardest ones and some that lie evenly apart."""
    names = list(found)
    if len(names) > MOST_SHEETS:
        first = hardest(found)[:HARDEST]
        others = [name for name in names if name not in set(first)]
        chosen = {*first, *(others[i] for i in places(len(others), MOST_SHEETS - HARDEST))}
        names = [name for name in names if name in chosen]
    return [Sheet(name, found[name]) for name in names]


def _shown(made: Generated, case: Case) -> tuple[Shown, bool]:
    image, small, wide = None, True, False
    if case.image is not None:
        try:
            image, small, wide = _picture(made.image(case.image))
        except (InputError, NotFoundError, OSError):
            image = None
    row = ", ".join(f"{name}: {rows.shown(value)}" for name, value in case.row.items() if value is not None)
    return Shown(case.id, image, small, cut(case.prompt), cut(row), cut(case.text or "")), wide


def _picture(data: bytes) -> tuple[str, bool, bool]:
    """A picture as a data URI, whether it is a small one, and whether it has more than 8 bits.

    Grey pictures are kept grey, which is smaller. A slash of base64 is written as an address may write it: between
    letters it could spell a path by chance, and no path belongs on the page.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as found:
        found.load()
    shown = images.to_rgb(found)
    bands = shown.split()
    if bands[0].tobytes() == bands[1].tobytes() == bands[2].tobytes():
        shown = bands[0]
    head, mark, body = data_uri(shown, PICTURE_SIDE, HEAVY).partition("base64,")
    return head + mark + body.replace("/", "%2F"), max(found.size) <= SMALL, found.mode.startswith("I")


def cut(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _columns(made: Generated, asked: Asked | None) -> list[Column]:
    """Those that can be counted; numbers over the range that is asked for, or else over that which there is."""
    ranges = made.ranges("cells")
    for name, forms in (asked.numbers if asked else {}).items():
        ranges[name] = min(form.range[0] for form, _ in forms), max(form.range[1] for form, _ in forms)
    found = []
    for name, kind in made.manifest.columns.items():
        if kind in ("category", "boolean"):
            found.append(Column(name, kind))
        elif kind in ("integer", "number") and name in ranges:
            found.append(Column(name, kind, edges=balance.edges(*ranges[name], integer=kind == "integer")))
    return found


def _scores(made: Generated) -> dict[str, Score]:
    """A histogram for each reward, over its range or that of what it gave, and a place for each of its parts."""
    ranges = made.ranges("scores")
    found: dict[str, Score] = {}
    for name in made.manifest.rewards:
        if name in ranges:
            edges = _edges(made.manifest.rewards[name].get("range"), ranges[name])
            found[name] = Score(name, edges, [0] * (len(edges) - 1), [0] * (len(edges) - 1))
        found |= {part: Score(part) for part in sorted(ranges) if part.startswith(f"{name}/")}
    return found


def _edges(given: Any, seen: tuple[float, float]) -> list[float]:
    known = isinstance(given, Sequence) and all(isinstance(end, int | float) and math.isfinite(end) for end in given)
    low, high = given if known else seen
    low, high = min(low, seen[0]), max(high, seen[1])
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return [low + (high - low) * i / BINS for i in range(BINS + 1)]


def _judged(scores: Mapping[str, Score], attempt: Attempt) -> None:
    for name, value in attempt.scores.items():
        if name in scores:
            scores[name].add(value, accepted=attempt.gate is None)


def _bin(value: float, edges: Sequence[float]) -> int:
    """The bin that holds the value; the last one holds its upper edge too."""
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    return min(max(int((value - edges[0]) / width + 1e-9), 0), len(edges) - 2)
