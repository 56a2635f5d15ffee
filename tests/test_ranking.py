"""Bradley-Terry with ties: a published example, the equations it must solve, refusals, intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.preferences.agreement import Array
from diffalign.preferences.ranking import Comparison, components, davidson, rank

BASEBALL = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ],
    dtype=np.float64,
)
"""American League East 1987 (Agresti, Categorical Data Analysis, table 10.10): wins of row over column."""


def test_a_published_example_without_ties() -> None:
    """Agresti's estimates with Baltimore at 0, as he and Turner and Firth 2012 print them."""
    fit = davidson(BASEBALL, np.zeros_like(BASEBALL), math.inf)
    published = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0]
    assert fit.strengths - fit.strengths[6] == pytest.approx(published, abs=5e-5)
    assert fit.tie_strength == 0


def test_davidsons_model_by_hand() -> None:
    """P(i over j) = p_i / (p_i + p_j + n sqrt(p_i p_j)), P(tie) = n sqrt(p_i p_j) / (the same); Davidson 1970, eq. 2.7.

    With worths 9, 4, 1 and n = 1 the three pairs have the denominators 9 + 4 + 6 = 19, 9 + 1 + 3 = 13, 4 + 1 + 2 = 7.
    Of so many comparisons each the expected wins are the worths themselves and the expected ties 6, 3 and 2. Where
    the counts are what is expected, the likelihood is at its maximum: the fit gives back ln 9, ln 4, ln 1 and 1.
    """
    wins = np.array([[0.0, 9, 9], [4, 0, 4], [1, 1, 0]])
    ties = np.array([[0.0, 6, 3], [6, 0, 2], [3, 2, 0]])
    fit = davidson(wins, ties, math.inf)
    assert fit.strengths - fit.strengths[2] == pytest.approx([math.log(9), math.log(4), 0], abs=1e-8)
    assert fit.tie_strength == pytest.approx(1, abs=1e-8)


def test_two_arms_have_a_closed_form() -> None:
    """Three outcomes, two parameters: the fit meets the counts. 8 : 6 : 2 give p_1 / p_2 = 4 and n = 6 / sqrt(16)."""
    fit = davidson(np.array([[0.0, 8], [2, 0]]), np.array([[0.0, 6], [6, 0]]), math.inf)
    assert fit.strengths == pytest.approx([math.log(2), -math.log(2)], abs=1e-8)
    assert fit.tie_strength == pytest.approx(1.5, abs=1e-8)


def test_known_parameters_come_back_from_drawn_comparisons() -> None:
    """20000 comparisons of each of six pairs. Their standard error is about 1 / sqrt(60000 / 5) = 0.01; four of it."""
    true, tie = np.array([-1.0, -0.2, 0.4, 0.8]), 0.7
    random = np.random.default_rng(0)
    wins, ties = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(4):
        for j in range(i):
            wins[i, j], ties[i, j], wins[j, i] = random.multinomial(20_000, chances(true, tie, i, j))
            ties[j, i] = ties[i, j]
    fit = davidson(wins, ties, math.inf)
    assert fit.strengths == pytest.approx(true, abs=0.04)
    assert fit.tie_strength == pytest.approx(tie, abs=0.02)


def chances(strengths: Array, tie: float, i: int, j: int) -> tuple[float, float, float]:
    """Davidson 1970, eq. 2.7, in worths."""
    one, two = math.exp(strengths[i]), math.exp(strengths[j])
    total = one + two + tie * math.sqrt(one * two)
    return one / total, tie * math.sqrt(one * two) / total, two / total


def counts(seed: int, arms: int = 4, each: int = 30) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    wins, ties = np.zeros((arms, arms)), np.zeros((arms, arms))
    strengths = random.normal(size=arms)
    for i in range(arms):
        for j in range(i):
            won, tied, lost = random.multinomial(each, chances(strengths, 0.7, i, j))
            wins[i, j], wins[j, i], ties[i, j], ties[j, i] = won, lost, tied, tied
    return wins, ties


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_solves_davidsons_equations(seed: int) -> None:
    """At the maximum the expected numbers equal the observed: twice the wins plus ties of each arm; all ties."""
    wins, ties = counts(seed)
    fit = davidson(wins, ties, math.inf)
    asked = wins + wins.T + ties
    expected, tied = np.zeros(4), 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                won, tie, _ = chances(fit.strengths, fit.tie_strength, i, j)
                expected[i] += asked[i, j] * (2 * won + tie)
                tied += asked[i, j] * tie / 2
    assert expected == pytest.approx((2 * wins + ties).sum(1), abs=1e-6)
    assert tied == pytest.approx(ties.sum() / 2, abs=1e-6)


def test_another_optimiser_finds_the_same() -> None:
    """The likelihood and the prior, written out from the formula, under a general optimiser without gradients."""
    wins, ties = counts(5)

    def loss(at: Array) -> float:
        total = (at[:4] ** 2).sum() / (2 * 1.5**2)
        for i in range(4):
            for j in range(i):
                won, tie, lost = chances(at, math.exp(at[4]), i, j)
                total -= wins[i, j] * math.log(won) + ties[i, j] * math.log(tie) + wins[j, i] * math.log(lost)
        return float(total)

    best = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-7}).x
    fit = davidson(wins, ties, prior_sd=1.5)
    assert fit.strengths == pytest.approx(best[:4], abs=1e-4)
    assert math.log(fit.tie_strength) == pytest.approx(best[4], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_properties(seed: int, order: list[int]) -> None:
    """Another order of arms permutes strengths; reversed votes turn their sign; more of the same changes nothing."""
    wins, ties = counts(seed, each=6)
    fit = davidson(wins, ties)
    assert abs(fit.strengths.mean()) < 1e-9
    shuffled = davidson(wins[np.ix_(order, order)], ties[np.ix_(order, order)])
    assert shuffled.strengths == pytest.approx(fit.strengths[order], abs=1e-6)
    assert davidson(wins.T, ties).strengths == pytest.approx(-fit.strengths, abs=1e-6)
    one_better = wins.copy()
    one_better[0, 1] += 1
    changed = davidson(one_better, ties).strengths
    assert changed[0] - changed[1] > fit.strengths[0] - fit.strengths[1]


def test_arms_that_always_win_or_always_tie_stay_finite() -> None:
    wins, ties = np.array([[0.0, 9], [0, 0]]), np.zeros((2, 2))
    fit = davidson(wins, ties)
    assert 1 < fit.strengths[0] < 10
    with pytest.raises(RefusedError, match="arms 1 only won, or only lost"):
        davidson(wins, ties, math.inf)
    all_tied = davidson(ties, np.array([[0.0, 3], [3, 0]]))
    assert all_tied.strengths == pytest.approx([0, 0]) and all_tied.tie_strength == math.inf
    # A tie is a way back: with ties both ways the maximum exists.
    assert np.isfinite(davidson(wins, np.array([[0.0, 1], [1, 0]]), math.inf).strengths).all()


def test_components() -> None:
    table = np.zeros((5, 5))
    table[0, 3] = table[3, 4] = table[2, 1] = 1
    assert components(table) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize(
    ("wins", "ties", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), "counts are"),
        (np.zeros((2, 2)), np.array([[0.0, 1], [2, 0]]), "symmetric"),
        (np.ones((2, 2)), np.zeros((2, 2)), "with itself"),
        (np.array([[0.0, -1], [1, 0]]), np.zeros((2, 2)), "0 or more"),
    ],
)
def test_bad_counts(wins: Array, ties: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        davidson(wins, ties)


# --- the ranking ---


def votes(strengths: dict[str, float], number: int, seed: int, raters: int = 10) -> list[Comparison]:
    random = np.random.default_rng(seed)
    arms = list(strengths)
    worths = np.array(list(strengths.values()))
    rows = []
    for k in range(number):
        i, j = random.choice(len(arms), 2, replace=False)
        outcome = random.choice([1, 0.5, 0], p=chances(worths, 0.5, int(i), int(j)))
        rows.append(Comparison(arms[i], arms[j], outcome, f"r{k % raters}", f"u{k // 2}"))
    return rows


def test_known_strengths_lie_within_their_intervals() -> None:
    """20 studies of 4 arms and 400 votes: of 80 intervals of 95 %, 76 +- 1.9 cover (they are not independent)."""
    true = {"a": -0.9, "b": -0.1, "c": 0.3, "d": 0.7}
    covered = 0
    for seed in range(20):
        found = rank(votes(true, 400, seed), "units", draws=100, seed=seed)
        covered += sum(row.low <= true[row.arm] <= row.high for row in found.standings)
    assert covered >= 68


def test_a_ranking_says_what_it_knows() -> None:
    found = rank(votes({"a": -1, "b": 0, "c": 0, "d": 1}, 1500, seed=1), draws=200)
    assert (found.standings[0].arm, found.standings[3].arm) == ("d", "a")
    assert sum(row.comparisons for row in found.standings) == 3000
    assert found.draws == 200
    first, middle = found.standings[0], found.standings[1]
    assert (first.best_rank, first.worst_rank) == (1, 1) and (middle.best_rank, middle.worst_rank) == (2, 3)
    assert found.tie_strength == pytest.approx(0.5, abs=0.1)
    assert found.win_probability("d", "a") == pytest.approx(1 / (1 + math.exp(-2)), abs=0.05)
    assert found.win_probability("d", "a") + found.win_probability("a", "d") == pytest.approx(1)
    with pytest.raises(InputError, match="there is no arm 'e'"):
        found.win_probability("e", "a")


def test_one_stubborn_rater_widens_the_interval_over_raters_only() -> None:
    """Half of the raters always prefer a, half always b: units agree with each other, raters do not."""
    rows = [Comparison("a", "b", float(r % 2), f"r{r}", f"u{u}") for r in range(6) for u in range(50)]
    width = {how: rank(rows, how, draws=200).standings[0] for how in ("raters", "units")}
    assert width["raters"].high - width["raters"].low > 1
    assert width["units"].high - width["units"].low < 0.01


def test_a_disconnected_graph_has_no_ranking() -> None:
    rows = [Comparison("a", "b", 1, "x"), Comparison("b", "a", 1, "y"), Comparison("c", "d", 0.5, "x")]
    with pytest.raises(RefusedError, match=r"Groups: a, b \| c, d\."):
        rank(rows)


def test_few_raters_who_hold_the_graph_together_give_no_interval() -> None:
    """Only one of three raters compared c: a draw without that one, 8 of 27, is not connected."""
    rows = [Comparison("a", "b", o, r) for r in "xyz" for o in (1, 0, 0.5)] + [Comparison("b", "c", 1, "x")]
    found = rank(rows, draws=200)
    assert 100 < found.draws < 170
    assert all(math.isnan(row.low) and math.isnan(row.high) for row in found.standings)
    assert (found.standings[0].best_rank, found.standings[0].worst_rank) == (1, 3)


def test_bad_comparisons() -> None:
    good = [Comparison("a", "b", 1, "x"), Comparison("a", "b", 0, "y")]
    with pytest.raises(InputError, match="no comparison"):
        rank([])
    with pytest.raises(InputError, match=r"outcome 0\.7"):
        rank([Comparison("a", "b", 0.7)])
    with pytest.raises(InputError, match="compared with itself"):
        rank([Comparison("a", "a", 1)])
    with pytest.raises(ConfigError, match="resample units instead"):
        rank(good[:1])
    with pytest.raises(ConfigError, match="too few"):
        rank(good, draws=5)
    with pytest.raises(ConfigError, match="raters and units"):
        rank(good, "arms")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prior_sd"):
        rank(good, prior_sd=0)
