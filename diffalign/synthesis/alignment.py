"""What an aligned model of a dataset was aligned to, in words: ``aligned`` among the facts of a model in a manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELD = "aligned"


@dataclass(frozen=True)
class Change:
    """A reward on held-out prompts, before and after the model was aligned."""

    reward: str
    before: str
    after: str
    difference: str
    interval: str
    """Of 95 %, of the difference; empty where there is none."""
    trained_on: bool
    """Whether the model was trained on this reward, so that a rise says little by itself."""


def sentence(facts: Mapping[str, Any]) -> str:
    """Base, objective, what it was aligned to, and how long; what is not stated is left out."""
    said = f"aligned from {facts.get('base', 'a model that is not named')}"
    if facts.get("objective"):
        said += f" by {facts['objective']}" + (f" (recipe {facts['recipe']})" if facts.get("recipe") else "")
    aims = [f"{one['reward']} (weight {one['weight']:g})" for one in facts.get("rewards") or []]
    if facts.get("examples"):
        aims.append(f"the examples of {facts['examples']}")
    said += f" to {' and '.join(aims)}" if aims else ""
    if facts.get("epochs") is not None:
        said += f", {facts['epochs']} {'epoch' if facts['epochs'] == 1 else 'epochs'}"
    return said + (f", seed {facts['seed']}" if facts.get("seed") is not None else "")


def changes(facts: Mapping[str, Any]) -> list[Change]:
    """What the run itself measured of each reward, those first that it was not trained on."""
    found = [_change(name, one) for name, one in (facts.get("held_out") or {}).items() if isinstance(one, Mapping)]
    return sorted(found, key=lambda one: one.trained_on)


def won(facts: Mapping[str, Any]) -> str:
    """The share of held-out prompts on which the aligned model won against its base; empty where it is not known."""
    rate = facts.get("win_rate") or {}
    share = _finite(rate.get("value"))
    if share is None:
        return ""
    ends = rate.get("ci95")
    between = f" ({100 * ends[0]:.0f} to {100 * ends[1]:.0f} %)" if ends else ""
    judge = f", by {rate['by']}" if rate.get("by") else ""
    ties = " (a tie is half a win)" if rate.get("ties") else ""
    return f"It won {100 * share:.0f} %{between} of {rate.get('n', 'its')} comparisons with its base{judge}{ties}."


def _change(name: str, one: Mapping[str, Any]) -> Change:
    gap = one.get("difference") or {}
    ends = gap.get("ci95")
    return Change(
        name,
        _number((one.get("before") or {}).get("mean")),
        _number((one.get("after") or {}).get("mean")),
        _number(gap.get("mean"), "+.3f"),
        f"{_number(ends[0], '+.3f')} to {_number(ends[1], '+.3f')}" if ends else "",
        bool(one.get("trained_on")),
    )


def _number(value: object, form: str = ".3f") -> str:
    number = _finite(value)
    return "–" if number is None else f"{number:{form}}".replace("-", "\u2212")


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
