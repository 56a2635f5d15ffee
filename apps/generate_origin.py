"""Where the models of a dataset come from: a model, an adapter on it, and the run that aligned it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps import warm_up_stage
from diffalign import config
from diffalign.config import RunConfig
from diffalign.errors import ConfigError, NotFoundError, UserError
from diffalign.synthesis.naming import without_places

CONFIG, EVALUATION = "config.yaml", "evaluation.json"


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: what is loaded, and the adapter on it."""

    model: str
    adapter: Path | None
    run: Path | None = None
    """The folder of the run that made the model as it is used here, where one did: what it measured holds of it."""

    @classmethod
    def of(cls, name: str, adapter: str | None) -> Origin:
        """Of a model or a run directory. Raises NotFoundError for a run that did not finish."""
        own = Path(adapter).expanduser() if adapter else None
        folder = Path(name).expanduser()
        if not is_run(folder):
            return cls(name, own, _run_of(own, name) if own is not None else None)
        if (folder / "model").is_dir():
            return cls(str(folder / "model"), own, folder if own is None else None)
        if not (folder / "adapter").is_dir():
            raise NotFoundError(f"run {name} has no adapter/ or model/: it did not finish; continue it with --resume")
        if adapter:
            raise ConfigError(f"{name} is a run with an adapter of its own, and adapter names another: {adapter}")
        return cls(_base(folder, config.load(folder / CONFIG, made=True)), folder / "adapter", folder)


def _base(run: Path, begun: RunConfig) -> str:
    """The model that the adapter of a run lies on."""
    return begun.model if begun.warm_up is None else str(warm_up_stage.model(run))


def _run_of(adapter: Path, model: str) -> Path | None:
    """The run that made a bare adapter, if it was made on this model.

    Other tools write a ``config.yaml`` beside their adapters too, and an adapter may be put on another model than its
    own: neither says what this model was aligned to.
    """
    run = adapter.parent
    if not is_run(run):
        return None
    try:
        base = _base(run, config.load(run / CONFIG, made=True))
    except UserError:
        return None
    return run if base == model or Path(base).expanduser().resolve() == Path(model).expanduser().resolve() else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CONFIG).is_file()


def aligned(run: Path) -> dict[str, Any]:
    """What the model of a run was aligned to, and what came of it on held-out prompts, as the run itself has it.

    ``rewards`` are each a ``reward`` and its ``weight``, since two servers have one name here. ``held_out`` (by reward:
    ``before``, ``after``, ``difference``, ``trained_on``) and ``win_rate`` are left out where the run was not
    evaluated. It names no place.
    """
    begun = config.load(run / CONFIG, made=True)
    found: dict[str, Any] = {
        "recipe": begun.name,
        "base": without_places(begun.model),
        "objective": begun.objective.name,
        "experience": begun.experience.source,
        "rewards": [{"reward": without_places(entry.reward), "weight": entry.weight} for entry in begun.rewards],
        "seed": begun.seed,
        "epochs": begun.trainer.epochs,
    }
    if begun.experience.path is not None:
        found["examples"] = without_places(begun.experience.path)
    return found | _outcome(run / EVALUATION)


def _outcome(path: Path) -> dict[str, Any]:
    """Of an evaluation the rewards themselves: their parts stay in the run."""
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rewards = measured.get("rewards") if isinstance(measured, Mapping) else None
    if not isinstance(rewards, Mapping):
        return {}
    kept = ("before", "after", "difference", "trained_on", "higher_is_better")
    held_out = {
        without_places(name): {key: facts[key] for key in kept if key in facts}
        for name, facts in rewards.items()
        if "/" not in name
    }
    return {"held_out": held_out} | ({"win_rate": measured["win_rate"]} if measured.get("win_rate") else {})
