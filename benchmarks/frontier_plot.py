"""The picture of the frontier: gold reward against KL to the base, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.frontier_points import BY_FITTED, BY_GOLD, Point, interval, resampled

WIDTH, HEIGHT, FINE = 1100, 720, 3
"""Size in pixels; it is drawn ``FINE`` times as large and made smaller, which smooths it."""
LEFT, TOP, RIGHT, BOTTOM = 80, 50, 40, 70
COLOURS = {
    "DPO": "#0072b2", "PPO on the fitted reward": "#d55e00", "PPO on gold": "#009e73", "GRPO on gold": "#cc79a7",
    BY_GOLD: "#222222", BY_FITTED: "#999999",
}  # fmt: skip
FARTHEST = 8.0
"""KL at which the picture ends; what lies beyond is drawn at its edge, with its KL beside it."""
TICKS = (0.1, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Canvas:
    """A plot area with a root scale to the right and a linear one upwards."""

    def __init__(self, most: float, low: float, high: float) -> None:
        self.most, self.low, self.high = math.sqrt(most), low, high
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def place(self, kl: float, gold: float) -> tuple[float, float]:
        """Where a point is drawn."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, math.sqrt(max(0.0, kl)) / self.most)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (gold - self.low) / (self.high - self.low)
        return x * FINE, y * FINE

    def line(self, ends: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """A line through pixel places."""
        self.draw.line(list(ends), fill=colour, width=max(1, round(width * FINE)), joint="curve")

    def dot(self, place: tuple[float, float], colour: str, radius: float, *, filled: bool) -> None:
        """A round mark."""
        x, y = place
        box = (x - radius * FINE, y - radius * FINE, x + radius * FINE, y + radius * FINE)
        self.draw.ellipse(box, fill=colour if filled else "white", outline=colour, width=round(1.5 * FINE))

    def text(
        self, place: tuple[float, float], words: str, size: int, colour: str = "#222222", anchor: str = "la"
    ) -> None:
        """Words at a pixel place."""
        font = ImageFont.load_default(size * FINE)
        self.draw.text(place, words, fill=colour, font=font, anchor=anchor, stroke_width=2 * FINE, stroke_fill="white")


def draw(known: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Writes the picture: a curve a run, its points with 95 % intervals over prompts."""
    every = [point for own in known.values() for point in own]
    rows = resampled(len(every[0].kl))
    ends = [interval(point.gold[rows].mean(1)) for point in every]
    most = min(FARTHEST, 1.06 * max(float(point.kl.mean()) for point in every))
    low = math.floor(20 * min(end[0] for end in ends)) / 20
    canvas = Canvas(most, low, math.ceil(20 * max(end[1] for end in ends)) / 20)
    _axes(canvas)
    for name, own in known.items():
        _curves(canvas, own, rows, COLOURS[name], filled="best of n" not in name)
    _legend(canvas, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, optimize=True)


def _axes(canvas: Canvas) -> None:
    left, bottom = canvas.place(0, canvas.low)
    right, top = canvas.place(canvas.most**2, canvas.high)
    step = 0.05
    for k in range(round((canvas.high - canvas.low) / step) + 1):
        value = canvas.low + k * step
        _, y = canvas.place(0, value)
        canvas.line([(left, y), (right, y)], "#e4e4e4")
        canvas.text((left - 8 * FINE, y), f"{value:.2f}", 14, anchor="rm")
    for tick in (0.0, *TICKS):
        if tick <= canvas.most**2:
            x, _ = canvas.place(tick, canvas.low)
            canvas.line([(x, bottom), (x, top)], "#f0f0f0")
            canvas.text((x, bottom + 8 * FINE), f"{tick:g}", 14, anchor="ma")
    canvas.line([(left, top), (left, bottom), (right, bottom)], "#222222", 1.2)
    middle = (left + right) / 2
    canvas.text((middle, bottom + 34 * FINE), "KL to the base, nats per text (root scale)", 16, anchor="ma")
    canvas.text((left - 60 * FINE, top - 34 * FINE), "gold reward on held-out prompts", 16)


def _curves(canvas: Canvas, own: Sequence[Point], rows: np.ndarray, colour: str, *, filled: bool) -> None:
    for run in dict.fromkeys(point.run for point in own):
        curve = [point for point in own if point.run == run]
        places = [canvas.place(float(point.kl.mean()), float(point.gold.mean())) for point in curve]
        canvas.line(places, colour, 2.0)
        for point, place in zip(curve[1:], places[1:], strict=True):
            kl = float(point.kl.mean())
            low, high = interval(point.gold[rows].mean(1))
            canvas.line([canvas.place(kl, low), canvas.place(kl, high)], colour, 1.0)
            canvas.dot(place, colour, 4.5, filled=filled)
            if kl > canvas.most**2:
                canvas.text((place[0] - 10 * FINE, place[1]), f"{kl:.0f} nats, off the scale", 13, colour, anchor="rm")
        x, y = places[-1]
        tag = f"n = {curve[-1].label}" if not filled else run.rpartition("-")[2]
        canvas.text((x + 7 * FINE, y - 11 * FINE), tag, 13, colour, anchor="lm")


def _legend(canvas: Canvas, known: Mapping[str, Sequence[Point]]) -> None:
    right, top = canvas.place(canvas.most**2, canvas.high)
    x, y = right - 280 * FINE, top + 26 * FINE
    canvas.draw.rectangle((x - 14 * FINE, top + FINE, right - FINE, y + 26 * FINE * len(known)), fill="white")
    for number, name in enumerate(known):
        middle = y + 26 * FINE * number
        canvas.line([(x, middle), (x + 30 * FINE, middle)], COLOURS[name], 2.0)
        canvas.dot((x + 15 * FINE, middle), COLOURS[name], 4.5, filled="best of n" not in name)
        canvas.text((x + 40 * FINE, middle), name, 15, anchor="lm")
