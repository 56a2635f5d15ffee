"""A number with its interval and count, and the difference of two.

Shape legend: ``R`` resamples, ``N`` cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.intervals import wilson
from diffalign.seeds import derive

Floats = NDArray[np.float64]
RESAMPLES = 500
EMPTY: Floats = np.empty(0)


@dataclass(frozen=True)
class Estimate:
    """A measured number. Its interval is of 95 %."""

    value: float
    ends: tuple[float, float] | None
    """None where there are too few cases for an interval."""
    n: int
    """Cases that it is about."""
    replicates: Floats = field(default_factory=lambda: EMPTY, repr=False, compare=False)
    """``(R,)``: the number in each resample; two estimates from the same cases have paired ones."""

    def to_json(self) -> dict[str, Any]:
        """``value``, ``ci95`` and ``n``; a value that could not be had is None."""
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "ci95": list(self.ends) if self.ends else None,
            "n": self.n,
        }


def weights(n: int, seed: int, *names: object, resamples: int = RESAMPLES) -> Floats:
    """``(R, N)``: how often each of ``n`` cases is drawn in each resample, drawing ``n`` with replacement."""
    chance = np.random.default_rng(derive(seed, "resample", *names, n))
    return chance.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def spread(value: float, replicates: Floats, n: int, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """An estimate whose interval is as wide as the middle 95 % of its resamples, set around the value.

    The resamples are centred first: of a number that repeated cases move (Vendi, say) all resamples lie to one side.
    """
    low, high = value + np.quantile(replicates - replicates.mean(), [0.025, 0.975])
    return Estimate(value, (max(bounds[0], float(low)), min(bounds[1], float(high))), n, replicates)


def share(hits: NDArray[np.bool_], drawn: Floats | None = None) -> Estimate:
    """The share of cases that are so, with Wilson's interval (1927). ``drawn (R, N)`` gives it resamples too."""
    n = len(hits)
    replicates = EMPTY if drawn is None or not n else drawn @ hits / n
    return Estimate(float(hits.mean()) if n else math.nan, wilson(int(hits.sum()), n), n, replicates)


def difference(after: Estimate, before: Estimate) -> dict[str, Any]:
    """After minus before: ``value`` and ``ci95``.

    By the resamples where both have them (paired where they share cases). Where no resample differs, as with shares of
    exactly 0 or 1, and without resamples, by the two intervals (Newcombe 1998; Zou & Donner 2008), as if the cases were
    others.
    """
    gap = after.value - before.value
    if not math.isfinite(gap):
        return {"value": None, "ci95": None}
    pairs = after.replicates.shape == before.replicates.shape and len(after.replicates) > 0
    if pairs and max(np.ptp(after.replicates), np.ptp(before.replicates)) > 0:
        apart = after.replicates - before.replicates
        low, high = gap + np.quantile(apart - apart.mean(), [0.025, 0.975])
        return {"value": gap, "ci95": [float(low), float(high)]}
    if after.ends is None or before.ends is None:
        return {"value": gap, "ci95": None}
    (one, two), (three, four) = after.ends, before.ends
    below = math.hypot(after.value - one, four - before.value)
    above = math.hypot(two - after.value, before.value - three)
    return {"value": gap, "ci95": [gap - below, gap + above]}


def to_json(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Of several, by name."""
    return {name: estimate.to_json() for name, estimate in found.items()}
