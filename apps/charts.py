"""Small charts as inline SVG. Colours and fonts come from the page's style sheet, so they follow its dark mode.

Every function returns markup in which all text is escaped. Sizes are in user units of the viewBox; about one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

STYLES = 8
"""Line styles ``s0`` to ``s7`` that the style sheet defines (a colour and a dash pattern each)."""
MOST_POINTS = 400
"""A longer line is drawn as the means of so many buckets."""
MOST_DOTS = 60


@dataclass(frozen=True)
class Line:
    """One line of a chart; a point that is not finite is a gap."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A point with its interval, beside the lines."""

    name: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """The plot area of a chart and its scales."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x_range
        return self.left + self.width * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        low, high = self.y_range
        return self.top + self.height * (1 - (value - low) / (high - low))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from just below ``low`` to just above ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers with as many decimals as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    largest = max(abs(value) for value in values)
    if largest and (largest < 1e-3 or largest >= 1e6):
        power = math.floor(math.log10(largest))
        places = max(0, power - math.floor(math.log10(step) + 1e-9))
        return [
            f"{minus(f'{v / 10**power:.{places}f}')}e{minus(str(power))}" if abs(v) > step / 2 else "0" for v in values
        ]
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [minus(f"{value:,.{places}f}") for value in values]


def brief(value: float, among: Sequence[float] = ()) -> str:
    """A number with as many decimals as it takes to tell it from its neighbours."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{minus(digits)}e{minus(str(int(power)))}"
    span = max(among, default=0.0) - min(among, default=0.0)
    places = 1 - math.floor(math.log10(span)) if span > 0 else 3
    return minus(f"{value:,.{min(max(places, 0 if value == round(value) else 2), 8)}f}")


def minus(text: str) -> str:
    """The text with a real minus sign; "-0.00" loses it."""
    if text.startswith("-"):
        return text[1:] if not any(digit in text for digit in "123456789") else "−" + text[1:]
    return text


def line_chart(
    lines: Sequence[Line], label: str, *, marks: Sequence[Mark] = (), width: int = 300, height: int = 180,
    across: str = "epoch",
) -> Markup:  # fmt: skip
    """Lines over epochs, or over what ``across`` says. ``label`` says in a sentence what a reader who cannot see the
    chart should know.
    """
    lines = [Line(line.name, _thinned(line.points)) for line in lines]
    known = [point for line in lines for point in line.points if _finite(point)]
    xs = [x for x, _ in known] + [mark.x for mark in marks]
    ys = [y for _, y in known] + [end for mark in marks for end in (mark.low, mark.high)]
    if not xs:
        return Markup("")
    y_ticks = ticks(min(ys), max(ys), 4)
    labels = tick_labels(y_ticks)
    left = 16 + 6.6 * max(map(len, labels))
    frame = Frame(left, 10, width - left - 12, height - 42, (min(xs), max(xs)), (y_ticks[0], y_ticks[-1]))
    body = [_axes(frame, y_ticks, labels, across)]
    body += [_polyline(frame, line, i % STYLES, across) for i, line in enumerate(lines)]
    body += [_mark(frame, mark) for mark in marks]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(body)
    )


def legend(names: Sequence[str], marks: str = "") -> Markup:
    """The names beside samples of their lines, in the order of the lines of a chart; ``marks`` names its marks."""
    items = [
        Markup(
            '<li><svg viewBox="0 0 28 8" aria-hidden="true"><path class="line s{}" d="M1 4H27"/></svg>{}</li>'
        ).format(i % STYLES, name)
        for i, name in enumerate(names)
    ]
    if marks:
        dot = Markup('<g class="mark"><circle cx="14" cy="4" r="4"/></g>')
        items.append(Markup('<li><svg viewBox="0 0 28 8" aria-hidden="true">{}</svg>{}</li>').format(dot, marks))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def intervals(
    before: tuple[float, float, float], after: tuple[float, float, float], axis: tuple[float, float], label: str
) -> Markup:
    """Two dots with their intervals, each ``(mean, low, high)``, above each other on one labelled axis."""
    frame = Frame(8, 4, 184, 28, axis, (0.0, 1.0))
    ends = tick_labels(axis)
    body = [
        Markup('<path class="axis" d="M{} 33H{}M{} 30v6M{} 30v6"/>').format(
            _n(frame.left), _n(frame.left + frame.width), _n(frame.left), _n(frame.left + frame.width)
        ),
        Markup('<text x="{}" y="47" class="tick">{}</text>').format(_n(frame.left - 4), ends[0]),
        Markup('<text x="{}" y="47" class="tick end">{}</text>').format(_n(frame.left + frame.width + 4), ends[1]),
    ]
    for (mean, low, high), y, style in ((before, 10, "before"), (after, 23, "after")):
        body.append(
            Markup('<g class="{}"><path d="M{} {}H{}"/><circle cx="{}" cy="{}" r="4"/></g>').format(
                style, _n(frame.x(low)), y, _n(frame.x(high)), _n(frame.x(mean)), y
            )
        )
    return Markup('<svg class="intervals" viewBox="0 0 200 50" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(body)
    )


def shares(parts: Iterable[tuple[str, float]], label: str) -> Markup:
    """One bar of parts, each a CSS class and a share; the middle is marked."""
    body, x = [], 0.0
    for style, share in parts:
        body.append(
            Markup('<rect class="{}" x="{}" y="4" width="{}" height="16"/>').format(style, _n(x), _n(share * 300))
        )
        x += share * 300
    body.append(Markup('<path class="middle" d="M150 0V24"/>'))
    return Markup(
        '<svg class="shares" viewBox="0 0 300 24" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(label, Markup("").join(body))


def _axes(frame: Frame, y_ticks: Sequence[float], labels: Sequence[str], across: str) -> Markup:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    body = []
    for value, label in zip(y_ticks, labels, strict=True):
        y = frame.y(value)
        body.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_n(frame.left), _n(y), _n(right)))
        body.append(
            Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_n(frame.left - 6), _n(y + 4), label)
        )
    low, high = frame.x_range
    within = [value for value in ticks(low, high, 5) if low <= value <= high]
    for value in [value for value in within if across != "epoch" or value == round(value)] or [low]:
        body.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                _n(frame.x(value)), _n(bottom + 15), f"{value:g}"
            )
        )
    body.append(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            _n(frame.left + frame.width / 2), _n(bottom + 29), across
        )
    )
    return Markup("").join(body)


def _polyline(frame: Frame, line: Line, style: int, across: str) -> Markup:
    path, pen = [], "M"
    for point in line.points:
        if not _finite(point):
            pen = "M"
            continue
        path.append(f"{pen}{_n(frame.x(point[0]))} {_n(frame.y(point[1]))}")
        pen = "L"
    drawn = Markup('<path class="line s{}" d="{}"/>').format(style, "".join(path))
    if len(line.points) > MOST_DOTS:
        return drawn
    dots = (
        Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.2"><title>{}, {} {}: {}</title></circle>').format(
            style, _n(frame.x(x)), _n(frame.y(y)), line.name, across, f"{x:.4g}", brief(y, frame.y_range)
        )
        for x, y in line.points
        if _finite((x, y))
    )
    return drawn + Markup("").join(dots)


def _mark(frame: Frame, mark: Mark) -> Markup:
    return Markup(
        '<g class="mark"><title>{name}: {value}</title>'
        '<path d="M{x} {low}V{high}"/><circle cx="{x}" cy="{y}" r="4"/></g>'
    ).format(
        x=_n(frame.x(mark.x)), low=_n(frame.y(mark.low)), high=_n(frame.y(mark.high)), y=_n(frame.y(mark.y)),
        name=mark.name, value=brief(mark.y, frame.y_range),
    )  # fmt: skip


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Means of equal buckets of the finite points, where there are more points than a chart can show."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    buckets = ([p for p in points[i : i + size] if _finite(p)] for i in range(0, len(points), size))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets if b]


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
