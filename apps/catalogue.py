"""The recipes that ship with diffalign. Nothing heavy is imported here, so listing them is quick."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Of ``diffalign align``, by name."""
    return _named(HERE / "recipes")


def fit_recipes() -> dict[str, Path]:
    """Of ``diffalign reward fit``, by name."""
    return _named(HERE / "fit_recipes")


def unknown(name: str, known: Mapping[str, Path]) -> str:
    """The sentence for a name that is no recipe."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no recipe {name!r}; {hint}recipes: {', '.join(known)}; or give a YAML file"


def _named(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
