"""The composition root: turns the names in a configuration into policies, rewards and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from diffalign.config import RunConfig, load
from diffalign.errors import ConfigError, NotFoundError
from diffalign.runs import hash_files
from diffalign.types import Reward, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy, locate
from rewards.combine import Combined
from rewards.registry import load as load_reward

log = logging.getLogger(__name__)
RECIPES = Path(__file__).parent / "recipes"


def recipes() -> dict[str, Path]:
    """The recipes that ship with diffalign, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


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
    raise NotFoundError(f"no recipe {recipe!r}; recipes: {', '.join(known)}; or give a YAML file")


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
    """What is optimised: the one reward as it is, or the weighted combination."""
    entries = config.rewards
    if len(entries) == 1 and (entries[0].weight, entries[0].center, entries[0].scale) == (1.0, 0.0, 1.0):
        return load_reward(entries[0].reward)
    return Combined([(load_reward(e.reward), e.weight, {"center": e.center, "scale": e.scale}) for e in entries])


def held_out_rewards(config: RunConfig) -> list[Reward]:
    """What is measured and not optimised."""
    return [load_reward(spec) for spec in config.evaluation.rewards]


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


def hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the base model's files and of the user's own rewards; a hub id and our version as they are."""
    where = locate(config.model)
    found = {"model": where if isinstance(where, str) else "sha256:" + hash_files(list(where.rglob("*.safetensors")))}
    for spec in [*(entry.reward for entry in config.rewards), *config.evaluation.rewards]:
        source = Path(spec.partition("?")[0].rpartition(":")[0]).expanduser()
        own = source.suffix == ".py" and source.is_file()
        found[f"reward {spec}"] = "sha256:" + hash_files([source]) if own else f"diffalign {version('diffalign')}"
    return found
