"""The composition root: turns the names in a configuration into policies, rewards and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from apps.catalogue import recipes, unknown
from diffalign.config import FITTED, RunConfig, load
from diffalign.errors import ConfigError, NotFoundError
from diffalign.types import Reward, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy
from rewards.arguments import split
from rewards.combine import Combined
from rewards.registry import load as load_reward

log = logging.getLogger(__name__)


def configuration(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a recipe's name, a YAML file, or a run directory."""
    known = recipes()
    if recipe in known:
        return load(known[recipe], overrides)
    path = Path(recipe).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return load(path / "config.yaml", overrides)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return load(path, overrides)
    raise NotFoundError(unknown(recipe, known))


def resolved(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the reward model that the run in this folder fits in place of ``fitted``."""
    if config.fit is None:
        return config
    place = f"folder={quote(str(folder / 'reward'), safe='/')}"
    rewards = [r.model_copy(update={"reward": r.reward.replace(FITTED, place)}) for r in config.rewards]
    measured = [spec.replace(FITTED, place) for spec in config.evaluation.rewards]
    evaluation = config.evaluation.model_copy(update={"rewards": measured})
    return config.model_copy(update={"rewards": rewards, "evaluation": evaluation})


def device(name: str) -> torch.device:
    """The device of a configuration; ``auto`` takes an accelerator where there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return wanted


def policy(config: RunConfig) -> DiffusionPolicy:
    """The model of a configuration, ready to be aligned."""
    return load_policy(
        config.model,
        adapter=config.adapter,
        full=config.adapter is None,
        sampler=config.sampler,
        device=device(config.device),
        precision=config.precision,
        gradient_checkpointing=config.trainer.gradient_checkpointing,
        seed=config.seed,
    )


def reward(config: RunConfig) -> Reward:
    """What is optimised: the one reward as it is, or the weighted combination. Raises ConfigError if there is none."""
    if not config.rewards:
        raise ConfigError(f"{config.name} learns from {config.experience.source}, so it optimises no reward")
    return _main(config, trained(config))


def trained(config: RunConfig) -> list[Reward]:
    """The rewards of which what is optimised is made, one by one."""
    return [load_reward(entry.reward) for entry in config.rewards]


def _main(config: RunConfig, loaded: Sequence[Reward]) -> Reward:
    entries = config.rewards
    if len(entries) == 1 and (entries[0].weight, entries[0].center, entries[0].scale) == (1.0, 0.0, 1.0):
        return loaded[0]
    return Combined(
        [(r, e.weight, {"center": e.center, "scale": e.scale}) for r, e in zip(loaded, entries, strict=True)]
    )


@dataclass(frozen=True)
class Judges:
    """The rewards of a configuration: what is optimised, and what is measured beside it."""

    main: Reward
    """What is optimised; where nothing is, because preferences are learned from, the first that is measured."""
    others: Sequence[Reward]
    trained_on: frozenset[str]
    """Names of what is optimised, and of each reward in it that counts; or of what stood behind simulated raters."""
    wanted: Mapping[str, bool]
    """Of the rewards in a combination, and of what they measure: whether training wants more of it."""


def judges(config: RunConfig) -> Judges:
    """Loads the rewards. Refuses two of one name, since one would take the other's place among the measures.

    A reward that is the whole of what is optimised is measured anyway, so naming it again changes nothing; one of a
    combination that is named again, by the same words, gets a row of its own.
    """
    if not config.rewards:
        return _measured_only(config)
    loaded = trained(config)
    main = _main(config, loaded)
    owner = {found.name: entry.reward for found, entry in zip(loaded, config.rewards, strict=True)}
    seen: dict[str, str] = {main.name: owner.get(main.name, "the combination of rewards")}
    others = []
    for spec in config.evaluation.rewards:
        found = load_reward(spec)
        if main is loaded[0] and spec == owner[main.name]:
            continue
        first = seen.get(found.name) or owner.get(found.name, spec)
        if found.name in seen or first != spec:
            raise ConfigError(
                f"two rewards that are measured are called {found.name}: {first} and {spec} (evaluation.rewards);"
                " leave one out, or give it another name"
            )
        seen[found.name] = spec
        others.append(found)
    counting = [(r, e) for r, e in zip(loaded, config.rewards, strict=True) if e.weight or len(loaded) == 1]
    kin = {_kind(entry.reward) for _, entry in counting}
    counted = {r.name for r, _ in counting} | {name for name, spec in seen.items() if _kind(spec) in kin}
    directions = {
        name: r.higher_is_better == (e.weight >= 0)
        for r, e in zip(loaded, config.rewards, strict=True)
        for name in (r.name, f"{main.name}/{r.name}")
        if main is not loaded[0]
    }
    return Judges(main, others, frozenset(counted | {main.name}), directions)


def _measured_only(config: RunConfig) -> Judges:
    """Of a run that learns from preferences: what simulated raters go by is no judge that was kept out of training."""
    found: dict[str, Reward] = {}
    behind = set()
    for spec in config.evaluation.rewards:
        loaded = load_reward(spec)
        if loaded.name in found:
            raise ConfigError(
                f"two rewards that are measured are called {loaded.name} (evaluation.rewards); leave one out, or give"
                " it another name"
            )
        found[loaded.name] = loaded
        name, arguments = split(spec)
        if name == "hidden-utility" and arguments.get("rater") == config.experience.rater:
            behind.add(loaded.name)
    main, *others = found.values()
    return Judges(main, others, frozenset(behind), {})


def _kind(spec: str) -> tuple[str, frozenset[str]]:
    """What a reward judges by: a graded checker and the plain one are the same judge, two CLIP models are not."""
    name, _, arguments = spec.partition("?")
    return name, frozenset(part for part in arguments.split("&") if part and not part.startswith("graded="))


def features() -> Callable[[Sequence[Sample]], Tensor] | None:
    """The encoder behind the diversity: ``embedded:clip`` if it is there, else None (coarse pixels)."""
    from rewards.clip import EMBEDDED, ClipReward

    if not EMBEDDED.is_dir():
        log.warning("diversity is measured on coarse pixels: embedded:clip is not installed")
        return None
    clip = ClipReward()

    def encode(samples: Sequence[Sample]) -> Tensor:
        return clip.encode_images([sample.image for sample in samples if sample.image is not None])

    return encode
