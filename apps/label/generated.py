"""Pairs that models make: a run beside its base model, models beside each other, or one model at two seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from apps import build, configured, evaluate
from apps.catalogue import recipes
from apps.progress import Status
from diffalign import prompts as prompt_sources
from diffalign.config import RunConfig
from diffalign.errors import ConfigError
from diffalign.seeds import derive
from diffalign.study import StudyPair
from diffalign.types import Policy, Prompt, Sample

Split = Literal["train", "held-out"]
PLAIN = "sd15-ddpo"
"""The recipe whose sampler stands in for a model that has none of its own."""
Key = tuple[int, int]
"""A prompt by number, and the round in which it is asked for."""


@dataclass(frozen=True)
class Arm:
    """A model or run, and the name by which the study knows it."""

    name: str
    source: str


@dataclass(frozen=True)
class Plan:
    """What will be sampled."""

    arms: Sequence[Arm]
    config: RunConfig
    prompts: Sequence[Prompt]
    split: str
    """Which prompts these are, in words."""
    pairs: Sequence[tuple[Key, tuple[int, int]]]
    """Each with the numbers of its two arms; the same number twice is one model at two seeds."""
    seed: int


def plan(
    sources: Sequence[str],
    against: str | None,
    overrides: Sequence[str],
    wanted: str | None,
    split: Split | None,
    count: int | None,
    seed: int,
) -> Plan:
    """Decides what is compared on which prompts. ``wanted`` is a number of prompts, or a file of them."""
    names = [*sources, *([against] if against else [])]
    config = _configuration(names, overrides, wanted)
    if len(names) == 1 and evaluate.is_run(names[0]):
        names.append(config.model)
    arms = [Arm(_label(name), name) for name in names]
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError(f"two of {', '.join(arm.name for arm in arms)} have one name; rename a run's folder")
    # One model alone gives pairs to learn from; several are compared on what none of them was trained on.
    split = split or ("train" if len(arms) == 1 else "held-out")
    prompts, said = _prompts(config, wanted, split)
    return Plan(arms, config, prompts, said, _pairs(len(prompts), len(arms), count, seed), seed)


def _configuration(names: Sequence[str], overrides: Sequence[str], wanted: str | None) -> RunConfig:
    """The configuration of the first run, else what stands for the first model, else a plain one."""
    run = next((name for name in names if evaluate.is_run(name)), None)
    if run is not None:
        return evaluate.of_run(run, overrides)
    if (config := build.standard(names[0], overrides)) is not None:
        return config
    recipe = next((name for name in recipes() if configured.configuration(name).model == names[0]), None)
    if recipe is None and (wanted is None or wanted.isdigit()):
        raise ConfigError(f"{names[0]} has no prompts of its own; name a file of them: --prompts FILE")
    return configured.configuration(recipe or PLAIN, overrides)


def _label(name: str) -> str:
    """The name of an arm: of a folder its last part, for what is above it may be somebody's own."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def _prompts(config: RunConfig, wanted: str | None, split: Split) -> tuple[list[Prompt], str]:
    if wanted is not None and not wanted.isdigit():
        return prompt_sources.read(Path(wanted).expanduser()), f"the prompts of {Path(wanted).name}"
    count, field = int(wanted or 0), "train" if split == "train" else "held_out"
    chosen = config.prompts
    # A world has a fixed split, so more may be asked for; of a file it depends on how many are held out.
    if count and (split == "train" or chosen.source in prompt_sources.WORLDS):
        chosen = chosen.model_copy(update={field: count})
    train, held_out = prompt_sources.load(chosen, config.seed, training=split == "train")
    found = train if split == "train" else held_out
    if count > len(found):
        raise ConfigError(f"{chosen.source} has {len(found)} {split} prompts, but --prompts asks for {count}")
    return found[: count or None], f"{split} prompts of {chosen.source}"


def _pairs(prompts: int, arms: int, count: int | None, seed: int) -> list[tuple[Key, tuple[int, int]]]:
    """Every prompt with every two arms, in as many rounds as ``count`` needs; of the last round a random part."""
    couples = list(combinations(range(arms), 2)) or [(0, 0)]
    one = [(prompt, couple) for prompt in range(prompts) for couple in couples]
    count = len(one) if count is None else count
    rounds, rest = divmod(count, len(one))
    chance = random.Random(derive(seed, "label-pairs"))
    found = [((prompt, number), couple) for number in range(rounds) for prompt, couple in one]
    part = sorted(chance.sample(range(len(one)), rest))
    return found + [((one[i][0], rounds), one[i][1]) for i in part]


def pairs(plan: Plan, status: Status) -> Iterator[StudyPair]:
    """Samples what the plan says, a batch at a time; nothing but the batch is held in memory."""
    policies = [evaluate.sampler(arm.source, plan.config) for arm in plan.arms]
    size = max(1, min(policy.batch_size for policy in policies) // (2 if len(policies) == 1 else 1))
    keys = list(dict.fromkeys(key for key, _ in plan.pairs))
    done = 0
    for start in range(0, len(keys), size):
        chunk = set(keys[start : start + size])
        batch = [(key, couple) for key, couple in plan.pairs[done:] if key in chunk]
        made = _sampled(plan, policies, batch)
        for key, (first, second) in batch:
            left, right = (made[key, first, 0], made[key, second, int(first == second)])
            yield StudyPair(
                left.prompt, left, right, plan.arms[first].name, plan.arms[second].name, None,
                {"first": _provenance(plan), "second": _provenance(plan)},
            )  # fmt: skip
        done += len(batch)
        status("sampling pairs", done, len(plan.pairs))


def _sampled(
    plan: Plan, policies: Sequence[Policy], batch: Sequence[tuple[Key, tuple[int, int]]]
) -> dict[tuple[Key, int, int], Sample]:
    """Samples by key, arm and draw. The draws of one key and number have one seed, whatever the arm."""
    needed = dict.fromkeys(
        (key, arm, int(first == second and place == 1))
        for key, (first, second) in batch
        for place, arm in enumerate((first, second))
    )
    found: dict[tuple[Key, int, int], Sample] = {}
    for number, policy in enumerate(policies):
        mine = [place for place in needed if place[1] == number]
        for i in range(0, len(mine), policy.batch_size):
            some = mine[i : i + policy.batch_size]
            prompts = [plan.prompts[key[0]] for key, _, _ in some]
            seeds = [
                derive(plan.seed, "label", prompt.key, key[1], draw)
                for prompt, (key, _, draw) in zip(prompts, some, strict=True)
            ]
            found |= zip(some, policy.rollout(prompts, seeds).samples, strict=True)
    return found


def _provenance(plan: Plan) -> dict[str, object]:
    return {"sampler": plan.config.looked_at.model_dump(mode="json")}
