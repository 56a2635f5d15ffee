"""The stage of a run that fits its own reward model before it trains: ``fit`` in the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from apps import reward_fit
from apps.progress import Status
from apps.sources import apart, judge_pairs
from diffalign import preferences
from diffalign.config import FITTED, RewardModelConfig, RunConfig, is_fitted
from diffalign.errors import ConfigError, InputError, RefusedError, UserError
from diffalign.preferences import Broken
from diffalign.runs import Run
from diffalign.types import Policy, Preference, Prompt
from rewards.arguments import split
from rewards.fit_config import AnyFitConfig, parse

UNFITTED = ("fit.ensemble", "fit.encoder", "fit.length", "fit.epochs", "fit.learning_rate")
"""Fields that nothing has come of before the reward model is fitted: those of the judgements are not among them."""


def fitted(directory: Run) -> bool:
    """Whether the run has fitted its reward model."""
    return (directory.path / "reward" / "reward.json").is_file()


def run(
    wanted: RewardModelConfig,
    config: RunConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    directory: Run,
    status: Status,
) -> None:
    """Fits to RUN/reward-preferences.parquet, and writes RUN/reward/ with a card beside it. A finished fit is kept.

    Neither pairs of held-out prompts nor samples of them are seen. Where nothing can be fitted, what was judged for it
    stays, and the error says how to go on; a copy of pairs that were given goes.
    """
    if fitted(directory):
        return
    path = directory.path / "reward-preferences.parquet"
    if wanted.rater is not None:
        judge_pairs(path, wanted.rater, wanted.collect, wanted.criteria, config.seed, policy, prompts, status)
    elif not path.exists():
        preferences.write(path, _own(Path(wanted.preferences or "").expanduser(), held_out, status))
    try:
        card = reward_fit.fit_into(settings(wanted, config, path), directory.path, "reward-card", status)
    except UserError as error:
        if wanted.rater is None:
            path.unlink()
            raise
        hint = _how_to_go_on(directory, config) if isinstance(error, RefusedError) else (
            f"what was judged is kept in {path}; for other judgements choose another --out"
        )  # fmt: skip
        raise type(error)(f"{error}; {hint}") from error
    for line in reward_fit.in_words(card):
        status.say(line)


def _how_to_go_on(directory: Run, config: RunConfig) -> str:
    place, foreign = directory.path, "fit.length" if config.modality == "image" else "fit.ensemble"
    *fields, last = (name for name in UNFITTED if name != foreign)
    return (
        f"what was judged is kept: 'diffalign align {place / 'config.yaml'} --resume --out {place}' fits to it again,"
        f" by --set with another {', '.join(fields)} or {last}; for other changes choose another --out"
    )


def settings(wanted: RewardModelConfig, config: RunConfig, pairs: Path) -> AnyFitConfig:
    """What is fitted to a file of pairs. ConfigError for a field that reward models of this modality have not."""
    given = {"name": config.name, "seed": config.seed, "preferences": str(pairs), "criteria": wanted.criteria}
    own = {name: getattr(wanted, name) for name in ("ensemble", "encoder", "length", "epochs", "learning_rate")}
    given |= {name: value for name, value in own.items() if value is not None}
    if config.modality == "text":
        # The curve fits again on parts of the pairs, which of a language model takes as long as all the rest.
        given |= {"modality": "text", "encoder": wanted.encoder or config.model, "learning_curve": False}
    return parse(given)


def check(wanted: RewardModelConfig, config: RunConfig) -> None:
    """Refuses before any work is done what could not be fitted, or not be used once it is."""
    settings(wanted, config, Path())
    fitting = {"text": ("language-reward",), "image": ("clinician", "preference")}[config.modality]
    for spec in [*(entry.reward for entry in config.rewards), *config.evaluation.rewards]:
        if is_fitted(spec) and split(spec)[0] not in fitting:
            raise ConfigError(
                f"reward {spec}: what is fitted judges {config.modality}s; name it {' or '.join(fitting)}?{FITTED}"
            )


def _own(path: Path, held_out: Sequence[Prompt], status: Status) -> Iterator[Preference]:
    """The pairs of a file whose prompts are not held out. Raises InputError for a broken row."""
    left_out = 0
    for row in preferences.read(path):
        if isinstance(row, Broken):
            raise InputError(f"{path}: {row}; `diffalign preferences convert` leaves such rows out")
        if apart([row.prompt], held_out):
            yield row
        else:
            left_out += 1
    if left_out:
        status.say(f"{left_out} pairs are of held-out prompts, and left out of the reward model")
