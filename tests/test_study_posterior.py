"""The posterior of the arms' strengths: by hand, against a general optimiser, and what a comparison would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from diffalign.errors import ConfigError, InputError
from diffalign.study.posterior import Array, posterior
from tests.test_ranking import BASEBALL


def test_the_posterior_of_two_arms_by_hand() -> None:
    """6 wins to 2, prior precision 1/4: at the mode 6 - 8 p = s / 4 for strengths s, -s and p = 1 / (1 + exp(-2 s)).

    The curvature is [[w + 1/4, -w], [-w, w + 1/4]] with w = 8 p (1 - p), so the difference has variance
    2 / (1/4 + 2 w), and a strength against the mean of the two half of the difference.
    """
    found = posterior(np.array([[0.0, 6.0], [2.0, 0.0]]), prior_sd=2)
    s = found.mean[0]
    p = 1 / (1 + math.exp(-2 * s))
    assert found.mean[1] == pytest.approx(-s) and 6 - 8 * p == pytest.approx(s / 4)
    variance = 2 / (0.25 + 2 * 8 * p * (1 - p))
    assert found.half_widths() == pytest.approx([1.96 * math.sqrt(variance) / 2] * 2)
    assert found.information()[0, 1] == pytest.approx(math.log(1 + p * (1 - p) * variance) / 2)


def test_the_posterior_is_the_mode_and_its_curvature() -> None:
    """Against a general optimiser, and the curvature by differences of the gradient of the written-out posterior."""
    wins = BASEBALL[:4, :4]

    def loss(s: Array) -> float:
        odds = sum(wins[i, j] * math.log(1 + math.exp(s[j] - s[i])) for i in range(4) for j in range(4) if i != j)
        return float(odds + (s @ s) / (2 * 25))

    found = posterior(wins)
    best = minimize(loss, np.zeros(4), tol=1e-12)
    assert found.mean == pytest.approx(best.x, abs=1e-5)
    step, curvature = 1e-3, np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            a, b = step * np.eye(4)[i], step * np.eye(4)[j]
            at = found.mean
            corners = loss(at + a + b) - loss(at + a - b) - loss(at - a + b) + loss(at - a - b)
            curvature[i, j] = corners / (4 * step**2)
    assert found.covariance == pytest.approx(np.linalg.inv(curvature), rel=1e-3, abs=1e-3)


def test_information_is_the_entropy_that_one_more_comparison_takes() -> None:
    """Half the logarithm of how much the determinant of the precision grows by p (1 - p) x x', for each two arms."""
    found = posterior(BASEBALL)
    precision = np.linalg.inv(found.covariance)
    for i, j in ((0, 1), (0, 6), (5, 6)):
        x = np.eye(7)[i] - np.eye(7)[j]
        p = 1 / (1 + math.exp(found.mean[j] - found.mean[i]))
        grown = np.linalg.slogdet(precision + p * (1 - p) * np.outer(x, x))[1] - np.linalg.slogdet(precision)[1]
        assert found.information()[i, j] == pytest.approx(grown / 2)
    assert np.diag(found.information()) == pytest.approx(np.zeros(7))


def test_arms_that_never_met_are_worth_comparing_first() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 20
    told = posterior(wins).information()
    assert min(told[0, 2], told[1, 3]) > 5 * max(told[0, 1], told[2, 3])


def test_pending_comparisons_narrow_and_do_not_move() -> None:
    wins = np.array([[0.0, 6.0, 0.0], [2.0, 0.0, 3.0], [0.0, 3.0, 0.0]])
    pending = np.zeros((3, 3))
    pending[0, 1] = pending[1, 0] = 50
    before, after = posterior(wins), posterior(wins, pending)
    assert np.array_equal(before.mean, after.mean)
    assert after.information()[0, 1] < before.information()[0, 1] / 3
    assert posterior(wins, np.zeros((3, 3))).covariance == pytest.approx(before.covariance)


def test_a_posterior_of_nothing_is_the_prior() -> None:
    found = posterior(np.zeros((3, 3)), prior_sd=2)
    assert found.mean == pytest.approx(np.zeros(3)) and found.covariance == pytest.approx(4 * np.eye(3))


def test_an_arm_that_always_wins_stays_finite() -> None:
    found = posterior(np.array([[0.0, 1000.0], [0.0, 0.0]]))
    assert 5 < found.mean[0] - found.mean[1] < 20 and np.isfinite(found.covariance).all()


def test_bad_counts_for_a_posterior() -> None:
    for wins in (np.zeros(3), np.zeros((2, 3)), -np.ones((2, 2))):
        with pytest.raises(InputError, match="wins are counts"):
            posterior(wins)
    for prior in (0, -1, math.inf, math.nan):
        with pytest.raises(ConfigError, match="above 0 and finite"):
            posterior(np.zeros((2, 2)), prior_sd=prior)
