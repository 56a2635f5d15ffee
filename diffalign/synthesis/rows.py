"""The rows that a specification asks for, in order, with memory that does not grow with their number.

Rows from axes. The cases are handed down from axis to axis, in the order in which the axes are written: at each value
its share of them, rounded down, and what is left over by the largest remainder (Hamilton's method). What an axis was
owed by earlier roundings is added to its remainders, so that the shares of a late axis come out right over the whole
table too, though each of its groups may be smaller than 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

from diffalign.errors import ConfigError
from diffalign.seeds import derive
from diffalign.synthesis import tables
from diffalign.synthesis.axes import Category, Numbers, matches
from diffalign.synthesis.cases import Value
from diffalign.synthesis.journal import Row
from diffalign.synthesis.spec import Spec, TableConfig

MOST_STRATA = 10_000
ONE_STRATUM = "all"


@dataclass(frozen=True)
class Survey:
    """What the rows of a specification come to."""

    count: int
    columns: Mapping[str, str]
    """Kind of each column."""
    strata: Mapping[str, int] = field(default_factory=dict)
    """Rows, by stratum, in the order in which they come."""
    splits: Mapping[str, int] = field(default_factory=dict)


def known(table: TableConfig) -> TableConfig:
    """The table with the kinds of all columns and the hash of the file, which is looked through as a whole."""
    path = Path(table.file).expanduser()
    kinds = tables.kinds(path, table.columns, table.id)
    return table.model_copy(update={"columns": kinds, "sha256": tables.sha256_of(path)})


def survey(spec: Spec) -> Survey:
    """Looks at every row, and at the prompts that it would get; raises ConfigError for the first that is wrong."""
    from diffalign.synthesis.prompting import Prompting

    prompting = Prompting(spec)
    strata: dict[str, int] = {}
    splits = dict.fromkeys(spec.splits, 0)
    count = 0
    for row in rows(spec):
        prompting.check(row)
        strata[row.stratum] = strata.get(row.stratum, 0) + 1
        if len(strata) > MOST_STRATA:
            raise ConfigError(
                f"strata: {', '.join(spec.strata)} make more than {MOST_STRATA} groups; name fewer columns"
            )
        splits[row.split] += 1
        count += 1
    return Survey(count, columns(spec), strata, splits)


def columns(spec: Spec) -> dict[str, str]:
    """The kind of each column of the rows."""
    if spec.table is not None:
        return dict(spec.table.columns)
    found: dict[str, str] = {}
    for name, axis in spec.axes.items():
        forms = [axis, *(condition.set[name] for condition in spec.conditions if name in condition.set)]
        kinds = {form.kind for form in forms}
        mixed = "number" if kinds == {"integer", "number"} else "category"
        found[name] = kinds.pop() if len(kinds) == 1 else mixed
    return found


def rows(spec: Spec) -> Iterator[Row]:
    """Every row, in order; the same rows each time."""
    prefix = f"syn-{spec.identity[:8]}"
    dealer = _Dealer(spec.splits)
    for index, cells in enumerate(_from_table(spec.table) if spec.table is not None else _drawn(spec)):
        stratum = stratum_of(spec, cells)
        yield Row(index, f"{prefix}-{index:06d}", cells, stratum, dealer.next(stratum))


def stratum_of(spec: Spec, cells: Mapping[str, Value]) -> str:
    """The stratum of a row: its values in the columns that strata are made of; empty ones are left out."""
    return " / ".join(shown(cells[name]) for name in spec.strata if cells[name] is not None) or ONE_STRATUM


def shown(value: Value) -> str:
    """A cell as strata name it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_table(table: TableConfig) -> Iterator[dict[str, Value]]:
    path = Path(table.file).expanduser()
    if table.sha256 is not None and tables.sha256_of(path) != table.sha256:
        raise ConfigError(f"table.file: {path} was changed since the dataset was begun; bring back what it was")
    return tables.rows(path, table.columns)


# -- rows from axes ---------------------------------------------------------------------------------------------------


def _drawn(spec: Spec) -> Iterator[dict[str, Value]]:
    assert spec.cases is not None
    numbers = {name for name, kind in columns(spec).items() if kind in ("integer", "number")}
    index = 0
    for cells, count in _groups(spec, list(spec.axes), {}, spec.cases, {}):
        for _ in range(count):
            row = dict(cells)
            for name in numbers:
                form = form_of(spec, name, row)
                if isinstance(form, Numbers):
                    row[name] = _number(form, derive(spec.seed, "axis", name, index) / 2**63)
            yield row
            index += 1


def _groups(
    spec: Spec, left: Sequence[str], cells: dict[str, Value], count: int, owed: dict[object, list[float]]
) -> Iterator[tuple[dict[str, Value], int]]:
    """Every combination of categories that gets a case, and how many; numbers are still empty."""
    if not count:
        return
    if not left:
        yield cells, count
        return
    name, *rest = left
    form = form_of(spec, name, cells)
    if not isinstance(form, Category):
        yield from _groups(spec, rest, {**cells, name: None}, count, owed)
        return
    key = (name, tuple(map(str, form.values)), tuple(form.shares))
    debts = owed.setdefault(key, [0.0] * len(form.values))
    for value, given in zip(form.values, allotted(form.shares, count, debts), strict=True):
        yield from _groups(spec, rest, {**cells, name: value}, given, owed)


def allotted(shares: Sequence[float], count: int, owed: list[float]) -> list[int]:
    """How many of ``count`` each share gets: its part rounded down, and the rest one by one by the largest remainder.

    ``owed`` is what earlier calls left each of them short of (negative: gave it too much); it counts with the
    remainders and is brought up to date. Where it is 0 throughout, this is Hamilton's method.
    """
    parts = [share * count for share in shares]
    given = [int(part + 1e-9) for part in parts]
    claims = [part - whole + debt for part, whole, debt in zip(parts, given, owed, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (-round(claims[i], 9), i))
    for i in order[: count - sum(given)]:
        given[i] += 1
    for i, (part, whole) in enumerate(zip(parts, given, strict=True)):
        owed[i] += part - whole
    return given


def form_of(spec: Spec, name: str, cells: Mapping[str, Value]) -> Category | Numbers | None:
    """The axis as it is in a row of these cells; of several conditions on it the last one counts."""
    form: Category | Numbers | None = spec.axes[name]
    for condition in spec.conditions:
        if (name in condition.set or name in condition.drop) and matches(condition.when, cells):
            form = condition.set.get(name)
    return form


def _number(form: Numbers, chance: float) -> float | int:
    """The number at this quantile, in [0, 1), of the distribution."""
    low, high = form.range
    if form.distribution == "normal":
        assert form.mean is not None
        assert form.sd is not None
        normal = NormalDist(form.mean, form.sd)
        edge = 0.5 if form.integer else 0.0
        first, last = normal.cdf(low - edge), normal.cdf(high + edge)
        found = (
            normal.inv_cdf(min(max(first + chance * (last - first), 1e-300), 1 - 1e-16)) if last > first else form.mean
        )
        found = min(max(found, low), high)
        return round(found) if form.integer else found
    if form.integer:
        return int(low) + int(chance * (int(high) - int(low) + 1))
    return low + chance * (high - low)


class _Dealer:
    """Deals the cases to splits, so that the shares hold in each stratum and over all of them, as closely as can be."""

    def __init__(self, splits: Mapping[str, float]) -> None:
        self.splits = splits
        self.given: dict[str, dict[str, float]] = {}

    def next(self, stratum: str) -> str:
        """The split of the next case of a stratum: the one that lags most, here and over all together."""
        totals = [
            self.given.setdefault(key, dict.fromkeys(self.splits, 0.0)) for key in (f"in {stratum}", "everywhere")
        ]
        for total in totals:
            for name, share in self.splits.items():
                total[name] += share
        chosen = max(self.splits, key=lambda name: round(sum(total[name] for total in totals), 9))
        for total in totals:
            total[chosen] -= 1
        return chosen
