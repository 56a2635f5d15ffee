"""The numbers of ``evaluation.json`` as a report shows them: rows of a table, words, and fixed formats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from apps.charts import intervals, minus, shares, ticks
from diffalign.types import Modality

Direction = Literal["better", "worse", "unclear"]
Interval = tuple[float, float | None, float | None]
"""Mean, and the lower and upper end of its 95 % interval; None where there were too few prompts for one."""
TOO_FEW = "too few prompts for an interval"

MOST_DECIMALS = 8
NARROW = 0.05
"""Fractions whose intervals span less than this get an axis of their own: on 0 to 1 they would be one dot."""


@dataclass(frozen=True)
class Row:
    """One measure before and after."""

    name: str
    trained_on: bool
    depth: int
    """0 for a measure, 1 and more for its parts."""
    n: int
    before: Interval | None
    """None where no sample could be judged."""
    after: Interval | None
    change: Interval | None
    direction: Direction
    plot: Markup
    places: int
    unchanged: bool
    """Whether every sample scored before as it did after: no interval of the difference says that."""

    @property
    def few(self) -> bool:
        """Whether it was measured on too few prompts for an interval."""
        return self.change is not None and self.change[1] is None

    def shown(self, value: Interval, *, signed: bool = False) -> tuple[str, str]:
        """Mean and interval in words."""
        mean, low, high = (None if v is None else number(v, self.places, signed=signed) for v in value)
        return str(mean), "–" if low is None or high is None else f"{low} to {high}"


@dataclass(frozen=True)
class Win:
    """The win rate, with its bar."""

    value: str
    interval: str
    n: int
    by: str
    won: str
    tied: str
    lost: str
    bar: Markup


def number(value: float, places: int, *, signed: bool = False) -> str:
    """A number with fixed decimals and a real minus sign."""
    text = minus(f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}")
    return text if any(digit in text for digit in "123456789") else text.lstrip("+−")


def percent(value: float) -> str:
    """A share as a whole percentage."""
    return f"{minus(f'{100 * value:.0f}')}\u00a0%"


def finite(value: object) -> float | None:
    """The value if it is a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def table(evaluation: Mapping[str, Any]) -> list[Row]:
    """The measures in the order of the evaluation; ``NAME/PART`` is a part of ``NAME``."""
    measures: Mapping[str, Any] = evaluation.get("rewards") or {}
    return [_row(name, entry, measures) for name, entry in measures.items()]


def _row(name: str, entry: Mapping[str, Any], measures: Collection[str]) -> Row:
    before, after, change = (_interval(entry.get(key)) for key in ("before", "after", "difference"))
    wanted = entry.get("higher_is_better", True)
    sign = -1 if wanted is False else 1
    known = [v for interval in (before, after) if interval for v in interval if v is not None]
    parent, _, part = name.rpartition("/")
    return Row(
        name=part if parent in measures else name,
        trained_on=bool(entry.get("trained_on")),
        depth=sum(name.startswith(f"{other}/") for other in measures),
        n=int((entry.get("after") or {}).get("n") or 0),
        before=before,
        after=after,
        change=change,
        direction="unclear" if wanted is None else _direction(change, sign, decimals(known)),
        plot=_plot(name, before, after),
        places=decimals(known),
        unchanged=unchanged(entry.get("difference") or {}),
    )


def unchanged(difference: Mapping[str, Any]) -> bool:
    """Whether no pair scored differently; of an older evaluation, as far as its interval tells."""
    if difference.get("mean") is None:
        return False
    return difference["changed"] == 0 if "changed" in difference else difference.get("ci95") == [0, 0]


def _interval(found: Mapping[str, Any] | None) -> Interval | None:
    low, high = map(finite, (found or {}).get("ci95") or (None, None))
    mean = finite((found or {}).get("mean"))
    if mean is None:
        return None
    return (mean, None, None) if low is None or high is None else (mean, low, high)


def spanned(value: Interval) -> tuple[float, float, float]:
    """Mean and ends to draw; without an interval all three are the mean."""
    mean, low, high = value
    return mean, mean if low is None else low, mean if high is None else high


def _direction(change: Interval | None, sign: int, places: int) -> Direction:
    if change is None or change[1] is None or change[2] is None or change[1] <= 0 <= change[2]:
        return "unclear"
    if round(change[0], places) == 0:  # a red arrow beside 0.000 says nothing
        return "unclear"
    return "better" if sign * change[0] > 0 else "worse"


def decimals(values: Sequence[float]) -> int:
    """How many decimals numbers of this size are shown with: three, fewer of large ones, more of those below 0.1."""
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 0.1:
        return min(2 - math.floor(math.log10(largest)), MOST_DECIMALS)
    return 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0


def _plot(name: str, before: Interval | None, after: Interval | None) -> Markup:
    if before is None or after is None or before[1] is None or after[1] is None:
        return Markup("")  # an axis fitted to two means alone would make any difference look as large as any other
    first, second = spanned(before), spanned(after)
    ends = [*first, *second]
    axis = (0.0, 1.0)
    if min(ends) < 0 or max(ends) > 1 or max(ends) - min(ends) < NARROW:
        found = ticks(min(ends), max(ends), 4)
        axis = (found[0], found[-1])
    words = f"{name}: {before[0]:.3g} before, {after[0]:.3g} after, axis from {axis[0]:g} to {axis[1]:g}"
    return intervals(first, second, axis, words)


def win(evaluation: Mapping[str, Any]) -> Win | None:
    """The win rate of an evaluation; None where there was nothing to compare."""
    found = evaluation.get("win_rate") or {}
    interval = _interval({"mean": found.get("value"), "ci95": found.get("ci95")})
    if interval is None:
        return None
    value, low, high = interval
    tied = finite(found.get("ties")) or 0.0
    won = max(0.0, value - tied / 2)
    lost = max(0.0, 1 - won - tied)
    words = f"{percent(won)} of pairs better after training, {percent(tied)} the same, {percent(lost)} worse"
    return Win(
        value=percent(value),
        interval=TOO_FEW if low is None or high is None else f"{percent(low)} to {percent(high)}",
        n=int(found.get("n") or 0),
        by=str(found.get("by") or "the optimised reward"),
        won=percent(won),
        tied=percent(tied),
        lost=percent(lost),
        bar=shares((("won", won), ("tied", tied), ("lost", lost)), words),
    )


def diversity(evaluation: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Share that was retained, diversity before, and after; None where it was not measured."""
    found = evaluation.get("diversity") or {}
    before, after = finite(found.get("before")), finite(found.get("after"))
    if before is None or after is None or before <= 0:
        return None
    return percent(after / before), number(before, 3), number(after, 3)


def perceived(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Diversity by other measures: name, share that was retained, before, and after."""
    rows = []
    for name, found in (evaluation.get("diversity") or {}).items():
        if isinstance(found, Mapping) and (own := diversity({"diversity": found})) is not None:
            rows.append((name.upper(), *own))
    return rows


KL_IN_WORDS = {
    "image": {
        "step_kl": ("KL divergence per step", "nats per latent element, along the aligned model's samples"),
        "sample_kl": ("KL divergence per sample", "nats per latent element: the sum over the steps of a sample"),
    },
    "text": {
        "step_kl": ("KL divergence per token", "nats, along the aligned model's texts"),
        "sample_kl": ("KL divergence per text", "nats: the sum over the tokens of a text"),
    },
}


def distances(evaluation: Mapping[str, Any], modality: Modality) -> list[tuple[str, str, str]]:
    """Each distance from the base model: value, name, and what it is."""
    known = {
        **KL_IN_WORDS[modality],
        "rewritten": ("Rewritten", "1 - cosine of the phrases of the two texts of a pair: 0 where none has changed"),
        "pixel_rms": ("Pixel change", "root mean square between the two images of a pair, pixels from 0 to 1"),
    }
    rows = []
    for key, value in (evaluation.get("distance") or {}).items():
        if (number_ := finite(value)) is not None:
            name, words = known.get(key, (key, ""))
            rows.append((minus(f"{number_:.3g}"), name, words))
    return rows


def outcome(row: Row, won: Win | None) -> str:
    """What came out, in one or two sentences."""
    if row.before is None or row.after is None or row.change is None:
        return f"{row.name} could not be measured."
    (before, _), (after, _), (change, interval) = (
        row.shown(row.before),
        row.shown(row.after),
        row.shown(row.change, signed=True),
    )
    if row.unchanged:
        moved = f"stayed at {after}: no sample scored differently"
    elif row.change[1] is None:
        moved = f"went from {before} to {after}: a difference of {change} ({TOO_FEW})"
    elif row.direction == "unclear":
        moved = (
            f"went from {before} to {after}: a difference of {change} that cannot be told from none"
            f" (95\u00a0% interval {interval})"
        )
    else:
        verb = "rose" if row.change[0] > 0 else "fell"
        moved = f"{verb} from {before} to {after}: a difference of {change} (95\u00a0% interval {interval})"
    text = f"On {row.n} samples of held-out prompts, {row.name} {moved}."
    if won:
        text += f" The aligned model won {won.value} of the pairs ({won.interval}; a tie is half a win)."
    return text
