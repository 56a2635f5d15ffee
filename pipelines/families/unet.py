"""The families with a U-Net on a discrete noise schedule: Stable Diffusion 1.x and 2.x, and SDXL.

Shape legend: see ``base``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from diffalign.config import SamplerConfig
from diffalign.denoising import Prediction
from diffalign.errors import ConfigError
from pipelines.families.base import ATTENTION, Conditioning, Family, Layers
from pipelines.schedules import Ddim

EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]


class StableDiffusion(Family):
    """Any ``StableDiffusionPipeline``: Stable Diffusion 1.x and 2.x, and the embedded models."""

    part = "unet"
    layers: ClassVar[Layers] = {"attention": ATTENTION, "all": EVERYTHING}

    def __init__(self, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> None:
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(pipeline, pipeline.unet.config.in_channels, height, width)
        self.scheduler = _ddim(pipeline)
        self.prediction: Prediction = self.scheduler.config.prediction_type

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """See Family. A text longer than the encoder takes is cut, with a warning that counts the lost tokens."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        limit = tokenizer.model_max_length
        for text in texts:
            self.warn_if_cut(text, len(tokenizer(text, truncation=False, verbose=False).input_ids), limit)
        tokens = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        ).input_ids
        encoded: Tensor = encoder(tokens.to(encoder.device))[0]
        return Conditioning(encoded.float())

    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """See Family."""
        output: Tensor = self.denoiser(latents, timesteps, encoder_hidden_states=text.tokens, return_dict=False)[0]
        return output

    def schedule(self, sampler: SamplerConfig, device: torch.device) -> Ddim:
        """See Family: DDIM, whatever scheduler the checkpoint was saved with."""
        return Ddim(self.scheduler, self.prediction, sampler, device)


class StableDiffusionXL(StableDiffusion):
    """Any ``StableDiffusionXLPipeline`` (Podell et al. 2023): two text encoders, and sizes among the conditions."""

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Conditioning:
        """See Family. An empty text is all zeros where the checkpoint says ``force_zeros_for_empty_prompt``."""
        pipeline = cast(StableDiffusionXLPipeline, self.pipeline)
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(texts), device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(text) for text in texts], device=tokens.device)
            tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
        return Conditioning(tokens.float(), pooled.float())

    def denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """See Family. As in diffusers, the image is said to be made of one of its own size, of which nothing is cut."""
        width, height = self.image_size()
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=latents.device)
        output: Tensor = self.denoiser(
            latents, timesteps, encoder_hidden_states=text.tokens, return_dict=False,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes.expand(len(latents), -1)},
        )[0]  # fmt: skip
        return output


def _ddim(pipeline: DiffusionPipeline) -> DDIMScheduler:
    """The DDIM scheduler of a checkpoint, whatever scheduler it was saved with."""
    config = dict(pipeline.scheduler.config)
    # DDIM's own default clips to [-1, 1], which is right for pixels and wrong for latents that never said so.
    config.setdefault("clip_sample", False)
    if config.get("thresholding"):
        raise ConfigError("the checkpoint's scheduler uses dynamic thresholding, which has no log-density")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(f"prediction type {config['prediction_type']!r} is not one of epsilon, v_prediction, sample")
    return DDIMScheduler.from_config(config)
