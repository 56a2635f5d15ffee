"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Tiny models gain nothing from several threads, and lose much where the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
# A proxy of the machine leads elsewhere; servers of tests are here.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import HealthCheck, settings
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.diffusion import DiffusionPolicy
from pipelines.embedded import tokenizer as tokenizers
from pipelines.families import StableDiffusion

# A machine that pauses for a fifth of a second says nothing about what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

WORDS = ["one", "two", "three", "red", "green", "blue", "ball", "cube", "a"]


def build_pipeline(folder: Path, prediction: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A tiny random Stable Diffusion (under 0.1 M parameters, 8x8 latents, 16x16 pixels) of the real classes."""
    torch.manual_seed(seed)
    tokenizer: CLIPTokenizer = tokenizers.build([" ".join(WORDS)] * 3, folder / "tokenizer", length=16)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny")
    build_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., DiffusionPolicy]:
    """Makes policies over fresh copies of the tiny pipeline."""

    def make(prediction: str = "epsilon", **options: object) -> DiffusionPolicy:
        return DiffusionPolicy(StableDiffusion(build_pipeline(tmp_path, prediction)), **options)  # type: ignore[arg-type]

    return make
