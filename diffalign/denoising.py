r"""One stochastic denoising step and its log-density, as pure functions.

Shape legend: ``B`` rows (each a sample at one step), ``... `` latent dimensions (``C H W``). All arithmetic is float32.

Notation of Song et al. 2021, "Denoising diffusion implicit models" (DDIM): ``a`` is the cumulative signal
:math:`\bar\alpha_t` of the current step, ``b`` that of the next, less noisy one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What the model of a diffusion process says; that of a flow says a velocity (see ``flow``)."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` to ``(B, 1, ..., 1)``, to multiply with ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def clean_and_noise(
    noisy: Tensor, output: Tensor, a: Tensor, prediction: Prediction, *, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """What the denoiser believes: the clean latents and the noise in them, each ``(B, ...)``.

    ``output`` is the denoiser's output, read as ``prediction`` says; v is that of Salimans & Ho 2022, eq. 7 ff.
    ``a (B,)`` must be above 0 for ``epsilon`` (a schedule with zero terminal signal needs v or sample prediction).
    ``clip`` bounds the clean latents, as a scheduler with ``clip_sample`` does.
    """
    a = expand(a, noisy)
    if prediction == "epsilon":
        clean, noise = (noisy - (1 - a).sqrt() * output) / a.sqrt(), output
    elif prediction == "v_prediction":
        clean, noise = a.sqrt() * noisy - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * noisy
    else:
        clean, noise = output, (noisy - a.sqrt() * output) / (1 - a).sqrt()
    return (clean if clip is None else clean.clamp(-clip, clip)), noise


def noised(clean: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """Latents ``(B, ...)`` at signal ``a (B,)``: ``sqrt(a) clean + sqrt(1 - a) noise`` (Ho et al. 2020, eq. 4)."""
    a = expand(a, clean)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def denoising_residual(output: Tensor, clean: Tensor, noise: Tensor, a: Tensor, prediction: Prediction) -> Tensor:
    """The denoiser's output less what it should have said of ``noised``, ``(B, ...)``, in the space it predicts."""
    a = expand(a, clean)
    if prediction == "epsilon":
        return output - noise
    if prediction == "v_prediction":
        return output - (a.sqrt() * noise - (1 - a).sqrt() * clean)
    return output - clean


def denoising_error(residual: Tensor) -> Tensor:
    """Mean squared error ``(B,)`` of a ``denoising_residual``.

    The *mean* over latent elements, unweighted in the space that the model predicts, as in Diffusion-DPO's released
    code (Wallace et al. 2023); a preference objective's ``beta`` depends on that.
    """
    return (residual**2).flatten(1).mean(1)


def ddim_std(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """Standard deviation ``(B,)`` of the step's noise, DDIM eq. 16; ``eta`` = 1 is the DDPM posterior.

    It is 0 for ``eta`` = 0 and on a step that ends without noise (``b`` = 1): such a step is deterministic and has no
    likelihood.
    """
    return eta * ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt()


def ddim_mean(clean: Tensor, noise: Tensor, b: Tensor, std: Tensor) -> Tensor:
    """Mean ``(B, ...)`` of the next latents, DDIM eq. 12."""
    b, std = expand(b, clean), expand(std, clean)
    return b.sqrt() * clean + (1 - b - std**2).clamp(min=0).sqrt() * noise


def log_density(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density ``(B,)`` in nats per latent element: the *mean* over elements, as in DDPO.

    Black et al. 2023, "Training diffusion models with reinforcement learning". The mean, not the sum, is why a clip
    range of 1e-4 works: the true log-ratio is the number of elements times larger. Rows with ``std`` = 0 give 0: they
    are deterministic, and masked by the caller. ``value`` is a recorded action, so no gradient flows into it.
    """
    safe = expand(torch.where(std > 0, std, torch.ones_like(std)), mean)
    density = -((value.detach() - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1) * (std > 0)


def gaussian_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL ``(B,)`` between steps of equal ``std``, in nats per latent element: ``|mean - reference|^2 / (2 std^2)``.

    0 where ``std`` = 0 (a deterministic step, masked by the caller).
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    return ((mean - reference) ** 2).flatten(1).mean(1) / (2 * safe**2) * (std > 0)
