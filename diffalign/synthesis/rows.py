"""The rows that a specification asks for, in order, with memory that does not grow with their number.

Rows from axes. Along the axes that strata or conditions look at the cases are handed down from axis to axis, in the
order in which the axes are written: at each value its share of them, rounded down, and what is left over by the largest
remainder (Hamilton's method). What an axis was owed by earlier roundings is added to its remainders, so that the shares
of a late axis come out right over the whole table too, though each of its groups may be smaller than 1. Groups that
have not two rows for every value are rounded by chance, but for the first axis, which divides all rows at once: a fixed
rule would give the same value too little at the same place in every table, and two axes that divided the same small
groups by it would go through their values in step.

The values of every other axis are counted out by Hamilton's method over all rows in which it has the same form, and
drawn from that urn without putting back, by chances of its own: its shares hold to a case over these rows, and among
any of them it says nothing about another axis.

Splits. Each row goes to the split that lags most, where it counts how far a split lags in the row's stratum, among the
rows with the same value in each column of the strata, and over all rows. Rows come in the order of the axes, and a
split that looked at the strata alone would step through them in one rhythm with it: a test split of every tenth row
could be of one value throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

from diffalign.errors import ConfigError, NotFoundError
from diffalign.seeds import derive
from diffalign.synthesis import tables
from diffalign.synthesis.axes import Category, Numbers, matches
from diffalign.synthesis.cases import Value
from diffalign.synthesis.journal import Row
from diffalign.synthesis.spec import Spec, TableConfig

MOST_STRATA = 10_000
ONE_STRATUM = "all"
SHOWN = 8
"""Values that a warning names."""
PAID = 0.5
"""Part of what a value is owed that the next group pays back, on average."""
WITHIN = 0.5
"""Weight of a split's lag in the stratum. At 1 a stratum of one row, whose largest split always lags most there, would
outweigh the values of its columns.
"""


@dataclass(frozen=True)
class Survey:
    """What the rows of a specification come to."""

    count: int
    columns: Mapping[str, str]
    """Kind of each column."""
    strata: Mapping[str, int] = field(default_factory=dict)
    """Rows, by stratum, in the order in which they come."""
    splits: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the split that has no row of them: values of the strata's columns (``COLUMN VALUE``) that others have."""

    def warnings(self) -> list[str]:
        """A sentence for each split that is too small for every value of the strata's columns."""
        return [
            f"split {split} has {self.splits[split]} of the {self.count} rows, and none with"
            f" {', '.join(missing[:SHOWN])}{f' and {len(missing) - SHOWN} more' if len(missing) > SHOWN else ''}"
            for split, missing in self.lacking.items()
        ]


def known(table: TableConfig, beside: Path) -> TableConfig:
    """The table with its place, the kinds of all columns and the hash of the file, which is looked through as a whole.

    A path that is not absolute is looked for in the folder ``beside`` first, that of the specification, and then in the
    working directory. Raises NotFoundError where it is in neither, and ConfigError where the specification has the hash
    of another file.
    """
    path = Path(table.file).expanduser()
    if not path.is_absolute():
        places = [beside / path, Path.cwd() / path]
        path = next((place for place in places if place.is_file()), path)
        if path not in places:
            raise NotFoundError(
                f"there is no table {path}: it is neither in {beside.absolute()}, where the specification is, nor in"
                f" {Path.cwd()}, the working directory"
            )
    found = tables.sha256_of(path) if path.is_file() else None
    if found is not None and table.sha256 not in (None, found):
        raise ConfigError(
            f"table.file: {path} is not the table that the specification names: its SHA-256 is {found}, and"
            f" table.sha256 is {table.sha256}; give the same file, or make another dataset of this"
            " one by --set table.sha256=null --set name=ANOTHER"
        )
    kinds = tables.kinds(path, table.columns, table.id)
    return table.model_copy(update={"file": str(path), "columns": kinds, "sha256": found})


def survey(spec: Spec) -> Survey:
    """Looks at every row, and at the prompts that it would get; raises ConfigError for the first that is wrong."""
    from diffalign.synthesis.prompting import Prompting

    prompting = Prompting(spec)
    strata: dict[str, int] = {}
    splits = dict.fromkeys(spec.splits, 0)
    held: dict[str, set[str]] = {split: set() for split in spec.splits}
    count = 0
    for row in rows(spec):
        prompting.check(row)
        strata[row.stratum] = strata.get(row.stratum, 0) + 1
        if len(strata) > MOST_STRATA:
            raise ConfigError(
                f"strata: {', '.join(spec.strata)} make more than {MOST_STRATA} groups; name fewer columns"
            )
        splits[row.split] += 1
        held[row.split].update(f"{name} {shown(value)}" for name, value in _grouping(spec, row.cells))
        count += 1
    values = sorted(set().union(*held.values()))
    lacking = {split: tuple(v for v in values if v not in held[split]) for split in splits}
    return Survey(count, columns(spec), strata, splits, {split: none for split, none in lacking.items() if none})


def columns(spec: Spec) -> dict[str, str]:
    """The kind of each column of the rows; that which names the rows of a table is checked, and stays behind."""
    if spec.table is not None:
        return {name: kind for name, kind in spec.table.columns.items() if name != spec.table.id}
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
    dealer = _Dealer(spec.splits, spec.cases)
    for index, cells in enumerate(_from_table(spec.table) if spec.table is not None else _drawn(spec)):
        stratum = stratum_of(spec, cells)
        yield Row(index, f"{prefix}-{index:06d}", cells, stratum, dealer.next(stratum, _grouping(spec, cells)))


def stratum_of(spec: Spec, cells: Mapping[str, Value]) -> str:
    """The stratum of a row: its values in the columns that strata are made of; empty ones are left out."""
    return " / ".join(shown(value) for _, value in _grouping(spec, cells)) or ONE_STRATUM


def _grouping(spec: Spec, cells: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """The columns that strata are made of, with the row's values; empty ones are left out."""
    return [(name, cells[name]) for name in spec.strata if cells[name] is not None]


def shown(value: Value) -> str:
    """A cell as strata name it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_table(table: TableConfig) -> Iterator[dict[str, Value]]:
    path = Path(table.file).expanduser()
    if table.sha256 is not None and tables.sha256_of(path) != table.sha256:
        raise ConfigError(f"table.file: {path} was changed since the dataset was begun; bring back what it was")
    found = tables.rows(path, table.columns)
    return ({column: cell for column, cell in row.items() if column != table.id} for row in found)


# -- rows from axes ---------------------------------------------------------------------------------------------------


def _drawn(spec: Spec) -> Iterator[dict[str, Value]]:
    numbers = {name for name, kind in columns(spec).items() if kind in ("integer", "number")}
    urns = _urns(spec)
    index = 0
    for cells, count in _groups(spec):
        forms = {name: form_of(spec, name, cells) for name in spec.axes if name not in cells}
        for _ in range(count):
            row = {name: cells.get(name) for name in spec.axes}
            for name, form in forms.items():
                if isinstance(form, Category):
                    row[name] = form.values[_taken(urns[_key(name, form)], derive(spec.seed, "axis", name, index))]
            for name in numbers:
                form = form_of(spec, name, row)
                if isinstance(form, Numbers):
                    row[name] = _number(form, derive(spec.seed, "axis", name, index) / 2**63)
            yield row
            index += 1


def _groups(spec: Spec) -> Iterator[tuple[dict[str, Value], int]]:
    """Every combination of values that gets a case, and how many, of the axes that strata or conditions look at."""
    assert spec.cases is not None
    looked_at = {*spec.strata, *(name for condition in spec.conditions for name in condition.when)}
    yield from _divided(spec, [name for name in spec.axes if name in looked_at], {}, spec.cases, {})


def _divided(
    spec: Spec, left: Sequence[str], cells: dict[str, Value], count: int, owed: dict[object, _Debts]
) -> Iterator[tuple[dict[str, Value], int]]:
    if not count:
        return
    if not left:
        yield cells, count
        return
    name, *rest = left
    form = form_of(spec, name, cells)
    if not isinstance(form, Category):
        yield from _divided(spec, rest, {**cells, name: None}, count, owed)
        return
    outermost = not owed
    debts = owed.setdefault(_key(name, form), _Debts([0.0] * len(form.values)))
    chances = [derive(spec.seed, "remainder", name, debts.times, i) / 2**63 for i in range(len(form.values) + 1)]
    given = allotted(form.shares, count, debts.owed, () if outermost else chances)
    debts.times += 1
    for value, part in zip(form.values, given, strict=True):
        yield from _divided(spec, rest, {**cells, name: value}, part, owed)


@dataclass
class _Debts:
    """What roundings left the values of an axis short of (negative: gave them too much), and how many there were."""

    owed: list[float]
    times: int = 0


def _key(name: str, form: Category) -> object:
    """Names an axis in one of its forms."""
    return name, tuple(map(str, form.values)), tuple(form.shares)


def _urns(spec: Spec) -> dict[object, list[int]]:
    """How many rows get each value of the axes that are drawn, in each of their forms."""
    forms: dict[object, Category] = {}
    rows_of: dict[object, int] = {}
    for cells, count in _groups(spec):
        for name in spec.axes:
            if name not in cells and isinstance(form := form_of(spec, name, cells), Category):
                key = _key(name, form)
                forms[key] = form
                rows_of[key] = rows_of.get(key, 0) + count
    return {key: allotted(form.shares, rows_of[key], [0.0] * len(form.values)) for key, form in forms.items()}


def _taken(urn: list[int], chance: int) -> int:
    """The place of the value that is drawn, which is one less in the urn from now on; ``chance`` is below 2**63."""
    ticket = chance * sum(urn) >> 63
    for place, left in enumerate(urn):
        if ticket < left:
            urn[place] -= 1
            return place
        ticket -= left
    raise AssertionError("an urn holds as many values as there are rows")


def allotted(shares: Sequence[float], count: int, owed: list[float], chances: Sequence[float] = ()) -> list[int]:
    """How many of ``count`` each share gets: its part rounded down, and one more for those that claim most.

    ``owed`` is what earlier calls left each of them short of (negative: gave it too much); it counts with the
    remainders and is brought up to date. Where it is 0 throughout, this is Hamilton's method. With ``chances``, in
    [0, 1), one for each share and one more, a count of which some share gets less than two is rounded by them: each is
    rounded up with the probability of its remainder, plus a part of what it is owed, so that what it gets on average
    does not depend on the size of the group.
    """
    parts = [share * count for share in shares]
    given = [int(part + 1e-9) for part in parts]
    remainders = [part - whole for part, whole in zip(parts, given, strict=True)]
    if chances and min(given) < 2:
        likely = [left + PAID * debt for left, debt in zip(remainders, owed, strict=True)]
        more = _sampled(likely, count - sum(given), chances)
    else:
        claims = [left + debt for left, debt in zip(remainders, owed, strict=True)]
        order = sorted(range(len(shares)), key=lambda i: (-round(claims[i], 9), i))
        first = set(order[: count - sum(given)])
        more = [int(i in first) for i in range(len(shares))]
    for i, left in enumerate(remainders):
        given[i] += more[i]
        owed[i] += left - more[i]
    return given


def _sampled(likely: Sequence[float], count: int, chances: Sequence[float]) -> list[int]:
    """1 for each of ``count`` places that are drawn, 0 for the others: each with its probability in ``likely``.

    Systematic sampling in random order (Madow 1949): the probabilities are laid end to end, and what lies at a random
    start and at every whole step from there is drawn. They are cut to [0, 1], and moved from there so that they add up
    to ``count``. ``chances`` are one for each place, which give the order, and the start.
    """
    cut = [min(max(one, 0.0), 1.0) for one in likely]
    lacking = count - sum(cut)
    room = [1 - one for one in cut] if lacking > 0 else cut
    added = lacking / sum(room) if abs(lacking) > 1e-9 else 0.0
    *ranks, start = chances
    drawn, end, passed = [0] * len(cut), 0.0, math.floor(round(-start, 9))
    order = sorted(range(len(cut)), key=lambda i: (ranks[i], i))
    for i in order:
        end = count if i == order[-1] else end + cut[i] + added * room[i]
        marks = math.floor(round(end - start, 9))
        drawn[i], passed = marks - passed, marks
    return drawn


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
    """Deals the cases to splits, so that the shares hold as closely as can be: over all cases, for each value of the
    strata's columns, and in each stratum. It holds a number for each split, stratum and value, however many cases.
    """

    def __init__(self, splits: Mapping[str, float], count: int | None) -> None:
        """``count`` cases are dealt in all; where that is not known, a split may miss its quota by a case."""
        self.splits = splits
        self.left: dict[str, int] = {}
        if count is not None:
            shares = list(splits.values())
            self.left = dict(zip(splits, allotted(shares, count, [0.0] * len(shares)), strict=True))
        self.owed: dict[object, dict[str, float]] = {}
        """Cases that each split is short of (negative: has too many), over all, by stratum, and by column and value."""

    def next(self, stratum: str, values: Sequence[tuple[str, Value]]) -> str:
        """The split of the next case of a stratum, whose columns have these values: the one that lags most."""
        groups = [(1.0, self._of(())), (WITHIN, self._of(stratum)), *((1.0, self._of(value)) for value in values)]
        for _, owed in groups:
            for name, share in self.splits.items():
                owed[name] += share
        open_ = [name for name in self.splits if self.left.get(name, 1)]
        chosen = max(open_, key=lambda name: round(sum(weight * owed[name] for weight, owed in groups), 9))
        if self.left:
            self.left[chosen] -= 1
        for _, owed in groups:
            owed[chosen] -= 1
        return chosen

    def _of(self, group: object) -> dict[str, float]:
        return self.owed.setdefault(group, dict.fromkeys(self.splits, 0.0))
