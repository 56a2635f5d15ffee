"""The stage of a run that learns from demonstrations before anything else: ``warm_up`` in the configuration.

It is a run of its own in ``RUN/warm-up/``, with its checkpoints, its evaluation and its report. The model that it
leaves is what the run begins with.
"""

from __future__ import annotations

from pathlib import Path

from diffalign.config import RunConfig, is_fitted, parse
from diffalign.runs import Run

FOLDER = "warm-up"
DONE = "evaluation.json"
"""The last thing that the stage writes but for its report."""


def configuration(config: RunConfig) -> RunConfig:
    """The run that the stage is. ConfigError where nothing could be measured beside it."""
    assert config.warm_up is not None
    measured = [spec for spec in config.evaluation.rewards if not is_fitted(spec)]
    plain = config.model_dump(mode="json")
    kept = {name: plain[name] for name in plain if name not in ("warm_up", "fit", "objective", "credit", "adapter")}
    return parse(
        {
            **kept,
            "name": f"{config.name}-warm-up",
            "adapter": None,
            "rewards": [],
            "experience": {"source": "demonstrations", "path": config.warm_up.demonstrations},
            "objective": {"name": "sft"},
            "trainer": plain["warm_up"]["trainer"],
            "evaluation": {**plain["evaluation"], "rewards": measured, "every": 0},
        },
        made=True,
    )


def model(folder: Path) -> Path:
    """Where the run in this folder keeps the model that it begins with."""
    return folder / FOLDER / "model"


def stage(folder: Path, config: RunConfig) -> Run | None:
    """The stage's run, begun if it was not; None where it is done."""
    run = Run(folder / FOLDER)
    if (run.path / DONE).is_file():
        return None
    if not (run.path / "config.yaml").is_file():
        run.begin(configuration(config))
    return run
