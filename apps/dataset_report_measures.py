"""Fidelity, use and privacy of a dataset, as its report shows them, from the two files of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.report_measures import Direction, finite, number
from diffalign.errors import InputError
from diffalign.synthesis import fidelity, release
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.release import Release

EVALUATION = "evaluation.json"
MEASURES = {
    "kid": ("KID", "distance between the distributions; 0 is alike, less is better"),
    "cmmd": ("CMMD", "another such distance, on CLIP embeddings; 0 is alike, less is better"),
    "precision": ("Precision", "share of synthetic images within reach of a real one"),
    "recall": ("Recall", "share of real images within reach of a synthetic one"),
    "density": ("Density", "how many real neighbourhoods an image lies in; about 1 for real ones"),
    "coverage": ("Coverage", "share of real images that have a synthetic one near"),
    "vendi": ("Vendi", "how many different images the set is worth"),
}
WAYS = {"probe": "linear probe", "network": "small network"}
MOST_GROUPS = 200


@dataclass(frozen=True)
class Line:
    """A measure in the table."""

    name: str
    words: str
    """What it is."""
    value: str
    interval: str
    n: str
    beside: str
    """What to hold it against: a limit, or what real images give."""
    verdict: str = ""


@dataclass(frozen=True)
class Block:
    """Lines under one heading; without lines, why there are none."""

    title: str
    note: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Change:
    """A measure before and after alignment."""

    name: str
    before: str
    after: str
    change: str
    interval: str
    direction: Direction


@dataclass(frozen=True)
class Group:
    """Fidelity within a stratum, or the cases of one value of a column."""

    name: str
    n: str
    cells: Sequence[tuple[str, str]]
    """Value and interval, by measure."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a dataset."""

    blocks: Sequence[Block]
    release: Release
    against: str
    """What it was compared with, in words; empty where it was not."""
    encoder: str
    names: Sequence[str]
    """Measures of the groups."""
    groups: Sequence[Group]
    too_few: Sequence[str]
    changes: Sequence[Change]
    baseline: str
    notes: Sequence[str]


def read(dataset: Path, beside: Path, manifest: Manifest) -> Measured:
    """From ``evaluation.json`` and ``privacy.json`` in the folder ``beside``, of the dataset in another, or the same.

    Files that are about other cases count as missing.
    """
    facts = _evaluation(dataset, beside)
    found = release.read(dataset, beside)
    near = facts.get("fidelity") or {}
    groups = near.get("groups") or {}
    names = [name for name in MEASURES if any(name in values for values in groups.values())]
    base = facts.get("baseline") or {}
    against = facts.get("against") or {}
    encoder = near.get("encoder") or {}
    return Measured(
        blocks=[*_blocks(facts, against), _privacy(found)],
        release=found,
        against=f"{against['n']:,} of {against['name']}" if against else "",
        encoder=f"{encoder['name']} ({encoder['sha256']})" if encoder else "",
        names=names,
        groups=[_group(name, values, names) for name, values in _sorted(groups)[:MOST_GROUPS]],
        too_few=near.get("too_few") or [],
        changes=list(_changes(facts, base)) if base else [],
        baseline=str(base.get("dataset", "")) + (f", {base['n']:,} images" if base else ""),
        notes=facts.get("notes") or [],
    )


def _evaluation(dataset: Path, beside: Path) -> Mapping[str, Any]:
    path = beside / EVALUATION
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no evaluation of a dataset: {error}") from None
    if not isinstance(facts, dict) or facts.get(release.OF) != release.about(dataset)[release.OF]:
        return {}
    return facts


def _blocks(facts: Mapping[str, Any], against: Mapping[str, Any]) -> Iterator[Block]:
    near = facts.get("fidelity") or {}
    whole: Mapping[str, Any] = near.get("all") or {}
    yield Block(
        "Fidelity",
        f"Images beside {against['n']:,} real ones. Copies of real images have the best fidelity there is, so read it"
        " together with privacy, below." if whole else "",
        [_near(name, near, against, int(facts["n"])) for name in MEASURES if name in whole],
    )  # fmt: skip
    yield Block(
        "Use",
        "Classifiers that are trained on the synthetic cases alone, tested on the real images: accuracy.",
        [line for name, ways in (facts.get("utility") or {}).items() for line in _use(name, ways)],
    )
    table = facts.get("table") or {}
    words = {"column_shapes": "how alike single columns are", "pair_trends": "how alike pairs of columns hang together"}
    count = f"{table['n'][0]:,}" if table else ""
    yield Block(
        "Table",
        "The rows beside those of the real images; 1 is alike.",
        [
            Line(name.replace("_", " ").capitalize(), said, number(value, 3), "", count, "")
            for name, said in words.items()
            if (value := finite(table.get(name))) is not None
        ],
    )


def _near(name: str, near: Mapping[str, Any], against: Mapping[str, Any], count: int) -> Line:
    """A measure of fidelity of ``count`` synthetic images."""
    whole = near["all"]
    title, words = MEASURES[name]
    beside = ""
    if name == "vendi" and "vendi_real" in whole:
        value, interval = shown(whole["vendi_real"], 2)
        beside = f"as many real ones: {value}{f' ({interval})' if interval else ''}"
    if name == "coverage":
        expected = fidelity.expected_coverage(count, int(against["n"]), int(near.get("nearest", fidelity.NEAREST)))
        beside = f"of the same distribution: {expected:.3f}"
    value, interval = shown(whole[name], 2 if name == "vendi" else 3)
    return Line(title, words, value, interval, f"{whole[name]['n']:,}", beside)


def _use(name: str, ways: Mapping[str, Any]) -> Iterator[Line]:
    guess = ways.get("guessing")
    for way, words in WAYS.items():
        if way in ways:
            value, interval = shown(ways[way])
            beside = f"by guessing: {shown(guess)[0]}" if guess else ""
            yield Line(name, words, value, interval, f"{ways[way]['n']:,}", beside)


def _privacy(found: Release) -> Block:
    note = "Against the images that the model was trained on, with held-out real ones as the yardstick."
    return Block("Privacy", note, [_measure(name, facts) for name, facts in found.measures.items()])


def _measure(name: str, facts: Mapping[str, Any]) -> Line:
    """A measure of privacy; all but the area under a curve are shares."""
    area = name == "membership"
    value, interval = shown(facts, 3) if area else _percent(facts)
    limit = finite(facts.get("limit"))
    beside = (
        "" if limit is None else f"at most {limit:g}" if area else f"at most {100 * limit:g} %" if limit else "none"
    )
    title = name.replace("_", " ").capitalize()
    n = f"{facts['n']:,}" if facts.get("n") else ""
    return Line(title, str(facts.get("why", "")), value, interval, n, beside, str(facts.get("verdict", "")))


def _percent(facts: Mapping[str, Any]) -> tuple[str, str]:
    value = finite(facts.get("value"))
    if value is None:
        return "–", ""
    ends = facts.get("ci95")
    interval = f"{number(100 * ends[0], 1)} to {number(100 * ends[1], 1)} %" if ends else ""
    return f"{number(100 * value, 1)} %", interval


def shown(estimate: Mapping[str, Any], places: int = 3, *, signed: bool = False) -> tuple[str, str]:
    """A number and its interval in words; a dash where it could not be measured."""
    value, ends = finite(estimate.get("value")), estimate.get("ci95")
    if value is None:
        return "–", ""
    interval = " to ".join(number(end, places, signed=signed) for end in ends) if ends else ""
    return number(value, places, signed=signed), interval


def _sorted(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Those of strata first, and among each kind the least like real images."""

    def key(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, str, float]:
        kind = item[0].partition(": ")[0]
        return kind != "stratum", kind, -(finite((item[1].get("kid") or {}).get("value")) or 0.0)

    return sorted(groups.items(), key=key)


def _group(name: str, values: Mapping[str, Any], names: Sequence[str]) -> Group:
    cells = [shown(values[one], 2) if one in values else ("–", "") for one in names]
    return Group(name, f"{next(iter(values.values()))['n']:,}" if values else "", cells)


def _changes(facts: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Change]:
    gaps = base.get("difference") or {}
    before, after = ((one.get("fidelity") or {}).get("all") or {} for one in (base, facts))
    for name, (title, _) in MEASURES.items():
        if name in before and name in after and name in (gaps.get("fidelity") or {}):
            yield _change(
                title, before[name], after[name], gaps["fidelity"][name], less=name in fidelity.LESS_IS_BETTER
            )
    for name, ways in (gaps.get("utility") or {}).items():
        for way, gap in ways.items():
            old, new = ((one.get("utility") or {}).get(name, {}).get(way) for one in (base, facts))
            if old and new:
                yield _change(f"{name}, {WAYS.get(way, way)} on real", old, new, gap, less=False)


def _change(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], gap: Mapping[str, Any], *, less: bool
) -> Change:
    value, interval = shown(gap, 3, signed=True)
    ends = gap.get("ci95")
    direction: Direction = "unclear"
    if ends and not ends[0] <= 0 <= ends[1]:
        direction = "better" if (ends[0] > 0) != less else "worse"
    return Change(name, shown(before)[0], shown(after)[0], value, interval, direction)
