"""What a rater answers, and whether it is an answer to what was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.errors import InputError
from diffalign.study.protocol import Criterion, Rules
from diffalign.study.schema import CHOICES

Choice = Literal["left", "right", "tie_good", "tie_bad", "cannot_judge"]
LONGEST_COMMENT = 20_000
MOST_POINTS = 500
VIEW_GRACE = 0.05
"""Seconds by which a browser's timer may be early."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place in an image that the rater marked, such as an artefact."""

    side: Literal["left", "right"]
    x: float
    """From 0, the left edge, to 1."""
    y: float
    """From 0, the upper edge, to 1."""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One vote, as the rater gave it: in terms of sides, never of samples."""

    choice: Choice
    strength: int | None = None
    """1 slightly, 2 clearly, 3 much better; only where a side was chosen."""
    criteria: Mapping[str, Any] = field(default_factory=dict)
    """Per criterion ``left``, ``right`` or ``tie``, or for a scale ``{"left": 3, "right": 5}``."""
    points: Sequence[Point] = ()
    comment: str = ""
    shown_at: float | None = None
    """When the pair was on the screen, by the rater's clock, in seconds since 1970."""
    decided_at: float | None = None

    def check(self, rules: Rules) -> None:
        """Raises InputError where this is no answer to what the protocol asks."""
        if self.choice not in CHOICES:
            raise InputError(f"there is no choice {self.choice!r}; there are {', '.join(CHOICES)}")
        if self.strength is not None:
            if self.choice not in ("left", "right"):
                raise InputError(f"a strength goes with left or right, not with {self.choice}")
            if not rules.strength:
                raise InputError("this protocol does not ask for a strength")
            if type(self.strength) is not int or not 1 <= self.strength <= 3:
                raise InputError(f"strength is {self.strength!r}; it is 1, 2 or 3")
        self._check_criteria(rules)
        self._check_points(rules)
        if len(self.comment) > LONGEST_COMMENT:
            raise InputError(f"the comment has {len(self.comment)} characters; {LONGEST_COMMENT} are allowed")
        self._check_times(rules.min_view_seconds)

    def _check_criteria(self, rules: Rules) -> None:
        asked = {criterion.name: criterion for criterion in rules.criteria}
        for name, value in self.criteria.items():
            if name not in asked:
                raise InputError(f"there is no criterion {name!r}; there are {', '.join(asked) or 'none'}")
            _check_criterion(asked[name], value)
        missing = [name for name in asked if name not in self.criteria]
        if rules.criteria_required and missing and self.choice != "cannot_judge":
            raise InputError(f"every criterion is to be answered; {', '.join(missing)} is not yet")

    def _check_points(self, rules: Rules) -> None:
        if len(self.points) > MOST_POINTS:
            raise InputError(f"{len(self.points)} points are too many; {MOST_POINTS} are allowed")
        for point in self.points:
            if point.side not in ("left", "right") or not (0 <= point.x <= 1 and 0 <= point.y <= 1):
                raise InputError(f"a point lies left or right, with x and y from 0 to 1; got {point}")
            if point.label not in rules.points:
                allowed = ", ".join(rules.points) or "nothing"
                raise InputError(f"a point marks one of what the protocol names, {allowed}; got {point.label!r}")

    def _check_times(self, at_least: float) -> None:
        times = [time for time in (self.shown_at, self.decided_at) if time is not None]
        if not all(math.isfinite(time) for time in times) or times != sorted(times):
            raise InputError("shown_at and decided_at are times, the second not before the first")
        if len(times) == 2 and times[1] - times[0] < at_least - VIEW_GRACE:
            raise InputError(f"look at the pair for {at_least:g} s at least; this answer came after less")


def _check_criterion(criterion: Criterion, value: object) -> None:
    if criterion.kind == "prefer":
        if value not in ("left", "right", "tie"):
            raise InputError(f"criterion {criterion.name} is answered by left, right or tie; got {value!r}")
        return
    points = len(criterion.anchors)
    good = isinstance(value, Mapping) and set(value) == {"left", "right"}
    if not good or not all(type(x) is int and 1 <= x <= points for x in value.values()):  # type: ignore[attr-defined]
        raise InputError(
            f"criterion {criterion.name} is answered by a number from 1 to {points} for left and for right;"
            f" got {value!r}"
        )
