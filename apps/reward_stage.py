"""The stage of a run that fits its own reward model before it trains: ``fit`` in the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from apps import reward_fit
from apps.progress import Status
from apps.sources import apart, judge_pairs
from diffalign import preferences
from diffalign.config import RewardModelConfig, RunConfig
from diffalign.errors import InputError
from diffalign.preferences import Broken
from diffalign.runs import Run
from diffalign.types import Policy, Preference, Prompt
from rewards.fit_config import FitConfig


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

    Neither pairs of held-out prompts nor samples of them are seen.
    """
    if (directory.path / "reward" / "reward.json").is_file():
        return
    path = directory.path / "reward-preferences.parquet"
    if wanted.rater is not None:
        judge_pairs(path, wanted.rater, wanted.collect, wanted.criteria, config.seed, policy, prompts, status)
    elif not path.exists():
        preferences.write(path, _own(Path(wanted.preferences or "").expanduser(), held_out, status))
    fit = FitConfig(
        name=config.name, seed=config.seed, preferences=str(path), criteria=wanted.criteria, ensemble=wanted.ensemble
    )
    card = reward_fit.fit_into(fit, directory.path, "reward-card", status)
    for line in reward_fit.in_words(card):
        status.say(line)


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
