"""What the votes say of each question: how far raters agree on it, and how each arm stands in it.

Shape legend: ``U`` units (pairs), ``A`` arms.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sqlalchemy import RowMapping

from diffalign.preferences.agreement import Estimate, alpha_interval, reliability_data
from diffalign.study.protocol import Rules
from diffalign.study.sides import first_preferred, standing

DRAWS = 500


@dataclass(frozen=True, slots=True)
class CriterionStats:
    """One question."""

    criterion: str
    kind: Literal["prefer", "scale"]
    answers: int
    alpha: Estimate
    """Krippendorff's: nominal of first, tie and second, or ordinal of the points of a scale."""
    arms: dict[str, Estimate]
    """Of pairs in random order: the share in which the arm was preferred, a tie as half; or its mean score.

    The interval is a 95 % percentile bootstrap over pairs; ``n`` counts answers.
    """


def criteria(rules: Rules, rows: Sequence[RowMapping], arms: dict[int, str]) -> Iterator[CriterionStats]:
    """The overall question and each criterion of the rules, from votes that count; ``arms`` by sample."""
    asked: list[tuple[str, Literal["prefer", "scale"]]] = [("overall", "prefer")]
    for name, kind in asked + [(one.name, one.kind) for one in rules.criteria]:
        said = [one for row in rows for one in _said(row, name, kind)]
        data = reliability_data((row["rater"], unit, value) for row, unit, _, value in said)
        shares = [
            (row["pair_id"], arms[sample], value if kind == "scale" or sample == row["first_id"] else 1 - value)
            for row, _, samples, value in said
            for sample in samples
            if row["chosen"] == "random" and (kind == "scale" or arms[row["first_id"]] != arms[row["second_id"]])
        ]
        level: Literal["nominal", "ordinal"] = "ordinal" if kind == "scale" else "nominal"
        yield CriterionStats(name, kind, len(said), alpha_interval(data.values, level), _means(shares))


def _said(
    row: RowMapping, criterion: str, kind: Literal["prefer", "scale"]
) -> Iterator[tuple[RowMapping, str, tuple[int, ...], float]]:
    """The row, the unit that raters agree on, the samples that it is about, and the value."""
    value = row["choice"] if criterion == "overall" else row["answers"].get(criterion)
    if kind == "prefer" and isinstance(value, str):
        preferred = first_preferred(value, row["first_is_left"])
        yield row, str(row["pair_id"]), (row["first_id"], row["second_id"]), preferred
    elif kind == "scale" and isinstance(value, dict):
        for side, score in value.items():
            sample = row[f"{standing(row['first_is_left'])[side]}_id"]
            yield row, f"{row['pair_id']} {sample}", (sample,), float(score)


def _means(values: Sequence[tuple[int, str, float]], seed: int = 0) -> dict[str, Estimate]:
    """Per arm, with whole pairs drawn again."""
    per_arm: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair, arm, value in values:
        per_arm[arm][pair].append(value)
    return {arm: _mean(list(pairs.values()), seed) for arm, pairs in sorted(per_arm.items())}


def _mean(units: Sequence[Sequence[float]], seed: int) -> Estimate:
    sums, counts = np.array([sum(one) for one in units]), np.array([len(one) for one in units])
    value, n = float(sums.sum() / counts.sum()), int(counts.sum())
    if len(units) < 2:
        return Estimate(value, math.nan, math.nan, n)
    weights = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=DRAWS)
    low, high = np.quantile((weights @ sums) / (weights @ counts), (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)
