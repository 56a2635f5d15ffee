"""How samples are made, in training and in evaluation alike; images and texts have a section each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from diffalign.section import Section
from diffalign.types import Modality


class SamplerConfig(Section):
    """How images are sampled."""

    steps: int = Field(10, ge=1, le=1000)
    """Number of denoising steps."""
    eta: float = Field(1.0, ge=0, le=1)
    """Share of the DDPM noise; 0 is deterministic and has no likelihood, so policy gradients refuse it."""
    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance; 1 is none, and halves the work."""
    batch_size: int = Field(32, ge=1)
    """Images sampled at once; memory only, results do not depend on it beyond float rounding."""


class GenerationConfig(Section):
    """How texts are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it, in the rollout and wherever the likelihood of its tokens is asked."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a sample at most, its end among them."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether a prompt goes through the tokenizer's chat template: ``auto`` does where there is one."""
    batch_size: int = Field(32, ge=1)
    """Texts sampled at once; memory only, results do not depend on it beyond float rounding."""


SAMPLED_BY: Mapping[Modality, str] = {"image": "sampler", "text": "generation"}
"""The section that says how samples of a modality are made; a run has no other."""
REDUCTIONS: Mapping[Modality, Literal["mean", "sum"]] = {"image": "mean", "text": "sum"}
"""How a sample's log-likelihood is reduced: a mean over latent elements, or a sum over tokens."""
