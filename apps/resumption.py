"""What a resumed run is: the run's own configuration, in which only what leaves the numbers as they are may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps import configured, reward_stage
from diffalign.config import RunConfig, load
from diffalign.errors import ConfigError
from diffalign.runs import Run

FREE = (
    "trainer.epochs", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.shard", "evaluation", "device",
)  # fmt: skip
"""Fields that ``--set`` may change in a resumed run, beside those of a reward model that is not fitted yet."""


def opened(out: Path | None) -> Run:
    """The run to continue."""
    if out is None:
        raise ConfigError("--resume needs --out: the run directory to continue")
    return Run.open(out)


def configuration(recipe: str, overrides: Sequence[str], run: Run) -> RunConfig:
    """The run's own configuration with the overrides. Raises ConfigError for another recipe, or another run."""
    file = run.path / "config.yaml"
    begun, wanted = load(file, made=True), load(file, overrides, made=True)
    _same_recipe(recipe, begun, file)
    free = _free(begun, run)
    before, after = dict(_flat(begun.model_dump(mode="json"))), dict(_flat(wanted.model_dump(mode="json")))
    for field in sorted(before.keys() | after.keys()):
        old, new = before.get(field), after.get(field)
        if old != new and not _among(field, free):
            raise ConfigError(
                f"--resume: {field} is {old!r} in {file}, and --set asks for {new!r}; a resumed run must equal an"
                f" uninterrupted one, so only {', '.join(free)} may change"
            )
    return wanted


def _free(begun: RunConfig, run: Run) -> list[str]:
    """A schedule that ends with the last epoch makes the number of epochs a part of every epoch's numbers."""
    free = [name for name in FREE if name != "trainer.epochs" or begun.trainer.schedule == "constant"]
    return free if begun.fit is None or reward_stage.fitted(run) else [*free, *reward_stage.UNFITTED]


def _among(field: str, free: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in free)


def _same_recipe(recipe: str, begun: RunConfig, file: Path) -> None:
    given = Path(recipe).expanduser()
    if any(place.exists() and place.resolve() == given.resolve() for place in (file, file.parent)):
        return
    asked = configured.configuration(recipe, made=True)
    if asked.name != begun.name:
        raise ConfigError(
            f"--resume: {recipe} is named {asked.name!r}, but the run in {file.parent} is named {begun.name!r};"
            f" give the recipe it was started from, or {file}"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf under its dotted name; items of lists by their number."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield prefix.removesuffix("."), value
        return
    for key, inner in items:
        yield from _flat(inner, f"{prefix}{key}.")
