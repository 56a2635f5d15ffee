"""The composition root: turns the names in a configuration into policies, rewards and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from apps import sources, warm_up_stage
from apps.configured import configuration
from diffalign import optimisers, processes
from diffalign.config import FITTED, RunConfig, is_fitted
from diffalign.errors import ConfigError, NotFoundError
from diffalign.methods import BACKPROP
from diffalign.prompts import WORLDS
from diffalign.types import Modality, Reward, Sample
from diffalign.worlds.shown import DEMONSTRATIONS
from pipelines.diffusion import DiffusionPolicy
from pipelines.fluency import Fluency
from pipelines.language import LanguagePolicy
from pipelines.loading import load_policy
from rewards.arguments import split
from rewards.combine import Combined
from rewards.rater import SimulatedRaters
from rewards.registry import differentiable
from rewards.registry import load as load_reward

log = logging.getLogger(__name__)


def warn_whole(run: str | Path) -> None:
    """Warns that a run whose weights were divided in training is loaded whole."""
    if configuration(str(run), made=True).trainer.shard:
        log.warning(f"run {run} was trained with trainer.shard; here its model is loaded whole, on one device")


STANDARD: Mapping[str, tuple[str, Sequence[str]]] = {
    "embedded:brain-mr": ("brain-mr-ddpo", ()),
    "embedded:emoji": (
        "emoji-ddpo",
        (
            "sampler.steps=10",
            "sampler.guidance_scale=3",
            "rewards=[emoji-checker?graded=true]",
            "evaluation.rewards=[emoji-checker, clip]",
        ),
    ),
}
"""Recipes whose prompts, rewards and sampler stand for a model, with what they have otherwise: `emoji-ddpo` samples in
two steps, which are too few for a model that was not trained on them."""


WORLD_OF: Mapping[str, str] = {
    "embedded:brain-mr": "brain-mr",
    "embedded:emoji": "emoji",
    "embedded:findings-lm": "findings",
}
"""The world whose prompts an embedded model was trained on; it has no words for those of another."""


def standard(model: str, overrides: Sequence[str] = ()) -> RunConfig | None:
    """How a model is sampled and judged where no run says it; None for one that is not embedded, or makes texts."""
    if model not in STANDARD:
        return None
    recipe, others = STANDARD[model]
    return configuration(recipe, (*others, *overrides))


def resolved(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with what the run in this folder makes itself: the model that it begins with after a warm-up,
    and the reward model in place of ``fitted``.
    """
    if config.warm_up is not None:
        config = config.model_copy(update={"model": str(warm_up_stage.model(folder)), "warm_up": None})
    if config.fit is None:
        return config
    place = f"folder={quote(str(folder / 'reward'), safe='/')}"

    def placed(spec: str) -> str:
        name, mark, arguments = spec.partition("?")
        return name + mark + "&".join(place if argument == FITTED else argument for argument in arguments.split("&"))

    rewards = [entry.model_copy(update={"reward": placed(entry.reward)}) for entry in config.rewards]
    measured = [placed(spec) for spec in config.evaluation.rewards]
    evaluation = config.evaluation.model_copy(update={"rewards": measured})
    return config.model_copy(update={"rewards": rewards, "evaluation": evaluation})


def device(name: str) -> torch.device:
    """The device of a configuration; ``auto`` takes an accelerator where there is one.

    Of several processes each has the one that the launcher gave it.
    """
    given = processes.start().device
    if given is not None:
        return processes.own_device(name, given)
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return wanted


def sampling(config: RunConfig, *, training: bool = False) -> dict[str, Any]:
    """How samples are made, as ``load_policy`` takes it: by the section for what the model makes."""
    if config.modality == "image":
        return {"sampler": config.sampler if training else config.looked_at}
    return {"generation": config.generation}


def looking(policy: DiffusionPolicy | LanguagePolicy, config: RunConfig) -> AbstractContextManager[None]:
    """Inside it the policy of a run samples as it is to be measured."""
    return policy.sampled_by(config.looked_at) if isinstance(policy, DiffusionPolicy) else nullcontext()


def policy(config: RunConfig) -> DiffusionPolicy | LanguagePolicy:
    """The model of a configuration, ready to be aligned."""
    return load_policy(
        config.model,
        modality=config.modality,
        adapter=config.adapter,
        full=config.adapter is None,
        critic=config.credit.critic is not None,
        **sampling(config, training=True),
        device=device(config.device),
        precision=config.precision,
        gradient_checkpointing=config.trainer.gradient_checkpointing,
        compiled=config.compile,
        shard=config.trainer.shard,
        seed=config.seed,
    )


def compiled(policy: DiffusionPolicy | LanguagePolicy) -> str:
    """The blocks of a model that are compiled, in words; empty where none are."""
    found = policy.compiled if isinstance(policy, DiffusionPolicy) else {}
    return ", ".join(f"{count} x {name}" for name, count in found.items())


def say_compiled(policy: DiffusionPolicy | LanguagePolicy, say: Callable[[str], None]) -> None:
    """Says, where blocks are compiled, why the first samples and the first update will take so long."""
    if blocks := compiled(policy):
        say(f"compiling {blocks}: whatever is asked of them for the first time takes minutes longer")


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


def judges(config: RunConfig, loaded: Sequence[Reward] | None = None) -> Judges:
    """Loads the rewards, but for those of ``trained`` that are ``loaded`` already. Refuses two of one name, since one
    would take the other's place among the measures.

    A reward that is the whole of what is optimised is measured anyway, so naming it again changes nothing; one of a
    combination that is named again, by the same words, gets a row of its own.
    """
    if not config.rewards:
        return _measured_only(config)
    loaded = trained(config) if loaded is None else loaded
    main = _main(config, loaded)
    owner = {found.name: entry.reward for found, entry in zip(loaded, config.rewards, strict=True)}
    seen: dict[str, str] = {main.name: owner.get(main.name, "the combination of rewards")}
    others = []
    for spec in config.evaluation.rewards:
        if main is loaded[0] and spec == owner[main.name]:
            continue
        found = load_reward(spec)
        first = seen.get(found.name) or owner.get(found.name, spec)
        if found.name in seen or first != spec:
            raise ConfigError(
                f"two rewards that are measured are called {found.name}: {first} and {spec} (evaluation.rewards);"
                " leave one out, or give it another name"
            )
        seen[found.name] = spec
        others.append(found)
    counting = [(r, e) for r, e in zip(loaded, config.rewards, strict=True) if e.weight or len(loaded) == 1]
    trained_by = {standard for _, entry in counting for standard in standards(entry.reward)}
    kin = {name for name, spec in seen.items() if trained_by & standards(spec)}
    counted = {r.name for r, _ in counting} | kin
    directions = {
        name: r.higher_is_better == (e.weight >= 0)
        for r, e in zip(loaded, config.rewards, strict=True)
        for name in (r.name, f"{main.name}/{r.name}")
        if main is not loaded[0]
    }
    return Judges(main, others, frozenset(counted | {main.name}), directions)


def _measured_only(config: RunConfig) -> Judges:
    """Of a run that learns from preferences, where nothing that is measured was optimised."""
    found: dict[str, Reward] = {}
    for spec in config.evaluation.rewards:
        loaded = load_reward(spec)
        if loaded.name in found:
            raise ConfigError(
                f"two rewards that are measured are called {loaded.name} (evaluation.rewards); leave one out, or give"
                " it another name"
            )
        found[loaded.name] = loaded
    main, *others = found.values()
    return Judges(main, others, frozenset(), {})


def standards(spec: str) -> frozenset[str]:
    """What a reward judges by. Two that share one are no independent judges of each other.

    A graded checker goes by what the plain one goes by; a hidden utility also by its world's checker; every reward of a
    fitted model by that model; a CLIP model by itself alone.
    """
    name, arguments = split(spec)
    if name == "hidden-utility":
        raters = SimulatedRaters.load(arguments.get("rater", ""))
        return frozenset({f"raters {raters.sha256}", f"{raters.profile.world}-checker"})
    if "folder" in arguments and name in ("preference", "clinician", "language-reward"):
        return frozenset({f"reward model {Path(arguments['folder']).expanduser().resolve()}"})
    judged = sorted(f"{key}={value}" for key, value in arguments.items() if key not in ("graded", "name"))
    return frozenset({"&".join([name, *judged])})


def world_judged(spec: str) -> str | None:
    """The world whose prompts alone a reward can judge, if there is one."""
    name, arguments = split(spec)
    if name == "hidden-utility":
        return SimulatedRaters.load(arguments.get("rater", "")).profile.world
    return {**{f"{world}-checker": world for world in WORLDS}, "findings-gold": "findings"}.get(name)


def is_of_another_world(spec: str, config: RunConfig) -> bool:
    """Whether a reward can judge nothing of what is made of the configuration's prompts."""
    return config.prompts.source in WORLDS and world_judged(spec) not in (None, config.prompts.source)


def check(config: RunConfig) -> None:
    """Refuses what is wrong in a configuration, as far as that can be known, before any work is done."""
    optimisers.check(config.trainer)
    if config.warm_up is not None:
        optimisers.check(config.warm_up.trainer)
    wanted = config.experience
    for field, rater in (("experience.rater", wanted.rater), ("fit.rater", config.fit.rater if config.fit else None)):
        if rater is not None:
            _same_modality(config, f"{field}: {rater} judges", SimulatedRaters.load(rater).modality)
    files = {
        "experience.path": wanted.path,
        "experience.demonstrations": wanted.demonstrations,
        "warm_up.demonstrations": config.warm_up and config.warm_up.demonstrations,
        "fit.preferences": config.fit and config.fit.preferences,
    }
    for field, path in files.items():
        shown = wanted.source == "demonstrations" if field == "experience.path" else field.endswith("demonstrations")
        if path and not (shown and path in DEMONSTRATIONS) and not Path(path).expanduser().exists():
            worlds = f", and no world of that name ({', '.join(DEMONSTRATIONS)})" if shown else ""
            raise NotFoundError(f"{field}: there is no file {path}{worlds}")
    _same_modality(config, f"experience.path: {wanted.path} has", sources.modality(config))
    if config.fit is not None and config.fit.preferences:
        fitted_to = Path(config.fit.preferences).expanduser()
        _same_modality(config, f"fit.preferences: {fitted_to} has", sources.modality_of_pairs(fitted_to))
        _judged(fitted_to, config.fit.criteria or ())
    if config.warm_up is not None:
        judges(warm_up_stage.configuration(config))
    _know_prompts(config)
    known = [(entry, load_reward(entry.reward)) for entry in config.rewards if not is_fitted(entry.reward)]
    optimised = [reward for _, reward in known]
    if config.objective.name in BACKPROP:
        _have_gradients(config, [reward for entry, reward in known if entry.weight])
    if config.fit is None:
        found = judges(config, optimised)
        loaded = [found.main, *found.others]
    else:
        loaded = [*optimised, *(load_reward(spec) for spec in config.evaluation.rewards if not is_fitted(spec))]
    for one in loaded:
        hint = " (a function of your own says by its attribute 'modality' which of them it judges)"
        _same_modality(config, f"reward {one.name} judges", one.modality, hint)


def _know_prompts(config: RunConfig) -> None:
    for entry in config.rewards:
        if entry.weight and is_of_another_world(entry.reward, config):
            raise ConfigError(
                f"rewards: {entry.reward} judges the prompts of {world_judged(entry.reward)} alone, and prompts.source"
                f" is {config.prompts.source}"
            )


def _have_gradients(config: RunConfig, counting: Sequence[Reward]) -> None:
    without = [one.name for one in counting if not hasattr(one, "differentiable")]
    if without:
        raise ConfigError(
            f"objective {config.objective.name} follows the reward's own gradient, and {' and '.join(without)}"
            f" {'has' if len(without) == 1 else 'have'} none;"
            f" {', '.join(differentiable())} have one, and functions of your own that say differentiable = True"
        )


def _judged(pairs: Path, criteria: Sequence[str]) -> None:
    there = sources.criteria_of_pairs(pairs) if criteria else set()
    if missing := sorted(set(criteria) - there):
        raise ConfigError(
            f"fit.criteria: no pair of {pairs} judges {', '.join(missing)}; it has {', '.join(sorted(there)) or 'none'}"
        )


def _same_modality(config: RunConfig, what: str, modality: Modality | None, hint: str = "") -> None:
    if modality not in (None, config.modality):
        raise ConfigError(f"{what} {modality}s, but the model {config.model} makes {config.modality}s{hint}")


def standing(policy: DiffusionPolicy | LanguagePolicy) -> list[Reward]:
    """What stands beside every evaluation of such a model: of a language model, how fluent its base finds its texts."""
    return [Fluency(policy)] if isinstance(policy, LanguagePolicy) else []


def features(config: RunConfig) -> Callable[[Sequence[Sample]], Tensor] | None:
    """The encoder behind the diversity of images: ``embedded:clip`` if it is there, else None (coarse pixels)."""
    if config.modality != "image":
        return None
    from rewards.clip import EMBEDDED, ClipReward

    if not EMBEDDED.is_dir():
        log.warning("diversity is measured on coarse pixels: embedded:clip is not installed")
        return None
    clip = ClipReward()

    def encode(samples: Sequence[Sample]) -> Tensor:
        return clip.encode_images([sample.image for sample in samples if sample.image is not None])

    return encode


def spreads(config: RunConfig) -> dict[str, Callable[[Sequence[Sample]], float]]:
    """Further measures of the diversity of images: LPIPS, if its weights were fetched (``diffalign fetch lpips``)."""
    from diffalign.assets import CATALOGUE

    if config.modality != "image" or not CATALOGUE["lpips"].present:
        return {}
    from rewards.lpips import lpips_diversity

    def spread(samples: Sequence[Sample]) -> float:
        return lpips_diversity([sample.image for sample in samples if sample.image is not None], net="alex")

    return {"lpips": spread}
