"""The picture of the clinician reward: hidden utility, checker and CLIP against the distance from the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Runs = Sequence[Mapping[str, Any]]
WIDTH, HEIGHT, FINE = 1200, 380, 2
"""Size of a row in pixels; it is drawn ``FINE`` times as large and made smaller, which smooths it."""
LEFT, GAP, ABOVE, BELOW = 64, 70, 50, 66
PANELS = {"held_out/hidden-utility": "hidden utility", "held_out/brain-mr-checker": "checker", "held_out/clip": "CLIP"}
COLOURS = ("#0072b2", "#d55e00")


def draw(settings: Mapping[str, Runs], path: Path) -> None:
    """A row for each setting: three panels, a line for each run."""
    image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE * len(settings)), "white")
    pen = ImageDraw.Draw(image)
    kappas = list(dict.fromkeys(run["kappa"] for runs in settings.values() for run in runs))
    for row, (setting, runs) in enumerate(settings.items()):
        top = row * HEIGHT
        _words(pen, LEFT, top + 8, f"{setting} (seeds {', '.join(sorted({str(run['seed']) for run in runs}))})", 17)
        for number, (key, title) in enumerate(PANELS.items()):
            width = (WIDTH - LEFT - GAP * len(PANELS)) / len(PANELS)
            left = LEFT + number * (width + GAP)
            _panel(pen, (left, top + ABOVE, left + width, top + HEIGHT - BELOW), runs, key, title, kappas)
    for number, kappa in enumerate(kappas):
        x, y = LEFT + 420 + 320 * number, 18
        pen.line([(x * FINE, y * FINE), ((x + 28) * FINE, y * FINE)], fill=COLOURS[number], width=3 * FINE)
        _words(pen, x + 36, y, kappa, 15, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (WIDTH, HEIGHT * len(settings))
    image.resize(size, Image.Resampling.LANCZOS).quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _panel(
    pen: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    runs: Runs,
    key: str,
    title: str,
    kappas: Sequence[str],
) -> None:
    left, top, right, bottom = box
    values = [point[key] for run in runs for point in run["points"]]
    low, high = math.floor(20 * min(values)) / 20, math.ceil(20 * max(values)) / 20
    most = 1.05 * max(point["distance/step_kl"] for run in runs for point in run["points"])

    def place(distance: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * math.sqrt(max(0.0, distance) / most)
        return x * FINE, (bottom - (bottom - top) * (value - low) / (high - low)) * FINE

    for k in range(round((high - low) * 20) + 1):
        value = low + k / 20
        pen.line([place(0, value), place(most, value)], fill="#e4e4e4", width=FINE)
        _words(pen, left - 8, place(0, value)[1] / FINE, f"{value:.2f}", 13, anchor="rm")
    for share in (0.05, 0.25, 0.6, 1.0):
        tick = share * most / 1.05
        x = place(tick, low)[0]
        pen.line([(x, top * FINE), (x, bottom * FINE)], fill="#f0f0f0", width=FINE)
        _words(pen, x / FINE, bottom + 6, f"{tick:.1g}" if tick < 0.001 else f"{tick:.4f}".rstrip("0"), 13, anchor="ma")
    pen.line([place(0, high), place(0, low), place(most, low)], fill="#222222", width=FINE)
    for run in runs:
        colour = COLOURS[kappas.index(run["kappa"])]
        dots = [place(point["distance/step_kl"], point[key]) for point in run["points"]]
        pen.line(dots, fill=colour, width=2 * FINE, joint="curve")
        for x, y in dots:
            pen.ellipse((x - 4 * FINE, y - 4 * FINE, x + 4 * FINE, y + 4 * FINE), fill=colour)
    _words(pen, left, top - 20, f"{title}, held-out prompts", 14)
    _words(pen, (left + right) / 2, bottom + 28, "distance to the base: KL of a step (root scale)", 13, anchor="ma")


def _words(pen: ImageDraw.ImageDraw, x: float, y: float, words: str, size: int, anchor: str = "la") -> None:
    pen.text((x * FINE, y * FINE), words, fill="#222222", font=ImageFont.load_default(size * FINE), anchor=anchor)
