"""Tables and picture of the time to a reward, from its recorded results. The words around them are written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.markdown import filled, grid, paragraph, where
from diffalign.runs import write_text

Results = Mapping[str, Any]
Floats = NDArray[np.float64]
MEASURES = {"everything": "images right in everything", "accuracy": "attributes right"}
"""What is measured of each held-out prompt, and what it is the share of."""
FIRST = "DDPO"
"""The method whose final level the others are held to."""
AXES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "images": lambda point: float(point["images"]),
    "denoiser calls": lambda point: float(point["denoiser calls"]),
    "seconds": lambda point: float(point["seconds"]["processor"]),
}
LABELS = {
    "images": "generated images", "denoiser calls": "denoiser calls, thousands",
    "seconds": "processor seconds of one core",
}  # fmt: skip
COLOURS = {
    "DDPO": "#0072b2", "GRPO": "#56b4e9", "ELBO-PG": "#d55e00", "DiffusionNFT": "#cc79a7", "DRaFT": "#009e73",
    "online DPO": "#999999", "ReST": "#b8a000",
}  # fmt: skip
WIDTH, HEIGHT, FINE = 1500, 460, 2
"""Size of a row in pixels; it is drawn ``FINE`` times as large and made smaller, which smooths it."""
LEFT, TOP, ABOVE, BELOW, GAP = 70, 60, 34, 76, 40


def write(results: Results, page: Path, picture: Path) -> None:
    """Draws the picture, and puts the tables between the marks of the page."""
    draw(results, picture)
    write_text(page, filled(page, tables(results)))


def curve(runs: Mapping[str, Any], measure: str) -> tuple[Floats, dict[str, Floats]]:
    """Mean over the seeds of one method: the measure ``(T, P)`` of each prompt, and each axis ``(T,)``."""
    own = [run["points"] for run in runs.values()]
    values = np.array([[point[measure] for point in points] for points in own]).mean(0)
    return values, {
        name: np.array([[of(point) for point in points] for points in own]).mean(0) for name, of in AXES.items()
    }


def interval(values: Floats, count: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over prompts ``(P,)``, resampling prompts."""
    rows = np.random.default_rng(0).integers(0, len(values), (count, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def tables(results: Results) -> dict[str, str]:
    """The generated parts, by the names of their marks."""
    each = {
        f"{task}-{measure}": _reached(own["runs"], measure)
        for task, own in results["tasks"].items() for measure in MEASURES if own["runs"]
    }  # fmt: skip
    return {**each, "settings": _settings(results), "conditions": _conditions(results)}


def _reached(runs: Results, measure: str) -> str:
    level, most = None, 0.0
    if FIRST in runs:
        values, axes = curve(runs[FIRST], measure)
        level, most = float(values[-1].mean()), float(axes["denoiser calls"][-1])
    body = []
    for name, own in runs.items():
        values, axes = curve(own, measure)
        means = values.mean(1)
        low, high = interval(values[-1])
        at = next((i for i, mean in enumerate(means) if level is not None and mean >= level - 1e-9), None)
        said = ["not reached"] + [""] * len(AXES)
        if at is not None:
            calls = float(axes["denoiser calls"][at])
            said = [*(f"{axes[axis][at]:,.0f}" for axis in AXES), f"1/{most / calls:.1f}" if calls else ""]
        body.append(
            [name, str(len(own)), f"{means[0]:.3f}", f"{means[-1]:.3f} ({low:.3f} to {high:.3f})",
             f"{axes['denoiser calls'][-1]:,.0f}", *said]
        )  # fmt: skip
    header = [
        "",
        "seeds",
        "before",
        "at its end",
        "calls of it",
        f"{FIRST}'s level: images",
        "calls",
        "seconds",
        f"calls of {FIRST}'s",
    ]
    return grid(header, body)


def _settings(results: Results) -> str:
    shown = {
        task: {**own["settings"], **{name: next(iter(runs.values()))["settings"] for name, runs in own["runs"].items()}}
        for task, own in results["tasks"].items()
    }
    text = yaml.safe_dump({"all": dict(results["common"]), **shown}, sort_keys=False, width=110)
    return f"```yaml\n{text.rstrip()}\n```"


def _conditions(results: Results) -> str:
    return paragraph(f"Of the last of these runs, {results['date']}. " + where(results["machine"], results["versions"]))


def draw(results: Results, path: Path) -> None:
    """Writes the picture: a row for each task and measure, a panel for each axis, a curve (mean of the seeds) for each
    method.
    """
    tasks = {task: own["runs"] for task, own in results["tasks"].items() if own["runs"]}
    rows = list(product(tasks, MEASURES))
    size = (WIDTH, TOP + HEIGHT * len(rows))
    image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    for number, (task, measure) in enumerate(rows):
        _row(image, f"{task}: {MEASURES[measure]}", tasks[task], measure, TOP + number * HEIGHT)
    _legend(image, [name for name in COLOURS if any(name in runs for runs in tasks.values())])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(size, Image.Resampling.LANCZOS).save(path, optimize=True)


def _row(image: Image.Image, title: str, runs: Results, measure: str, top: float) -> None:
    curves = {name: curve(own, measure) for name, own in runs.items()}
    means = np.concatenate([values.mean(1) for values, _ in curves.values()])
    low, high = np.floor(means.min() * 20) / 20, np.ceil(means.max() * 20) / 20
    width = (WIDTH - LEFT - GAP * len(AXES)) / len(AXES)
    for number, axis in enumerate(AXES):
        left = LEFT + number * (width + GAP)
        panel = Panel(image, (left, top + ABOVE, left + width, top + HEIGHT - BELOW), (float(low), float(high)))
        panel.frame(axis, max(float(axes[axis][-1]) for _, axes in curves.values()), numbered=number == 0)
        for name, (values, axes) in curves.items():
            panel.curve(axes[axis], values.mean(1), COLOURS[name])
    words(ImageDraw.Draw(image), (LEFT * FINE, (top + 4) * FINE), title, 17)


class Panel:
    """One plot with linear scales."""

    def __init__(self, image: Image.Image, box: tuple[float, float, float, float], ends: tuple[float, float]) -> None:
        self.draw, self.box, self.ends, self.most = ImageDraw.Draw(image), box, ends, 1.0

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        left, top, right, bottom = self.box
        low, high = self.ends
        return (
            (left + (right - left) * x / self.most) * FINE, (bottom - (bottom - top) * (y - low) / (high - low)) * FINE
        )  # fmt: skip

    def frame(self, axis: str, most: float, *, numbered: bool) -> None:
        """Grid, numbers and the name of the axis."""
        self.most = most * 1.03
        low, high = self.ends
        for value in np.arange(low, high + 0.01, 0.05):
            left, right = self.place(0, value), self.place(self.most, value)
            self.draw.line([left, right], fill="#e4e4e4", width=FINE)
            if numbered:
                words(self.draw, (left[0] - 8 * FINE, left[1]), f"{value:.2f}", 14, anchor="rm")
        step = nice(most / 5)
        for tick in np.arange(0, self.most, step):
            x, y = self.place(float(tick), low)
            self.draw.line([(x, y), (x, y + 5 * FINE)], fill="#222222", width=FINE)
            label = f"{tick / 1000:g}" if axis == "denoiser calls" else f"{tick:g}"
            words(self.draw, (x, y + 9 * FINE), label, 14, anchor="ma")
        self.draw.line([self.place(0, high), self.place(0, low), self.place(self.most, low)], "#222222", FINE)
        middle, bottom = self.place(self.most / 2, low)
        words(self.draw, (middle, bottom + 36 * FINE), LABELS[axis], 16, anchor="ma")

    def curve(self, x: Floats, y: Floats, colour: str) -> None:
        """A line with a dot at each measurement."""
        places = [self.place(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        self.draw.line(places, fill=colour, width=2 * FINE, joint="curve")
        for a, b in places:
            size = 3.5 * FINE
            self.draw.ellipse((a - size, b - size, a + size, b + size), fill=colour)


def nice(value: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten."""
    power = 10 ** np.floor(np.log10(value))
    return float(next(k * power for k in (1, 2, 5, 10) if k * power >= value - 1e-9))


def words(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, anchor: str = "la") -> None:
    """Text at a pixel place."""
    draw.text(place, text, fill="#222222", font=ImageFont.load_default(size * FINE), anchor=anchor)


def _legend(image: Image.Image, names: Sequence[str]) -> None:
    draw = ImageDraw.Draw(image)
    words(draw, (14 * FINE, 14 * FINE), "held-out prompts", 16)
    x = 190.0
    for name in names:
        draw.line([(x * FINE, 25 * FINE), ((x + 30) * FINE, 25 * FINE)], fill=COLOURS[name], width=3 * FINE)
        words(draw, ((x + 38) * FINE, 25 * FINE), name, 15, anchor="lm")
        x += 75 + 9 * len(name)
