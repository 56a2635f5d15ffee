"""How samples are made: images and texts have a section each. Evaluation may take steps of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from diffalign.section import Section
from diffalign.types import Modality

FlowNoise = Literal["sde", "cps", "dance"]
"""How noise enters the steps of a flow model."""
OPTIONAL = ("noise", "window", "size")
"""Fields of a sampler that stand in a file only where they say something."""


class WindowConfig(Section):
    """Which steps have noise: the window of MixGRPO (Li et al. 2025, arXiv 2507.21802), which stays, or moves on as
    training goes. Whatever is sampled outside of training has it where it starts.
    """

    start: int = Field(0, ge=0)
    """The first of them, counted from 0; of a window that moves, that of the first epoch."""
    steps: int = Field(2, ge=1)
    """How many."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Epochs after which the window moves on, towards the image, until it is on the last steps that have noise, where
    it stays. Null is never."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Steps that it moves by; null is 1."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See SamplerConfig."""
        return {name: value for name, value in handler(self).items() if value is not None}

    @model_validator(mode="after")
    def _moves(self) -> WindowConfig:
        if self.stride is not None and self.every is None:
            raise ValueError(
                "stride is how far the window moves, and every, the epochs after which it does, is missing: set"
                " window.every, or leave window.stride out"
            )
        return self

    def at(self, epoch: int, noisy: int) -> WindowConfig:
        """Where the window is in an epoch, counted from 0, as one that stays; the first ``noisy`` steps can have noise.

        Its first step is ``min(start + stride * floor(epoch / every), noisy - steps)`` (Li et al. 2025, section 3.2:
        ``every`` is the shift interval, ``stride`` the stride), and never before ``start``.
        """
        moved = 0 if self.every is None else epoch // self.every * (self.stride or 1)
        first = max(self.start, min(self.start + moved, noisy - self.steps))
        return WindowConfig(start=first, steps=self.steps)


class SamplerConfig(Section):
    """How images are sampled."""

    steps: int = Field(10, ge=1, le=1000)
    """Number of denoising steps."""
    noise: FlowNoise | None = None
    """Of flow models: how noise enters a step, by Flow-GRPO's ``sde`` (the default), coefficients-preserving sampling
    ``cps``, or DanceGRPO's ``dance``. The others sample by DDIM, and leave it null."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much noise a step has; 0 is deterministic and has no likelihood, so policy gradients refuse it. Of DDIM the
    share of the DDPM noise, of flow models the level a (``sde``, ``cps``) or eta (``dance``) of their papers. Null is 1
    for DDIM, 0.7 for ``sde``, 0.8 for ``cps`` and 0.3 for ``dance``."""
    window: WindowConfig | None = None
    """The steps that have noise; the others are deterministic and not trained on. Null is all of them."""
    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance; 1 is none, and halves the work. Models that take the scale as an input, such as
    FLUX.1-dev, get it there at no cost."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side of the images in pixels, which are square then; null is the size that the checkpoint is made for."""
    batch_size: int = Field(32, ge=1)
    """Images sampled at once; memory only, results do not depend on it beyond float rounding."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A specification's hash, and the seeds that derive from it, are those from before these fields were."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None or name not in OPTIONAL}

    @model_validator(mode="after")
    def _window_fits(self) -> SamplerConfig:
        if self.window is not None and self.window.start + self.window.steps > self.steps:
            raise ValueError(
                f"window ends at step {self.window.start + self.window.steps}, and there are {self.steps} steps; set"
                " window.start and window.steps to end there or before"
            )
        return self


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
