"""The families with a transformer that matches a flow: Stable Diffusion 3 and 3.5, FLUX.1, Z-Image.

Shape legend: see ``base``; ``N`` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn import functional

from diffalign.config import SamplerConfig
from diffalign.errors import ConfigError
from pipelines.families.base import ATTENTION, Conditioning, Family, Layers
from pipelines.schedules import Flow

JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""Attention of an image and its text together."""
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class FlowFamily(Family):
    """What flow transformers share: their schedule."""

    part = "transformer"
    patch = 2
    prediction = "flow"
    from_one: bool = True
    """Whether sampling begins at sigma 1 and ends a step above 0, before any shift; else as the scheduler has it."""

    def schedule(self, sampler: SamplerConfig, device: torch.device) -> Flow:
        """See Family: the sigmas of the family's own pipeline, shifted as the checkpoint says for the image's size."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        if scheduler.config.invert_sigmas:
            raise ConfigError("the checkpoint's scheduler counts noise upwards (invert_sigmas), which no sampler does")
        options = {"mu": self._shift(scheduler)} if scheduler.config.use_dynamic_shifting else {}
        if self.from_one:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / sampler.steps, sampler.steps), **options)
        else:
            scheduler.set_timesteps(sampler.steps, **options)
        return Flow(scheduler, sampler, device)

    @classmethod
    def kept_in(cls, precision: torch.dtype, parts: Iterable[str]) -> dict[str, torch.dtype]:
        """See Family: the denoiser in half precision, and in bfloat16 the text encoders (T5 overflows in float16).

        Trained weights are no part of it: a LoRA is float32 on top.
        """
        if precision == torch.float32:
            return {}
        encoders = [name for name in parts if name.startswith("text_encoder") and precision == torch.bfloat16]
        return dict.fromkeys([cls.part, *encoders], precision)

    def _shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        """Dynamic shift: the larger the image, the more of the steps are spent at high noise."""
        config, (_, height, width) = scheduler.config, self.latent_shape
        tokens = (height // self.patch) * (width // self.patch)
        mu: float = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return mu


class StableDiffusion3(FlowFamily):
    """Any ``StableDiffusion3Pipeline`` (Esser et al. 2024): two CLIP encoders, and T5 where the checkpoint has it."""

    layers: ClassVar[Layers] = {"attention": JOINT, "all": [*JOINT, *FEED_FORWARD]}
    from_one = False

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        config = pipeline.transformer.config
        super().__init__(pipeline, config.in_channels, config.sample_size, config.sample_size)

    def resize(self, side: int) -> None:
        """See Family. The checkpoint knows the places of so many tokens along a side."""
        super().resize(side)
        known = self.pipeline.transformer.config.pos_embed_max_size
        if self.latent_shape[1] // self.patch > known:
            most = known * self.patch * self.pipeline.vae_scale_factor
            raise ConfigError(f"sampler.size {side} is more than the {most} pixels that the model knows the places of")

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """See Family. Without T5 its tokens are zeros, as in diffusers."""
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, device=self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return Conditioning(tokens.float(), pooled.float())

    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """See Family."""
        output: Tensor = self.denoiser(
            latents, timestep=timesteps, encoder_hidden_states=text.tokens, pooled_projections=text.pooled,
            return_dict=False,
        )[0]  # fmt: skip
        return output


class Flux(FlowFamily):
    """Any ``FluxPipeline``: FLUX.1-dev, which takes the guidance scale as an input, and FLUX.1-schnell.

    Latents are ``(C, H, W)`` outside; here 2 x 2 of them are packed into one token.
    """

    layers: ClassVar[Layers] = {
        "attention": JOINT,
        "all": [*JOINT, *FEED_FORWARD, "proj_mlp", "proj_out"],
    }

    def __init__(self, pipeline: FluxPipeline) -> None:
        side = pipeline.default_sample_size
        super().__init__(pipeline, pipeline.transformer.config.in_channels // 4, side, side)
        self.guidance_embedded: bool = pipeline.transformer.config.guidance_embeds

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """See Family: tokens of T5, pooled by CLIP."""
        tokens, pooled, _ = self.pipeline.encode_prompt(list(texts), device=self.pipeline.text_encoder.device)
        return Conditioning(tokens.float(), pooled.float())

    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """See Family."""
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        output: Tensor = self.denoiser(
            hidden_states=functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=text.guidance if self.guidance_embedded else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=places.to(latents),
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), 2)


class ZImage(FlowFamily):
    """Any ``ZImagePipeline`` (Z-Image, 2025): one language model for the text, of which padding is left out.

    Its own pipeline counts guidance from 0: its ``guidance_scale`` w is 1 + w here, as in all other families.
    """

    layers: ClassVar[Layers] = {
        "attention": ATTENTION,
        "all": [*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    }

    def __init__(self, pipeline: ZImagePipeline) -> None:
        side = 1024 // pipeline.vae_scale_factor
        super().__init__(pipeline, pipeline.transformer.config.in_channels, side, side)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """See Family. As in diffusers, a text is a message of a chat, of which 512 tokens are read."""
        tokenizer = self.pipeline.tokenizer
        for text in texts:
            chat = [{"role": "user", "content": text}]
            whole = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            self.warn_if_cut(text, len(tokenizer(whole, verbose=False).input_ids), 512)
        found, _ = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        tokens = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        lengths = torch.tensor([len(one) for one in found], device=tokens.device)
        return Conditioning(tokens.float(), mask=torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])

    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """See Family. The transformer counts time from noise to image, and says the velocity in that direction."""
        assert text.mask is not None
        said = [tokens[mask] for tokens, mask in zip(text.tokens, text.mask, strict=True)]
        found = self.denoiser(list(latents.unsqueeze(2).unbind(0)), (1000 - timesteps) / 1000, said, return_dict=False)[
            0
        ]
        return -torch.stack(list(found)).squeeze(2)
