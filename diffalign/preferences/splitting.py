"""Which preferences are held out: whole prompts, or whole cases, never a part of one."""

from __future__ import annotations

from collections.abc import Iterable

from diffalign.errors import ConfigError, InputError
from diffalign.prompts import plain
from diffalign.seeds import derive
from diffalign.types import Prompt


def group(prompt: Prompt) -> str:
    """What must not stand on both sides: the case that the prompt is about (``attributes["case"]``), or its text.

    Spaces and capitals do not make another text, and ids do not. A prompt without text is known by its id.
    """
    case = prompt.attributes.get("case")
    return plain(prompt.text) or prompt.key if case is None else f"case {case}"


def is_held_out(key: str, share: float, seed: int = 0) -> bool:
    """Whether this group is held out. It depends on nothing else, so rows that are added later move no other row."""
    return derive(seed, "held-out", key) < share * 2**63


def split(groups: Iterable[str], held_out: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on, and of the rows to hold out, from the group of each row.

    ``held_out`` is the chance of a group to be held out, so the share of rows is near it where there are many groups.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is {held_out:g}; it is a share, from 0 to below 1")
    sides: tuple[list[int], list[int]] = ([], [])
    seen = set()
    for number, key in enumerate(groups):
        sides[is_held_out(key, held_out, seed)].append(number)
        seen.add(key)
    if not sides[0] or (held_out and not sides[1]):
        empty = "hold out" if sides[0] else "train on"
        raise InputError(
            f"{len(seen)} different prompts or cases with held_out {held_out:g} and seed {seed} leave none to {empty};"
            " take more prompts, another share, or another seed"
        )
    return sides
