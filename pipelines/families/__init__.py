"""Families of diffusion models, each by diffusers' own pipeline class, behind one interface: see ``base.Family``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.families.base import ATTENTION, Conditioning, Family, joined
from pipelines.families.transformer import Flux, StableDiffusion3, ZImage
from pipelines.families.unet import EVERYTHING, StableDiffusion, StableDiffusionXL

__all__ = [
    "ATTENTION",
    "EVERYTHING",
    "FAMILIES",
    "Conditioning",
    "Family",
    "Flux",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "joined",
]

FAMILIES: Mapping[str, Any] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "ZImagePipeline": ZImage,
}
"""The family of each pipeline class of diffusers that can be aligned; each is made of such a pipeline."""
