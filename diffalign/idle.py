"""Fields that the chosen method has no use for: a configuration that sets one is refused, never quietly half followed.

A field is set where it differs from its default: the written configuration of a run names every field. How much
simulated raters judge (``collect``) may stay where people's own judgements take their place: a recipe has both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diffalign.methods import FORWARD_PROCESS, POLICY_GRADIENT, RECORDED

if TYPE_CHECKING:
    from diffalign.config import RunConfig

Rule = tuple[tuple[str, ...], Callable[["RunConfig"], bool], str]


def _credited(config: RunConfig) -> bool:
    credits = config.objective.name in (*POLICY_GRADIENT, *FORWARD_PROCESS, "reward-weighted")
    return credits and config.experience.source == "rollouts"


RULES: tuple[Rule, ...] = (
    (
        ("experience.collect",),
        lambda c: c.experience.source in ("pairs", "labels"),
        "it counts what simulated raters (experience.rater) judge before training",
    ),
    (("experience.keep",), lambda c: c.experience.source == "best-of-n", "it is for experience.source best-of-n"),
    (
        ("trainer.samples_per_prompt",),
        lambda c: c.experience.source not in RECORDED,
        "the samples of experience.source {source} were made before the run",
    ),
    (
        ("trainer.timestep_fraction",),
        lambda c: c.objective.name in POLICY_GRADIENT,
        f"it is for {' and '.join(POLICY_GRADIENT)}, which learn from single steps",
    ),
    (
        ("credit.rule", "credit.clip", "credit.buffer_size", "credit.min_count"),
        _credited,
        "objective {objective} with experience.source {source} gives no credit for scores",
    ),
    (("credit.clip",), lambda c: c.credit.rule != "gae", "credit.rule gae clips no advantages"),
    (
        ("credit.buffer_size", "credit.min_count"),
        lambda c: c.credit.rule == "per-prompt",
        "credit.rule {rule} remembers no scores",
    ),
)
"""Fields, when they are used, and why they are not otherwise."""


def fault(config: RunConfig) -> str:
    """The first field that is set and not used, with the reason; empty if there is none."""
    window = config.sampler.window
    if window is not None and window.every is not None and config.experience.source in RECORDED:
        return (
            f"sampler.window.every is {window.every}, but the samples of experience.source {config.experience.source}"
            " were made before the run, so no window moves: leave it out"
        )
    warming = None if config.warm_up is None else config.warm_up.trainer
    for name in ("samples_per_prompt", "timestep_fraction"):
        default = type(config.trainer).model_fields[name].get_default()
        if warming is not None and getattr(warming, name) != default:
            return (
                f"warm_up.trainer.{name} is {getattr(warming, name)}, but a warm-up imitates demonstrations: leave it"
                f" out, or at {default}"
            )
    for fields, used, why in RULES:
        for field in fields:
            section, name = field.split(".")
            there = getattr(config, section)
            value, default = getattr(there, name), type(there).model_fields[name].get_default()
            if value != default and not used(config):
                words = why.format(
                    source=config.experience.source, objective=config.objective.name, rule=config.credit.rule
                )
                return f"{field} is {value}, but {words}: leave it out, or at {default}"
    return ""
