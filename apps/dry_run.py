"""``diffalign align --dry-run``: what a run would do and need, and every resolved field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from pydantic import BaseModel

from apps import build, configured, resumption, sources
from diffalign import optimisers
from diffalign import prompts as prompt_sources
from diffalign.backprop import most_steps
from diffalign.config import RunConfig, dump
from diffalign.methods import BACKPROP, FORWARD_PROCESS, NEEDS_STEPS, OF_OLD_WEIGHTS, POLICY_GRADIENT, RECORDED
from diffalign.runs import Run
from diffalign.types import Prompt, Rollout, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy

FLOAT32 = 4
NOT_COUNTED = (
    "the rewards, decoding of images, what a layer needs while it computes, start-up checks, and what libraries keep"
    " for themselves"
)
COMPILED = "; the activations are those without torch.compile"
CHECKPOINTED = "; nor what gradient checkpointing makes again in the backward pass, one block at a time"


def run(recipe: str, overrides: Sequence[str], out: Path | None = None, *, resume: bool = False) -> None:
    """Prints the plan; loads model and rewards, samples nothing. That of a resumed run is of its own configuration."""
    directory = resumption.opened(out) if resume else None
    config = (
        resumption.configuration(recipe, overrides, directory)
        if directory
        else configured.configuration(recipe, overrides)
    )
    build.check(config)
    asked = sources.asks_prompts(config)
    train, held_out = prompt_sources.load(config.prompts, config.seed, training=asked)
    whole = config.model_copy(update={"trainer": config.trainer.model_copy(update={"shard": False})})
    policy = build.policy(whole)  # dividing it takes other processes
    trained = sum(p.numel() for p in policy.trainable().values())
    size = _size(policy, adapted=config.adapter is not None)
    sampled, measured, evaluated = generated(config, len(held_out))
    experience: str = config.experience.source
    if config.experience.rater is not None:
        experience += f", judged by the simulated raters {config.experience.rater}"
    for label, value in {
        "model": f"{config.model}, {size / 1e6:.2f} M parameters{PARTS[config.modality]}",
        "trained parameters": f"{trained:,}",
        "device": f"{policy.device}, {config.precision}",
        **({"compiled": build.compiled(policy)} if config.compile else {}),
        "prompts": f"{len(train) if asked else 'those of the file'} to train on, {len(held_out)} held out",
        **({"warm-up": _warm_up(config)} if config.warm_up else {}),
        "method": f"{config.objective.name} from {experience}",
        **({"done already": _done(directory, config)} if directory else {}),
        "updates per epoch": updates(config),
        f"{config.modality}s to generate": f"{sampled} in training, {measured} measured on the way, {evaluated} to"
        " evaluate",
        **WORK[config.modality](policy, config, len(held_out)),
        "memory estimate": f"{memory(policy, config) / 2**20:.0f} MiB, of {_available(policy.device) / 2**20:.0f}",
        **({"of it divided": _divided(policy)} if config.trainer.shard else {}),
        "made up of": ", ".join(f"{part} {size / 2**20:.1f}" for part, size in parts(policy, config).items()),
        "not counted": NOT_COUNTED
        + (CHECKPOINTED if config.trainer.gradient_checkpointing else "")
        + (COMPILED if config.compile else ""),
    }.items():
        click.echo(f"{label + ':':<20} {value}")
    click.echo("\n" + dump(config), nl=False)
    if null := [*left_out(config, config.model_dump())] if config.modality == "image" else []:
        click.echo(f"# null, and then not written: {', '.join(null)}")


def left_out(section: BaseModel, written: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Fields that could be set and are in no file while they are null, dotted."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in written and value is None:
            yield prefix + name
        elif name in written and isinstance(value, BaseModel):
            yield from left_out(value, written[name], f"{prefix}{name}.")


def _done(directory: Run, config: RunConfig) -> str:
    saved = directory.checkpoints()
    epochs = saved[-1].name.removeprefix("step-") if saved else "0"
    return f"{epochs} of {config.trainer.epochs} epochs, in {directory.path}; the numbers below are of the whole run"


def _warm_up(config: RunConfig) -> str:
    assert config.warm_up is not None
    settings = config.warm_up.trainer
    count = settings.epochs * settings.samples_per_epoch
    return f"every weight, {count} demonstrations of {config.warm_up.demonstrations}; not counted below"


def updates(config: RunConfig) -> str:
    """Updates of an epoch; what is not known before sampling is an upper bound."""
    settings, source = config.trainer, config.experience.source
    both = config.objective.name == "kto" and source.endswith("pairs")  # KTO takes a pair apart
    count = sum(math.ceil(items(config, k) * (1 + both) / settings.batch_size) for k in range(settings.inner_epochs))
    most = "at most " if both or source in ("best-of-n", "online-pairs") else ""
    what = "pairs" if source.endswith("pairs") and config.objective.name not in ("kto", "sft") else "samples"
    return f"{most}{count} (each over {settings.batch_size} {what})"


def items(config: RunConfig, inner: int = 0) -> int:
    """Samples or pairs that a pass over an epoch's experience trains on, at most."""
    settings, wanted = config.trainer, config.experience
    if wanted.source == "online-pairs":
        groups = settings.samples_per_epoch // settings.samples_per_prompt
        return groups if wanted.rater is None else groups * (settings.samples_per_prompt // 2)
    if wanted.source == "best-of-n":
        return math.ceil(settings.samples_per_epoch * wanted.keep[min(inner, len(wanted.keep) - 1)])
    return settings.samples_per_epoch


def generated(config: RunConfig, held_out: int) -> tuple[int, int, int]:
    """Samples made to train on, to measure on the way (``evaluation.every``), and for before and after."""
    epochs, every, wanted = config.trainer.epochs, config.evaluation.every, config.experience
    moments = max(0, epochs - 1) // every if every else 0
    sampled = epochs * config.trainer.samples_per_epoch
    if wanted.source in RECORDED:
        sampled = wanted.collect * (2 if wanted.source == "pairs" else 1) if wanted.rater is not None else 0
    if config.fit is not None and config.fit.rater is not None:
        sampled += 2 * config.fit.collect
    return sampled, moments * held_out, 2 * held_out * config.evaluation.seeds_per_prompt


def passes(config: RunConfig, *, embedded: bool = False) -> int:
    """Forward passes of a step: a second, unconditional one under guidance, but where the denoiser takes the guidance
    scale as an input (``embedded``).
    """
    return 1 if embedded or config.sampler.guidance_scale == 1 else 2


def calls(config: RunConfig, held_out: int, *, embedded: bool = False) -> int:
    """Forward passes of one image through the denoiser: sampling, training, and the reference's answers."""
    sampled, measured, evaluated = generated(config, held_out)
    # The distance replays two batches of the evaluation, by the model and by its reference.
    compared = 0 if config.looked_at.eta == 0 else 2 * min(evaluated // 2, 2 * config.sampler.batch_size)
    looked = (measured + evaluated + compared) * config.looked_at.steps
    steps = (sampled * config.sampler.steps + looked) * passes(config, embedded=embedded)
    learning = learning_calls(config, embedded=embedded)
    return int(steps + learning * config.trainer.epochs)


def learning_calls(config: RunConfig, *, embedded: bool = False) -> float:
    """Forward passes of the updates of an epoch, backward passes aside."""
    return sum(_pass_calls(config, inner, embedded=embedded) for inner in range(config.trainer.inner_epochs))


def _pass_calls(config: RunConfig, inner: int, *, embedded: bool) -> float:
    objective, settings = config.objective, config.trainer
    if objective.name in POLICY_GRADIENT:
        branches = passes(config, embedded=embedded) * (2 if objective.kl_coefficient else 1)
        window = config.sampler.window
        noisy = config.sampler.steps if window is None else min(window.steps, config.sampler.steps)
        return items(config, inner) * noisy * settings.timestep_fraction * branches
    if objective.name in BACKPROP:
        branches = passes(config, embedded=embedded)
        each = 1 + settings.gradient_checkpointing + bool(objective.kl_coefficient)
        return settings.samples_per_epoch * _differentiated(config) * branches * each
    asked = items(config, inner) * (objective.draws or 1)
    if config.experience.source.endswith("pairs") and objective.name != "sft":
        asked *= 2
    if objective.name in ("sft", "reward-weighted"):
        return asked
    if objective.name in FORWARD_PROCESS:
        # The policy, its old weights once they are others, and the reference where it is held to one.
        first = settings.batch_size / settings.samples_per_epoch
        old = {"elbo-ppo-clip": 1 - first, "nft": 1.0 if objective.old_decay_rate else 1 - first}
        return asked * (1 + old.get(objective.name, 0.0) + bool(objective.kl_coefficient))
    # Policy and reference; KTO's baseline asks both once more.
    return asked * (4 if objective.name == "kto" else 2)


def _differentiated(config: RunConfig) -> float:
    """Steps of a walk that a reward's gradient goes through, in the mean."""
    most = most_steps(config.objective, config.sampler.steps)
    return {"draft": most, "align-prop": (1 + most) / 2, "refl": 1}[config.objective.name]


def _denoising(policy: DiffusionPolicy | LanguagePolicy, config: RunConfig, held_out: int) -> dict[str, str]:
    assert isinstance(policy, DiffusionPolicy)
    made = calls(config, held_out, embedded=policy.family.guidance_embedded)
    return {"denoiser calls": f"{made:,} (image x step x guidance branch, forward)"}


def _writing(policy: DiffusionPolicy | LanguagePolicy, config: RunConfig, held_out: int) -> dict[str, str]:
    most = sum(generated(config, held_out)) * config.generation.max_new_tokens
    return {"tokens to generate": f"at most {most:,}"}


WORK = {"image": _denoising, "text": _writing}
PARTS = {"image": " in the denoiser", "text": ""}


def _size(policy: DiffusionPolicy | LanguagePolicy, *, adapted: bool) -> int:
    """Parameters of the model itself: an adapter is counted as what is trained."""
    model = policy.family.denoiser if isinstance(policy, DiffusionPolicy) else policy.model
    return sum(p.numel() for p in model.parameters() if not (adapted and p.requires_grad))


def memory(policy: DiffusionPolicy | LanguagePolicy, config: RunConfig) -> int:
    """Bytes that training needs at least; see ``parts``."""
    return sum(parts(policy, config).values())


def parts(policy: DiffusionPolicy | LanguagePolicy, config: RunConfig) -> dict[str, int]:
    """Bytes by what they are for, each counted but the last, which is measured.

    Weights in the precision that they are kept in; a fully trained model is there twice, for its frozen copy is the
    reference. Of what is trained, gradients, Adam's moments, and copies where old or averaged weights are kept. An
    epoch's latents or tokens. The activations that the backward pass of a micro-batch keeps.
    """
    copies = 1 + (config.objective.name in OF_OLD_WEIGHTS) + (config.trainer.ema_decay is not None)
    trained = list(policy.trainable().values())
    blank: dict[str, torch.Tensor]
    found: dict[str, int] = {}
    if isinstance(policy, DiffusionPolicy):
        model = policy.family.denoiser
        modules = [part for part in policy.family.modules() if not any(part is one for one in policy.encoders.networks)]
        found["text encoders"] = policy.encoders.nbytes
        latent, most = math.prod(policy.family.latent_shape) * FLOAT32, 1
        steps = config.sampler.steps + 1 if config.objective.name in NEEDS_STEPS else 1
        blank = {"latents": torch.randn(1, 2, *policy.family.latent_shape)}
    else:
        model, modules, latent, most = policy.model, [policy.model], 3 * FLOAT32, config.generation.max_new_tokens
        steps = most
        blank = {"tokens": torch.zeros((1, most), dtype=torch.int64)}
    if config.adapter is None:
        modules = [*modules, model]
    found |= {
        "weights": _weights(modules),
        "gradients and copies": copies * FLOAT32 * sum(p.numel() for p in trained),
        "optimiser": optimisers.nbytes(config.trainer, trained),
        "an epoch": config.trainer.samples_per_epoch * steps * latent,
        "activations": _activations(policy, config, blank, most),
    }
    if isinstance(policy, DiffusionPolicy) and not policy.encoders.stay:
        # They come for a new prompt and have left when the backward pass begins: never both at once.
        found["activations, or text encoders"] = max(found.pop("activations"), found.pop("text encoders"))
    return found


def _divided(policy: DiffusionPolicy | LanguagePolicy) -> str:
    """What ``trainer.shard`` leaves of the memory."""
    assert isinstance(policy, DiffusionPolicy)
    frozen = [p for p in policy.family.denoiser.parameters() if not p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in frozen)
    return f"{size / 2**20:.1f} MiB of weights, of which each of N processes keeps 1 / N, and a block while it is used"


def _weights(modules: Sequence[torch.nn.Module]) -> int:
    """Of parameters and of buffers: the table of places of Stable Diffusion 3.5 medium takes 0.9 GB in float32."""
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def _activations(
    policy: DiffusionPolicy | LanguagePolicy, config: RunConfig, state: dict[str, torch.Tensor], steps: int
) -> int:
    """Bytes that the backward pass of a micro-batch keeps.

    Measured on one row and on two: what both keep, such as weights cast to another precision, is there once.
    """

    def kept(rows: int) -> int:
        blank = torch.ones(rows, steps)
        several = {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in state.items()}
        rollout = Rollout((Sample(Prompt("x")),) * rows, blank, blank.bool(), several)
        with torch.compiler.set_stance("force_eager"):  # a plan is not worth minutes of compiling
            return _saved(policy, lambda: policy.step_log_probs(rollout, torch.arange(steps).repeat(rows, 1)))

    rows = config.trainer.micro_batch_size
    one = kept(1)
    each = kept(2) - one if rows > 1 else 0
    step = one + (rows - 1) * each
    if not isinstance(policy, DiffusionPolicy) or config.objective.name not in BACKPROP:
        return step
    latents = torch.zeros(1, *policy.family.latent_shape, device=policy.device, requires_grad=True)
    decoded = rows * _saved(policy, lambda: policy.family.decode(latents))
    if config.trainer.gradient_checkpointing:
        return max(step, decoded)
    through = 1 if config.objective.name == "refl" else most_steps(config.objective, config.sampler.steps)
    return step * through + decoded


def _saved(policy: DiffusionPolicy | LanguagePolicy, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights aside; memory that is kept twice is there once."""
    models = policy.family.modules() if isinstance(policy, DiffusionPolicy) else [policy.model]
    known = {tensor.untyped_storage().data_ptr() for model in models for tensor in model.state_dict().values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = forward()  # held until all is counted: else its memory would be given to others
    del made
    return sum(saved.values())


def _available(device: torch.device) -> int:
    """Bytes of the device's own memory, or of the machine's where they share it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
