"""The two charts of a reward model's card, as inline SVG: how far its probabilities can be believed, and what more
labels bring. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from apps.charts import Frame, tick_labels, ticks

WIDTH, HEIGHT = 300, 200


def reliability(bins: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Seen against predicted shares, with the line on which a calibrated model lies; larger dots are more pairs."""
    low = min([0.5, *(row["seen"] for row in bins)])
    y_ticks = ticks(low, 1.0, 4)
    frame = _frame(y_ticks, (0.5, 1.0))
    most = max(row["n"] for row in bins)
    diagonal = Markup('<path class="line s4" d="M{} {}L{} {}"/>').format(
        _n(frame.x(0.5)), _n(frame.y(0.5)), _n(frame.x(1)), _n(frame.y(1))
    )
    dots = [
        Markup('<circle class="dot s0" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            _n(frame.x(row["predicted"])), _n(frame.y(row["seen"])), _n(2 + 3 * math.sqrt(row["n"] / most)),
            f"predicted {row['predicted']:.2f}, seen {row['seen']:.2f}, {row['n']} pairs",
        )
        for row in bins
    ]  # fmt: skip
    axes = _axes(frame, y_ticks, [(v, f"{v:.1f}") for v in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)], "predicted share")
    return _svg([axes, diagonal, *dots], label)


def learning(points: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Accuracy, with its intervals, over the number of training prompts on a logarithmic scale."""
    known = [point for point in points if point["accuracy"]]
    ends = [end for point in known for end in (point["accuracy"]["ci95"] or [point["accuracy"]["value"]])]
    y_ticks = ticks(min(ends), max(ends), 4)
    places = [math.log2(point["prompts"]) for point in points]
    frame = _frame(y_ticks, (min(places), max(places)))
    line = "L".join(
        f"{_n(frame.x(math.log2(point['prompts'])))} {_n(frame.y(point['accuracy']['value']))}" for point in known
    )
    body = [
        _axes(frame, y_ticks, [(math.log2(p["prompts"]), str(p["prompts"])) for p in points], "training prompts"),
        Markup('<path class="line s0" d="M{}"/>').format(line),
    ]
    for point in known:
        x, value = frame.x(math.log2(point["prompts"])), point["accuracy"]["value"]
        if point["accuracy"]["ci95"]:
            low, high = point["accuracy"]["ci95"]
            body.append(
                Markup('<path class="line s0" d="M{} {}V{}"/>').format(_n(x), _n(frame.y(low)), _n(frame.y(high)))
            )
        body.append(
            Markup('<circle class="dot s0" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                _n(x), _n(frame.y(value)), f"{point['prompts']} prompts, {point['pairs']} pairs: {value:.1%}"
            )
        )
    return _svg(body, label)


def _frame(y_ticks: Sequence[float], x_range: tuple[float, float]) -> Frame:
    left = 16 + 6.6 * max(map(len, tick_labels(y_ticks)))
    return Frame(left, 10, WIDTH - left - 16, HEIGHT - 46, x_range, (y_ticks[0], y_ticks[-1]))


def _axes(frame: Frame, y_ticks: Sequence[float], x_ticks: Sequence[tuple[float, str]], below: str) -> Markup:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    body = []
    for value, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(value)
        body.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_n(frame.left), _n(y), _n(right)))
        body.append(
            Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_n(frame.left - 6), _n(y + 4), text)
        )
    for value, text in x_ticks:
        body.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                _n(frame.x(value)), _n(bottom + 15), text
            )
        )
    body.append(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            _n(frame.left + frame.width / 2), _n(bottom + 31), below
        )
    )
    return Markup("").join(body)


def _svg(body: Sequence[Markup], label: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(body)
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
