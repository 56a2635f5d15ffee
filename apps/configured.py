"""What a name, a file and overrides make. No library is loaded for it, so that its faults are told at once."""

from __future__ import annotations

from collections.abc import Sequence

from apps.catalogue import find, recipes
from diffalign.config import RunConfig, fields_of, parse
from pipelines.naming import modality_of


def configuration(recipe: str, overrides: Sequence[str] = (), *, made: bool = False) -> RunConfig:
    """The configuration of a recipe's name, a YAML file, or a run directory; ``made`` where that run is only read."""
    data, origin = fields_of(find(recipe, recipes()), overrides, "model: embedded:emoji")
    if isinstance(data.get("model"), str):
        data.setdefault("modality", modality_of(data["model"]))
    return parse(data, origin, made=made)
