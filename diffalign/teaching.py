"""From one epoch's experience to what the objective learns of it: whom to credit, and which lesson."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from diffalign import actor_critic, backprop, checks, credit, experience, lessons
from diffalign.config import CreditConfig, ObjectiveConfig, TrainerConfig
from diffalign.errors import ConfigError
from diffalign.experience import Chosen, Experience, Judged, Paired, Rollouts, Scored, Shown, Source
from diffalign.forward_lessons import Forward
from diffalign.lessons import Lesson
from diffalign.methods import BACKPROP, FORWARD_PROCESS, OF_OLD_WEIGHTS, POLICY_GRADIENT
from diffalign.processes import Processes
from diffalign.shadow import Shadow
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
        processes: Processes | None = None,
    ) -> None:
        self.policy, self.source, self.objective = policy, source, objective
        self.credit, self.settings, self.seed = credit, settings, seed
        self.processes = Processes() if processes is None else processes
        self.tracker = _tracker(credit)
        self.notes: Mapping[str, float] = {}
        self.old = Shadow(policy.trainable()) if objective.name in OF_OLD_WEIGHTS else None
        self.old_checked = False
        self.agreed = False
        """Whether the reward's differentiable form was found to say what the reward says."""
        if objective.name in BACKPROP and isinstance(source, Rollouts):
            backprop.form_of(source.reward)  # a reward without one is refused before any work

    def lesson(self, gathered: Experience, epoch: int) -> Lesson:
        """What the objective makes of the experience. Raises ConfigError for one that it cannot learn from."""
        name = self.objective.name
        about = self.policy, self.objective, self.seed, epoch
        if isinstance(gathered, Paired) and name == "kto":
            gathered = experience.judged(gathered.preferences)
        elif isinstance(gathered, Paired) and name == "sft":
            gathered = experience.winners(gathered.preferences)
        found: Lesson | None = None
        match gathered:
            case Scored():
                found = self._of_scores(gathered, epoch)
            case Chosen(rollout, passes) if name in POLICY_GRADIENT:
                share, equal = self.settings.timestep_fraction, torch.ones(len(rollout))
                found = lessons.Steps(*about, rollout, equal, step_fraction=share, passes=passes)
            case Chosen(rollout, passes) if name == "sft":
                found = lessons.Examples(*about, rollout.samples, passes)
            case Paired(preferences) if name in lessons.PAIRWISE:
                found = lessons.Comparisons(*about, preferences)
            case Judged(samples, good) if name == "kto":
                found = lessons.Verdicts(*about, samples, good, self.processes)
            case Shown(samples) if name == "sft":
                found = lessons.Examples(*about, samples)
        if found is None:
            raise ConfigError(f"objective {name} cannot learn from source {self.source.name}")
        return found

    def _of_scores(self, scored: Scored, epoch: int) -> Lesson | None:
        name = self.objective.name
        about = self.policy, self.objective, self.seed, epoch
        if name in POLICY_GRADIENT and isinstance(self.tracker, credit.AdaptiveKL):
            return self._with_critic(scored, epoch)
        if name in POLICY_GRADIENT:
            share = self.settings.timestep_fraction
            return lessons.Steps(*about, scored.rollout, self.advantages(scored), step_fraction=share)
        if name in BACKPROP:
            return self._through_the_reward(scored, epoch)
        if name in FORWARD_PROCESS:
            return self._forward(scored, epoch)
        if name == "reward-weighted":
            failed = ~scored.scores.total.isfinite().cpu()
            advantages = self.advantages(scored).masked_fill(failed, math.nan)
            return lessons.Examples(*about, scored.rollout.samples, advantages=advantages)
        return None

    def _through_the_reward(self, scored: Scored, epoch: int) -> Lesson:
        assert isinstance(self.source, Rollouts)
        reward = self.source.reward
        if not self.agreed:
            backprop.forms_agree(reward, scored.rollout, scored.scores)
            self.agreed = True
        form = backprop.form_of(reward)
        return backprop.Backprop(self.policy, self.objective, self.seed, epoch, scored.rollout, form)

    def _forward(self, scored: Scored, epoch: int) -> Lesson:
        lesson = Forward(
            self.policy, self.objective, self.seed, epoch, scored.rollout.samples, self.advantages(scored),
            self.credit.clip, self.old,
        )  # fmt: skip
        if self.old is not None and not self.old_checked:
            checks.old_is_policy(lesson.fingerprint, self.old)
            self.old_checked = True
        return lesson

    def behaviour(self) -> AbstractContextManager[None]:
        """Inside it the policy has the weights that sample: its own; DiffusionNFT samples by old ones."""
        return self.old() if self.old is not None and self.objective.name == "nft" else nullcontext()

    def end_epoch(self, epoch: int) -> None:
        """After the updates of an epoch: what samples next, and what the next lesson compares with."""
        if self.old is not None:
            share = (self.objective.old_decay_rate or 0.0) * epoch
            self.old.update(min(share, self.objective.old_decay_limit or 0.0))

    def _with_critic(self, scored: Scored, epoch: int) -> Lesson:
        assert self.credit.critic is not None
        assert isinstance(self.tracker, credit.AdaptiveKL)
        found, metrics = actor_critic.lesson(
            cast(CriticPolicy, self.policy), self.objective, self.seed, epoch, scored.rollout,
            self._oriented(scored), critic=self.credit.critic, penalty=self.tracker,
            step_fraction=self.settings.timestep_fraction, processes=self.processes,
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
        found = self.tracker.state_dict() if isinstance(self.tracker, STATEFUL) else {}
        return found if self.old is None else {**found, "old": self.old.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state of ``state_dict``."""
        if self.old is not None:
            self.old.load_state_dict(state["old"])
            self.old_checked = True
        if isinstance(self.tracker, STATEFUL):
            self.tracker.load_state_dict({name: value for name, value in state.items() if name != "old"})


def _tracker(config: CreditConfig) -> Tracker:
    if config.critic is not None:
        return credit.AdaptiveKL(config.critic.kl_coefficient, config.critic.target_kl, config.critic.horizon)
    if config.rule == "per-prompt":
        return credit.PerPromptStatistics(config.buffer_size, config.min_count)
    return CREDIT_RULES[config.rule]
