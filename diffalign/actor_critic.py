"""PPO with a critic: each step is credited by how much better things went than the critic expected before it.

Shape legend: ``N`` samples, ``S`` steps of each, ``K`` of them asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from diffalign import credit
from diffalign.config import ObjectiveConfig
from diffalign.methods import CriticConfig
from diffalign.objectives import policy_gradient
from diffalign.objectives.policy_gradient import Metrics
from diffalign.processes import Processes
from diffalign.steps import Inputs, Rows, Steps, in_turn
from diffalign.types import CriticPolicy, Rollout, Sample


@dataclass
class ActorCritic(Steps):
    """Steps whose advantages ``(N, S)`` come from a critic, which learns beside the policy."""

    critic: CriticConfig = field(default_factory=CriticConfig)
    old_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    """float32 ``(N, S)``: what the critic expected at the rollout."""
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))
    """float32 ``(N, S)``: what came of it."""

    def _taught(self, rows: Rows) -> Rows:
        """All rows: where nothing is to be learned by the policy, the critic still learns."""
        return rows

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        assert rows.steps is not None
        steps, batch = rows.steps, self.rollout.take(rows.items)
        answer = cast(CriticPolicy, self.policy).step_log_probs(batch, steps, kl=self._exact_kl, values=True)
        assert answer.values is not None
        known = {"old_values": self.old_values, "returns": self.returns}
        return self._recorded(rows, batch, answer) | {
            "values": answer.values,
            **{name: kept[rows.items].gather(1, steps).to(answer.values.device) for name, kept in known.items()},
        }

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson: the policy's loss, and the critic's."""
        own = {name: inputs[name] for name in ("values", "old_values", "returns", "mask")}
        loss, metrics = super().loss(
            {name: values for name, values in inputs.items() if name not in own or name == "mask"}
        )
        error, more = policy_gradient.value_clip(**own, clip_range=self.critic.value_clip)
        if "weights" in inputs:
            error = error * inputs["weights"]
        return loss + self.critic.value_coefficient * error.sum(1), metrics | more


def lesson(
    policy: CriticPolicy,
    objective: ObjectiveConfig,
    seed: int,
    epoch: int,
    rollout: Rollout,
    scores: Tensor,
    *,
    critic: CriticConfig,
    penalty: credit.AdaptiveKL,
    step_fraction: float = 1.0,
    processes: Processes | None = None,
) -> tuple[ActorCritic, dict[str, float]]:
    """What PPO learns from scored samples, and metrics of it. ``scores`` float32 ``(N,)``, more is better.

    The reward of a step is minus the KL weight times how far the step has drifted from the reference; the score is
    added to that of the last step (Ziegler et al. 2019, eq. 2). A failed judgement teaches nothing: its sample counts
    in no step.
    """
    values, drift = _asked(policy, rollout, critic.kl_estimator, Processes() if processes is None else processes)
    known = scores.isfinite().cpu()
    mask = rollout.mask.cpu() & known[:, None]
    rewards = -penalty.weight * drift * mask
    last = mask.long().cumsum(1).argmax(1)
    ended = scores.cpu().nan_to_num(0.0) - critic.missing_end_penalty * _cut(rollout.samples)
    rewards[torch.arange(len(rewards)), last] += torch.where(mask.any(1), ended, 0.0)
    if critic.whiten_rewards:
        rewards = credit.whitened(rewards, mask, shift_mean=False)
    advantages, returns = credit.gae(rewards, values, mask, discount=critic.discount, trace=critic.trace)
    if critic.whiten_advantages:
        advantages = credit.whitened(advantages, mask)
    kl = float((drift * mask).sum(1)[known].mean()) if bool(known.any()) else 0.0
    metrics = {"critic/kl": kl, "critic/kl_weight": penalty.weight, "critic/return": _mean(returns, mask)}
    penalty.update(kl, len(rewards))
    about = ActorCritic(
        policy, objective, seed, epoch, rollout, advantages, step_fraction, critic=critic, old_values=values,
        returns=returns,
    )  # fmt: skip
    return about, metrics


@torch.no_grad()
def _asked(policy: CriticPolicy, rollout: Rollout, estimator: str, processes: Processes) -> tuple[Tensor, Tensor]:
    """What the critic expects, and how far each step has drifted, both float32 ``(N, S)`` on the CPU.

    The processes share the work.
    """
    values, drift = torch.zeros(rollout.mask.shape), torch.zeros(rollout.mask.shape)
    batches = torch.arange(len(rollout)).split(min(policy.batch_size, -(-len(rollout) // processes.count)))
    for number in processes.own(len(batches)).tolist():
        rows = batches[number]
        batch = rollout.take(rows)
        for steps in in_turn(policy, batch):
            expected = policy.step_log_probs(batch, steps, values=True).values
            assert expected is not None
            with policy.reference():
                reference = policy.step_log_probs(batch, steps).log_probs
            places = (rows[:, None], steps)
            values[places] = expected.float().cpu()
            own = batch.log_probs.cpu().gather(1, steps)
            drift[places] = policy_gradient.kl_estimate(own, reference.cpu(), estimator)
    return processes.summed("values", values), processes.summed("drift", drift)


def _cut(samples: Sequence[Sample]) -> Tensor:
    """1 for samples that were cut off before they ended, else 0."""
    return torch.tensor([float(not sample.evidence.get("finished", True)) for sample in samples])


def _mean(values: Tensor, mask: Tensor) -> float:
    return float(policy_gradient.masked_mean(values, mask))
