"""Axes: the columns of rows that are drawn, with their values and shares, and what holds for some rows only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from diffalign.section import Section
from diffalign.synthesis.cases import Value
from diffalign.synthesis.faults import made, meant

Cell = str | int | float | bool
When = dict[str, Any]
"""A value or a list of values, by column."""
LEAST = 1e-6
"""Share of a normal distribution that a range beside its mean has to hold: below it numbers crowd at one end."""


class Category(Section):
    """Values with their shares."""

    values: list[Any] = Field(min_length=1)
    shares: list[float] = Field(default_factory=list)
    """As many, which add up to 1."""

    @model_validator(mode="after")
    def _fits(self) -> Category:
        for value in self.values:
            if not isinstance(value, Cell) or value == "" or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{value!r} is no value of an axis: a text, a number, true or false")
        if len(types := {type(value).__name__: value for value in self.values}) > 1:
            raise ValueError(
                f"its values are of several kinds ({', '.join(map(repr, types.values()))}); quote them all"
            )
        if twice := [one for i, one in enumerate(self.values) if one in self.values[:i]]:
            raise ValueError(f"the value {twice[0]!r} stands there twice")
        return self

    @property
    def kind(self) -> str:
        """The kind of the column."""
        return "boolean" if all(isinstance(value, bool) for value in self.values) else "category"


class Numbers(Section):
    """A range of numbers, ends included."""

    integer: tuple[int, int] | None = None
    number: tuple[float, float] | None = None
    distribution: Literal["uniform", "normal"] = "uniform"
    mean: float | None = None
    """Of the normal distribution, which is cut at the ends of the range."""
    sd: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Numbers:
        if (self.integer is None) == (self.number is None):
            raise ValueError("a range is {integer: [LOW, HIGH]} or {number: [LOW, HIGH]}")
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"the range goes from {low:g} to {high:g}; its first end is the lower one")
        normal = self.distribution == "normal"
        if (self.mean is not None, self.sd is not None) != (normal, normal):
            raise ValueError("mean and sd go with distribution: normal, both of them")
        if normal and low < high:
            self._lies_within()
        return self

    def _lies_within(self) -> None:
        """Raises ValueError where nearly every number would stand at one end of the range."""
        assert self.mean is not None
        assert self.sd is not None
        if not (math.isfinite(self.mean) and math.isfinite(self.sd)):
            raise ValueError(f"mean and sd are finite numbers; got {self.mean:g} and {self.sd:g}")
        low, high = self.range
        curve = NormalDist(self.mean, self.sd)
        if not low <= self.mean <= high and curve.cdf(high) - curve.cdf(low) < LEAST:
            raise ValueError(
                f"a normal distribution of mean {self.mean:g} and sd {self.sd:g} has next to nothing from {low:g} to "
                f"{high:g}; the mean belongs into the range, or near it"
            )

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest number."""
        found = self.integer or self.number
        assert found is not None
        return found

    @property
    def kind(self) -> str:
        """The kind of the column."""
        return "integer" if self.integer is not None else "number"


def _axis(value: object) -> object:
    """An axis as it is written, in one form."""
    if isinstance(value, Category | Numbers):
        return value
    if isinstance(value, list):
        return made(Category, {"values": value, "shares": [1 / max(1, len(value))] * len(value)})
    if not isinstance(value, Mapping) or not value:
        raise ValueError("an axis is a list of values, {value: share, ...}, or a range such as {integer: [20, 80]}")
    if {"integer", "number"} & set(value):
        return made(Numbers, value)
    if set(value) <= {"values", "shares"} and isinstance(value.get("values"), list):
        given = made(Category, value)
        if len(given.shares) != len(given.values):
            raise ValueError(f"there are {len(given.values)} values and {len(given.shares)} shares")
        shares("shares", given.shares)
        return given
    if wrong := [one for one in value.values() if isinstance(one, bool) or not isinstance(one, int | float)]:
        raise ValueError(f"a share is a number; got {wrong[0]!r}")
    shares("its shares", [float(one) for one in value.values()])
    return made(Category, {"values": list(value), "shares": list(value.values())})


def shares(what: str, found: Iterable[float]) -> None:
    """Raises ValueError unless the shares are positive and add up to 1 (to 1e-6)."""
    known = list(found)
    if broken := [one for one in known if not (one > 0 and math.isfinite(one))]:
        raise ValueError(f"{what}: a share is above 0; got {broken[0]:g}")
    if abs(sum(known) - 1) > 1e-6:
        raise ValueError(f"{what} add up to {sum(known):g}, not to 1")


AxisConfig = Annotated[Category | Numbers, BeforeValidator(_axis)]


class ConditionConfig(Section):
    """What holds for rows with certain values."""

    when: When = Field(min_length=1)
    """A value, or a list of values, of each axis that it depends on."""
    set: dict[str, AxisConfig] = Field(default_factory=dict)
    """Axes as they are in these rows."""
    drop: list[str] = Field(default_factory=list)
    """Axes that are empty in these rows."""


def matches(when: Mapping[str, Any], cells: Mapping[str, Value]) -> bool:
    """Whether a row has one of the values that ``when`` lists, in each of its columns."""
    return all(
        any(
            cells.get(name) is not None and cells[name] == one
            for one in (wanted if isinstance(wanted, list) else [wanted])
        )
        for name, wanted in when.items()
    )


def fault_of(
    axes: Mapping[str, Category | Numbers], conditions: Sequence[ConditionConfig], strata: Sequence[str]
) -> str | None:
    """What is wrong between the axes, in words that begin with the field; None where nothing is."""
    for name in axes:
        if fault := fault_of_column(name) or _mixed(name, axes, conditions):
            return f"axes.{name}: {fault}"
    for i, condition in enumerate(conditions):
        if fault := _fault_of_condition(condition, axes, conditions):
            return f"conditions.{i}{fault}"
    for name in strata:
        if name not in axes:
            return f"strata: {_unknown(name, axes)}"
        if isinstance(axes[name], Numbers):
            return f"strata: {name} is a range of numbers; strata are made of categories"
    return None


def _fault_of_condition(
    condition: ConditionConfig, axes: Mapping[str, Category | Numbers], conditions: Sequence[ConditionConfig]
) -> str | None:
    order = list(axes)
    for name in [*condition.when, *condition.set, *condition.drop]:
        if name not in axes:
            return f": {_unknown(name, axes)}"
    if not condition.set and not condition.drop:
        return ": it neither sets nor drops an axis"
    for name, wanted in condition.when.items():
        if fault := _never(name, wanted, axes, conditions):
            return f".when: {fault}"
    last = max(map(order.index, condition.when))
    for name in [*condition.set, *condition.drop]:
        if order.index(name) <= last:
            return f": {name} stands before {order[last]}, on which it depends; put it below under axes"
    return None


def fault_of_column(name: str) -> str | None:
    """Why a column cannot be called so; None where it can."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        return f"{name[:60]!r} is no name of a column: up to 200 letters that can be printed"
    return None


def _mixed(name: str, axes: Mapping[str, Category | Numbers], conditions: Sequence[ConditionConfig]) -> str | None:
    """Why the forms that an axis takes do not make one column."""
    forms = [axes[name], *(condition.set[name] for condition in conditions if name in condition.set)]
    kinds = {"number" if isinstance(form, Numbers) else type(form.values[0]).__name__ for form in forms}
    return f"conditions give it values of another kind ({', '.join(sorted(kinds))})" if len(kinds) > 1 else None


def _never(
    name: str, wanted: object, axes: Mapping[str, Category | Numbers], conditions: Sequence[ConditionConfig]
) -> str | None:
    forms = [axes[name], *(condition.set[name] for condition in conditions if name in condition.set)]
    if any(isinstance(form, Numbers) for form in forms):
        return f"{name} is a range of numbers; conditions are on categories"
    known = [value for form in forms if isinstance(form, Category) for value in form.values]
    for one in wanted if isinstance(wanted, list) else [wanted]:
        if one not in known:
            return f"{name} is never {one!r}; {meant(str(one), map(str, dict.fromkeys(known)))}"
    return None


def _unknown(name: str, axes: Mapping[str, object]) -> str:
    return f"there is no axis {name}; {meant(name, axes)}"
