"""The tables of the frontier's page, from its recorded results. The words around them are written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import frontier_plot
from benchmarks.frontier_points import BY_FITTED, BY_GOLD, Point, interval, points, reached, resampled
from benchmarks.markdown import filled, grid, paragraph, where
from diffalign.runs import write_text

Results = Mapping[str, Any]
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
VERSUS = (
    ("DPO", "PPO on the fitted reward"),
    ("DPO", BY_FITTED),
    ("PPO on the fitted reward", BY_FITTED),
    ("PPO on gold", BY_GOLD),
    ("PPO on gold", "GRPO on gold"),
    ("PPO on gold", "DPO"),
)
"""Differences that the page shows, the first less the second."""


def write(results: Results, page: Path, picture: Path) -> None:
    """Draws the picture, and puts the tables between the marks of the page."""
    frontier_plot.draw(points(results), picture)
    write_text(page, filled(page, tables(results)))


def tables(results: Results) -> dict[str, str]:
    """The generated parts, by the names of their marks."""
    known = points(results)
    return {
        "reached": at_budgets(known),
        "versus": differences(known),
        "runs": runs(results, known),
        "best of n": best_of_n(known),
        "conditions": conditions(results),
    }


def at_budgets(known: Mapping[str, Sequence[Point]]) -> str:
    """What each method reaches within each budget."""
    rows = resampled(len(known[BY_GOLD][0].kl))
    all_of_them = np.arange(rows.shape[1])[None]

    def said(own: Sequence[Point], budget: float) -> str:
        low, high = interval(reached(own, budget, rows))
        return f"{reached(own, budget, all_of_them)[0]:.3f} ({low:.3f} to {high:.3f})"

    body = [(name, *(said(own, budget) for budget in BUDGETS)) for name, own in known.items()]
    return grid(("gold within a KL of", *(f"{budget:g}" for budget in BUDGETS)), body)


def differences(known: Mapping[str, Sequence[Point]]) -> str:
    """Paired differences of methods at each budget; in bold where the interval leaves out 0."""
    rows = resampled(len(known[BY_GOLD][0].kl))
    all_of_them = np.arange(rows.shape[1])[None]

    def said(one: Sequence[Point], other: Sequence[Point], budget: float) -> str:
        low, high = interval(reached(one, budget, rows) - reached(other, budget, rows))
        value = (reached(one, budget, all_of_them) - reached(other, budget, all_of_them))[0]
        text = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
        return f"**{text}**" if low > 0 or high < 0 else text

    body = [
        (f"{one} less {other}", *(said(known[one], known[other], budget) for budget in BUDGETS))
        for one, other in VERSUS
        if one in known and other in known
    ]
    return grid(("difference within a KL of", *(f"{budget:g}" for budget in BUDGETS)), body)


def runs(results: Results, known: Mapping[str, Sequence[Point]]) -> str:
    """Each run: its best point by gold, and its last."""
    body = []
    for run in results["runs"]:
        own = [point for point in known[run["method"]] if point.run == run["name"]]
        best, last = max(own, key=lambda point: float(point.gold.mean())), own[-1]
        body.append(
            (
                f"{run['method']}, {run['knob']:g}", best.label, *_means(best), *_means(last), f"{last.tokens:.1f}",
                f"{run['seconds']['processor']:.0f}",
            )
        )  # fmt: skip
    header = ("run", "best after", "KL", "gold", "fitted", "last KL", "gold", "fitted", "tokens", "processor s")
    return grid(header, body)


def best_of_n(known: Mapping[str, Sequence[Point]]) -> str:
    """Best-of-n by either reward."""
    body = []
    for gold, fitted in zip(known[BY_GOLD], known[BY_FITTED], strict=True):
        n = "1" if gold.label == "base" else gold.label
        values = (gold.gold, fitted.gold, fitted.fitted)
        body.append((n, f"{gold.kl.mean():.2f}", *(f"{value.mean():.3f}" for value in values)))
    return grid(("n", "KL at most", "gold, by gold", "gold, by the fitted reward", "fitted, by it"), body)


def conditions(results: Results) -> str:
    """What it ran on."""
    proxy, seconds = results["proxy"], results["seconds"]
    return paragraph(
        f"{results['date']}. {where(results['machine'], results['versions'])} {seconds['processor'] / 60:.0f} minutes"
        f" of processor time in all, in {seconds['wall'] / 60:.0f} minutes. Of"
        f" {results['judgements']['checked']} pairs that it has not seen, the fitted reward orders"
        f" {proxy['accuracy']:.0%} as they were judged; gold itself, whose judges are noisy, {proxy['gold']:.0%}."
    )


def _means(point: Point) -> tuple[str, str, str]:
    return f"{point.kl.mean():.2f}", f"{point.gold.mean():.3f}", f"{point.fitted.mean():.3f}"
