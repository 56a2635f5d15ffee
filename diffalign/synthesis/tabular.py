"""How like a real table a synthetic one is: column by column, and pair by pair.

The formulas are those of SDMetrics' quality report (TVComplement, KSComplement, ContingencySimilarity,
CorrelationSimilarity). The package itself needs an older pandas than this project has; its numbers are recorded in the
tests. One thing differs: a number beside a category is cut into the same ten bins in both tables, by the real one.

Shape legend: ``N`` synthetic rows, ``M`` real ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from diffalign.synthesis.cases import Value
from diffalign.synthesis.estimates import Floats

Rows = Sequence[Mapping[str, Value]]
NUMBERS = frozenset({"integer", "number"})
CATEGORIES = frozenset({"category", "boolean"})
BINS = 10
_CHUNK = 256


def fidelity(synthetic: Rows, real: Rows, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Column shapes and pair trends in [0, 1], each by column and as a mean, and the marginals of every column.

    ``kinds`` are those of ``Manifest.columns``; texts, and columns that the real table lacks, are left out and named.
    """
    there = {name for row in real for name in row}
    columns = {name: kind for name, kind in kinds.items() if kind in NUMBERS | CATEGORIES and name in there}
    shapes = {name: shape(synthetic, real, name, kind) for name, kind in columns.items()}
    pairs = {f"{a} / {b}": pair(synthetic, real, (a, b), columns) for a, b in combinations(columns, 2)}
    return {
        "column_shapes": _mean(shapes),
        "pair_trends": _mean(pairs),
        "columns": shapes,
        "pairs": pairs,
        "marginals": {
            name: {"synthetic": marginal(synthetic, name, kind), "real": marginal(real, name, kind)}
            for name, kind in columns.items()
        },
        "left_out": [name for name in kinds if name not in columns],
        "n": [len(synthetic), len(real)],
    }


def _mean(found: Mapping[str, float | None]) -> float | None:
    known = [value for value in found.values() if value is not None]
    return float(np.mean(known)) if known else None


def shape(synthetic: Rows, real: Rows, name: str, kind: str) -> float | None:
    """1 minus the distance of a column's two distributions: total variation, or Kolmogorov-Smirnov of numbers.

    An empty cell is a value of its own in a category and left out of numbers; None where no number is left.
    """
    if kind in CATEGORIES:
        return alike(Counter(row.get(name) for row in synthetic), Counter(row.get(name) for row in real))
    first, second = (np.sort(_numbers(rows, name)) for rows in (synthetic, real))
    if not len(first) or not len(second):
        return None
    points = np.concatenate([first, second])
    below = [np.searchsorted(values, points, side="right") / len(values) for values in (first, second)]
    return float(1 - np.abs(below[0] - below[1]).max())


def alike(first: Counter[Any], second: Counter[Any]) -> float | None:
    """1 minus the total variation distance of two counts; None where one is empty."""
    n, m = first.total(), second.total()
    if not n or not m:
        return None
    return 1 - sum(abs(first[value] / n - second[value] / m) for value in first.keys() | second.keys()) / 2


def pair(synthetic: Rows, real: Rows, names: tuple[str, str], kinds: Mapping[str, str]) -> float | None:
    """How alike two columns hang together: by correlation of two numbers, else by the table of their values."""
    if all(kinds[name] in NUMBERS for name in names):
        found = [_correlation(rows, names) for rows in (synthetic, real)]
        return None if None in found else 1 - abs(found[0] - found[1]) / 2  # type: ignore[operator]
    cuts = {name: _cuts(real, name) for name in names if kinds[name] in NUMBERS}
    return alike(
        *(Counter(tuple(_cell(row.get(n), cuts.get(n)) for n in names) for row in rows) for rows in (synthetic, real))
    )


def _cuts(real: Rows, name: str) -> Floats:
    values = _numbers(real, name)
    if not len(values):
        return np.empty(0)
    edges: Floats = np.asarray(np.linspace(values.min(), values.max(), BINS + 1))
    return edges[1:-1]


def _cell(value: Value, cuts: Floats | None) -> Hashable:
    if cuts is None or value is None:
        return value
    return int(np.digitize(float(value), cuts))


def _correlation(rows: Rows, names: tuple[str, str]) -> float | None:
    """Pearson's; None where fewer than two rows have both, or one of them never changes."""
    known = [tuple(row.get(name) for name in names) for row in rows]
    values = np.array([pair for pair in known if None not in pair], dtype=np.float64).reshape(-1, 2)
    if len(values) < 2 or (values == values[0]).all(axis=0).any():
        return None
    first, second = (values - values.mean(0)).T
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))


def marginal(rows: Rows, name: str, kind: str) -> dict[str, Any]:
    """Shares of the values of a category; mean, spread and quartiles of numbers; the share of empty cells of both."""
    empty = sum(row.get(name) is None for row in rows) / len(rows) if rows else math.nan
    if kind in CATEGORIES:
        counts = Counter(row.get(name) for row in rows)
        shares = sorted((str(value), count / len(rows)) for value, count in counts.items() if value is not None)
        return {"shares": dict(shares), "empty": empty}
    values = _numbers(rows, name)
    if not len(values):
        return {"empty": empty}
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "mean": float(values.mean()), "sd": float(values.std()), "quartiles": [float(low), float(middle), float(high)],
        "empty": empty,
    }  # fmt: skip


def _numbers(rows: Rows, name: str) -> Floats:
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=np.float64)


def gower(rows: Rows, training: Rows, kinds: Mapping[str, str]) -> Floats:
    """Distance ``(N,)`` in [0, 1] of each row to the nearest training row, by Gower (1971).

    The mean over columns: 0 or 1 for categories and texts, the difference over the training table's range for numbers
    (at most 1); an empty cell is a value like any other.
    """
    own, other = [], []
    numeric: list[bool] = []
    for name, kind in kinds.items():
        numeric.append(kind in NUMBERS)
        encode = _scaled(training, name) if kind in NUMBERS else _coded(training, name)
        own.append([encode(row.get(name)) for row in rows])
        other.append([encode(row.get(name)) for row in training])
    first, second = np.array(own, dtype=np.float64).T, np.array(other, dtype=np.float64).T
    found = np.empty(len(first))
    for start in range(0, len(first), _CHUNK):
        total = np.zeros((len(first[start : start + _CHUNK]), len(second)))
        for j, number in enumerate(numeric):
            gap = np.abs(first[start : start + _CHUNK, j][:, None] - second[:, j][None])
            total += np.minimum(gap, 1) if number else gap > 0
        found[start : start + _CHUNK] = total.min(1) / len(numeric)
    return found


def _scaled(training: Rows, name: str) -> Any:
    values = _numbers(training, name)
    low, width = (float(values.min()), float(np.ptp(values)) or 1.0) if len(values) else (0.0, 1.0)
    return lambda value: -2.0 if value is None else (float(value) - low) / width


def _coded(training: Rows, name: str) -> Any:
    codes: dict[Value, int] = {}
    for row in training:
        codes.setdefault(row.get(name), len(codes))
    return lambda value: codes.get(value, -1)
