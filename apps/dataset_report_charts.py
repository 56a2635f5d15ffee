"""The charts of a dataset's report, as inline SVG: a share beside what was asked for, and histograms of scores.

Shape legend: ``K`` bins.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from apps.charts import Frame, tick_labels, ticks

WIDTH, HEIGHT = 300, 150


def track(share: float, asked: float | None, most: float) -> Markup:
    """A bar for a share, and a line where the specification asks it to end, on a scale that ends at ``most``."""
    scale = 100 / most if most > 0 else 0
    line = Markup("")
    if asked is not None:
        line = Markup('<path class="asked" d="M{0} 0V12"/>').format(_n(asked * scale))
    return Markup(
        '<svg class="track" viewBox="0 0 101 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect x="0" y="2" width="{}" height="8"/>{}</svg>'
    ).format(_n(share * scale), line)


def histogram(
    edges: Sequence[float], counts: Sequence[int], label: str, *, behind: Sequence[int] = (),
    asked: Sequence[float] = (), across: str = "",
) -> Markup:  # fmt: skip
    """Counts ``(K,)`` between edges ``(K + 1,)``, with paler ones ``(K,)`` behind them, and lines at ``asked (K,)``.

    ``label`` says in a sentence what a reader who cannot see the chart should know.
    """
    y_ticks = [tick for tick in ticks(0, max([1, *counts, *behind, *asked]), 3) if tick == int(tick)]
    labels = tick_labels(y_ticks)
    left = 16 + 6.6 * max(map(len, labels))
    frame = Frame(left, 8, WIDTH - left - 12, HEIGHT - 42, (edges[0], edges[-1]), (0.0, y_ticks[-1]))
    bottom = frame.top + frame.height
    body = [_level(frame, value, text) for value, text in zip(y_ticks, labels, strict=True)]
    body += [_columns(frame, edges, behind, "behind"), _columns(frame, edges, counts, "front")]
    for i, value in enumerate(asked):
        body.append(
            Markup('<path class="asked" d="M{} {}H{}"/>').format(
                _n(frame.x(edges[i])), _n(frame.y(value)), _n(frame.x(edges[i + 1]))
            )
        )
    low, high = edges[0], edges[-1]
    for value in [value for value in ticks(low, high, 4) if low <= value <= high] or [low]:
        body.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                _n(frame.x(value)), _n(bottom + 15), f"{value:g}"
            )
        )
    body.append(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            _n(frame.left + frame.width / 2), _n(bottom + 30), across
        )
    )
    return Markup('<svg class="chart histogram" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(body)
    )


def _level(frame: Frame, value: float, text: str) -> Markup:
    y = frame.y(value)
    return Markup(
        '<path class="grid" d="M{} {}H{}"/><text class="tick end" x="{}" y="{}">{}</text>'
    ).format(_n(frame.left), _n(y), _n(frame.left + frame.width), _n(frame.left - 6), _n(y + 4), text)  # fmt: skip


def _columns(frame: Frame, edges: Sequence[float], counts: Sequence[int], style: str) -> Markup:
    columns = []
    for i, count in enumerate(counts):
        if not count:
            continue
        left, right, top = frame.x(edges[i]), frame.x(edges[i + 1]), frame.y(count)
        columns.append(
            Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                style, _n(left + 0.5), _n(top), _n(max(1.0, right - left - 1)), _n(frame.top + frame.height - top),
                f"{edges[i]:g} to {edges[i + 1]:g}: {count:,}",
            )
        )  # fmt: skip
    return Markup("").join(columns)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
