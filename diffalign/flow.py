r"""Flow matching: stochastic denoising steps whose mean and deviation are pure functions of what the model says.

Shape legend: ``B`` rows (each a sample at one step), ``...`` latent dimensions (``C H W``). All arithmetic is float32.

Notation: a rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747) mixes clean latents
:math:`x_0` and noise :math:`\varepsilon` as :math:`x = (1-\sigma) x_0 + \sigma \varepsilon`, and its model says the
velocity :math:`v`, which is to be :math:`\varepsilon - x_0`. :math:`\sigma` is 1 at pure noise and 0 at an image. A
step goes from ``sigma`` to ``following``, which is lower: :math:`\Delta` = ``following - sigma`` is negative.

The likelihood of a step is ``denoising.log_density`` of its mean and deviation, whatever the kind of noise: so ratio,
KL and clip range mean the same for each. For a step of CPS Wang & Yu 2025 take minus the mean squared distance instead,
the log-density times :math:`2\,std^2` without its constants, which is that of no distribution; theirs is not here.

The KL of a step to the reference is ``denoising.gaussian_kl``: :math:`|\mu - \mu_{ref}|^2 / (2\,std^2)`, where the
deviation is that of the whole step, so it has :math:`\sqrt{-\Delta}` in it. That is the KL of the two Gaussians and the
one of Flow-GRPO's paper. Its released code leaves :math:`-\Delta` out: it divides by the square of the *scale*, so its
KL is :math:`-\Delta` times this one, and a coefficient taken from there must be multiplied by :math:`-\Delta`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.denoising import expand


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents ``(B, ...)`` at ``sigma (B,)``: ``(1 - sigma) clean + sigma noise`` (Liu et al. 2022, section 2.1)."""
    sigma = expand(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def clean_and_noise(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What the model believes: the clean latents ``x - sigma v`` and the noise in them, ``x + (1 - sigma) v``."""
    sigma = expand(sigma, noisy)
    return noisy - sigma * velocity, noisy + (1 - sigma) * velocity


def residual(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """What the model got wrong, ``(B, ...)``: ``v - (noise - clean)`` (Esser et al. 2024, arXiv 2403.03206, eq. 2)."""
    return velocity - (noise - clean)


def sde_scale(sigma: Tensor, level: float, highest: Tensor) -> Tensor:
    r"""Scale ``(B,)`` of Flow-GRPO's noise, :math:`s = a \sqrt{\sigma / (1 - \sigma)}` with ``level`` as :math:`a`.

    Liu et al. 2025, arXiv 2505.05470, section 4.2. At ``sigma`` 1 it is infinite; ``highest`` (the second noise level
    of the schedule) bounds the ``sigma`` of the denominator. A bound, not a test for 1: schedules may begin just below.
    """
    return level * (sigma / (1 - torch.minimum(sigma, highest))).sqrt()


def dance_scale(sigma: Tensor, level: float) -> Tensor:
    """Scale ``(B,)`` of DanceGRPO's noise: ``level``, whatever ``sigma`` (Xue et al. 2025, arXiv 2505.07818)."""
    return torch.full_like(sigma, level)


def sde_mean(noisy: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor, scale: Tensor) -> Tensor:
    r"""Mean ``(B, ...)`` of the next latents of an SDE that has the flow's own distribution at every ``sigma``.

    :math:`\mu = x + [v + \frac{s^2}{2\sigma}(x + (1-\sigma) v)]\,\Delta`, the Euler-Maruyama step of Flow-GRPO (Liu et
    al. 2025, section 4.2), with :math:`s` = ``scale (B,)``. DanceGRPO writes the same as
    :math:`x + [v - \frac{s^2}{2} \nabla \log p]\,\Delta`, for the score of a flow is
    :math:`-(x + (1-\sigma) v)/\sigma`; the two differ in the scale only. With scale 0 it is the Euler step of the ODE.
    ``sigma`` is above 0.
    """
    delta = expand(following - sigma, noisy)
    drift = expand(scale**2 / (2 * sigma), noisy)
    sigma = expand(sigma, noisy)
    return noisy + (velocity + drift * (noisy + (1 - sigma) * velocity)) * delta


def sde_std(sigma: Tensor, following: Tensor, scale: Tensor) -> Tensor:
    r"""Standard deviation ``(B,)`` of the SDE's step, :math:`s \sqrt{-\Delta}`."""
    return scale * (sigma - following).sqrt()


def cps_std(following: Tensor, level: float) -> Tensor:
    r"""Standard deviation ``(B,)`` of coefficients-preserving sampling, :math:`\sigma' \sin(a \pi / 2)`.

    Wang & Yu 2025, arXiv 2509.05952, with ``level`` as :math:`a`: 0 is the ODE, and at 1 all noise is drawn anew.
    """
    return following * math.sin(level * math.pi / 2)


def cps_mean(noisy: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor, std: Tensor) -> Tensor:
    r"""Mean ``(B, ...)`` of the next latents, :math:`(1-\sigma') \hat x_0 + \sqrt{\sigma'^2 - std^2}\,\hat x_1`.

    Wang & Yu 2025, arXiv 2509.05952: the noise that is kept and the noise that is new make up :math:`\sigma'` together,
    as in DDIM, so that images have no noise left in them. With ``std`` 0 it is the Euler step of the ODE; above it, and
    unlike the SDE, many steps do not end at the flow's own distribution but at a narrower one.
    """
    clean, noise = clean_and_noise(noisy, velocity, sigma)
    kept = (following**2 - std**2).clamp(min=0).sqrt()
    return expand(1 - following, noisy) * clean + expand(kept, noisy) * noise
