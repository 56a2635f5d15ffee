"""The report of a dataset: ``OUT/report.html``, one page that needs nothing but itself.

Everything on it is read from the dataset's folder, and the same dataset gives the same bytes. What was not measured is
said to be missing, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from apps import report
from apps.dataset_report_cases import MOST_VALUES, Cases, Column, Score, gather, hardest
from apps.dataset_report_charts import histogram, track
from apps.dataset_report_measures import read
from apps.dataset_report_words import aligned, facts_of, hint, limitations, verdict
from apps.report_measures import number
from diffalign.errors import UserError
from diffalign.intervals import wilson
from diffalign.runs import write_text
from diffalign.synthesis import balance, card, rows, store
from diffalign.synthesis import spec as specification
from diffalign.synthesis.balance import Asked
from diffalign.synthesis.spec import Spec
from diffalign.synthesis.store import Acceptance, Generated

NAME = "report.html"
MOST_STRATA = 20
"""Rows of the table of acceptance that are open; the others are folded away."""
MOST_FOLDED = 1000
EMPTY = "(empty)"


@dataclass(frozen=True)
class Bar:
    """A value of a column."""

    value: str
    count: str
    share: str
    asked: str
    bar: Markup


@dataclass(frozen=True)
class Distribution:
    """A column as it is shown: bars of its values, or a histogram."""

    name: str
    note: str
    bars: Sequence[Bar] = ()
    chart: Markup | None = None


@dataclass(frozen=True)
class Stratum:
    """How a stratum was filled."""

    name: str
    cases: str
    asked: str
    attempts: int
    share: str
    interval: str
    rejected: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Judged:
    """A reward."""

    name: str
    note: str
    chart: Markup
    parts: Sequence[tuple[str, str, str]]
    """Name, mean over all attempts, mean over accepted ones."""


def write(folder: Path, beside: Path | None = None) -> Path:
    """Writes the report of a finished dataset into its folder and returns its path.

    With ``beside`` an evaluation that lies in another folder is shown, and the page is written there.
    """
    path = (beside or folder) / NAME
    made = Generated.open(folder)
    try:
        write_text(path, report.page("dataset.html.j2", context(made, beside or folder)))
    finally:
        made.close()
    return path


def context(made: Generated, beside: Path) -> dict[str, Any]:
    """What the template shows."""
    manifest = made.manifest
    spec = _spec(made.folder)
    asked = balance.asked(spec) if spec is not None else None
    cases = gather(made, asked)
    measured = read(made.folder, beside, manifest)
    attempts = sum(found.attempts for found in cases.acceptance.values())
    return {
        "manifest": manifest,
        "cases": cases,
        "attempts": attempts,
        "parts": _parts(made),
        "splits": [(name, f"{cases.splits[name]:,}") for name in manifest.splits],
        "measured": measured,
        "aligned": aligned(manifest),
        "verdict": verdict(measured.release),
        "hint": hint(manifest),
        "distributions": [_distribution(column, cases.count, asked) for column in cases.columns],
        "joint": _joint(cases, asked),
        "strata": _strata(cases, asked),
        "open": MOST_STRATA,
        "gates": _gates(manifest.gates, cases, attempts),
        "judged": _judged(cases, manifest.rewards),
        "texts": _texts(cases),
        "limitations": limitations(made, cases, measured),
        "facts": facts_of(manifest, spec),
        "elsewhere": _elsewhere(spec),
        "spec_text": _spec_text(made.folder),
    }


def _spec(folder: Path) -> Spec | None:
    """The specification; None where it cannot be read, which ``verify`` will tell."""
    try:
        data = yaml.safe_load(_spec_text(folder))
        return specification.parse(data) if isinstance(data, dict) else None
    except (yaml.YAMLError, UserError):
        return None


def _spec_text(folder: Path) -> str:
    return (folder / store.SPEC).read_text(encoding="utf-8", errors="replace")


def _parts(made: Generated) -> str:
    words = {"image": "an image", "text": "a text"}
    return ", ".join([words[part] for part in made.parts]) + " and a table row"


def _elsewhere(spec: Spec | None) -> list[str]:
    """What the specification names by its name alone, so that whoever repeats it has to say where it lies."""
    if spec is None:
        return []
    found = [
        f"{name}.{field}" for name, section in (("image", spec.image), ("text", spec.text)) if section is not None
        for field, value in (("model", section.model), ("adapter", section.adapter))
        if value is not None and not value.startswith(("embedded:", "fetched:", "hf-hub:")) and "/" not in value
    ]  # fmt: skip
    return found + (["table.file"] if spec.table is not None else [])


# -- distributions ----------------------------------------------------------------------------------------------------


def _distribution(column: Column, count: int, asked: Asked | None) -> Distribution:
    if column.edges:
        return _numbers(column, count, asked)
    if column.many:
        return Distribution(column.name, "It has too many different values to be shown.")
    wanted = asked.values.get(column.name) if asked else None
    return Distribution(column.name, *_bars(column, count, wanted))


def _bars(column: Column, count: int, wanted: Mapping[Any, float] | None) -> tuple[str, list[Bar]]:
    found = {rows.shown(value): number for value, number in column.counts.items()}
    if column.empty:
        found[EMPTY] = column.empty
    shares = {EMPTY if value is None else rows.shown(value): share for value, share in (wanted or {}).items()}
    order = [name for name in shares if name != EMPTY] or sorted(found, key=lambda name: (-found[name], name))
    order = [name for name in dict.fromkeys([*order, *found]) if name != EMPTY]
    order += [EMPTY] * (EMPTY in found or EMPTY in shares)
    # Empty cells are told, but do not make the other bars short.
    most = max(
        [1e-9, *(max(found.get(name, 0) / max(1, count), shares.get(name, 0)) for name in order if name != EMPTY)]
    )
    bars = [_bar(name, found.get(name, 0), count, shares.get(name) if wanted else None, most) for name in order]
    notes = []
    if wanted:
        notes.append(_deviation(*balance.furthest(found, shares), count))
    if len(bars) > MOST_VALUES:
        notes.append(f"{len(bars) - MOST_VALUES} more values are not shown.")
    return " ".join(notes), bars[:MOST_VALUES]


def _bar(name: str, found: int, count: int, asked: float | None, most: float) -> Bar:
    share = found / max(1, count)
    words = "" if asked is None else f"{number(100 * asked, 1)}\u00a0%"
    bar = Markup() if name == EMPTY else track(share, asked, most)
    return Bar(name, f"{found:,}", f"{number(100 * share, 1)}\u00a0%", words, bar)


def _deviation(name: str, gap: float, count: int) -> str:
    """The largest deviation in words; what rounding to whole cases makes cannot be avoided."""
    if abs(gap) * count < 0.05:
        return "Every share is as asked for."
    return (
        f"Largest deviation: {name}, {number(100 * gap, 2, signed=True)} percentage points"
        f" ({number(gap * count, 1, signed=True)} cases)."
    )


def _numbers(column: Column, count: int, asked: Asked | None) -> Distribution:
    counts = [column.counts[i] for i in range(len(column.edges) - 1)]
    shares = (
        balance.expected(asked.numbers[column.name], column.edges) if asked and column.name in asked.numbers else []
    )
    words = [f"{edge:g}" for edge in column.edges]
    note = f"{column.empty:,} are empty." if column.empty else ""
    if shares:
        named = {f"{low} to {high}": i for i, (low, high) in enumerate(pairwise(words))}
        found = {name: counts[i] for name, i in named.items()} | ({EMPTY: column.empty} if column.empty else {})
        wanted = {name: shares[i] for name, i in named.items()} | {EMPTY: 1 - sum(shares)}
        note = f"{_deviation(*balance.furthest(found, wanted), count)} Numbers are drawn, so some is by chance. {note}"
    label = f"{column.name}: {sum(counts):,} cases from {words[0]} to {words[-1]}"
    chart = histogram(column.edges, counts, label, asked=[share * count for share in shares], across=column.name)
    return Distribution(column.name, note.strip(), chart=chart)


def _joint(cases: Cases, asked: Asked | None) -> str:
    """How far the strata are from what was asked for, in a sentence."""
    if asked is None or len(asked.strata) < 2:
        return ""
    found = {name: one.accepted for name, one in cases.acceptance.items()}
    empty = sum(1 for name in asked.strata if not found.get(name))
    gone = f" {empty} strata that the shares ask for have no case: there are too few cases." if empty else ""
    deviation = _deviation(*balance.furthest(found, asked.strata), cases.count)
    return f"Together, {len(asked.strata):,} strata. {deviation}{gone}"


# -- acceptance -------------------------------------------------------------------------------------------------------


def _strata(cases: Cases, asked: Asked | None) -> list[Stratum]:
    return [_stratum(name, cases.acceptance[name], cases, asked) for name in hardest(cases.acceptance)[:MOST_FOLDED]]


def _stratum(name: str, found: Acceptance, cases: Cases, asked: Asked | None) -> Stratum:
    low, high = wilson(found.accepted, found.attempts)
    wanted = asked.strata.get(name) if asked else None
    return Stratum(
        name,
        f"{found.accepted:,}",
        f"{found.wanted:,}" if wanted is None else number(wanted * cases.count, 1),
        found.attempts,
        f"{100 * found.accepted / max(1, found.attempts):.0f}\u00a0%",
        f"{100 * low:.0f} to {100 * high:.0f}",
        sorted(found.rejected.items(), key=lambda item: (-item[1], item[0])),
    )


def _gates(
    gates: Sequence[Mapping[str, Any]], cases: Cases, attempts: int
) -> list[tuple[str, str, str, Sequence[tuple[str, int]]]]:
    """Each gate: name, how many it rejected, of 100 attempts, and what it said most often."""
    return [
        (gate, f"{count:,}", f"{100 * count / max(1, attempts):.1f}", cases.reasons.get(gate, ()))
        for gate, count in sorted(card.tallied(gates, cases.acceptance).items(), key=lambda item: -item[1])
    ]


# -- what was judged and written --------------------------------------------------------------------------------------


def _judged(cases: Cases, rewards: Mapping[str, Any]) -> list[Judged]:
    return [
        _score(cases.scores[name], facts, [one for key, one in cases.scores.items() if key.startswith(f"{name}/")])
        for name, facts in rewards.items()
        if name in cases.scores
    ]


def _score(score: Score, facts: Mapping[str, Any], parts: Sequence[Score]) -> Judged:
    tried, kept = score.counts
    note = f"{kept:,} accepted, mean {_mean(score, 1)}; {tried:,} attempts, mean {_mean(score, 0)}."
    if facts.get("higher_is_better") is False:
        note += " Less is better."
    label = f"{score.name}: {note}"
    chart = histogram(
        score.edges, score.accepted, label, behind=score.all, across=f"{score.name}, {facts.get('unit', '')}"
    )
    named = [(one.name.removeprefix(f"{score.name}/"), _mean(one, 0), _mean(one, 1)) for one in parts]
    return Judged(score.name, note, chart, named)


def _mean(score: Score, which: int) -> str:
    found = score.mean(which)
    return "–" if found is None else number(found, 3)


def _texts(cases: Cases) -> Mapping[str, Any] | None:
    if not cases.texts.words:
        return None
    words = cases.texts.words
    edges, counts = cases.texts.histogram()
    total, different = words.total(), cases.texts.different
    note = f"{total:,} texts of {min(words)} to {max(words)} words, {cases.texts.mean():.1f} on average. " + (
        "No two are the same."
        if different == total
        else f"{different:,} different ones ({100 * different / total:.0f}\u00a0%)."
    )
    return {"note": note, "chart": histogram(edges, counts, f"Length of the texts: {note}", across="words")}
