"""From one epoch's experience to what the objective learns of it: whom to credit, and which lesson."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from diffalign import actor_critic, credit, experience, lessons
from diffalign.config import CreditConfig, ObjectiveConfig, TrainerConfig
from diffalign.errors import ConfigError
from diffalign.experience import Experience, Judged, Paired, Rollouts, Scored, Shown, Source
from diffalign.lessons import Lesson
from diffalign.methods import POLICY_GRADIENT
from diffalign.types import CriticPolicy, Policy

CREDIT_RULES: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {
    "batch": credit.batch,
    "group": credit.group,
    "group-mean": credit.group_mean,
    "leave-one-out": credit.leave_one_out,
}
STATEFUL = (credit.PerPromptStatistics, credit.AdaptiveKL)
Tracker = credit.PerPromptStatistics | credit.AdaptiveKL | Callable[[Tensor, Sequence[str]], Tensor]


class Teacher:
    """Makes lessons of experience, and remembers what scores were usual."""

    def __init__(
        self,
        policy: Policy,
        source: Source,
        objective: ObjectiveConfig,
        credit: CreditConfig,
        settings: TrainerConfig,
        seed: int,
    ) -> None:
        self.policy, self.source, self.objective = policy, source, objective
        self.credit, self.settings, self.seed = credit, settings, seed
        self.tracker = _tracker(credit)
        self.notes: Mapping[str, float] = {}

    def lesson(self, gathered: Experience, epoch: int) -> Lesson:
        """What the objective makes of the experience. Raises ConfigError for one that it cannot learn from."""
        name = self.objective.name
        about = self.policy, self.objective, self.seed, epoch
        if isinstance(gathered, Paired) and name == "kto":
            gathered = experience.judged(gathered.preferences)
        elif isinstance(gathered, Paired) and name == "sft":
            gathered = experience.winners(gathered.preferences)
        match gathered:
            case Scored(rollout) if isinstance(self.tracker, credit.AdaptiveKL) and name in POLICY_GRADIENT:
                return self._with_critic(gathered, epoch)
            case Scored(rollout) if name in POLICY_GRADIENT:
                share = self.settings.timestep_fraction
                return lessons.Steps(*about, rollout, self.advantages(gathered), step_fraction=share)
            case Scored(rollout, scores) if name == "reward-weighted":
                failed = ~scores.total.isfinite().cpu()
                advantages = self.advantages(gathered).masked_fill(failed, math.nan)
                return lessons.Examples(*about, rollout.samples, advantages=advantages)
            case Paired(preferences) if name in lessons.PAIRWISE:
                return lessons.Comparisons(*about, preferences)
            case Judged(samples, good) if name == "kto":
                return lessons.Verdicts(*about, samples, good)
            case Shown(samples, passes) if name == "sft":
                return lessons.Examples(*about, samples, passes)
        raise ConfigError(f"objective {name} cannot learn from source {self.source.name}")

    def _with_critic(self, scored: Scored, epoch: int) -> Lesson:
        assert self.credit.critic is not None
        assert isinstance(self.tracker, credit.AdaptiveKL)
        found, metrics = actor_critic.lesson(
            cast(CriticPolicy, self.policy), self.objective, self.seed, epoch, scored.rollout,
            self._oriented(scored), critic=self.credit.critic, penalty=self.tracker,
            step_fraction=self.settings.timestep_fraction,
        )  # fmt: skip
        self.notes = metrics
        return found

    def _oriented(self, scored: Scored) -> Tensor:
        total = scored.scores.total
        return experience.oriented(self.source.reward, total) if isinstance(self.source, Rollouts) else total

    def advantages(self, scored: Scored) -> Tensor:
        """Clipped advantages ``(N,)`` on the CPU; more is better, whatever the reward's own direction."""
        keys = [sample.prompt.key for sample in scored.rollout.samples]
        assert not isinstance(self.tracker, credit.AdaptiveKL)
        found = self.tracker(self._oriented(scored), keys)
        self.notes = {"advantage/clipped_fraction": float((found.abs() > self.credit.clip).float().mean())}
        return found.clamp(-self.credit.clip, self.credit.clip)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of scores from epoch to epoch."""
        return self.tracker.state_dict() if isinstance(self.tracker, STATEFUL) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state of ``state_dict``."""
        if isinstance(self.tracker, STATEFUL):
            self.tracker.load_state_dict(state)


def _tracker(config: CreditConfig) -> Tracker:
    if config.critic is not None:
        return credit.AdaptiveKL(config.critic.kl_coefficient, config.critic.target_kl, config.critic.horizon)
    if config.rule == "per-prompt":
        return credit.PerPromptStatistics(config.buffer_size, config.min_count)
    return CREDIT_RULES[config.rule]
