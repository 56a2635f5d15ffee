"""Reward backpropagation: the reward's own gradient, through the last steps of sampling.

Shape legend: ``B`` images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.objectives.policy_gradient import Metrics


def reward_backprop(
    reward: Tensor, drift: Tensor | None = None, *, kl_coefficient: float = 0.0
) -> tuple[Tensor, Metrics]:
    """``-reward + kl_coefficient * drift``, a loss ``(B,)`` for each image, and detached metrics.

    ``reward`` ``(B,)``, more is better, carries the gradient that comes through the image (Clark et al. 2023, "Directly
    fine-tuning diffusion models on differentiable rewards", arXiv 2309.17400; ReFL and AlignProp differ in which steps
    it goes through, see ``diffalign.backprop``). It is taken as it is: ImageReward's released ReFL has ``relu(2 -
    reward)`` in its place. A NaN, a judgement that failed, has no gradient.

    ``drift`` ``(B,)`` is the mean squared difference of the denoiser's output from the reference's over the steps that
    are differentiated (the term of DRaFT+ in NVIDIA's NeMo-Aligner). Where a step has noise it is the KL of the step,
    but for a factor of the step. It is in units of the output, and the reward in its own: the coefficient belongs to
    the reward.

    Metrics: ``reward`` (mean over the judged), ``failed`` (share of judgements that failed), and ``kl``, the mean
    drift.
    """
    judged = reward.isfinite()
    loss = -torch.where(judged, reward, 0.0)
    known = judged.sum().clamp(min=1)
    metrics = {
        "reward": torch.where(judged, reward, 0.0).detach().sum() / known,
        "failed": (~judged).float().mean(),
    }
    if drift is not None:
        loss = loss + kl_coefficient * drift
        metrics["kl"] = drift.detach().mean()
    return loss, metrics
