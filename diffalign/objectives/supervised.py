"""Supervised objectives: make given samples more likely, all alike or the better ones more.

Shape legend: ``B`` samples, ``G`` groups. Every function returns a per-sample loss ``(B,)``, which the caller averages,
and detached metrics: ``log_likelihood``, its mean over the samples, and what the function adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.objectives.policy_gradient import Metrics


def sft(log_likelihood: Tensor) -> tuple[Tensor, Metrics]:
    """Maximum likelihood, ``-log p``: supervised fine-tuning, for an image the denoising loss.

    ``log_likelihood`` is ``(B,)``, with gradient. A text's is a sum over its tokens: the loss grows with its length,
    unlike the mean over tokens that language models are often trained with.
    """
    return -log_likelihood, {"log_likelihood": log_likelihood.detach().mean()}


def weighted(log_likelihood: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Weighted maximum likelihood, ``-w log p``; ``weights`` ``(B,)`` are those of ``exponential_weights``.

    Metric ``effective_samples``: ``(sum w)^2 / sum w^2``, between 1 and ``B``.
    """
    metrics = {
        "log_likelihood": log_likelihood.detach().mean(),
        "effective_samples": weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-12),
    }
    return -weights * log_likelihood, metrics


def reward_weighted(
    log_likelihood: Tensor, reward: Tensor, *, temperature: float, groups: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Maximum likelihood in which better samples count more, ``-w log p`` with ``w`` proportional to
    ``exp(reward / temperature)`` (reward-weighted regression, Peters & Schaal 2007; for images Black et al. 2023 as
    RWR, and Lee et al. 2023 with the reward itself as the weight).

    It only ever imitates: no sample is pushed away, however bad. ``log_likelihood`` is ``(B,)`` with gradient, and the
    rest as in ``exponential_weights``. Over micro-batches, take the weights over all of them first, then ``weighted``.
    """
    return weighted(log_likelihood, exponential_weights(reward, temperature=temperature, groups=groups))


def exponential_weights(reward: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """``exp(reward / temperature)``, scaled to mean 1 over the batch or over each group, ``(B,)`` without gradient.

    So ``temperature`` does not change the step size. One (> 0, in units of the reward) that is too low trains on the
    single best sample: watch ``effective_samples`` (at least the number of groups where these are of one size).
    ``reward`` ``(B,)`` may be an advantage; a shift changes nothing. A NaN, a judgement that failed, has weight 0 and
    counts in no mean. ``groups`` int64 ``(B,)`` names the group, such as the prompt, within which samples are
    compared; without it an easy prompt takes the weight of a hard one.
    """
    logits = reward / temperature
    if groups is None:
        groups = torch.zeros_like(reward, dtype=torch.int64)
    names, index = groups.unique(return_inverse=True)
    count = len(names)
    failed = logits.isnan()
    logits = logits.detach().masked_fill(failed, -math.inf)
    peak = logits.new_full((count,), -math.inf).scatter_reduce(0, index, logits, "amax")
    weights = (logits - peak[index]).exp().masked_fill(failed, 0.0)
    total = logits.new_zeros(count).index_add(0, index, weights)
    known = logits.new_zeros(count).index_add(0, index, (~failed).to(logits.dtype))
    return weights * (known / total.clamp(min=1))[index]
