"""What is known of the arms' strengths, and what one more comparison would tell: for the choice of pairs.

Apart from ``preferences.ranking``, whose package reads and writes files by large libraries: who claims a pair waits for
none of them. Shape legend: ``A`` arms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffalign.errors import ConfigError, InputError

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
PRIOR_SD = 5.0
"""Standard deviation of the weak prior on a strength, as in ``preferences.ranking``: five means odds of 148 to 1."""
MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Posterior:
    """What is known of the strengths, as a normal distribution."""

    mean: Array
    """``(A,)``, in log-odds."""
    covariance: Array
    """``(A, A)``. The level of all strengths is known by the prior alone; differences are what the votes tell."""

    def half_widths(self) -> Array:
        """Of the 95 % intervals of the strengths against the mean of all arms, ``(A,)``."""
        centre = np.eye(len(self.mean)) - 1 / len(self.mean)
        widths: Array = 1.96 * np.sqrt(np.diag(centre @ self.covariance @ centre).clip(0))
        return widths

    def information(self) -> Array:
        """What one more comparison of i and j would tell, ``(A, A)``, in nats: ``log(1 + p (1 - p) v) / 2``.

        ``p`` is the chance that i is preferred, ``v`` the variance of the difference of the two: little is learned
        where the answer is known, and where it would change nothing. It is the gain in the entropy of the normal
        approximation (MacKay 1992, Information-based objective functions for active data selection, section 4).
        """
        variance = np.diag(self.covariance)[:, None] + np.diag(self.covariance)[None, :] - 2 * self.covariance
        gain: Array = np.log1p(_closeness(self.mean) * variance.clip(0)) / 2
        return gain


def posterior(wins: Array, pending: Array | None = None, prior_sd: float = PRIOR_SD) -> Posterior:
    """Bradley-Terry strengths by Laplace's approximation around the mode, from counts ``wins[i, j]`` of i over j.

    A tie is entered as half a win for either. ``pending (A, A)``, symmetric, counts comparisons that were given out
    and not answered: they narrow the covariance by what they are expected to tell, and move nothing. Unlike
    ``davidson`` it serves arms that were never compared: there the prior speaks.
    """
    if not (prior_sd > 0 and math.isfinite(prior_sd)):
        raise ConfigError(f"prior_sd is {prior_sd:g}; it is above 0 and finite")
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or (wins < 0).any():
        raise InputError(f"wins are counts (arms, arms), 0 or more; got {wins.shape}")
    wins = wins * (1 - np.eye(len(wins)))
    met, precision = wins + wins.T, prior_sd**-2

    def climb(at: Array) -> tuple[float, Array]:
        gaps = at[:, None] - at[None, :]
        value = -float((wins * np.logaddexp(0, -gaps)).sum()) - precision * float(at @ at) / 2
        return value, (wins - met / (1 + np.exp(-gaps))).sum(1) - precision * at

    def curvature(at: Array, counts: Array) -> Array:
        weights = counts * _closeness(at)
        found: Array = np.diag(weights.sum(1) + precision) - weights
        return found

    at = np.zeros(len(wins))
    value, gradient = climb(at)
    for _ in range(MOST_STEPS):
        step, size = np.linalg.solve(curvature(at, met), gradient), 1.0
        while (new := climb(at + size * step))[0] < value and size > 1e-10:
            size /= 2
        at = at + size * step
        value, gradient = new
        if np.abs(step).max() < 1e-8:
            break
    seen = met if pending is None else met + pending * (1 - np.eye(len(wins)))
    return Posterior(at, np.asarray(np.linalg.inv(curvature(at, seen)), np.float64))


def _closeness(strengths: Array) -> Array:
    """``p (1 - p)`` of each two."""
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    found: Array = chance * (1 - chance)
    return found
