"""The page of ``diffalign preferences inspect``: what was counted, and example pairs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps import report
from apps.report_pictures import PICTURE_SIDE, data_uri
from diffalign.preferences import Summary
from diffalign.runs import write_text
from diffalign.types import Preference, Sample

EXAMPLES = 24
LONGEST_TEXT = 400
SMALL = 128
"""Images up to this size are enlarged with sharp pixels."""


@dataclass(frozen=True)
class Side:
    """One sample of a pair."""

    name: str
    image: str | None
    """Data URI; None where the sample is a text."""
    text: str
    small: bool
    preferred: bool


@dataclass(frozen=True)
class Example:
    """One pair as it is shown."""

    number: int
    prompt: str
    verdict: str
    details: str
    sides: tuple[Side, Side]


class Sheet:
    """A random sample of the pairs that are offered one after the other (Vitter 1985, algorithm R), always the same."""

    def __init__(self, size: int = EXAMPLES, seed: int = 0) -> None:
        self.size = size
        self.seen = 0
        self.examples: list[Example] = []
        self._random = random.Random(seed)

    def offer(self, preference: Preference) -> None:
        """Keeps the pair, perhaps in the place of another."""
        place = len(self.examples) if self.seen < self.size else self._random.randrange(self.seen + 1)
        self.seen += 1
        if place < self.size:
            self.examples[place : place + 1] = [_example(self.seen, preference)]


def write(path: Path, name: str, form: str, summary: Summary, sheet: Sheet) -> None:
    """Writes the page."""
    shown: Mapping[str, Any] = {
        "name": name,
        "facts": facts(form, summary),
        "warnings": summary.warnings(),
        "broken": summary.broken,
        "examples": sorted(sheet.examples, key=lambda example: example.number),
        "seen": sheet.seen,
    }
    write_text(path, report.page("preferences.html.j2", shown))


def facts(form: str, summary: Summary) -> list[tuple[str, str]]:
    """The counts in words, by name."""
    data = summary.to_json()
    labels, prompts, repeats = data["labels"], data["prompts"], data["repeats"]
    each = prompts["pairs_each"]
    rows = [
        ("format", form),
        ("judgements", f"{data['judgements']:,}"),
        ("pairs", f"{data['pairs']:,} different"),
        ("broken rows", f"{data['broken']['rows']:,}" + _within(data["broken"]["reasons"])),
        (
            "labels",
            f"{labels['first']:,} prefer the first, {labels['second']:,} the second, {labels['ties']:,} are ties"
            + (f"; {labels['soft']:,} are soft" if labels["soft"] else ""),
        ),
        ("first preferred", _share(data["first_preferred"])),
        (
            "prompts",
            f"{prompts['different']:,} different, with {_each(each)}",
        ),
        ("criteria", _listed(data["criteria"])),
        ("raters", f"{data['raters']['different']:,}" + _within(data["raters"]["most"])),
    ]
    if summary.sizes:
        unequal = data["sizes"]["unequal_pairs"]
        rows.append(("sizes", _listed(data["sizes"]["most"]) + (f"; unequal in {unequal:,}" if unequal else "")))
    repeated = f"{repeats['same_judgement']:,} repeat a judgement ({repeats['of_these_swapped']:,} swapped)"
    contradictory, identical = repeats["contradictory_pairs"], repeats["identical_samples"]
    rows.append(("repeats", f"{repeated}, {contradictory:,} contradict, {identical:,} are of identical samples"))
    return rows


def _each(found: Mapping[str, Any]) -> str:
    if found["min"] == found["max"]:
        return f"{found['min']} {'pair' if found['min'] == 1 else 'pairs'} each"
    return f"{found['min']} to {found['max']} pairs each (median {found['median']:g})"


def _share(first: Mapping[str, Any]) -> str:
    if first["share"] is None:
        return "no pair is decided"
    low, high = first["ci95"]
    return f"{first['share']:.1%} of {first['n']:,} decided pairs (95 % interval {low:.1%} to {high:.1%})"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _within(counts: Mapping[str, int]) -> str:
    return f" ({_listed(counts)})" if counts else ""


def _example(number: int, preference: Preference) -> Example:
    label = preference.label
    verdict = "tie" if label == 0.5 else "first preferred" if label > 0.5 else "second preferred"
    details = [] if label in (0, 0.5, 1) else [f"label {label:g}"]
    details += [] if preference.criterion == "overall" else [preference.criterion]
    details += [f"by {preference.rater}"] if preference.rater else []
    return Example(
        number=number,
        prompt=_cut(preference.prompt.text) or "(no prompt)",
        verdict=verdict,
        details=", ".join(details),
        sides=(_side("first", preference.first, label > 0.5), _side("second", preference.second, label < 0.5)),
    )


def _side(name: str, sample: Sample, preferred: bool) -> Side:
    if sample.image is None:
        return Side(name, None, _cut(sample.text or ""), False, preferred)
    small = max(sample.image.size) <= SMALL
    return Side(name, data_uri(sample.image, PICTURE_SIDE), "", small, preferred)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
