r"""Policy gradients on the forward process: learn from finished samples, noised anew, and from no sampling step.

What sampled the images plays no part in these losses: any solver, with or without noise, guided or not. In the place of
the likelihood of a trajectory stands ``E``, minus the mean squared error of the denoiser on the sample at one draw of
timestep and noise: one term of the evidence lower bound (ELBO), with weight 1 in the space that the model predicts.

Shape legend: ``n`` rows, each one sample at one draw; ``...`` latent dimensions. Losses are per row, ``(n,)``, and the
caller averages them; metrics are detached float32 scalars.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.objectives.policy_gradient import Metrics

LEAST_ERROR = 1e-5
"""What the adaptive weight of ``nft`` divides by, at least."""


def elbo_reinforce(log_likelihood: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
    """Score function on the surrogate, ``-A E``, without an importance weight (Williams 1992; as EPG in "Rethinking the
    design space of reinforcement learning for diffusion models", 2026, which multiplies by ``sg exp(E - E_old)``).

    Each further update of one epoch follows samples that the policy has moved away from; ``elbo_ppo_clip`` corrects for
    that. Where ``A < 0`` nothing bounds how far the error of a sample is pushed up: keep updates few and small.
    ``log_likelihood`` is ``E (n,)`` with gradient, ``advantages`` ``(n,)``.
    """
    return -advantages * log_likelihood, {"log_likelihood": log_likelihood.detach().mean()}


def elbo_ppo_clip(
    log_likelihood: Tensor,
    old_log_likelihood: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped ratio of the surrogate, ``max(-A r, -A clip(r, 1 - c, 1 + c))`` with ``r = exp(E - E_old)`` at one draw
    (Schulman et al. 2017, eq. 7; on the surrogate Xue et al. 2025, "Advantage weighted matching").

    At ``r = 1`` its gradient is that of ``elbo_reinforce``. ``r`` is no ratio of densities: ``E`` is one term of a
    bound, and a mean over latent elements, so ``c`` is small and belongs to one size of latents. All are ``(n,)``;
    ``old_log_likelihood`` is what the weights that sampled say at the same draw, without gradient.
    """
    log_ratio = log_likelihood - old_log_likelihood
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high))
    apart, now = log_ratio.detach(), ratio.detach()
    outside = (now < 1 - clip_range) | (now > 1 + high)
    metrics = {
        "ratio": now.mean(),
        "approx_kl": 0.5 * (apart**2).mean(),
        "clip_fraction": outside.float().mean(),
        "log_likelihood": log_likelihood.detach().mean(),
    }
    return loss, metrics


def optimality(advantages: Tensor, largest: float) -> Tensor:
    """How likely a sample is to be a good one, in [0, 1]: ``clip(A / A_max, -1, 1) / 2 + 1/2`` (Zheng et al. 2025,
    "DiffusionNFT", section 3.3). ``advantages`` ``(n,)``, ``largest`` is ``A_max > 0``.
    """
    return (advantages / largest).clamp(-1, 1) / 2 + 0.5


def contrasted(error: Tensor, old_error: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """How far the implicit positive and negative policies of DiffusionNFT are from the sample, each ``(n,)``.

    Their outputs lie on the line through the old policy's and the policy's, ``v+ = (1 - b) v_old + b v`` and ``v- = (1
    + b) v_old - b v`` (Zheng et al. 2025, section 3.2), and so do their errors, which are linear in them.
    ``error`` ``(n, ...)``, with gradient, and ``old_error``, without, are predicted minus true *clean latents* at one
    draw. Each is ``mean(e^2) / w`` with the adaptive weight ``w = sg mean|e|``, at least ``LEAST_ERROR``, after which a
    draw counts in proportion to its error and no more.
    """
    towards = beta * error
    return _weighted((1 - beta) * old_error + towards), _weighted((1 + beta) * old_error - towards)


def nft(
    positive: Tensor, negative: Tensor, advantages: Tensor, *, beta: float, largest: float
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT: imitate by the positive policy what is good, by the negative one what is bad,
    ``(r L+ + (1 - r) L-) A_max / b`` with ``r`` of ``optimality`` (Zheng et al. 2025, section 3.2).

    The smaller ``beta``, the further the policy must go for its positive policy to move, and the further a bad sample
    pushes it. Of ``A_max / b`` nothing but the step size depends: with it the first gradient is that of ``-A E`` whose
    error is weighted as here, whatever ``beta`` and the clip of advantages. ``positive`` and ``negative`` ``(n,)`` are
    those of ``contrasted``. At ``A = 0`` the two cancel, but for a pull back to the old policy that is of second order.
    """
    good = optimality(advantages, largest)
    loss = (good * positive + (1 - good) * negative) * (largest / beta)
    metrics = {
        "positive_error": positive.detach().mean(),
        "negative_error": negative.detach().mean(),
        "optimality": good.mean(),
    }
    return loss, metrics


def output_distance(residual: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance ``(n,)`` between the outputs of policy and reference at one draw.

    It is the KL divergence between their denoising steps from there, up to a factor that depends on the timestep alone
    (Ho et al. 2020, eq. 8), left out here as in the surrogate likelihood. Both arguments are residuals ``(n, ...)`` of
    one draw: the truth, which both leave out, cancels.
    """
    return ((residual - reference) ** 2).flatten(1).mean(1)


def _weighted(error: Tensor) -> Tensor:
    flat = error.flatten(1)
    weight = flat.detach().double().abs().mean(1).clamp(min=LEAST_ERROR).float()
    return (flat**2).mean(1) / weight
