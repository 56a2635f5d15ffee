"""The plots of a study's report as inline SVG, in the style of ``apps.charts``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup

from apps.charts import Frame, brief, tick_labels, ticks

if TYPE_CHECKING:
    from diffalign.preferences.agreement import Estimate
    from diffalign.preferences.ranking import Ranking

ROW = 30
LONGEST_NAME = 34


def progress(done: int, total: int) -> Markup:
    """How many of all pairs are complete, as a bar."""
    share = done / total if total else 0.0
    return Markup(
        '<svg class="progress" viewBox="0 0 300 10" preserveAspectRatio="none" role="img" aria-label="{} of {} pairs'
        ' are complete"><rect class="all" width="300" height="10"/>'
        '<rect class="done" width="{}" height="10"/></svg>'
    ).format(done, total, f"{300 * share:.1f}")


def ranking(found: Ranking | None) -> Markup:
    """Strengths with their intervals, the strongest above, on one axis."""
    if found is None:
        return Markup("")
    rows = found.standings
    ends = [end for row in rows for end in (row.low, row.high, row.strength) if math.isfinite(end)]
    marks = ticks(min([*ends, 0.0]), max([*ends, 0.0]), 5)
    left = 20 + 7.2 * max(min(len(row.arm), LONGEST_NAME) for row in rows)
    height = ROW * len(rows) + 44
    frame = Frame(left, 8, 700 - left - 24, ROW * len(rows), (marks[0], marks[-1]), (0.0, 1.0))
    body = [
        Markup('<path class="grid{}" d="M{} 8V{}"/><text class="middle" x="{}" y="{}">{}</text>').format(
            " zero" if value == 0 else "", _n(frame.x(value)), height - 36, _n(frame.x(value)), height - 20, label
        )
        for value, label in zip(marks, tick_labels(marks), strict=True)
    ]
    body.append(
        Markup('<text class="middle" x="{}" y="{}">strength: log-odds against the mean of the arms</text>').format(
            _n(frame.left + frame.width / 2), height - 4
        )
    )
    for place, row in enumerate(rows):
        y = 8 + ROW * place + ROW / 2
        low, high = (frame.x(min(max(end, marks[0]), marks[-1])) for end in (row.low, row.high))
        body.append(
            Markup(
                '<g class="arm"><title>{}: {} ({} to {})</title><text class="end name" x="{}" y="{}">{}</text>'
                '<path d="M{} {}H{}"/><circle cx="{}" cy="{}" r="5"/></g>'
            ).format(
                row.arm,
                brief(row.strength),
                brief(row.low),
                brief(row.high),
                _n(left - 10),
                _n(y + 4),
                _cut(row.arm),
                _n(low),
                _n(y),
                _n(high),
                _n(frame.x(row.strength)),
                _n(y),
            )
        )
    label = "; ".join(f"{row.arm} {brief(row.strength)}" for row in rows)
    return Markup('<svg class="forest" viewBox="0 0 700 {}" role="img" aria-label="{}">{}</svg>').format(
        height, f"Strengths: {label}", Markup("").join(body)
    )


def share(value: Estimate, middle: float | None) -> Markup:
    """A share from 0 to 1 with its interval; ``middle`` marks what one would expect."""
    if math.isnan(value.value):
        return Markup("")
    frame = Frame(6, 2, 108, 12, (0.0, 1.0), (0.0, 1.0))
    mark = "" if middle is None else Markup('<path class="expected" d="M{} 1V15"/>').format(_n(frame.x(middle)))
    return Markup(
        '<svg class="share" viewBox="0 0 120 16" aria-hidden="true"><path class="axis" d="M6 8H114"/>{}'
        '<path class="range" d="M{} 8H{}"/><circle cx="{}" cy="8" r="4"/></svg>'
    ).format(mark, _n(frame.x(value.low)), _n(frame.x(value.high)), _n(frame.x(value.value)))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
