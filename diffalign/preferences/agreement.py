"""Do raters agree, and can each of them be relied on? Pure functions over what they answered.

Shape legend: ``R`` raters, ``U`` units (what is judged: a pair, an image), ``C`` categories.

Judgements are a float64 ``(R, U)`` with NaN where a rater did not judge a unit; categories are numbers, and their order
matters to the ordinal level alone. ``reliability_data`` makes it from rows. A number that cannot be had from the data
(nobody judged the same unit; all answers are alike) is NaN: undefined, which is neither 0 nor 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from diffalign.errors import ConfigError, InputError
from diffalign.intervals import wilson

Array: TypeAlias = npt.NDArray[np.float64]
Level = Literal["nominal", "ordinal"]

MOST_UNDEFINED = 0.05
"""With more than this share of bootstrap draws undefined there is no interval."""
FEWEST_TIMES = 8
"""With fewer known times nobody can say which of them is unusual."""
FEWEST_OPINIONS = 3
"""Judgements of a unit that Dawid-Skene needs: of two that differ, nothing says which is right."""
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; NaN where the data do not determine it."""

    value: float
    low: float
    high: float
    n: int
    """What it rests on: units, or answers, as the function says."""


@dataclass(frozen=True, slots=True)
class Judgements:
    """Who answered what."""

    raters: tuple[str, ...]
    units: tuple[str, ...]
    values: Array
    """``(R, U)``, NaN where there is no answer."""


def reliability_data(rows: Iterable[tuple[str, str, float]]) -> Judgements:
    """Judgements of rows (rater, unit, value), in the order of names. One rater answers once for a unit.

    Raises InputError for a second answer of a rater for a unit: repeats belong into ``share_of``.
    """
    cells: dict[tuple[str, str], float] = {}
    for rater, unit, value in rows:
        if (rater, unit) in cells:
            raise InputError(f"rater {rater} answered twice for {unit}; agreement takes one answer, leave repeats out")
        if not math.isfinite(value):
            raise InputError(f"rater {rater} answered {value:g} for {unit}; leave out what was not judged")
        cells[rater, unit] = float(value)
    raters = tuple(sorted({rater for rater, _ in cells}))
    units = tuple(sorted({unit for _, unit in cells}))
    row, column = ({name: i for i, name in enumerate(names)} for names in (raters, units))
    values = np.full((len(raters), len(units)), np.nan)
    for (rater, unit), value in cells.items():
        values[row[rater], column[unit]] = value
    return Judgements(raters, units, values)


# --- agreement of all ---


def krippendorff_alpha(values: Array, level: Level = "nominal") -> float:
    """Krippendorff's alpha of ``(R, U)``: 1 - observed / expected disagreement; any number of raters, gaps allowed.

    1 is full agreement, 0 what chance gives, below 0 systematic disagreement. NaN where no unit has two answers, or
    all answers are alike: without variation there is nothing to be reliable about. Low agreement is usual where taste
    or fine findings are judged; report it with ``alpha_interval``.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, sections C and D. The ordinal distance of
    two categories is the square of how many answers lie from one to the other, each end counted half.
    """
    counts = _counts(values)
    return _alpha(counts, np.ones(len(counts)), level)


def alpha_interval(values: Array, level: Level = "nominal", draws: int = 1000, seed: int = 0) -> Estimate:
    """``krippendorff_alpha`` with a percentile bootstrap over units; ``n`` is the number of units with two answers.

    Whole units are drawn, so that the dependence within a unit is kept (Zapf et al. 2016, who find that this holds its
    level where Krippendorff's own algorithm, which draws pairs, does not). Draws in which alpha is undefined are left
    out; where they are more than a twentieth, there is no interval.
    """
    counts = _counts(values)
    low, high = _bootstrap(lambda weights: _alpha(counts, weights, level), len(counts), draws, seed)
    return Estimate(_alpha(counts, np.ones(len(counts)), level), low, high, len(counts))


def percent_agreement(values: Array, draws: int = 1000, seed: int = 0) -> Estimate:
    """Share of pairs of answers to the same unit that are alike, of ``(R, U)``, with a bootstrap over units.

    Every pair of raters counts the same, so a unit with many answers counts more. What chance gives is in it: read it
    beside alpha.
    """
    counts = _counts(values)
    together = counts.sum(1) * (counts.sum(1) - 1)
    alike = (counts * (counts - 1)).sum(1)

    def share(weights: Array) -> float:
        asked = float(weights @ together)
        return float(weights @ alike) / asked if asked else math.nan

    low, high = _bootstrap(share, len(counts), draws, seed)
    return Estimate(share(np.ones(len(counts))), low, high, len(counts))


def _counts(values: Array) -> Array:
    """How often each category was given to each unit that has two answers or more, ``(U', C)``, categories sorted."""
    if values.ndim != 2:
        raise InputError(f"judgements are (raters, units); got {values.ndim} dimensions")
    known = ~np.isnan(values)
    if np.isinf(values).any():
        raise InputError("judgements are finite numbers, or NaN where there is none")
    categories, codes = np.unique(values[known], return_inverse=True)
    counts = np.zeros((values.shape[1], len(categories)))
    np.add.at(counts, (np.nonzero(known)[1], codes), 1)
    several: Array = counts[counts.sum(1) >= 2]
    return several


def _alpha(counts: Array, weights: Array, level: Level) -> float:
    """Alpha of units ``(U, C)`` that occur ``weights (U,)`` times."""
    if level not in ("nominal", "ordinal"):
        raise ConfigError(f"there is no level {level!r}; there are nominal and ordinal")
    per_unit = counts.sum(1)
    share = weights / (per_unit - 1)
    coincidences = counts.T @ (counts * share[:, None]) - np.diag(share @ counts)
    marginals = weights @ counts
    total = marginals.sum()
    if level == "nominal":
        distance = 1 - np.eye(len(marginals))
    else:
        # Answers up to the middle of each category: their difference is the sum from one to the other, ends halved.
        middle = np.cumsum(marginals) - marginals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    expected = marginals @ distance @ marginals
    if total < 2 or expected == 0:
        return math.nan
    return float(1 - (total - 1) * (coincidences * distance).sum() / expected)


def _bootstrap(statistic: Callable[[Array], float], units: int, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of a statistic of weights ``(U,)``: how often each unit is drawn."""
    if draws < 100:
        raise ConfigError(f"{draws} draws are too few for an interval; take 100 or more")
    if units < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    drawn = (random.multinomial(units, np.full(units, 1 / units)).astype(np.float64) for _ in range(draws))
    found = np.array([statistic(weights) for weights in drawn])
    if np.isnan(found).mean() > MOST_UNDEFINED:
        return math.nan, math.nan
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


# --- agreement of two ---


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """How two raters agree on the units that both judged."""

    first: str
    second: str
    kappa: Estimate
    same: Estimate
    """Share of units with the same answer, with a Wilson interval."""


def cohen_kappa(first: Array, second: Array) -> Estimate:
    """Cohen's kappa of two raters over the units that both judged, ``(U,)`` each; ``n`` is their number.

    The interval is the value +- 1.96 standard errors, cut to [-1, 1]: for large samples, take it as rough below 50
    units. Where all answers agree, the formula gives no width: then the interval is NaN. Kappa is NaN where both
    raters gave one and the same category throughout.

    Source: Cohen 1960; the standard error is that of Fleiss, Cohen and Everitt 1969, eq. 13, which holds for a kappa
    other than 0.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"two raters judge the same units, (U,) each; got {first.shape} and {second.shape}")
    both = ~(np.isnan(first) | np.isnan(second))
    n = int(both.sum())
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    categories, codes = np.unique(np.concatenate([first[both], second[both]]), return_inverse=True)
    table = np.zeros((len(categories), len(categories)))
    np.add.at(table, (codes[:n], codes[n:]), 1 / n)
    rows, columns, diagonal = table.sum(1), table.sum(0), np.diag(table)
    observed, expected = float(diagonal.sum()), float(rows @ columns)
    if 1 - expected < 1e-12:
        return Estimate(math.nan, math.nan, math.nan, n)
    kappa = (observed - expected) / (1 - expected)
    # rows[i] goes with a rater's answer i, and columns[i] with the other's: a cell (i, j) meets columns[i] + rows[j].
    mixed = columns[:, None] + rows[None, :]
    on = diagonal @ (1 - np.diag(mixed) * (1 - kappa)) ** 2
    off = (1 - kappa) ** 2 * ((table * mixed**2).sum() - diagonal @ np.diag(mixed) ** 2)
    variance = (on + off - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    half = _Z * math.sqrt(max(0.0, float(variance)))
    if half < 1e-9:
        return Estimate(kappa, math.nan, math.nan, n)
    return Estimate(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), n)


def pairwise_kappa(judgements: Judgements) -> list[PairAgreement]:
    """Every two raters who judged a unit in common, by name."""
    found = []
    for i, j in combinations(range(len(judgements.raters)), 2):
        first, second = judgements.values[i], judgements.values[j]
        kappa = cohen_kappa(first, second)
        if kappa.n:
            same = share_of(int((first == second).sum()), kappa.n)
            found.append(PairAgreement(judgements.raters[i], judgements.raters[j], kappa, same))
    return found


# --- one rater ---


def share_of(right: int, asked: int) -> Estimate:
    """A share with its Wilson interval: gold items answered as expected, repeats answered alike, A/A pairs tied.

    A repeat is compared after the sides are undone. NaN in an interval of [0, 1] where nothing was asked.
    """
    if not 0 <= right <= asked:
        raise InputError(f"{right} of {asked} is no share")
    low, high = wilson(right, asked)
    return Estimate(right / asked if asked else math.nan, low, high, asked)


@dataclass(frozen=True, slots=True)
class LeftBias:
    """How often the left side was chosen, whatever stood there."""

    left: Estimate
    """Share of decided votes, ``n`` of them, with the exact binomial interval (Clopper and Pearson 1934)."""
    p_value: float
    """Exact two-sided test of a share of one half; it is below 0.05 where the interval leaves out one half."""


def left_bias(left: int, right: int) -> LeftBias:
    """Left bias of so many decided votes. It only speaks of the rater where the sides were drawn at random."""
    from scipy.stats import binomtest

    if left < 0 or right < 0:
        raise InputError(f"{left} votes for the left and {right} for the right: counts are 0 or more")
    decided = left + right
    if decided == 0:
        return LeftBias(Estimate(math.nan, 0.0, 1.0, 0), math.nan)
    test = binomtest(left, decided, 0.5)
    interval = test.proportion_ci(0.95, method="exact")
    return LeftBias(Estimate(left / decided, float(interval.low), float(interval.high), decided), float(test.pvalue))


def time_scores(seconds: Sequence[float] | Array) -> Array:
    """How unusual each time is among these, ``(N,)``: a robust z-score of its logarithm. Below -3.5: too fast to look.

    ``log(t)`` minus the median, divided by 1.4826 x the median absolute deviation; where more than half of the times
    are equal, by 1.2533 x the mean absolute deviation (Iglewicz and Hoaglin 1993, who also give the 3.5). Times are
    those of one rater: a fast rater is not an outlier. NaN where a time is NaN, and everywhere where fewer than 8 are
    known.
    """
    times = np.asarray(seconds, dtype=np.float64)
    if (times <= 0).any() or np.isinf(times).any():
        raise InputError("times are seconds above 0, or NaN where they are not known")
    logs = np.log(times)
    known = logs[~np.isnan(logs)]
    if len(known) < FEWEST_TIMES:
        return np.full(len(times), np.nan)
    deviations = np.abs(known - np.median(known))
    scale = 1.4826 * float(np.median(deviations)) or 1.2533 * float(deviations.mean())
    centred: Array = logs - np.median(known)
    return centred / scale if scale else centred


# --- reliability of raters ---


@dataclass(frozen=True, slots=True)
class Reliability:
    """What Dawid-Skene finds."""

    categories: Array
    """``(C,)``, sorted."""
    accuracy: tuple[Estimate, ...]
    """Per rater: the chance of the right answer, over the units as they come. NaN where nothing determines it."""
    confusion: Array
    """``(R, C, C)``: the chance that a rater answers the second category where the first is right."""
    prevalence: Array
    """``(C,)``: the share of units of each category."""
    posterior: Array
    """``(U, C)``: the chance of each category being right; NaN for a unit that was left out."""
    iterations: int


def dawid_skene(
    values: Array, truth: Array | None = None, draws: int = 200, seed: int = 0, tolerance: float = 1e-7
) -> Reliability:
    """Reliability of each rater from ``(R, U)``, without knowing what is right, by EM (Dawid and Skene 1979).

    Every unit has one right category and every rater an own table of errors. That asks nothing of the arms that are
    compared: no order among them, no connected graph, unlike Bradley-Terry with rater temperatures; and it serves
    categories of any kind, and a rater who mixes up two of them consistently. It does ask for overlap: only units
    with three answers, or whose right category is given in ``truth (U,)`` (NaN elsewhere), are used, and a rater
    with none of them gets NaN. It is no proof against raters who share an error: gold items in ``truth`` are.

    Each row of an error table has the pseudo-counts of one answer, half of it right, which keeps a rater of few units
    near chance. The interval is a percentile bootstrap over units.
    """
    if truth is not None and truth.shape != values.shape[1:]:
        raise InputError(f"truth is one category per unit, {values.shape[1:]}; got {truth.shape}")
    known = np.full(values.shape[1], np.nan) if truth is None else truth
    everything = np.concatenate([values.ravel(), known])
    categories = np.unique(everything[~np.isnan(everything)])
    if len(categories) < 2:
        raise InputError("reliability needs two different answers; here all are alike")
    opinions = (~np.isnan(values)).sum(0)
    used = (opinions >= FEWEST_OPINIONS) | ((opinions > 0) & ~np.isnan(known))
    if not used.any():
        raise InputError(
            "no unit has three judgements or a known answer, so nothing says who is right; let three raters judge the"
            " same units, or add gold items"
        )
    answers = (values[:, used, None] == categories).astype(np.float64)
    fixed = (known[used, None] == categories).astype(np.float64)
    ones = np.ones(int(used.sum()))
    confusion, prevalence, posterior, iterations = _dawid_skene(answers, fixed, ones, tolerance)
    random = np.random.default_rng(seed)
    drawn = (random.multinomial(len(ones), ones / len(ones)).astype(np.float64) for _ in range(draws))
    again = np.array([_accuracy(*_dawid_skene(answers, fixed, weights, 1e-4)[:2]) for weights in drawn])
    everywhere = np.full((values.shape[1], len(categories)), np.nan)
    everywhere[used] = posterior
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    value, n = _accuracy(confusion, prevalence), answers.sum((1, 2))
    unknown = Estimate(math.nan, math.nan, math.nan, 0)
    accuracy = tuple(
        Estimate(float(value[r]), float(low[r]), float(high[r]), int(n[r])) if n[r] else unknown
        for r in range(len(values))
    )
    return Reliability(categories, accuracy, confusion, prevalence, everywhere, iterations)


def _accuracy(confusion: Array, prevalence: Array) -> Array:
    right: Array = np.einsum("c,rcc->r", prevalence, confusion)
    return right


def _dawid_skene(
    answers: Array, fixed: Array, weights: Array, tolerance: float, most: int = 500
) -> tuple[Array, Array, Array, int]:
    """EM from the share of votes. ``answers (R, U, C)`` and ``fixed (U, C)`` are one-hot, zero where not known."""
    size = fixed.shape[1]
    prior = np.full((size, size), 0.5 / (size - 1))
    np.fill_diagonal(prior, 0.5)
    is_fixed = fixed.any(1, keepdims=True)
    votes = answers.sum(0)
    posterior = np.where(is_fixed, fixed, votes / np.maximum(votes.sum(1, keepdims=True), 1))
    iteration, change = 0, math.inf
    while change >= tolerance and iteration < most:
        iteration += 1
        weighted = posterior * weights[:, None]
        prevalence = weighted.sum(0) + 1 / size
        prevalence /= prevalence.sum()
        confusion = weighted.T @ answers + prior
        confusion /= confusion.sum(2, keepdims=True)
        logs = np.log(prevalence) + (answers @ np.log(confusion).transpose(0, 2, 1)).sum(0)
        logs -= logs.max(1, keepdims=True)
        found = np.exp(logs)
        found = np.where(is_fixed, fixed, found / found.sum(1, keepdims=True))
        change = float(np.abs(found - posterior).max())
        posterior = found
    return confusion, prevalence, posterior, iteration
