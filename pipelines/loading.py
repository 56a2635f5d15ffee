"""From the name of a model to its pipeline: ``embedded:NAME``, a local diffusers folder, or a hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.utils import set_peft_model_state_dict
from transformers.utils import logging as transformers_logging

from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import Family, StableDiffusion

EMBEDDED = Path(__file__).parent / "embedded"


def embedded_models() -> list[str]:
    """Names of the image models that ship with diffalign."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/model_index.json"))


def locate(model: str) -> str | Path:
    """The folder of an embedded or local model, or the hub id as it is."""
    if model.startswith("embedded:"):
        name = model.removeprefix("embedded:")
        if name not in embedded_models():
            known = ", ".join(f"embedded:{known}" for known in embedded_models())
            raise NotFoundError(f"there is no embedded image model {name!r}; there is {known}")
        return EMBEDDED / name
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return path
    if path.exists():
        raise InputError(f"{model} is not a diffusers pipeline folder: it has no model_index.json")
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    raise NotFoundError(f"no model folder {model}; give embedded:NAME, a local diffusers folder, or a hub id ORG/NAME")


def load_family(model: str) -> Family:
    """The pipeline of a model in float32, behind the interface of its family."""
    where = locate(model)
    local = isinstance(where, Path)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            where, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, use_safetensors=True,
            local_files_only=local,
        )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if local:
            raise InputError(
                f"model {model} cannot be loaded, its files are incomplete or corrupt: {reason}"
            ) from error
        raise NotFoundError(f"model {model} is not on this machine and could not be fetched: {reason}") from error
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ConfigError(
            f"model {model} is a {type(pipeline).__name__}; this version aligns StableDiffusionPipeline checkpoints"
        )
    pipeline.set_progress_bar_config(disable=True)
    return StableDiffusion(pipeline)


def load_policy(
    model: str,
    *,
    adapter: AdapterConfig | None = None,
    full: bool = False,
    sampler: SamplerConfig | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> DiffusionPolicy:
    """The model of that name, to sample from, or to align by a LoRA (``adapter``) or in every weight (``full``)."""
    return DiffusionPolicy(
        load_family(model),
        name=model,
        adapter=adapter,
        full=full,
        sampler=sampler,
        device=device,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )


def load_adapter(policy: DiffusionPolicy, folder: Path) -> None:
    """Puts the weights of a saved adapter into a policy that was built with the same adapter settings."""
    try:
        state, _ = StableDiffusionPipeline.lora_state_dict(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"adapter {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    weights = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
    result = set_peft_model_state_dict(policy.family.denoiser, weights)
    if result.unexpected_keys:
        raise InputError(f"adapter {folder} does not fit the model: unexpected {result.unexpected_keys[0]}")
