"""A sampler's settings on a model's noise schedule: what each step is told, where it leads, and how much noise it has.

Shape legend: ``S`` sampling steps, ``B`` rows (each a sample at one step), ``...`` latent dimensions. All is float32.
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign import denoising, flow
from diffalign.config import SamplerConfig
from diffalign.denoising import Prediction, expand
from diffalign.errors import ConfigError
from diffalign.sampling import FlowNoise

ETA: dict[FlowNoise, float] = {"sde": 0.7, "cps": 0.8, "dance": 0.3}
"""How much noise is usual: Flow-GRPO for SD3.5, FlowCPS and DanceGRPO, by their published settings."""


class Schedule(Protocol):
    """The steps of a sampler, and the forward process behind them."""

    noise: str
    """How noise enters a step."""
    eta: float
    """How much; 0 is deterministic."""
    timesteps: Tensor
    """``(S,)``: what the denoiser is told."""
    std: Tensor
    """``(S,)``: standard deviation of each step, 0 where it is deterministic."""

    def mean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """Mean ``(B, ...)`` of the latents after ``steps (B,)``, by the denoiser's output at the latents before."""
        ...

    def clean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """The clean latents ``(B, ...)`` that the denoiser's output at ``steps (B,)`` believes in."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents at ``time (B,)`` in [0, 1), uniform as in training; what the denoiser is told; the level."""
        ...

    def residual(self, output: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The denoiser's output less what it should have said of ``noised``, ``(B, ...)``."""
        ...

    def clean_error(self, residual: Tensor, level: Tensor) -> Tensor:
        """How far the clean latents that a residual believes in are from the true ones, ``(B, ...)``."""
        ...


class Ddim:
    """DDIM on a discrete schedule (Song et al. 2021); ``eta`` 1 is the DDPM posterior."""

    noise = "ddim"

    def __init__(
        self, scheduler: DDIMScheduler, prediction: Prediction, sampler: SamplerConfig, device: torch.device
    ) -> None:
        """The same timesteps as diffusers' scheduler. Raises ConfigError for settings that it has no use for."""
        if sampler.noise is not None:
            raise ConfigError(
                f"sampler.noise {sampler.noise} is for flow models, and this model samples by DDIM: leave it out"
            )
        self.prediction = prediction
        self.trained: int = scheduler.config.num_train_timesteps
        self.all_signal = scheduler.alphas_cumprod.float().to(device)
        self.clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self.eta = 1.0 if sampler.eta is None else sampler.eta
        timesteps, before, after = _signal(scheduler, prediction, sampler.steps)
        self.timesteps, self.signal, self.next_signal = timesteps.to(device), before.to(device), after.to(device)
        self.std = _in_window(denoising.ddim_std(self.signal, self.next_signal, self.eta), sampler)
        _require_noise(self, sampler)

    def mean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """See Schedule."""
        clean, noise = self._believed(latents, output, steps)
        return denoising.ddim_mean(clean, noise, self.next_signal[steps], self.std[steps])

    def clean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """See Schedule."""
        return self._believed(latents, output, steps)[0]

    def _believed(self, latents: Tensor, output: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        return denoising.clean_and_noise(latents, output, self.signal[steps], self.prediction, clip=self.clip)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Schedule; the level is the cumulative signal."""
        timesteps = (time * self.trained).long().clamp(0, self.trained - 1)
        signal = self.all_signal[timesteps]
        return denoising.noised(clean, noise, signal), timesteps, signal

    def residual(self, output: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """See Schedule: in the space that the model predicts."""
        return denoising.denoising_residual(output, clean, noise, level, self.prediction)

    def clean_error(self, residual: Tensor, level: Tensor) -> Tensor:
        """See Schedule."""
        level = expand(level, residual)
        if self.prediction == "sample":
            return residual
        return -(1 - level).sqrt() * residual / (level.sqrt() if self.prediction == "epsilon" else 1)


class Flow:
    """A rectified flow: the ODE's Euler steps at ``eta`` 0, else one of the stochastic samplers of ``diffalign.flow``.

    The last step ends at an image and is deterministic, whatever the kind: noise there would be seen.
    """

    def __init__(
        self, scheduler: FlowMatchEulerDiscreteScheduler, sampler: SamplerConfig, device: torch.device
    ) -> None:
        """``scheduler`` has had its timesteps set. Raises ConfigError where no step has noise that should."""
        kind: FlowNoise = sampler.noise or "sde"
        self.noise: str = kind
        self.eta = ETA[kind] if sampler.eta is None else sampler.eta
        self.trained: int = scheduler.config.num_train_timesteps
        sigmas = scheduler.sigmas.float().to(device)
        self.timesteps, self.sigma, self.following = scheduler.timesteps.float().to(device), sigmas[:-1], sigmas[1:]
        noisy = _in_window((self.following > 0).float(), sampler)
        if self.noise == "cps":
            self.std = noisy * flow.cps_std(self.following, self.eta)
            self.scale = torch.zeros_like(self.std)
        else:
            own = (
                flow.dance_scale(self.sigma, self.eta)
                if self.noise == "dance"
                else flow.sde_scale(self.sigma, self.eta, self.sigma[min(1, len(self.sigma) - 1)])
            )
            self.scale = torch.where(noisy > 0, own, 0.0)
            self.std = flow.sde_std(self.sigma, self.following, self.scale)
        _require_noise(self, sampler)

    def mean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """See Schedule."""
        sigma, following = self.sigma[steps], self.following[steps]
        if self.noise == "cps":
            return flow.cps_mean(latents, output, sigma, following, self.std[steps])
        return flow.sde_mean(latents, output, sigma, following, self.scale[steps])

    def clean(self, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
        """See Schedule."""
        return flow.clean_and_noise(latents, output, self.sigma[steps])[0]

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Schedule; the level is sigma, which is the time itself: the shift of sampling plays no part."""
        return flow.noised(clean, noise, time), time * self.trained, time

    def residual(self, output: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """See Schedule: of the velocity."""
        return flow.residual(output, clean, noise)

    def clean_error(self, residual: Tensor, level: Tensor) -> Tensor:
        """See Schedule."""
        return -expand(level, residual) * residual


def _in_window(values: Tensor, sampler: SamplerConfig) -> Tensor:
    """The values ``(S,)`` of the steps in the sampler's window; 0 elsewhere."""
    if sampler.window is None:
        return values
    inside = torch.zeros_like(values)
    inside[sampler.window.start : sampler.window.start + sampler.window.steps] = 1
    return values * inside


def _require_noise(schedule: Schedule, sampler: SamplerConfig) -> None:
    """Raises ConfigError where noise was asked for, and the window is on a step that never has any."""
    if sampler.window is not None and schedule.eta > 0 and not bool(schedule.std.any()):
        raise ConfigError(
            f"sampler.window is on the last of the {sampler.steps} steps alone, which never has noise: let it start"
            " before"
        )


def _signal(scheduler: DDIMScheduler, prediction: Prediction, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps int64, cumulative signal before and after each step, float32, each ``(steps,)``."""
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise ConfigError(f"sampler.steps is {steps}, but the model was trained with {trained} steps")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.long().cpu()
    signal = scheduler.alphas_cumprod.float().cpu()
    following = timesteps - trained // steps
    after = torch.where(following >= 0, signal[following.clamp(min=0)], scheduler.final_alpha_cumprod.float())
    if prediction == "epsilon" and float(signal[timesteps].min()) == 0:
        raise ConfigError("a schedule with zero terminal signal cannot predict epsilon; the checkpoint is broken")
    return timesteps, signal[timesteps], after
