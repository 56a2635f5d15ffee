"""What every family of diffusion models has: a pipeline of diffusers' own class, behind one interface.

Families differ in text encoding, the denoiser's call, the shape of latents, what the denoiser predicts, the noise
schedule and the style of guidance. Nothing else does, so a new family is one more class with these members. Shape
legend: ``B`` prompts or rows, ``L`` text tokens, ``D`` text width, ``P`` width of a pooled text, ``C H W`` latents.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from diffalign.config import SamplerConfig
from diffalign.denoising import Prediction
from diffalign.errors import ConfigError
from pipelines.schedules import Schedule

log = logging.getLogger(__name__)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""Names of attention layers in all families of diffusers."""
ONE_BY_ONE = 512
"""Pixels along a side from which images are decoded by themselves. At 1024 pixels one layer of 256 features is 1 GiB
for each image, in float32."""
Layers = Mapping[Literal["attention", "all"], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a denoiser is conditioned on, batch first."""

    tokens: Tensor
    """float32 ``(B, L, D)``: the text, token by token."""
    pooled: Tensor | None = None
    """float32 ``(B, P)``: the text as a whole, where the family has it."""
    mask: Tensor | None = None
    """bool ``(B, L)``: False is padding; where the family leaves padding out."""
    guidance: Tensor | None = None
    """float32 ``(B,)``: the guidance scale, where the denoiser takes it as an input."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory of it."""
        return sum(tensor.nbytes for tensor in (self.tokens, self.pooled, self.mask) if tensor is not None)


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch of several; those that have a mask are padded to the longest."""
    longest = max(part.tokens.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]))

    pooled = [part.pooled for part in parts if part.pooled is not None]
    masks = [padded(part.mask) for part in parts if part.mask is not None]
    tokens = [padded(part.tokens) if masks else part.tokens for part in parts]
    return Conditioning(torch.cat(tokens), torch.cat(pooled) if pooled else None, torch.cat(masks) if masks else None)


class Family(ABC):
    """One family of models behind one interface, with what most of them share."""

    part: ClassVar[Literal["unet", "transformer"]]
    """The denoiser's name in the pipeline, and the prefix of its LoRA."""
    layers: ClassVar[Layers]
    """What ``adapter.targets`` means here, ``attention`` and ``all``."""
    patch: ClassVar[int] = 1
    """Latents that make one token, along a side."""
    prediction: Prediction | Literal["flow"]
    """What the denoiser says."""
    latent_shape: tuple[int, int, int]
    """``(C, H, W)`` of one image."""
    guidance_embedded: bool = False
    """Whether the denoiser takes the guidance scale as an input; then there is no second, unconditional pass."""

    def __init__(self, pipeline: DiffusionPipeline, channels: int, height: int, width: int) -> None:
        self.pipeline = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.part)
        self.latent_shape = (channels, height, width)
        self._warned: set[str] = set()

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """What the denoiser is conditioned on, by these texts."""

    @abstractmethod
    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's output ``(B, C, H, W)``, read as ``prediction`` says, for latents and timesteps ``(B,)``."""

    @abstractmethod
    def schedule(self, sampler: SamplerConfig, device: torch.device) -> Schedule:
        """The steps of a sampler on this model's noise schedule. Raises ConfigError for settings of another kind."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 ``(B, 3, H', W')`` in [0, 1] of latents ``(B, C, H, W)``. Large ones one after the other."""
        if latents.shape[-2] * self.pipeline.vae_scale_factor < ONE_BY_ONE:
            return self._decoded(latents)
        return torch.cat([self._decoded(one) for one in latents.split(1)])

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype)
        mean, std = self._statistics(scaled)
        scaled = scaled / vae.config.scaling_factor if std is None else scaled * std / vae.config.scaling_factor
        if mean is not None:
            scaled = scaled + mean
        images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` float32 of images float32 ``(B, 3, H', W')`` in [0, 1]; the inverse of decode.

        The mean of the encoder's distribution: the same latents every time.
        """
        vae = self.pipeline.vae
        latents: Tensor = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(latents)
        if mean is not None:
            latents = latents - mean
        latents = latents * vae.config.scaling_factor
        return (latents if std is None else latents / std).float()

    def _statistics(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mean (or shift) and deviation of the autoencoder's latents, where its configuration says them."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
            return mean, std
        shift = config.get("shift_factor")
        return (None if shift is None else torch.tensor(shift).to(like)), None

    def image_size(self) -> tuple[int, int]:
        """Width and height of the images, in pixels."""
        scale = self.pipeline.vae_scale_factor
        return self.latent_shape[2] * scale, self.latent_shape[1] * scale

    def resize(self, side: int) -> None:
        """Makes square images of that many pixels. Raises ConfigError for a size that does not divide."""
        scale = self.pipeline.vae_scale_factor
        if side % (scale * self.patch):
            near = max(1, round(side / (scale * self.patch))) * scale * self.patch
            raise ConfigError(
                f"sampler.size {side} is no multiple of the {scale * self.patch} pixels that one token of the model"
                f" stands for; the nearest that is: {near}"
            )
        self.latent_shape = (self.latent_shape[0], side // scale, side // scale)

    @classmethod
    def kept_in(cls, precision: torch.dtype, parts: Iterable[str]) -> dict[str, torch.dtype]:
        """Of these networks of the pipeline those whose weights, where none is trained, are not kept in float32 when
        the denoiser computes in ``precision``. Most families have none.
        """
        return {}

    def freeze_in(self, precision: torch.dtype) -> None:
        """Keeps weights that are not trained as ``kept_in`` says."""
        parts = self.components()
        for name, dtype in self.kept_in(precision, parts).items():
            nn.Module.to(parts[name], dtype)  # diffusers' own to() warns, of layers to keep that these have none of

    def warn_if_cut(self, text: str, count: int, limit: int) -> None:
        """Warns, once for each text, where it has more tokens than its encoder takes."""
        if count > limit and text not in self._warned:
            self._warned.add(text)
            log.warning(
                "prompt %r is %d tokens long and the text encoder takes %d: its last %d tokens are cut",
                text[:60] + ("…" if len(text) > 60 else ""), count, limit, count - limit,
            )  # fmt: skip

    def components(self) -> dict[str, nn.Module]:
        """The networks of the pipeline by name: text encoders, denoiser, autoencoder."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def modules(self) -> list[nn.Module]:
        """The same without names."""
        return list(self.components().values())
