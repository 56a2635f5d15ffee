"""Policy-gradient objectives: what to minimise, given how likely the recorded steps are now and how good they were.

Shape legend: ``B`` rows, ``K`` steps of a row. Every function returns a per-step loss ``(B, K)``, 0 where ``mask`` is
False, and metrics: float32 scalars, means over the steps that ``mask`` keeps. The caller averages the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is True; 0 where it is False everywhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def reinforce(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """Score-function gradient, ``-A log p`` (Williams 1992; DDPO-SF, Black et al. 2023, eq. 4).

    Valid for one update per batch only: it does not correct for a policy that has moved since the rollout.
    ``log_probs``, ``old_log_probs``, ``mask`` are ``(B, K)``, ``advantages`` is ``(B,)`` or ``(B, K)``.
    """
    loss = -_per_step(advantages) * log_probs * mask
    return loss, _drift(log_probs.detach() - old_log_probs, mask)


def ppo_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped importance-weighted gradient per step, ``max(-A r, -A clip(r, 1 - c, 1 + c))`` with
    ``r = exp(log p - log p_old)`` (Schulman et al. 2017, eq. 7; DDPO-IS, Black et al. 2023, eq. 5).

    ``clip_range_high`` lets the ratio rise further than it may fall: ``1 + clip_range_high`` is the upper bound (DAPO's
    clip-higher, Yu et al. 2025, eq. 10). ``clip_range`` is not portable between modalities: about 1e-4 for images,
    whose log-probabilities are means over latent elements, and 0.2 for text. ``log_probs``, ``old_log_probs``, ``mask``
    are ``(B, K)``, ``advantages`` ``(B,)`` or ``(B, K)``.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high)
    advantages = _per_step(advantages)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped) * mask
    metrics = _drift(log_ratio.detach(), mask)
    outside = (ratio.detach() < 1 - clip_range) | (ratio.detach() > 1 + high)
    metrics["clip_fraction"] = masked_mean(outside.float(), mask)
    return loss, metrics


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """The KL divergence to the reference, estimated from the steps that were sampled, ``(B, K)`` in nats.

    With ``d = log p - log q`` of a step: ``k1 = d`` is unbiased and can be negative, ``k2 = d^2 / 2`` is biased with a
    gradient that is right, ``k3 = exp(-d) - 1 + d`` is unbiased and never negative (Schulman 2020, "Approximating KL
    divergence"). As a loss k1 has a gradient that is 0 in the mean: it belongs into the reward.
    """
    apart = log_probs - reference
    if kind == "k1":
        return apart
    return 0.5 * apart**2 if kind == "k2" else torch.expm1(-apart) + apart


def value_clip(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Metrics]:
    """Half the squared error of a critic, the larger of it and of the error of a value that moved no further than
    ``clip_range`` from what it was, per step (Schulman et al. 2017, as in Ziegler et al. 2019's code). All are
    ``(B, K)``, in units of the reward.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask
    error = masked_mean((values.detach() - returns) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return loss, {"value_error": error, "value_explained": 1 - error / spread.clamp(min=1e-8)}


def _per_step(advantages: Tensor) -> Tensor:
    """``(B, 1)`` or ``(B, K)``."""
    return advantages[:, None] if advantages.ndim == 1 else advantages


def _drift(log_ratio: Tensor, mask: Tensor) -> Metrics:
    return {
        "ratio": masked_mean(log_ratio.exp(), mask),
        "approx_kl": masked_mean(0.5 * log_ratio**2, mask),
    }
