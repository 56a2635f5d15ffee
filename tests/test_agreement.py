"""Agreement and reliability: published examples, the formulas written out again, properties, known raters."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffalign.errors import ConfigError, InputError
from diffalign.preferences import agreement
from diffalign.preferences.agreement import (
    Array,
    alpha_interval,
    cohen_kappa,
    dawid_skene,
    krippendorff_alpha,
    left_bias,
    pairwise_kappa,
    percent_agreement,
    reliability_data,
    share_of,
    time_scores,
)

N = math.nan
FOUR_CODERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
)
"""Krippendorff 2011, section C."""
THREE_CODERS = np.array(
    [
        [N, N, N, N, N, 3, 4, 1, 2, 1, 1, 3, 3, N, 3],
        [1, N, 2, 1, 3, 3, 4, 3, N, N, N, N, N, N, N],
        [N, N, 2, 1, 3, 4, 4, N, 2, 1, 1, 3, 3, N, 4],
    ]
)
"""The worked example of the encyclopaedia article on the coefficient."""
TABLES = arrays(np.float64, st.tuples(st.integers(2, 4), st.integers(1, 8)), elements=st.sampled_from([1.0, 2, 4, N]))


def test_alpha_of_published_examples() -> None:
    """Krippendorff 2011 prints 0.743 (nominal) and 0.815 (ordinal); the article on three coders has 0.691."""
    assert krippendorff_alpha(FOUR_CODERS) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(FOUR_CODERS, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(THREE_CODERS) == pytest.approx(0.691, abs=5e-4)


def alpha_by_pairs(values: Array, level: str) -> float:
    """Alpha from its definition: mean distance of answers within units over the mean distance of all answers."""
    units = [[x for x in column if not math.isnan(x)] for column in values.T]
    units = [unit for unit in units if len(unit) > 1]
    pool = [x for unit in units for x in unit]

    def distance(a: float, b: float) -> float:
        if level == "nominal":
            return float(a != b)
        low, high = min(a, b), max(a, b)
        between = sum(low <= x <= high for x in pool) - (pool.count(low) + pool.count(high)) / 2
        return 0.0 if a == b else between**2

    expected = sum(distance(a, b) for a, b in permutations(pool, 2))
    if not expected:
        return N
    within = sum(distance(a, b) / (len(unit) - 1) for unit in units for a, b in permutations(unit, 2))
    return 1 - (within / len(pool)) / (expected / (len(pool) * (len(pool) - 1)))


@settings(max_examples=60, deadline=None)
@given(TABLES, st.sampled_from(["nominal", "ordinal"]))
def test_alpha_is_its_definition(values: Array, level: agreement.Level) -> None:
    found = krippendorff_alpha(values, level)
    assert found == pytest.approx(alpha_by_pairs(values, level), nan_ok=True, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(TABLES, st.randoms(use_true_random=False))
def test_who_comes_first_does_not_matter(values: Array, random: object) -> None:
    """Alpha and percent agreement do not change with the order of raters and units, nor nominal ones with names."""
    turned = values[::-1, ::-1]
    for level in ("nominal", "ordinal"):
        assert krippendorff_alpha(values, level) == pytest.approx(krippendorff_alpha(turned, level), nan_ok=True)
    renamed = np.where(values == 4, 0, values)
    assert krippendorff_alpha(values) == pytest.approx(krippendorff_alpha(renamed), nan_ok=True)
    straight, back = (percent_agreement(table, 100).value for table in (values, turned))
    assert straight == pytest.approx(back, nan_ok=True)


def test_alpha_at_the_edges() -> None:
    same = np.array([[1.0, 2, 3], [1, 2, 3]])
    assert krippendorff_alpha(same) == 1
    assert math.isnan(krippendorff_alpha(np.ones((3, 5))))
    assert math.isnan(krippendorff_alpha(np.array([[1, N], [N, 2]])))
    assert math.isnan(krippendorff_alpha(np.empty((0, 0))))
    chance = np.random.default_rng(0).integers(0, 3, (2, 20_000)).astype(float)
    assert krippendorff_alpha(chance) == pytest.approx(0, abs=0.02)
    with pytest.raises(ConfigError, match="there are nominal and ordinal"):
        krippendorff_alpha(same, "interval")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="raters, units"):
        krippendorff_alpha(np.ones(3))
    with pytest.raises(InputError, match="finite"):
        krippendorff_alpha(np.array([[math.inf, 1], [1, 1]]))


def test_alpha_interval_covers_what_generated_the_data() -> None:
    """Two raters copy a fair coin with chance 0.8 each and toss their own otherwise: alpha is 0.8^2 = 0.64.

    200 data sets of 60 units; a 95 % interval covers in 190 +- 3.1 of them, the bootstrap in somewhat fewer.
    """
    random = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        truth = random.integers(0, 2, 60)
        copied = random.random((2, 60)) < 0.8
        values = np.where(copied, truth, random.integers(0, 2, (2, 60))).astype(float)
        found = alpha_interval(values, draws=150, seed=number)
        covered += found.low <= 0.64 <= found.high
    assert 178 <= covered <= 199


def test_alpha_interval_at_the_edges() -> None:
    once = alpha_interval(FOUR_CODERS, seed=3)
    assert once == alpha_interval(FOUR_CODERS, seed=3) != alpha_interval(FOUR_CODERS, seed=4)
    assert once.n == 11  # the twelfth unit has one answer
    assert once.low < once.value <= once.high
    alone = alpha_interval(np.array([[1.0], [2.0]]))
    assert alone.n == 1 and math.isnan(alone.low) and math.isnan(alone.high)
    with pytest.raises(ConfigError, match="too few"):
        alpha_interval(FOUR_CODERS, draws=10)
    # One unit of two differs from the rest, so a quarter of the draws and more have one category only.
    rare = np.array([[1.0, 1, 1, 2], [1, 1, 1, 2]])
    assert math.isnan(alpha_interval(rare).low)


def test_percent_agreement_counts_pairs_of_answers() -> None:
    """Units (1 1 2), (1 2), (3 alone): one of three pairs alike, none of one, none to compare: 1 of 4."""
    values = np.array([[1, 1, 3], [1, N, N], [2, 2, N]])
    found = percent_agreement(values)
    assert found.value == 1 / 4 and found.n == 2
    assert math.isnan(percent_agreement(np.array([[1.0, N]])).value)


# --- two raters ---


def spread(table: list[list[int]]) -> tuple[Array, Array]:
    cells = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    first, second = np.array(cells, dtype=np.float64).T
    return first, second


def test_kappa_of_a_published_example() -> None:
    """Fleiss, Statistical Methods for Rates and Proportions, table 13.1: kappa 0.68, standard error 0.088."""
    found = cohen_kappa(*spread([[75, 1, 4], [5, 4, 1], [0, 0, 10]]))
    assert found.value == pytest.approx((0.89 - 0.66) / (1 - 0.66))
    assert (found.high - found.low) / (2 * 1.959964) == pytest.approx(0.088, abs=5e-4)


def test_kappa_has_the_standard_error_of_the_delta_method() -> None:
    """The gradient of kappa in the cells of the table, by differences, and the multinomial covariance of the cells."""
    table = np.array([[20.0, 5, 2], [3, 30, 6], [1, 4, 9]])
    n = table.sum()
    shares = table / n

    def kappa(p: Array) -> float:
        p = p.reshape(3, 3)
        expected = p.sum(1) @ p.sum(0)
        return float((np.trace(p) - expected) / (1 - expected))

    flat = shares.ravel()
    slope = np.array([(kappa(flat + e) - kappa(flat - e)) / 2e-6 for e in 1e-6 * np.eye(9)])
    error = math.sqrt((slope**2 @ flat - (slope @ flat) ** 2) / n)
    found = cohen_kappa(*spread(table.astype(int).tolist()))
    assert found.value == pytest.approx(kappa(flat))
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)


def test_kappa_at_the_edges() -> None:
    a, b = np.array([1.0, 2, N, 1]), np.array([1.0, N, 2, 1])
    constant = cohen_kappa(a, b)
    assert constant.n == 2 and math.isnan(constant.value)
    full = cohen_kappa(np.array([1.0, 2, 1]), np.array([1.0, 2, 1]))
    assert full.value == 1 and math.isnan(full.low)
    assert cohen_kappa(np.array([N]), np.array([1.0])).n == 0
    with pytest.raises(InputError, match="same units"):
        cohen_kappa(np.ones(2), np.ones(3))


def test_kappa_of_every_two_raters_with_a_common_unit() -> None:
    rows = [("a", "1", 0), ("b", "1", 0), ("a", "2", 1), ("b", "2", 0), ("a", "4", 1), ("b", "4", 1), ("c", "3", 1)]
    found = pairwise_kappa(reliability_data(rows))
    assert [(pair.first, pair.second, pair.kappa.n) for pair in found] == [("a", "b", 3)]
    assert found[0].same.value == pytest.approx(2 / 3)
    assert found[0].kappa.value == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))


def test_rows_become_a_table() -> None:
    made = reliability_data([("b", "y", 2), ("a", "x", 1), ("b", "x", 0)])
    assert made.raters == ("a", "b") and made.units == ("x", "y")
    assert np.array_equal(made.values, [[1, N], [0, 2]], equal_nan=True)
    with pytest.raises(InputError, match="answered twice"):
        reliability_data([("a", "x", 1), ("a", "x", 1)])
    with pytest.raises(InputError, match="leave out"):
        reliability_data([("a", "x", N)])


# --- one rater ---


def test_shares_have_wilson_intervals() -> None:
    """8 of 10 (Newcombe 1998): 0.490 to 0.943."""
    found = share_of(8, 10)
    assert found.value == 0.8
    assert (found.low, found.high) == pytest.approx((0.490, 0.943), abs=5e-4)
    nothing = share_of(0, 0)
    assert math.isnan(nothing.value) and (nothing.low, nothing.high) == (0, 1)
    with pytest.raises(InputError, match="no share"):
        share_of(2, 1)


def test_left_bias_is_an_exact_test() -> None:
    """9 of 10: p = 2 (1 + 10) / 1024; the interval of Clopper and Pearson is 0.555 to 0.9975."""
    found = left_bias(9, 1)
    assert found.p_value == pytest.approx(22 / 1024)
    assert (found.left.low, found.left.high) == pytest.approx((0.5550, 0.9975), abs=5e-5)
    assert left_bias(0, 0).left.n == 0
    with pytest.raises(InputError, match="counts are 0 or more"):
        left_bias(-1, 2)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_left_bias_test_and_interval_agree_and_mirror(left: int, right: int) -> None:
    found, mirrored = left_bias(left, right), left_bias(right, left)
    assert found.p_value == pytest.approx(mirrored.p_value, nan_ok=True)
    assert found.left.low == pytest.approx(1 - mirrored.left.high)
    if left + right:
        outside = not found.left.low <= 0.5 <= found.left.high
        assert outside == (found.p_value < 0.05)


def test_times_far_from_the_usual_stand_out() -> None:
    """Log times -2 .. 2 have the median 0 and the median absolute deviation 1: e^-6 is -6 / 1.4826 away."""
    usual = np.exp([-2.0, -1, -1, 0, 0, 0, 1, 1, 2])
    found = time_scores([*usual, math.exp(-6), math.exp(6), N])
    assert found[9] == pytest.approx(-6 / 1.4826) and found[10] == pytest.approx(6 / 1.4826)
    assert math.isnan(found[11]) and np.abs(found[:9]).max() < 3.5
    assert time_scores(60 * usual) == pytest.approx(time_scores(usual))  # the unit does not matter


def test_times_at_the_edges() -> None:
    assert np.isnan(time_scores([1.0] * 7)).all()
    assert not time_scores([2.0] * 9).any()
    mostly = time_scores([1.0] * 9 + [math.e])  # mean absolute deviation 0.1
    assert mostly[9] == pytest.approx(1 / 0.12533) and not mostly[:9].any()
    with pytest.raises(InputError, match="above 0"):
        time_scores([0.0] * 9)


# --- reliability ---


def simulated(accuracies: list[float], units: int, seed: int, overlap: int = 3) -> tuple[Array, Array]:
    """Judgements of three categories, wrong ones spread evenly; every unit is judged by ``overlap`` raters."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, units, p=[0.45, 0.45, 0.1]).astype(float)
    values = np.full((len(accuracies), units), N)
    for unit in range(units):
        for rater in random.choice(len(accuracies), overlap, replace=False):
            right = random.random() < accuracies[rater]
            values[rater, unit] = truth[unit] if right else (truth[unit] + random.integers(1, 3)) % 3
    return values, truth


def test_dawid_skene_recovers_known_raters_within_their_intervals() -> None:
    """Six raters of known accuracy, 5 of 6 intervals or more cover; the order of bad, middling and good is found."""
    accuracies = [0.95, 0.9, 0.9, 0.8, 0.75, 0.4]
    values, truth = simulated(accuracies, 600, seed=0, overlap=4)
    found = dawid_skene(values, draws=100)
    covered = [e.low - 0.01 <= a <= e.high + 0.01 for e, a in zip(found.accuracy, accuracies, strict=True)]
    assert sum(covered) >= 5
    assert [e.value for e in found.accuracy] == pytest.approx(accuracies, abs=0.08)
    assert sum(e.n for e in found.accuracy) == 4 * 600
    right = (found.categories[found.posterior.argmax(1)] == truth).mean()
    votes = np.stack([(values == c).sum(0) for c in range(3)])
    assert right >= (votes.argmax(0) == truth).mean()
    assert found.confusion.sum(2) == pytest.approx(1) and found.prevalence.sum() == pytest.approx(1)


def log_posterior(values: Array, confusion: Array, prevalence: Array) -> float:
    """Written out again: the likelihood of the answers, the categories summed out, and the Dirichlet priors."""
    total = sum(math.log(p) / 3 for p in prevalence)
    for table in confusion:
        total += sum((0.5 if i == j else 0.25) * math.log(table[i, j]) for i in range(3) for j in range(3))
    for unit in values.T:
        total += math.log(
            sum(
                prevalence[c] * math.prod(confusion[r, c, int(x)] for r, x in enumerate(unit) if not math.isnan(x))
                for c in range(3)
            )
        )
    return total


def test_dawid_skene_is_at_a_maximum() -> None:
    """No small move of a table or of the prevalence does better than where EM stopped."""
    values, _ = simulated([0.9, 0.8, 0.7, 0.8], 120, seed=2)
    found = dawid_skene(values, draws=100, tolerance=1e-10)
    best = log_posterior(values, found.confusion, found.prevalence)
    random = np.random.default_rng(0)
    for _ in range(30):
        confusion = found.confusion * np.exp(0.03 * random.normal(size=found.confusion.shape))
        prevalence = found.prevalence * np.exp(0.03 * random.normal(size=3))
        moved = log_posterior(values, confusion / confusion.sum(2, keepdims=True), prevalence / prevalence.sum())
        assert moved < best


def test_gold_says_who_is_right_where_most_are_wrong() -> None:
    """Two raters who share an error outvote the one who is right; known answers turn that round."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60).astype(float)
    wrong = np.where(random.random(60) < 0.8, 1 - truth, truth)
    values = np.stack([truth, wrong, wrong])
    fooled = dawid_skene(values, draws=100)
    told = dawid_skene(values, truth=np.where(np.arange(60) < 20, truth, N), draws=100)
    assert fooled.accuracy[0].value < 0.5 < fooled.accuracy[1].value
    # Short of 1, because the model takes the two to err independently, and so believes them too much.
    assert told.accuracy[0].value > 0.8 and told.accuracy[1].value < 0.4


def test_reliability_that_nothing_determines_is_not_given() -> None:
    values = np.array([[0.0, 1, 0, 1, N], [0, 1, 0, N, N], [0, 1, 1, N, N], [N, N, N, 1, 0]])
    found = dawid_skene(values, draws=100)
    assert math.isnan(found.accuracy[3].value) and found.accuracy[3].n == 0
    assert found.accuracy[0].n == 3
    assert np.isnan(found.posterior[3:]).all() and not np.isnan(found.posterior[:3]).any()
    with pytest.raises(InputError, match="add gold items"):
        dawid_skene(values[:2])
    with pytest.raises(InputError, match="all are alike"):
        dawid_skene(np.ones((3, 4)))
    with pytest.raises(InputError, match="one category per unit"):
        dawid_skene(values, truth=np.ones(2))


def test_every_pair_is_formed_once() -> None:
    rows = [(rater, unit, 1.0 + (rater == unit)) for rater in "abcd" for unit in "abcd"]
    assert [(p.first, p.second) for p in pairwise_kappa(reliability_data(rows))] == list(combinations("abcd", 2))
