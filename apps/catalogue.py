"""The recipes that ship with diffalign. Nothing heavy is imported here, so listing them is quick."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from diffalign.errors import NotFoundError

HERE = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Of ``diffalign align``, by name."""
    return _named(HERE / "recipes")


def fit_recipes() -> dict[str, Path]:
    """Of ``diffalign reward fit``, by name."""
    return _named(HERE / "fit_recipes")


def dataset_recipes() -> dict[str, Path]:
    """Of ``diffalign generate``, by name."""
    return _named(HERE / "datasets")


def find(name: str, known: Mapping[str, Path]) -> Path:
    """The file of a recipe's name, of a YAML file, or of the folder of an earlier run. Raises NotFoundError."""
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise NotFoundError(f"no recipe {name!r}; {hint}recipes: {', '.join(known)}; or give a YAML file")


def _named(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
