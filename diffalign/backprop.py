"""What reward backpropagation learns from: recorded walks, whose last steps are gone once more with gradient.

The three objectives differ in which steps the reward's gradient goes back through. The sampler has ``S`` steps:

- ``draft``: the last K of them, always (DRaFT-K; Clark et al. 2023, arXiv 2309.17400). K = S is the whole walk.
- ``align-prop``: the last K, where every update draws its own K, uniform from 1 to the most (the randomised truncation
  of AlignProp; Prabhudesai et al. 2023, arXiv 2310.03739).
- ``refl``: one step, drawn for each update among the last ones, by default the last quarter. What it believes the
  image to be is judged (ReFL; Xu et al. 2023, "ImageReward", arXiv 2304.05977, which draws from the last 10 of 40).

What comes before is the record of the rollout. Where an epoch has several updates, or is gone through several times,
the record is that many updates old.

Shape legend: ``N`` samples, ``n`` rows (each a sample), ``S`` sampling steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from diffalign import images
from diffalign.config import ObjectiveConfig
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.objectives.policy_gradient import Metrics
from diffalign.objectives.reward_backprop import reward_backprop
from diffalign.seeds import derive
from diffalign.steps import FEW, Inputs, Rows
from diffalign.types import DifferentiablePolicy, DifferentiableReward, Policy, Prompt, Reward, Rollout, Scores

Form = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""Scores ``(B,)`` with gradient of images ``(B, 3, H, W)`` in [0, 1] and their prompts."""
SPREADS, SHARE = 0.25, 0.01
"""How far a differentiable form may be from the scores: in standard deviations of the epoch's scores, or as a share of
the largest where these are all alike."""


def form_of(reward: Reward) -> Form:
    """The differentiable form of a reward, turned so that more is better. Raises ConfigError where it has none."""
    form = getattr(reward, "differentiable", None)
    if form is None:
        raise ConfigError(
            f"reward {reward.name} has no gradient{_which(reward)}; draft, align-prop and refl need one, and the other"
            " objectives do not"
        )

    def turned(pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = cast(DifferentiableReward, reward).differentiable(pictures, prompts)
        if scores.shape != (len(prompts),):
            raise InputError(
                f"the differentiable form of {reward.name} returned scores of shape {tuple(scores.shape)} for"
                f" {len(prompts)} images; it returns one score for each, ({len(prompts)},)"
            )
        scores = scores.float().to(pictures.device)  # a reward may look at it on a device of its own
        return scores if reward.higher_is_better else -scores

    return turned


def _which(reward: Reward) -> str:
    """Which of the rewards of a combination have none, where it says so."""
    without: Sequence[str] = getattr(reward, "without_gradient", ())
    return f" because of {', '.join(without)}" if without else ""


@torch.no_grad()
def forms_agree(reward: Reward, rollout: Rollout, scores: Scores) -> None:
    """Refuses a reward whose differentiable form judges a few of the images otherwise than the reward itself.

    Training would follow the one, and everything that is reported would be the other.
    """
    known = scores.total[scores.total.isfinite()]
    few = rollout.take(torch.arange(min(len(rollout), FEW)))
    pictures = images.to_tensor([sample.image for sample in few.samples if sample.image is not None])
    again = form_of(reward)(pictures, [sample.prompt for sample in few.samples]).cpu()
    said = scores.total[: len(few)].float().cpu() * (1 if reward.higher_is_better else -1)
    both = again.isfinite() & said.isfinite()
    gap = float((again - said)[both].abs().max()) if bool(both.any()) else 0.0
    spread = float(known.std(correction=0))
    if gap > max(SPREADS * spread, SHARE * float(known.abs().max())):
        raise RefusedError(
            f"the differentiable form of reward {reward.name} is up to {gap:.3g} off its scores, whose standard"
            f" deviation is {spread:.3g}: training would follow another reward than is reported; see 'diffalign reward"
            " check'"
        )


def most_steps(objective: ObjectiveConfig, steps: int) -> int:
    """The last steps of ``steps`` that an objective's gradient goes through, or that it draws from."""
    quarter = math.ceil(steps / 4)
    return objective.backprop_steps or {"draft": 1, "align-prop": steps, "refl": quarter}[objective.name]


@dataclass
class Backprop:
    """Reward backpropagation: which way do the weights move so that the image of this walk scores better?"""

    policy: Policy
    objective: ObjectiveConfig
    seed: int
    epoch: int
    rollout: Rollout
    reward: Form
    samples_per_row: ClassVar[int] = 1

    def __post_init__(self) -> None:
        most, steps = self.objective.backprop_steps, self.rollout.log_probs.shape[1]
        if most is not None and most > steps:
            raise ConfigError(f"objective.backprop_steps is {most}, but sampling takes {steps} steps")

    def __len__(self) -> int:
        return len(self.rollout)

    def items(self, inner: int) -> Tensor:
        """See Lesson."""
        return torch.arange(len(self))

    def rows(self, items: Tensor, inner: int) -> Rows:
        """See Lesson. All rows of an update start at the same step: they go through the model together."""
        start = self.start(inner, int(items[0])) if len(items) else 0
        return Rows(items, len(items), torch.full((len(items), 1), start))

    def start(self, inner: int, first: int) -> int:
        """The first step with gradient (0 is the first of all), of the update whose first sample is ``first``."""
        steps = self.rollout.log_probs.shape[1]
        most = most_steps(self.objective, steps)
        if self.objective.name == "draft":
            return steps - most
        return steps - 1 - derive(self.seed, "backprop", self.epoch, inner, first) % most

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        assert rows.steps is not None
        batch = self.rollout.take(rows.items)
        redrawn = cast(DifferentiablePolicy, self.policy).redraw(
            batch, int(rows.steps[0, 0]), jump=self.objective.name == "refl", drift=bool(self.objective.kl_coefficient)
        )
        reward = self.reward(redrawn.images, [sample.prompt for sample in batch.samples])
        if not reward.requires_grad:
            raise InputError("the reward's differentiable form returned scores without a gradient to the images")
        return {"reward": reward} | ({} if redrawn.drift is None else {"drift": redrawn.drift})

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        return reward_backprop(**inputs, kl_coefficient=self.objective.kl_coefficient or 0.0)

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """See Lesson: the first images, from their last step."""
        few = self.rollout.take(torch.arange(min(len(self), FEW)))
        return cast(DifferentiablePolicy, self.policy).redraw(few, self.rollout.log_probs.shape[1] - 1).images
