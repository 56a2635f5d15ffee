"""Fidelity and tabular likeness, against closed forms, slow loops and numbers that SDMetrics gave."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from diffalign.errors import InputError
from diffalign.synthesis import estimates, fidelity, tabular
from diffalign.synthesis.estimates import Estimate


def normal(seed: int, n: int, dimensions: int = 3, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (n, dimensions))


def slow_mmd(first: np.ndarray, second: np.ndarray, kernel) -> float:
    """Gretton et al. 2012, equation 3, one pair at a time."""
    n, m = len(first), len(second)
    own = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = sum(kernel(a, b) for a in first for b in second) / (n * m)
    return own + other - 2 * cross


def test_kid_and_cmmd_are_those_of_a_slow_loop() -> None:
    first, second = normal(0, 12), normal(1, 9, mean=0.7)
    found = fidelity.fidelity(first, second, k=3)
    assert found["kid"].value == pytest.approx(slow_mmd(first, second, lambda a, b: (a @ b / 3 + 1) ** 3))
    rows = [row / np.linalg.norm(row) for row in first], [row / np.linalg.norm(row) for row in second]
    cmmd = slow_mmd(*rows, lambda a, b: 1000 * math.exp(-((a - b) ** 2).sum() / 200))
    assert found["cmmd"].value == pytest.approx(cmmd)
    assert "cmmd" not in fidelity.fidelity(first, second, k=3, clip=False)


def test_kid_of_known_gaussians_is_the_closed_form() -> None:
    """One dimension: E (x y + 1)^3 = m3 m3' + 3 m2 m2' + 3 m1 m1' + 1, by the moments of the two distributions.

    Of N(0, 1) the moments are 0, 1, 0; of N(1, 1) they are 1, 2, 4. KID: (0 - 4)^2 + 3 (1 - 2)^2 + 3 (0 - 1)^2 = 22.
    """
    found = fidelity.mmd(
        *fidelity._kernels(fidelity.polynomial, first := normal(0, 1500, 1), second := normal(1, 1500, 1, 1.0)),
        estimates.weights(len(first), 0, "a", resamples=200), estimates.weights(len(second), 0, "b", resamples=200),
    )  # fmt: skip
    assert found.ends is not None and found.ends[0] < 22 < found.ends[1]
    assert found.value == pytest.approx(22, rel=0.25)


@pytest.mark.parametrize("gap", [0.0, 0.5])
def test_intervals_of_kid_hold_the_truth(gap: float) -> None:
    """60 draws of 60 + 60 cases, uniform with variance 1; the truth is by their moments g, 1 + g^2, 3 g + g^3.

    With no gap (a degenerate U-statistic) they hold it more often than promised; binomial(60, .95) >= 51 has p > .9999.
    """
    truth = (3 * gap + gap**3) ** 2 + 3 * gap**4 + 3 * gap**2
    held = 0
    for seed in range(60):
        chance = np.random.default_rng(seed)
        first, second = (chance.uniform(-math.sqrt(3), math.sqrt(3), (60, 1)) + shift for shift in (0, gap))
        drawn = [estimates.weights(60, seed, side, resamples=200) for side in "ab"]
        ends = fidelity.mmd(*fidelity._kernels(fidelity.polynomial, first, second), *drawn).ends
        held += ends is not None and ends[0] <= truth <= ends[1]
    assert held >= 51


def test_prdc_is_that_of_a_slow_loop() -> None:
    made, real, k = normal(0, 15), normal(1, 11, mean=0.5), 3

    def reach(rows: np.ndarray, i: int) -> float:
        return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    balls, own = [reach(real, i) for i in range(11)], [reach(made, j) for j in range(15)]
    inside = [[math.dist(real[i], made[j]) < balls[i] for j in range(15)] for i in range(11)]
    found = fidelity.neighbourhoods(made, real, k)
    assert found["precision"].value == pytest.approx(sum(any(row[j] for row in inside) for j in range(15)) / 15)
    assert found["density"].value == pytest.approx(sum(map(sum, inside)) / (k * 15))
    assert found["coverage"].value == pytest.approx(sum(map(any, inside)) / 11)
    held = sum(any(math.dist(real[i], made[j]) < own[j] for j in range(15)) for i in range(11))
    assert found["recall"].value == pytest.approx(held / 11)


def test_exact_copies_have_perfect_fidelity_which_is_why_privacy_is_printed_beside_it() -> None:
    real = normal(0, 60, 4)
    found = fidelity.fidelity(real.copy(), real)
    assert [found[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert found["density"].value == pytest.approx(1)
    assert (
        found["kid"].value < 0 and found["cmmd"].value < 0
    )  # copies are "better" than a fresh sample, whose mean is 0
    assert found["kid"].value > -0.5
    assert any("privacy" in note for note in fidelity.notes(60, 60))


def test_the_order_of_cases_changes_nothing() -> None:
    made, real = normal(0, 40), normal(1, 50)
    order = np.random.default_rng(2).permutation(40)
    first, second = fidelity.fidelity(made, real), fidelity.fidelity(made[order], real[::-1])
    for name in ("kid", "cmmd", "precision", "recall", "density", "coverage", "vendi"):
        assert second[name].value == pytest.approx(first[name].value), name


def test_vendi_counts_what_is_different() -> None:
    """Four directions at right angles, ten of each, are worth 4; with shares 1/2, 1/4, 1/4 exp of their entropy."""
    assert fidelity.vendi(np.repeat(np.eye(4), 10, axis=0)).value == pytest.approx(4)
    assert fidelity.vendi(np.ones((30, 5))).value == pytest.approx(1)
    shares = [0.5, 0.25, 0.25]
    rows = np.repeat(np.eye(3), [20, 10, 10], axis=0)
    assert fidelity.vendi(rows).value == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))


def test_coverage_of_the_same_distribution_is_as_expected() -> None:
    """Lemma 2 of Naeem et al., by counting draws: no dimension enters it."""
    found = [fidelity.neighbourhoods(normal(s, 30, 2), normal(900 + s, 50, 2), 3)["coverage"].value for s in range(80)]
    assert np.mean(found) == pytest.approx(fidelity.expected_coverage(30, 50, 3), abs=0.03)


def test_differences_of_two_datasets_are_paired_by_the_real_cases() -> None:
    real = normal(0, 80)
    far, near = fidelity.fidelity(normal(1, 80, mean=1.0), real), fidelity.fidelity(normal(2, 80), real)
    gap = estimates.difference(near["kid"], far["kid"])
    assert gap["value"] == pytest.approx(near["kid"].value - far["kid"].value)
    assert gap["ci95"][1] < 0  # nearer, and surely so
    same = estimates.difference(far["kid"], far["kid"])
    assert same["value"] == 0 and same["ci95"] == [0, 0]


def test_a_difference_without_resamples_is_newcombe_s() -> None:
    """Newcombe 1998, table II, example (a): 56/70 and 48/80 by method 10 give 0.2 (0.0524 to 0.3339)."""
    first, second = (estimates.share(np.arange(n) < right) for right, n in ((56, 70), (48, 80)))
    found = estimates.difference(first, second)
    assert found["value"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.0524, 0.3339], abs=2e-4)


def test_groups_are_measured_where_both_sides_have_enough() -> None:
    made, real = normal(0, 50), normal(1, 60)
    own = [{"plane": "axial" if i < 30 else "coronal"} for i in range(50)]
    other = [{"plane": "axial" if i < 25 else "coronal" if i < 35 else "other"} for i in range(60)]
    found, few = fidelity.by_group(made, real, own, other)
    assert list(found) == ["plane: axial"] and few == ["plane: coronal"]
    assert found["plane: axial"]["kid"].value == pytest.approx(fidelity.fidelity(made[:30], real[:25])["kid"].value)


@pytest.mark.parametrize(
    ("made", "real", "said"),
    [
        (normal(0, 20, 3), normal(0, 20, 4), "two encoders"),
        (normal(0, 4), normal(1, 20), "too few"),
        (np.full((20, 3), np.nan), normal(1, 20), "finite"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(made: np.ndarray, real: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fidelity.fidelity(made, real)


def test_few_cases_are_warned_of() -> None:
    assert any("2048" in note for note in fidelity.notes(100, 5000))
    assert not any("2048" in note for note in fidelity.notes(3000, 5000))


def test_json_has_no_numbers_that_are_none() -> None:
    assert Estimate(math.nan, None, 0).to_json() == {"value": None, "ci95": None, "n": 0}
    json.dumps(estimates.to_json(fidelity.fidelity(normal(0, 20), normal(1, 20))), allow_nan=False)


# -- tables -----------------------------------------------------------------------------------------------------------

KINDS = {"side": "category", "size": "category", "age": "integer", "dose": "number", "told": "text"}
SDMETRICS = {
    "side": 0.3333333407406, "size": 0.9888888888889, "age": 0.9888888888889, "dose": 0.7,
    "side / size": 0.3333333333333, "age / dose": 0.9371324592344,
}  # fmt: skip
"""What SDMetrics 0.32.0 says of these two tables: TVComplement, KSComplement, Contingency- and CorrelationSimilarity.
Its total variation stops at single precision."""


def table(n: int, odd: int) -> list[dict[str, object]]:
    return [
        {
            "side": ["left", "right", "both"][(i * i + odd * i) % 3],
            "size": ["small", "large"][(i // 2 + odd * (i % 5 == 0)) % 2],
            "age": 20 + (i * 37 + odd * 11) % 61,
            "dose": ((i * i * 7) % 23) / 4 + odd * (i % 3) + ((i * 37) % 61) / 20,
        }
        for i in range(n)
    ]


def test_tables_are_compared_as_sdmetrics_does() -> None:
    found = tabular.fidelity(table(60, 1), table(90, 0), KINDS)
    for name, value in SDMETRICS.items():
        assert (found["columns"] | found["pairs"])[name] == pytest.approx(value, abs=1e-7), name
    assert found["left_out"] == ["told"]
    assert found["column_shapes"] == pytest.approx(
        np.mean([SDMETRICS[name] for name in ("side", "size", "age", "dose")])
    )


def test_a_table_is_like_itself() -> None:
    found = tabular.fidelity(table(50, 0), table(50, 0), KINDS)
    assert found["column_shapes"] == 1 and found["pair_trends"] == pytest.approx(1)
    ages = [20 + (i * 37) % 61 for i in range(50)]
    assert found["marginals"]["age"]["real"]["mean"] == pytest.approx(sum(ages) / 50)


def test_empty_cells_and_missing_columns_do_not_stop_a_comparison() -> None:
    made = [{"side": None, "age": None}, {"side": "left", "age": 30}]
    real = [{"side": "left", "age": 30}, {"side": "left", "age": 31}]
    found = tabular.fidelity(made, real, {"side": "category", "age": "integer", "size": "category"})
    assert found["columns"] == {"side": 0.5, "age": 0.5} and found["left_out"] == ["size"]
    assert found["marginals"]["age"]["synthetic"]["empty"] == 0.5


def test_gower_distance_by_hand() -> None:
    """Ages span 40 in training: |30 - 20| / 40 = 1/4 and another side: (1/4 + 1) / 2; the other row: (3/4 + 0) / 2."""
    training = [{"side": "left", "age": 20}, {"side": "right", "age": 60}]
    found = tabular.gower(
        [{"side": "right", "age": 30}, {"side": "left", "age": 20}], training, {"side": "category", "age": "integer"}
    )
    assert found.tolist() == [0.375, 0.0]
