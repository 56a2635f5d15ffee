"""The last steps of a walk once more, with gradient: what a reward's own gradient goes back through.

Shape legend: ``B`` images of ``3 H W`` pixels, ``S`` sampling steps, ``C H W`` latents.

A step is the rollout's own, with its noise, its guidance and its schedule, so that the images are the rollout's. The
image is clamped to [0, 1] as every image is that a reward sees: a pixel beyond has no gradient. There the reward of the
8-bit image does not change either, and the weights of decoder and denoiser are shared by all pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign import denoising
from diffalign.types import Redrawn, Rollout

if TYPE_CHECKING:
    from pipelines.diffusion import DiffusionPolicy


def redraw(policy: DiffusionPolicy, rollout: Rollout, start: int, *, jump: bool, drift: bool) -> Redrawn:
    """See DifferentiablePolicy. What comes before ``start`` is taken from the record, so it has no gradient.

    With gradient checkpointing a call of the denoiser, and the decoding, keeps what it is given and is made again in
    the backward pass: then the memory hardly grows with the steps. The call that is made again is checkpointed inside,
    so a step costs two calls more.
    """
    count, steps = len(rollout), policy.sampler.steps
    latents = rollout.state["latents"][:, start].to(policy.device)
    noise = policy._noise([sample.seed for sample in rollout.samples], steps + 1)
    text = policy._encode([sample.prompt for sample in rollout.samples])
    away = []
    for step in range(start, steps):
        now = torch.full((count,), step, device=policy.device)

        def output(given: Tensor, now: Tensor = now) -> Tensor:
            return policy._output(given, now, text)

        # A divided denoiser makes its pass again anyway.
        found = output(latents) if policy.shard else _again(policy, output, latents)
        if drift:
            away.append(denoising.denoising_error(found - _reference(policy, output, latents)))
        if jump:
            latents = policy.schedule.clean(latents, found, now)
            break
        std = denoising.expand(policy.schedule.std[now], latents)
        latents = policy.schedule.mean(latents, found, now) + std * noise[:, step + 1]
    images = _again(policy, policy.family.decode, latents)
    return Redrawn(images, torch.stack(away).mean(0) if drift else None)


def _again(policy: DiffusionPolicy, function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    if not (policy.gradient_checkpointing and torch.is_grad_enabled()):
        return function(given)
    made: Tensor = checkpoint(function, given, use_reentrant=False)
    return made


@torch.no_grad()
def _reference(policy: DiffusionPolicy, output: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    with policy.reference():
        return output(latents)
