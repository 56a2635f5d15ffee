"""``diffalign align --dry-run``: what a run would do and need, and every resolved field."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import psutil
import torch

from apps import build
from diffalign import prompts as prompt_sources
from diffalign.config import RunConfig, dump
from diffalign.methods import POLICY_GRADIENT, RECORDED
from diffalign.types import Prompt, Rollout, Sample
from pipelines.diffusion import DiffusionPolicy

FLOAT32 = 4


def run(recipe: str, overrides: Sequence[str]) -> None:
    """Prints the plan; loads model and rewards, samples nothing."""
    config = build.configuration(recipe, overrides)
    train, held_out = prompt_sources.load(config.prompts, config.seed)
    build.check(config)
    policy = build.policy(config)
    trained = sum(p.numel() for p in policy.trainable().values())
    size = sum(p.numel() for p in policy.family.denoiser.parameters())
    sampled, measured, evaluated = images(config, len(held_out))
    experience: str = config.experience.source
    if config.experience.rater is not None:
        experience += f", judged by the simulated raters {config.experience.rater}"
    for label, value in {
        "model": f"{config.model}, {size / 1e6:.2f} M parameters in the denoiser",
        "trained parameters": f"{trained:,}",
        "device": f"{policy.device}, {config.precision}",
        "prompts": f"{len(train)} to train on, {len(held_out)} held out",
        "method": f"{config.objective.name} from {experience}",
        "updates per epoch": updates(config),
        "images to generate": f"{sampled} in training, {measured} measured on the way, {evaluated} to evaluate",
        "denoiser calls": f"{calls(config, len(held_out)):,} (image x step x guidance branch, forward)",
        "memory estimate": f"{memory(policy, config) / 2**20:.0f} MiB, of {_available(policy.device) / 2**20:.0f}",
        "not counted": "the rewards, decoding of images, start-up checks, and what libraries keep for themselves",
    }.items():
        click.echo(f"{label + ':':<20} {value}")
    click.echo("\n" + dump(config), nl=False)


def updates(config: RunConfig) -> str:
    """Updates of an epoch; what is not known before sampling is an upper bound."""
    settings, source = config.trainer, config.experience.source
    learned = items(config) * (2 if config.objective.name == "kto" and source.endswith("pairs") else 1)
    count = settings.inner_epochs * math.ceil(learned / settings.batch_size)
    both = config.objective.name == "kto" and source.endswith("pairs")  # KTO takes a pair apart
    most = "at most " if both or source in ("best-of-n", "online-pairs") else ""
    what = "pairs" if source.endswith("pairs") and config.objective.name not in ("kto", "sft") else "samples"
    return f"{most}{count} (each over {settings.batch_size} {what})"


def items(config: RunConfig) -> int:
    """Samples or pairs that an epoch trains on, at most."""
    settings, wanted = config.trainer, config.experience
    if wanted.source == "online-pairs":
        groups = settings.samples_per_epoch // settings.samples_per_prompt
        return groups if wanted.rater is None else groups * (settings.samples_per_prompt // 2)
    if wanted.source == "best-of-n":
        return math.ceil(settings.samples_per_epoch * max(wanted.keep))
    return settings.samples_per_epoch


def images(config: RunConfig, held_out: int) -> tuple[int, int, int]:
    """Images sampled to train on, to measure on the way (``evaluation.every``), and for before and after."""
    epochs, every, wanted = config.trainer.epochs, config.evaluation.every, config.experience
    moments = max(0, epochs - 1) // every if every else 0
    sampled = epochs * config.trainer.samples_per_epoch
    if wanted.source in RECORDED:
        sampled = wanted.collect * (2 if wanted.source == "pairs" else 1) if wanted.rater is not None else 0
    if config.fit is not None and config.fit.rater is not None:
        sampled += 2 * config.fit.collect
    return sampled, moments * held_out, 2 * held_out * config.evaluation.seeds_per_prompt


def calls(config: RunConfig, held_out: int) -> int:
    """Forward passes of one image through the denoiser: sampling, training, and the reference's answers."""
    sampled, measured, evaluated = images(config, held_out)
    # The distance replays two batches of the evaluation, by the model and by its reference.
    compared = 2 * min(evaluated // 2, 2 * config.sampler.batch_size)
    branches = 1 if config.sampler.guidance_scale == 1 else 2
    steps = (sampled + measured + evaluated + compared) * config.sampler.steps * branches
    return int(steps + learning_calls(config) * config.trainer.epochs * config.trainer.inner_epochs)


def learning_calls(config: RunConfig) -> float:
    """Forward passes of one pass over an epoch's experience, backward passes aside."""
    objective, settings = config.objective, config.trainer
    if objective.name in POLICY_GRADIENT:
        branches = (1 if config.sampler.guidance_scale == 1 else 2) * (2 if objective.kl_coefficient else 1)
        return settings.samples_per_epoch * config.sampler.steps * settings.timestep_fraction * branches
    asked = items(config) * (objective.draws or 1)
    if config.experience.source.endswith("pairs") and objective.name != "sft":
        asked *= 2
    if objective.name in ("sft", "reward-weighted"):
        return asked
    # Policy and reference; KTO's baseline asks both once more.
    return asked * (4 if objective.name == "kto" else 2)


def memory(policy: DiffusionPolicy, config: RunConfig) -> int:
    """Bytes for weights, gradients, Adam's moments, an epoch's latents, and the activations of one micro-batch.

    The activations are measured on one row. A fully trained denoiser is there twice: its frozen copy is the reference.
    """
    pipeline = policy.family.pipeline
    modules = [pipeline.vae, pipeline.text_encoder, policy.family.denoiser]
    if config.adapter is None:
        modules.append(policy.family.denoiser)
    weights: int = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    trained = sum(3 * p.numel() * FLOAT32 for p in policy.trainable().values())
    latent = math.prod(policy.family.latent_shape) * FLOAT32
    steps = 1 if config.experience.source in RECORDED else config.sampler.steps + 1
    stored = config.trainer.samples_per_epoch * steps * latent
    return weights + trained + stored + _activations(policy) * config.trainer.micro_batch_size


def _activations(policy: DiffusionPolicy) -> int:
    """Bytes that the backward pass of one row keeps."""
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if not isinstance(tensor, torch.nn.Parameter):
            saved += tensor.numel() * tensor.element_size()
        return tensor

    latents = torch.randn(1, 2, *policy.family.latent_shape)
    blank = torch.zeros(1, 1)
    rollout = Rollout((Sample(Prompt("x")),), blank, blank.bool(), {"latents": latents})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.step_log_probs(rollout, torch.zeros((1, 1), dtype=torch.int64))
    return saved


def _available(device: torch.device) -> int:
    """Bytes of the device's own memory, or of the machine's where they share it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
