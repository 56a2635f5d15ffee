"""The curves of a report: what was logged during training, one small chart per question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from apps import charts
from apps.charts import Line, Mark

Rows = Sequence[Mapping[str, object]]

OWN = ("total", "std", "failed")
"""Names under ``reward/`` that are not parts of the reward."""

SMALL: tuple[tuple[str, str, str], ...] = (
    ("reward/std", "Spread of the reward", "Standard deviation among an epoch's samples. At 0 nothing can be learned."),
    ("reward/failed", "Failed judgements", "Samples that the reward could not score. Healthy is 0."),
    (
        "policy/ratio",
        "Probability ratio",
        "New over old probability of a step, or of what stands for it. Healthy stays close to 1.",
    ),
    (
        "policy/clip_fraction",
        "Clipped",
        "Share of ratios beyond the clip range. Near 1 for long: updates too large.",
    ),
    ("policy/approx_kl", "Drift within an epoch", "Half the squared log-ratio. Healthy is small, without jumps."),
    ("distance/step_kl", "Distance from the {base}, held out", "Closed-form KL per step on held-out prompts."),
    ("policy/kl", "Distance from the {base}", "Closed-form KL per step. It grows; slower is safer."),
    (
        "policy/accuracy",
        "Preferences in order",
        "Share of pairs whose winner gained more than its loser. Starts at 0.5.",
    ),
    (
        "policy/held_out_accuracy",
        "Held-out preferences in order",
        "The same of pairs whose prompts are held out. It stands still while the training pairs are learned by heart.",
    ),
    ("policy/margin", "Margin", "How clearly, times beta. It grows; without end means overfitting."),
    ("policy/winner_drift", "Drift of winners", "How much more likely winners became. Below 0: they fall, too."),
    ("policy/loser_drift", "Drift of losers", "How much more likely losers became. It should fall, or rise less."),
    ("policy/log_likelihood", "Log-likelihood of samples", "Of those learned from. Of examples it rises; else steady."),
    ("experience/pairs", "Pairs", "Pairs that an epoch learned from."),
    ("experience/kept", "Kept samples", "Share of fresh samples that are imitated."),
    (
        "policy/loss",
        "Loss",
        "No measure of quality: for policy gradients it need not fall; for pairs it starts at ln 2.",
    ),
    ("policy/grad_norm", "Gradient norm", "Before clipping. Healthy is steady; a rise by orders of magnitude is not."),
    ("advantage/mean", "Mean advantage", "Near 0 by construction; else the statistics lag behind."),
    ("advantage/zero_fraction", "Samples without a signal", "Advantage 0. Near 1: prompts too easy or too hard."),
)
KL = "distance/sample_kl"
STAGES = (("time/sample", "sampling"), ("time/reward", "scoring"), ("time/update", "updating"))


@dataclass(frozen=True)
class Chart:
    """One figure."""

    title: str
    hint: str
    """How to read it, in a sentence."""
    svg: Markup
    legend: Markup
    last: str = ""
    wide: bool = False


def against_distance(rows: Rows, evaluation: Mapping[str, Any], base: str = "base model") -> list[Chart]:
    """Rewards on held-out prompts against the divergence of whole samples from the base (the model that the run began
    with, ``base`` in words): what was gained at what price. What was
    optimised comes first; if it goes on rising where the others fall, it was over-optimised.

    Empty where a run was not measured on the way (``evaluation.every``). ``evaluation`` is that of the end.
    """
    after = (evaluation.get("distance") or {}).get("sample_kl")
    found = []
    for name, measure in (evaluation.get("rewards") or {}).items():
        moments = [
            (float(x), float(y))
            for row in rows
            if isinstance(x := row.get(KL), int | float) and isinstance(y := row.get(f"held_out/{name}"), int | float)
        ]
        if not moments or not isinstance(after, int | float):
            continue
        ends = [(0.0, measure["before"]), (float(after), measure["after"])]
        marks = [Mark(name, x, end["mean"], *end["ci95"]) for x, end in ends if end["mean"] is not None and end["ci95"]]
        points = [(x, end["mean"]) for x, end in ends if end["mean"] is not None]
        lines = [Line(name, [*points[:1], *moments, *points[1:]])]
        trained = "It was trained on." if measure["trained_on"] else "It was not trained on."
        hint = (
            f"{trained} From the {base} at 0, as training went, on one seed a prompt;"
            " the ends are the evaluation, of all its seeds, with 95\u00a0% intervals."
        )
        found.append((not measure["trained_on"], _chart(f"{name} against KL", hint, lines, marks=marks, across="nats")))
    return [chart for _, chart in sorted(found, key=lambda one: one[0])]


def curves(rows: Rows, main: str, marks: Sequence[Mark], base: str) -> list[Chart]:
    """The charts for what was logged, the reward first. ``main`` is the name of the reward that was optimised.

    ``marks`` are the full evaluations, drawn beside the held-out curve.
    """
    found = [_reward(rows, main, marks), *_parts(rows), *_others(rows, main)]
    for key, title, hint in SMALL:
        points = series(rows, key)
        quiet = key == "reward/failed" and not any(y for _, y in points)
        if points and not quiet:
            found.append(_single(title.format(base=base), hint, points))
    lines = [Line(name, points) for key, name in STAGES if (points := series(rows, key))]
    if lines:
        hint = "Wall-clock seconds of each stage of an epoch."
        found.append(_chart("Seconds per stage", hint, lines))
    return [chart for chart in found if chart is not None]


def series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """The points ``(step, value)`` of one metric, as logged; what is not a number is left out."""
    return [
        (float(step), float(value))
        for row in rows
        if isinstance(value := row.get(key), int | float) and isinstance(step := row.get("step"), int | float)
    ]


def epochs(rows: Rows) -> list[int]:
    """The epochs that were trained, as against measurements on the way."""
    return [int(str(row["step"])) for row in rows if "reward/total" in row or "policy/learning_rate" in row]


def part_names(rows: Rows) -> list[str]:
    """The parts of the reward that were logged, such as the attributes of a checker."""
    keys = sorted({key for row in rows for key in row if key.startswith("reward/")})
    return [name for key in keys if (name := key.removeprefix("reward/")) not in OWN]


def _reward(rows: Rows, main: str, marks: Sequence[Mark]) -> Chart | None:
    lines = [Line("training prompts", series(rows, "reward/total"))]
    held_out = series(rows, f"held_out/{main}")
    if held_out:
        lines.append(Line("held-out prompts", held_out))
    if not any(line.points for line in lines):
        return None
    hint = f"Mean of {main} over an epoch's samples."
    if held_out:
        hint += " Training rising while held-out prompts stand still means memorised prompts."
    if marks:
        hint += (
            " The dots with bars are the evaluation before and after, on held-out prompts, with 95\u00a0% intervals."
        )
    return _chart(f"Reward: {main}", hint, lines, marks=marks, wide=True)


def _others(rows: Rows, main: str) -> list[Chart]:
    """What was measured on held-out prompts beside what was optimised, each on its own scale."""
    keys = sorted({key for row in rows for key in row if key.startswith("held_out/")} - {f"held_out/{main}"})
    hint = "Mean on held-out prompts, one seed each."
    return [_single(f"Held out: {key.removeprefix('held_out/')}", hint, series(rows, key)) for key in keys]


def _parts(rows: Rows) -> list[Chart]:
    """The parts in one chart where they share a scale, else one chart each."""
    lines = [Line(name, series(rows, f"reward/{name}")) for name in part_names(rows)]
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not lines:
        return []
    if min(values) >= 0 and max(values) <= 1 and len(lines) <= charts.STYLES:
        return [_chart("Parts of the reward", "Means over an epoch's samples, on one scale.", lines, wide=True)]
    return [_single(line.name, "Part of the reward, mean over an epoch's samples.", line.points) for line in lines]


def _single(title: str, hint: str, points: Sequence[tuple[float, float]]) -> Chart:
    return _chart(title, hint, [Line(title, points)])


def _chart(
    title: str, hint: str, lines: Sequence[Line], *, marks: Sequence[Mark] = (), wide: bool = False,
    across: str = "epoch",
) -> Chart:  # fmt: skip
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ends = [(line.name, charts.brief(y, values)) for line in lines if (y := _last(line.points)) is not None]
    words = "; ".join(f"{name} ends at {value}" for name, value in ends)
    named = len(lines) > 1 or bool(marks)
    size = {"width": 480, "height": 270} if wide else {"width": 300, "height": 180}
    return Chart(
        title=title,
        hint=hint,
        svg=charts.line_chart(lines, f"{title}: {words}.", marks=marks, across=across, **size),
        legend=charts.legend([line.name for line in lines], "evaluation" if marks else "") if named else Markup(""),
        last=ends[0][1] if len(lines) == 1 and ends else "",
        wide=wide,
    )


def _last(points: Sequence[tuple[float, float]]) -> float | None:
    return next((y for _, y in reversed(points) if math.isfinite(y)), None)
