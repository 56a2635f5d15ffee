"""What ``sizes`` measures: models of the sizes that people use, with random weights, and the settings of an iteration.

``python -m benchmarks.sizes_models NAME FOLDER`` makes one. Classes and configurations are those of the published
checkpoints; weights are as the classes initialise them, saved in bfloat16. A tokenizer of a few words stands in for the
published vocabulary; the embeddings have their full size.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ddpo_setup import PROMPTS
from benchmarks.environment import ROOT

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WORK = ROOT / "build" / "bench-sizes"
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SD15: Mapping[str, Any] = {"cross_attention_dim": 768}
SDXL: Mapping[str, Any] = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", CROSS[0], CROSS[0]), "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": (CROSS[1], CROSS[1], "UpBlock2D"), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35_MEDIUM: Mapping[str, Any] = {
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
FLUX: Mapping[str, Any] = {"guidance_embeds": True}
"""What the denoisers' configurations say beyond the defaults of their classes."""
CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_BIG_G: Mapping[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLUX_SHARE = 2, 19
"""Of 19 double and 38 single blocks this share is made: all 11.9 G parameters do not fit into 24 GiB."""


def text_encoder(tokenizer: Any, config: Mapping[str, Any], *, projected: bool = False) -> Any:
    """A text encoder of CLIP at its real size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return kind(CLIPTextConfig(**config, **ends))


def autoencoder(channels: int, **config: Any) -> Any:
    """The autoencoder of Stable Diffusion 1.5, SDXL, Stable Diffusion 3 and FLUX, which differ in their latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **config,
    )  # fmt: skip


def stable_diffusion(tokenizer: Any, side: int | None) -> DiffusionPipeline:
    """Stable Diffusion 1.5, with a DDIM scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    scheduler = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        vae=autoencoder(4, sample_size=512), text_encoder=text_encoder(tokenizer, CLIP_L), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=(side or 512) // 8, **SD15), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(tokenizer: Any, side: int | None) -> DiffusionPipeline:
    """SDXL with both of its text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    return StableDiffusionXLPipeline(
        vae=autoencoder(4, sample_size=1024, scaling_factor=0.13025), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=text_encoder(tokenizer, CLIP_L),
        text_encoder_2=text_encoder(tokenizer, CLIP_BIG_G, projected=True),
        unet=UNet2DConditionModel(sample_size=(side or 1024) // 8, **SDXL), add_watermarker=False,
        scheduler=EulerDiscreteScheduler.from_config(
            {**BETAS, "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": False}
        ),
    )  # fmt: skip


def stable_diffusion_35_medium(tokenizer: Any, side: int | None) -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium without T5, which its pipeline allows."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        vae=autoencoder(
            16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=SD3Transformer2DModel(sample_size=(side or 1024) // 8, **SD35_MEDIUM),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=text_encoder(tokenizer, CLIP_L, projected=True), tokenizer=tokenizer,
        text_encoder_2=text_encoder(tokenizer, CLIP_BIG_G, projected=True), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(tokenizer: Any, side: int | None, share: tuple[int, int] = (1, 1)) -> DiffusionPipeline:
    """FLUX.1-dev, or a share of its blocks; a T5 of one narrow layer, but of T5-XXL's width outside, reads the text.

    The pipeline has no say in its own image size, so ``side`` must be None.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    assert side is None
    words = dict.fromkeys(word for prompt in PROMPTS for word in prompt.split())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentences = T5Tokenizer(vocab=[*special, ("▁", -2.0), *((f"▁{word}", -3.0) for word in words)], extra_ids=0)
    blocks = {name: count * share[0] // share[1] for name, count in {"num_layers": 19, "num_single_layers": 38}.items()}
    return FluxPipeline(
        vae=autoencoder(
            16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=FluxTransformer2DModel(**FLUX, **blocks), scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, max_image_seq_len=4096, base_image_seq_len=256
        ),
        text_encoder=text_encoder(tokenizer, CLIP_L), tokenizer=tokenizer, tokenizer_2=sentences,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(sentences), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1, dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """One iteration: sample ``images``, score their JPEG size, and make one optimiser update from all their steps."""

    device: str = "cpu"
    precision: str = "fp32"
    pixels: int = 128
    images: int = 2
    steps: int = 2
    guidance_scale: float = 5.0
    micro_batch: int = 2
    """Denoising steps in a forward and backward pass; guidance doubles the denoiser's batch."""
    rank: int = 16
    gradient_checkpointing: bool = False
    matmul: int = 4096
    """Side of the matrices whose product is the ceiling."""


@dataclass(frozen=True)
class Model:
    """A model of a size that people use."""

    title: str
    make: Callable[[Any, int | None], DiffusionPipeline]
    precisions: Sequence[str] = ("fp32",)
    """What it is measured in where nothing else is said."""
    guidance_scale: float = 5.0
    note: str = ""
    """What of it is not as published."""


MODELS: Mapping[str, Model] = {
    "sd15": Model("Stable Diffusion 1.5", stable_diffusion),
    "sdxl": Model("SDXL", stable_diffusion_xl),
    "sd35-medium": Model(
        "Stable Diffusion 3.5 medium", stable_diffusion_35_medium, ("fp32", "bf16"),
        note="without its T5 (4.8 G parameters), as its pipeline allows: the T5's tokens are zeros",
    ),
    "flux-share": Model(
        f"FLUX.1-dev, {FLUX_SHARE[0]} of {FLUX_SHARE[1]} of its blocks",
        lambda tokenizer, side: flux(tokenizer, side, FLUX_SHARE), ("bf16",), 3.5,
        note="2 of its 19 double and 4 of its 38 single blocks, and a T5 of one narrow layer: not a FLUX",
    ),
    "flux": Model(
        "FLUX.1-dev", flux, ("bf16",), 3.5,
        note="a T5 of one narrow layer in place of T5-XXL, with as many tokens as wide",
    ),
}  # fmt: skip
DEFAULT = ("sd15", "sdxl", "sd35-medium", "flux-share")


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Inside it weights are made in bfloat16: half of the memory, and of the file."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(name: str, folder: Path, side: int | None = None) -> Path:
    """Saves that model as a diffusers folder, as the hub lays it out; ``side``: pixels that it is made for."""
    import torch

    from pipelines.embedded import tokenizer as tokenizers

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = tokenizers.build(PROMPTS, partial / "tokenizer", length=77)
    torch.manual_seed(0)
    with _in_bfloat16():
        pipeline = MODELS[name].make(tokenizer, side)
    pipeline.save_pretrained(partial, max_shard_size="2GB")
    partial.rename(folder)
    return folder


@contextmanager
def made(name: str, side: int | None = None, *, keep: bool = False) -> Iterator[Path]:
    """The folder of a model, made by another process, so that none of its memory is left in this one.

    It is removed at the end, unless it is to be kept.
    """
    folder = WORK / (name if side is None else f"{name}-{side}")
    if not folder.is_dir():
        print(f"{name}: making random weights", flush=True)
        sized = [] if side is None else ["--side", str(side)]
        command = [sys.executable, "-m", "benchmarks.sizes_models", name, str(folder), *sized]
        subprocess.run(command, cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes_models", description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, help="pixels that the model says it is made for")
    given = parser.parse_args()
    make(given.name, given.folder, given.side)
