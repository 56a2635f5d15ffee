"""The lines of a report that make an image of the aligned model in diffusers itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.config import RunConfig

if TYPE_CHECKING:
    from pipelines.families.base import Family

UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Call:
    """How diffusers' own pipeline is called to sample as ``diffalign`` looked at the model."""

    ddim: bool
    """Whether DDIM takes the place of the checkpoint's scheduler: of U-Nets. Flow models keep theirs."""
    arguments: str
    quiet: bool
    """Whether diffusers adds no noise where the run's own samples had some: a flow model's pipeline has no ``eta``."""


def facts(family: Family) -> dict[str, Any]:
    """What a run records of its pipeline: its class, and whether guidance is an input of the denoiser."""
    return {"class": type(family.pipeline).__name__, "guidance_embedded": family.guidance_embedded}


def call(config: RunConfig, pipeline: Mapping[str, Any]) -> Call:
    """The call for the pipeline of ``facts``; a run that recorded none is taken for a Stable Diffusion."""
    sampler, kind = config.looked_at, pipeline.get("class", UNETS[0])
    options: dict[str, Any] = {"num_inference_steps": sampler.steps}
    if kind in UNETS:
        options["eta"] = 1.0 if sampler.eta is None else sampler.eta
    options |= _guidance(kind, sampler.guidance_scale, embedded=bool(pipeline.get("guidance_embedded")))
    if sampler.size is not None:
        options |= {"height": sampler.size, "width": sampler.size}
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Call(kind in UNETS, arguments, quiet=kind not in UNETS and sampler.eta != 0)


def _guidance(kind: str, scale: float, *, embedded: bool) -> dict[str, Any]:
    """diffusers' names for a scale of which 1 is none: Z-Image counts from 0, FLUX.1-schnell has another argument."""
    if kind == "ZImagePipeline":
        return {"guidance_scale": scale - 1}
    if kind == "FluxPipeline" and not embedded:
        return {} if scale == 1 else {"true_cfg_scale": scale, "negative_prompt": ""}
    return {"guidance_scale": scale}
