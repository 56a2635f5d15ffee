"""Left and right, as a rater saw them, and first and second, as the study keeps them: turned into each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Side = Literal["left", "right"]
Sample = Literal["first", "second"]

_OTHER = {"left": "right", "right": "left"}
_LEFT_PREFERRED = {"left": 1.0, "right": 0.0, "tie": 0.5, "tie_good": 0.5, "tie_bad": 0.5}


def standing(first_is_left: bool) -> dict[Side, Sample]:
    """Which sample stood where."""
    return {"left": "first", "right": "second"} if first_is_left else {"left": "second", "right": "first"}


def first_preferred(choice: str, first_is_left: bool) -> float:
    """How far the first sample is preferred: 1, 0, or 0.5 for a tie."""
    left = _LEFT_PREFERRED[choice]
    return left if first_is_left else 1 - left


def outcome(choice: str, first_is_left: bool) -> str:
    """What a choice counts as: ``for_first``, ``for_second`` or ``ties``."""
    return {1.0: "for_first", 0.0: "for_second", 0.5: "ties"}[first_preferred(choice, first_is_left)]


def swapped(answer: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """The same answer, a choice or a number for each side, had the samples stood the other way round."""
    if isinstance(answer, str):
        return _OTHER.get(answer, answer)
    return {_OTHER[side]: value for side, value in answer.items()}
