"""What a specification asks for, before its shares become whole cases: of each column, and of each stratum.

Shape legend: ``K`` bins.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist

from diffalign.synthesis import rows
from diffalign.synthesis.axes import Category, Numbers
from diffalign.synthesis.cases import Value
from diffalign.synthesis.spec import Spec

MOST_STATES = 50_000
"""Combinations of values that are followed at once; a specification with more is not worked out."""
BINS = 12
"""Bins of a column of numbers, at most."""


@dataclass(frozen=True)
class Asked:
    """Shares of all cases, which add up to 1 in each column and over the strata."""

    values: Mapping[str, Mapping[Value, float]] = field(default_factory=dict)
    """Of the values of each axis of categories; ``None`` is an empty cell."""
    numbers: Mapping[str, Sequence[tuple[Numbers, float]]] = field(default_factory=dict)
    """Of each axis of numbers: the ranges that it has, and the share of cases in which it has them."""
    strata: Mapping[str, float] = field(default_factory=dict)


def asked(spec: Spec) -> Asked | None:
    """The shares that axes and conditions give; None for a table, and where there are too many combinations.

    The axes are followed in their order. Of the cells of a row only those are kept that a condition or a stratum looks
    at, so that the work grows with these alone.
    """
    if spec.table is not None:
        return None
    kept = {name for condition in spec.conditions for name in condition.when} | set(spec.strata)
    values: dict[str, dict[Value, float]] = {}
    numbers: dict[str, list[tuple[Numbers, float]]] = {}
    states: dict[tuple[tuple[str, Value], ...], float] = {(): 1.0}
    for name in spec.axes:
        following: defaultdict[tuple[tuple[str, Value], ...], float] = defaultdict(float)
        found: defaultdict[Value, float] = defaultdict(float)
        for cells, share in states.items():
            form = rows.form_of(spec, name, dict(cells))
            if isinstance(form, Numbers):
                numbers.setdefault(name, []).append((form, share))
                following[cells] += share
                continue
            outcomes = zip(form.values, form.shares, strict=True) if isinstance(form, Category) else [(None, 1.0)]
            for value, part in outcomes:
                found[value] += share * part
                following[(*cells, (name, value)) if name in kept else cells] += share * part
        if found:
            values[name] = dict(found)
        states = following
        if len(states) > MOST_STATES:
            return None
    strata: defaultdict[str, float] = defaultdict(float)
    for cells, share in states.items():
        strata[rows.stratum_of(spec, dict(cells))] += share
    return Asked(values, numbers, dict(strata))


def edges(low: float, high: float, *, integer: bool) -> list[float]:
    """``(K + 1,)`` edges of equal bins over a range; those of integers lie halfway between two."""
    if not integer:
        return [low + (high - low) * i / BINS for i in range(BINS + 1)] if high > low else [low - 0.5, low + 0.5]
    width = math.ceil((high - low + 1) / BINS)
    count = math.ceil((high - low + 1) / width)
    return [low - 0.5 + i * width for i in range(count + 1)]


def expected(forms: Sequence[tuple[Numbers, float]], bins: Sequence[float]) -> list[float]:
    """``(K,)`` shares of all cases that the ranges of an axis put between the edges ``(K + 1,)``."""
    below = [sum(share * _below(form, edge) for form, share in forms) for edge in bins]
    # The last bin holds its upper edge too.
    below[-1] = sum(share for _, share in forms)
    return [after - before for before, after in pairwise(below)]


def _below(form: Numbers, value: float) -> float:
    """The chance of a number below this one; for integers, of a value halfway between two."""
    low, high = form.range
    edge = 0.5 if form.integer else 0.0
    low, high = low - edge, high + edge
    value = min(max(value, low), high)
    if form.distribution == "normal":
        assert form.mean is not None
        assert form.sd is not None
        normal = NormalDist(form.mean, form.sd)
        first, last = normal.cdf(low), normal.cdf(high)
        if last > first:
            return (normal.cdf(value) - first) / (last - first)
        return float(value > form.mean)
    return (value - low) / (high - low) if high > low else float(value > low)


def furthest(found: Mapping[str, int], wanted: Mapping[str, float]) -> tuple[str, float]:
    """The name whose share of the cases is furthest from what was asked for, and found minus asked share.

    Of equals the first; ``("", 0)`` where there is nothing.
    """
    total = sum(found.values())
    gaps = {
        name: found.get(name, 0) / max(1, total) - wanted.get(name, 0.0) for name in dict.fromkeys([*wanted, *found])
    }
    name = max(gaps, key=lambda one: round(abs(gaps[one]), 12), default="")
    return name, gaps.get(name, 0.0)
