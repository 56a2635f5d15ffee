"""The arithmetic of the frontier: best-of-n, what is reached within a budget of KL, and intervals over prompts.

Shape legend: ``P`` held-out prompts, ``M`` samples of each that best-of-n picks from, ``R`` resamples of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Results = Mapping[str, Any]
BEST_OF = (2, 3, 4, 6, 8, 12, 16, 24, 32)
RESAMPLES = 2000
BY_GOLD, BY_FITTED = "best of n by gold", "best of n by the fitted reward"


@dataclass(frozen=True)
class Point:
    """A model, or a way to pick, on the plane of KL and gold reward; every value float64 ``(P,)``, one a prompt."""

    kl: Floats
    gold: Floats
    fitted: Floats
    run: str
    """The curve it belongs to."""
    label: str
    """What it is on its curve: after which epoch, or of how many."""
    tokens: float = math.nan


def analytic_kl(n: int) -> float:
    """KL in nats of the best of n to what it is picked from: ``log n - (n - 1) / n``; where samples can be alike, the
    most that it can be (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of(n: int, by: Floats, value: Floats) -> Floats:
    """Expected value of the one of ``n`` samples that ``by`` ranks highest, ``(P,)``, without bias.

    ``by`` and ``value`` are ``(P, M)``. Of all subsets of n of the M, the sample of rank i (from 1, upwards) is the
    best in ``C(i - 1, n - 1)``; equals share their ranks' mean, which is to break ties at random.
    """
    count = by.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"best of {n} needs as many samples; there are {count}")
    weights = np.array([math.comb(i, n - 1) for i in range(count)], dtype=np.float64) / math.comb(count, n)
    found = np.empty(len(by))
    for row, (keys, values) in enumerate(zip(by, value, strict=True)):
        order = np.argsort(keys, kind="stable")
        _, group = np.unique(keys[order], return_inverse=True)
        means = np.bincount(group, values[order]) / np.bincount(group)
        found[row] = weights @ means[group]
    return found


def points(results: Results) -> dict[str, list[Point]]:
    """Every point of every method, the base at a KL of 0 first in each."""
    gold, fitted = (np.array(results["base"][name]) for name in ("gold", "fitted"))
    nothing = np.zeros(len(gold))
    start = gold.mean(1), fitted.mean(1)
    found: dict[str, list[Point]] = {}
    for run in results["runs"]:
        own = found.setdefault(run["method"], [])
        own.append(Point(nothing, *start, run["name"], "base"))
        for point in run["points"]:
            kl, reward, judged = (np.array(point[name]) for name in ("kl", "gold", "fitted"))
            tokens = float(np.mean(point["tokens"]))
            own.append(Point(kl, reward, judged, run["name"], f"epoch {point['epoch']}", tokens))
    for name, by in ((BY_GOLD, gold), (BY_FITTED, fitted)):
        found[name] = [Point(nothing, *start, name, "base")]
        for n in BEST_OF:
            picked = best_of(n, by, gold), best_of(n, by, fitted)
            found[name].append(Point(np.full(len(gold), analytic_kl(n)), *picked, name, str(n)))
    return found


def resampled(prompts: int) -> NDArray[np.int64]:
    """Prompt numbers ``(R, P)``: the same for all, so that differences are paired."""
    return np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))


def reached(own: Sequence[Point], budget: float, rows: NDArray[np.int64]) -> Floats:
    """The highest mean gold reward among the points whose mean KL is within the budget, ``(R,)``.

    It is chosen anew in each resample, so the interval holds the luck of choosing.
    """
    kl = np.stack([point.kl[rows].mean(1) for point in own])
    gold = np.stack([point.gold[rows].mean(1) for point in own])
    best: Floats = np.where(kl <= budget, gold, -np.inf).max(0)
    return best


def interval(values: Floats) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
