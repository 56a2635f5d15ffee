"""Which model is preferred: Bradley-Terry with ties (Davidson 1970) over paired comparisons, with intervals.

Shape legend: ``A`` arms (models), ``G`` what is drawn again by the bootstrap (raters or units).

A strength is the logarithm of Davidson's worth, centred on 0. With strengths ``s`` and a tie parameter ``v``, where
``d = s[i] - s[j]``::

    P(i preferred) : P(tie) : P(j preferred)  =  exp(d / 2) : v : exp(-d / 2)

which is the model of ``objectives.reward_model.bradley_terry_with_ties``. The odds of i, given no tie, are ``exp(d)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.preferences.agreement import MOST_UNDEFINED, Array

PRIOR_SD = 5.0
"""Standard deviation of the weak prior on a strength: five means odds of 148 to 1."""
MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer about two arms."""

    first: str
    second: str
    outcome: float
    """1: the first was preferred, 0: the second, 0.5: a tie."""
    rater: str = ""
    unit: str = ""
    """The pair that was judged, by id: several raters may have judged it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Strengths that fit the counts best."""

    strengths: Array
    """``(A,)``, mean 0."""
    tie_strength: float
    """Davidson's v: equals tie with probability ``v / (2 + v)``. 0 without ties, infinite where all tied."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One arm of a ranking."""

    arm: str
    strength: float
    low: float
    high: float
    """95 % bootstrap interval of the strength."""
    best_rank: int
    worst_rank: int
    """The ranks, from 1, that hold 95 % of the bootstrap draws."""
    comparisons: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Arms, the strongest first."""

    standings: tuple[Standing, ...]
    tie_strength: float
    draws: int
    """Bootstrap draws that could be used: those whose arms were all connected."""

    def win_probability(self, first: str, second: str) -> float:
        """Chance that the first is preferred where the two do not tie."""
        strengths = {standing.arm: standing.strength for standing in self.standings}
        for arm in (first, second):
            if arm not in strengths:
                raise InputError(f"there is no arm {arm!r}; there are {', '.join(strengths)}")
        return 1 / (1 + math.exp(strengths[second] - strengths[first]))


def davidson(wins: Array, ties: Array, prior_sd: float = PRIOR_SD) -> Fit:
    """Davidson's model of counts: ``wins[i, j]`` of i over j, and ``ties``, symmetric; both ``(A, A)``.

    Source: Davidson 1970, On extending the Bradley-Terry model to accommodate ties, eq. 2.7 and section 3. Without
    ties it is Bradley-Terry. The prior, normal around 0, keeps an arm that always wins finite; it moves an arm with
    some comparisons either way by next to nothing. ``math.inf`` is maximum likelihood.

    Raises RefusedError where the arms fall into groups that were never compared, or where maximum likelihood was asked
    for and does not exist: one group was never preferred to, nor tied with, the others (Ford 1957).
    """
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or ties.shape != wins.shape:
        raise InputError(f"counts are (arms, arms); got {wins.shape} and {ties.shape}")
    if not np.array_equal(ties, ties.T):
        raise InputError("ties are symmetric: ties[i, j] is ties[j, i], each tie counted in both")
    if (wins < 0).any() or (ties < 0).any() or np.diag(wins).any() or np.diag(ties).any():
        raise InputError("counts are 0 or more, and an arm is not compared with itself")
    if prior_sd <= 0:
        raise ConfigError(f"prior_sd is {prior_sd:g}; it is above 0, or infinite for maximum likelihood")
    groups = components(wins + ties)
    if len(groups) != 1:
        shown = " | ".join(", ".join(map(str, group)) for group in groups)
        raise RefusedError(f"the arms were never all compared, directly or through others: {shown}")
    if math.isinf(prior_sd):
        _check_maximum_exists(wins + ties)
    if not wins.any():
        return Fit(np.zeros(len(wins)), math.inf)
    strengths, log_tie = _newton(wins, ties, 0.0 if math.isinf(prior_sd) else prior_sd**-2)
    return Fit(strengths, math.exp(log_tie) if ties.any() else 0.0)


def components(counts: Array) -> list[list[int]]:
    """Groups of arms that are connected by comparisons, from ``(A, A)`` counts in either direction."""
    linked = (counts + counts.T) > 0
    left = set(range(len(counts)))
    groups = []
    while left:
        group = _reached(linked, min(left))
        groups.append(sorted(group))
        left -= group
    return groups


def _reached(linked: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], start: int) -> set[int]:
    reached, edge = {start}, [start]
    while edge:
        new = set(np.nonzero(linked[edge.pop()])[0].tolist()) - reached
        reached |= new
        edge += new
    return reached


def _check_maximum_exists(counts: Array) -> None:
    """Every arm must be reached from every other along wins and ties; ties go both ways."""
    forward, backward = _reached(counts > 0, 0), _reached(counts.T > 0, 0)
    everything = set(range(len(counts)))
    short = everything - backward or everything - forward
    if short:
        shown = ", ".join(map(str, sorted(short)))
        raise RefusedError(
            f"arms {shown} only won, or only lost, against the others, so that their distance has no finite estimate;"
            " give a finite prior_sd"
        )


def _newton(wins: Array, ties: Array, precision: float) -> tuple[Array, float]:
    """Newton's method, step halved where it would not climb. The likelihood is concave in strengths and log(v)."""
    arms = len(wins)
    one, two = np.nonzero(np.triu(wins + wins.T + ties) > 0)
    counts = np.stack([wins[one, two], ties[one, two], wins[two, one]], axis=1)
    with_ties = bool(ties.any())
    # Logits are linear in (strengths, log v): design (pairs, 3 outcomes, A + 1).
    design = np.zeros((len(one), 3, arms + 1))
    rows = np.arange(len(one))
    for outcome, sign in ((0, 0.5), (2, -0.5)):
        design[rows, outcome, one], design[rows, outcome, two] = sign, -sign
    design[:, 1, arms] = 1
    pull = np.append(np.full(arms, precision), 0.0)

    def evaluate(at: Array) -> tuple[float, Array]:
        logits = design @ at
        if not with_ties:
            logits[:, 1] = -np.inf
        logits -= logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        happened = counts > 0
        return float((counts[happened] * logs[happened]).sum() - pull @ at**2 / 2), np.exp(logs)

    at = np.zeros(arms + 1)
    value, chances = evaluate(at)
    for _ in range(MOST_STEPS):
        asked = counts.sum(1, keepdims=True)
        gradient = np.einsum("po,poa->a", counts - asked * chances, design) - pull * at
        weighted = (asked * chances)[:, :, None] * design
        mean = np.einsum("po,poa->pa", chances, design)
        hessian = np.einsum("poa,pob->ab", weighted, design) - (asked * mean).T @ mean + np.diag(pull)
        # The level of all strengths is free, and so is log(v) where nobody tied: both stay where they are.
        hessian[:arms, :arms] += 1 / arms
        hessian[arms, arms] += 0.0 if with_ties else 1.0
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10:
            new, new_chances = evaluate(at + size * step)
            if new >= value:
                break
            size /= 2
        else:
            break
        at, value, chances = at + size * step, new, new_chances
        if np.abs(size * step).max() < 1e-10:
            break
    if np.abs(gradient).max() > 1e-5 * max(1.0, float(counts.sum())):
        raise RefusedError("the strengths did not settle; give a smaller prior_sd")
    return at[:arms] - at[:arms].mean(), float(at[arms])


def rank(
    comparisons: Iterable[Comparison],
    resample: Literal["raters", "units"] = "raters",
    draws: int = 500,
    seed: int = 0,
    prior_sd: float = PRIOR_SD,
) -> Ranking:
    """Ranks the arms by ``davidson``, with percentile intervals from drawing whole raters, or whole units, again.

    Raters: would other raters of this kind say the same? That needs several; below about 10 the interval is too narrow.
    Units: would these raters say the same of other pairs? A draw whose arms are not all connected is left out; where
    they are more than a twentieth, there are no intervals.

    Raises RefusedError, naming the groups, where the arms fall into groups that were never compared: strengths of
    different groups cannot be set against each other.
    """
    rows = list(comparisons)
    arms = _checked(rows)
    if resample not in ("raters", "units"):
        raise ConfigError(f"resample is {resample!r}; there are raters and units")
    if draws < 100:
        raise ConfigError(f"{draws} draws are too few for an interval; take 100 or more")
    names = [row.rater if resample == "raters" else row.unit for row in rows]
    kinds = sorted(set(names))
    if len(kinds) < 2:
        other = "units" if resample == "raters" else "raters"
        raise ConfigError(f"drawing {resample} again needs two or more, here is {len(kinds)}; resample {other} instead")
    number = {kind: i for i, kind in enumerate(kinds)}
    wins, ties = _tables(rows, arms, [number[name] for name in names])
    total = wins.sum(0) + ties.sum(0)
    groups = components(total)
    if len(groups) > 1:
        shown = " | ".join(", ".join(arms[i] for i in group) for group in groups)
        raise RefusedError(
            f"the comparisons do not connect all arms, so they have no common ranking. Groups: {shown}. Compare arms of"
            " different groups, or rank each group alone"
        )
    fit = davidson(wins.sum(0), ties.sum(0), prior_sd)
    found = _drawn(wins, ties, draws, seed, prior_sd)
    return _ranking(arms, fit, found, draws, (total + total.T - ties.sum(0)).sum(1))


def _checked(rows: Sequence[Comparison]) -> list[str]:
    """The arms, by name."""
    if not rows:
        raise InputError("there is no comparison to rank by")
    for row in rows:
        if row.outcome not in (0, 0.5, 1):
            raise InputError(f"outcome {row.outcome:g} of {row.first} and {row.second}: it is 1, 0, or 0.5 for a tie")
        if row.first == row.second:
            raise InputError(f"{row.first} is compared with itself; leave pairs of one arm out")
    return sorted({arm for row in rows for arm in (row.first, row.second)})


def _tables(rows: Sequence[Comparison], arms: Sequence[str], codes: Sequence[int]) -> tuple[Array, Array]:
    """Wins and ties, ``(G, A, A)`` each."""
    number = {arm: i for i, arm in enumerate(arms)}
    wins = np.zeros((max(codes) + 1, len(arms), len(arms)))
    ties = np.zeros_like(wins)
    for row, code in zip(rows, codes, strict=True):
        first, second = number[row.first], number[row.second]
        if row.outcome == 0.5:
            ties[code, first, second] += 1
            ties[code, second, first] += 1
        elif row.outcome == 1:
            wins[code, first, second] += 1
        else:
            wins[code, second, first] += 1
    return wins, ties


def _drawn(wins: Array, ties: Array, draws: int, seed: int, prior_sd: float) -> Array:
    """Strengths of the draws that connect all arms, ``(draws', A)``."""
    random = np.random.default_rng(seed)
    groups = len(wins)
    found = []
    for _ in range(draws):
        weights = random.multinomial(groups, np.full(groups, 1 / groups)).astype(np.float64)
        try:
            fit = davidson(np.tensordot(weights, wins, 1), np.tensordot(weights, ties, 1), prior_sd)
        except RefusedError:
            continue
        found.append(fit.strengths)
    return np.array(found).reshape(len(found), wins.shape[1])


def _ranking(arms: Sequence[str], fit: Fit, found: Array, draws: int, counts: Array) -> Ranking:
    if len(found) < (1 - MOST_UNDEFINED) * draws:
        low = high = np.full(len(arms), np.nan)
        best, worst = np.ones(len(arms)), np.full(len(arms), len(arms))
    else:
        low, high = np.quantile(found, (0.025, 0.975), axis=0)
        # Equal strengths share the better rank, as in sport.
        ranks = 1 + (found[:, None, :] > found[:, :, None] + 1e-9).sum(2)
        best, worst = np.quantile(ranks, (0.025, 0.975), axis=0, method="nearest")
    order = sorted(range(len(arms)), key=lambda i: (-fit.strengths[i], arms[i]))
    return Ranking(
        tuple(
            Standing(
                arms[i], float(fit.strengths[i]), float(low[i]), float(high[i]), int(best[i]), int(worst[i]),
                int(counts[i]),
            )
            for i in order
        ),
        fit.tie_strength,
        len(found),
    )  # fmt: skip
