"""Rows from axes: axes that a specification leaves independent are so in its rows, of any number, and in any part."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pytest

from apps.catalogue import dataset_recipes
from diffalign.synthesis import rows, spec

SEEDS = 12
STEPS = 4.0
"""Standard errors that a mean may be off."""


def cells(recipe: str, *overrides: str) -> list[dict[str, Any]]:
    return [dict(row.cells) for row in rows.rows(spec.load(dataset_recipes()[recipe], overrides))]


def statistic(found: Sequence[dict[str, Any]], first: str, second: str) -> tuple[float, int]:
    """Pearson's chi-square over its mean under independence with these margins, df N / (N - 1), and df."""
    pairs = [(row[first], row[second]) for row in found if row[first] is not None and row[second] is not None]
    table, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    count = len(pairs)
    chi = sum((table[a, b] - n * m / count) ** 2 / (n * m / count) for a, n in left.items() for b, m in right.items())
    degrees = (len(left) - 1) * (len(right) - 1)
    return chi / (degrees * count / (count - 1)), degrees


def independent(found: Sequence[Sequence[dict[str, Any]]], first: str, second: str) -> None:
    """The mean over tables of several seeds is that of independence. A chi-square has the variance 2 df."""
    ratios, degrees = zip(*(statistic(one, first, second) for one in found), strict=True)
    error = math.sqrt(sum(2 / n for n in degrees)) / len(degrees)
    assert abs(mean(ratios) - 1) < STEPS * error, (first, second, mean(ratios), error)


@pytest.mark.parametrize("cases", [100, 300, 1000])
def test_axes_that_are_no_strata_are_independent(cases: int) -> None:
    """In whole tables, in the first rows of them, in every third row, and in one stratum.

    When such axes were handed down like strata, objects and backgrounds went round in step: their chi-square was 1.2
    times that of independence at 100 rows, 2.9 times at 300, and 0.26 times at 1 000.
    """
    tables = [cells("emoji-dataset", f"cases={cases}", f"seed={seed}") for seed in range(SEEDS)]
    parts = {"all": tables, "first": [one[: cases * 2 // 5] for one in tables], "third": [one[::3] for one in tables]}
    parts["stratum"] = [[row for row in one if row["kind"] == "relation"] for one in tables]
    for name, part in parts.items():
        independent(part, "object", "background")
        independent(part, "background", "kind" if name in ("all", "third") else "object")
    independent(parts["stratum"], "object", "other")
    independent(parts["stratum"], "other", "relation")


@pytest.mark.parametrize("cases", [100, 300, 1000])
def test_their_shares_hold_to_a_case(cases: int) -> None:
    """Over the rows in which an axis has the same values: here all but relations, and relations."""
    found = cells("emoji-dataset", f"cases={cases}", "seed=3")
    both = [[row for row in found if (row["kind"] == "relation") is kind] for kind in (False, True)]
    for name, part in (("background", found), ("object", both[0]), ("object", both[1]), ("other", both[1])):
        counts = Counter(row[name] for row in part)
        assert max(counts.values()) - min(counts.values()) <= 1, name
    assert len({row["object"] for row in both[0]}) == 24 and len({row["object"] for row in both[1]}) == 12


STRATA = {
    "cases": 300,
    "axes": {
        "a": [str(i) for i in range(24)],
        "b": [str(i) for i in range(6)],
        "c": [str(i) for i in range(6)],
        "d": [str(i) for i in range(4)],
        "e": {"x": 0.5, "y": 0.3, "z": 0.2},
        "f": {"x": 0.5, "y": 0.3, "z": 0.2},
    },
    "strata": ["a", "b", "c", "d", "e", "f"],
    "image": {"model": "embedded:emoji", "template": "{a}"},
}


@pytest.mark.parametrize("cases", [100, 300, 1000])
def test_strata_with_less_than_a_case_do_not_go_in_step(cases: int) -> None:
    """31 104 strata: the shares of each axis hold to two cases, and no two axes are much more alike than by chance.

    When remainders went by size alone, chi-squares were 4 to 9 times those of independence.
    """
    tables = [
        [dict(row.cells) for row in rows.rows(spec.parse({**STRATA, "cases": cases, "seed": seed}))]
        for seed in range(SEEDS)
    ]
    for found in tables:
        for name, axis in spec.parse(STRATA).axes.items():
            counts = Counter(row[name] for row in found)
            assert all(abs(counts[v] - s * cases) <= 2 for v, s in zip(axis.values, axis.shares, strict=True)), name
    names = list(STRATA["axes"])
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert mean(statistic(one, first, second)[0] for one in tables) < 1.6, (first, second)


def test_shares_do_not_depend_on_the_place() -> None:
    """3 rows of each of 20 groups, 0.3 of them of the rare value: over 300 seeds 90 at every place, and 7.9 more or
    less. When the first group of an axis was rounded by a fixed rule, there were 0 in the first, and 142 in the second.
    """
    groups = [str(i) for i in range(20)]
    found: Counter[Any] = Counter()
    for seed in range(300):
        config = {
            "cases": 60, "seed": seed, "axes": {"g": groups, "x": {"a": 0.9, "b": 0.1}}, "strata": ["g", "x"],
            "image": {"model": "embedded:emoji", "template": "{g}"},
        }  # fmt: skip
        found.update(row.cells["g"] for row in rows.rows(spec.parse(config)) if row.cells["x"] == "b")
    error = math.sqrt(300 * 0.3 * 0.7)
    assert all(abs(found[group] - 90) < STEPS * error for group in groups), found


@pytest.mark.parametrize(("shares", "count"), [([0.9, 0.1], 1), ([0.5, 0.3, 0.2], 1), ([0.4, 0.35, 0.25], 2)])
def test_a_group_rounded_by_chance_has_its_shares(shares: list[float], count: int) -> None:
    """On average, and no count is off by a whole row: over 4 000 draws, within 4 standard errors of each remainder."""
    times, draw, total = 4000, random.Random(0), [0] * len(shares)
    for _ in range(times):
        chances = [draw.random() for _ in range(len(shares) + 1)]
        given = rows.allotted(shares, count, [0.0] * len(shares), chances)
        assert sum(given) == count and all(abs(n - s * count) < 1 for n, s in zip(given, shares, strict=True))
        total = [n + more for n, more in zip(total, given, strict=True)]
    for got, share in zip(total, shares, strict=True):
        odds = share * count % 1
        assert abs(got - times * share * count) < STEPS * math.sqrt(times * odds * (1 - odds))


def test_debts_that_reach_beyond_a_row_keep_the_count() -> None:
    """What is owed may ask for more than a row, or less than none: the count holds, and no value is off by two."""
    draw = random.Random(1)
    for _ in range(2000):
        weights = [draw.randint(1, 9) for _ in range(draw.randint(1, 6))]
        shares, count = [weight / sum(weights) for weight in weights], draw.randint(1, 9)
        owed = [draw.uniform(-3, 3) for _ in shares]
        owed = [one - mean(owed) for one in owed]
        given = rows.allotted(shares, count, owed, [draw.choice([0.0, draw.random()]) for _ in range(len(shares) + 1)])
        assert sum(given) == count
        assert all(int(s * count + 1e-9) <= n <= int(s * count + 1e-9) + 1 for n, s in zip(given, shares, strict=True))


def test_strata_of_whole_cases_are_exact() -> None:
    """180 cases over 45 strata, of which those with a lesion have 4 in each of 36, those without 4 in each of 9."""
    found = Counter(row.stratum for row in rows.rows(spec.load(dataset_recipes()["brain-mr-dataset"], ["cases=180"])))
    assert set(found.values()) == {4} and len(found) == 45


def test_rows_follow_from_the_specification() -> None:
    """The same each time they are asked; another seed draws others, of the same strata."""
    first, again = cells("emoji-dataset"), cells("emoji-dataset")
    other = cells("emoji-dataset", "seed=1")
    assert first == again and first != other
    strata = [
        Counter((row["kind"], row["count"], row["relation"], row["corner"]) for row in one) for one in (first, other)
    ]
    assert strata[0] == strata[1]
