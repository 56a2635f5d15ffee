"""What both sides of the DDPO comparison are given: the model, the prompts, and every setting."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

OBJECTS = ("ball", "cube", "cone", "ring")
COLOURS = ("red", "green", "blue", "grey")
PROMPTS = tuple(f"a {colour} {thing}" for colour in COLOURS for thing in OBJECTS)


@dataclass(frozen=True, slots=True)
class Setup:
    """One iteration: sample ``images``, score them, and make one optimiser update from all their steps."""

    images: int = 32
    steps: int = 10
    guidance_scale: float = 5.0
    eta: float = 1.0
    micro_batch: int = 16
    """Images, each at one denoising step, in a forward and backward pass; guidance doubles the denoiser's batch."""
    rank: int = 4
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    pixels: int = 64
    """Side of the images. TRL takes it from the model alone, so the model is made for it."""
    matmul: int = 1024
    """Side of the matrices whose product is the ceiling."""

    def calls(self, micro_batch: int) -> dict[str, int]:
        """The denoiser calls that one iteration takes, by kind and batch."""
        return {
            f"forward, batch {2 * self.images}": self.steps,
            f"forward and backward, batch {2 * micro_batch}": self.images * self.steps // micro_batch,
        }


SETUP = Setup()
SETUPS = {"tiny": SETUP, "sd15": Setup(images=4, steps=2, micro_batch=2, pixels=128, matmul=4096)}
"""By the name of the model: the tiny one below, or one of ``sizes_models``. TRL's LoRA has rank 4, and no other."""


def ensure_model(folder: Path) -> Path:
    """The tiny pipeline as a diffusers folder; made where it is missing, so that all sides load the same files."""
    if not (folder / "model_index.json").is_file():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _tiny_pipeline(partial / "tokenizer").save_pretrained(partial)
        partial.rename(folder)
    return folder


def _tiny_pipeline(tokenizer_folder: Path) -> StableDiffusionPipeline:
    """A random Stable Diffusion of the real classes: U-Net of 1 M parameters, 16x16 latents, 64x64 pixels."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from pipelines.embedded import tokenizer as tokenizers

    torch.manual_seed(0)
    tokenizer = tokenizers.build(PROMPTS, tokenizer_folder, length=32)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
