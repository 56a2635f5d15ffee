"""A tiny random pipeline of each family, of the real classes and as the hub lays it out: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipelines.embedded import tokenizer as tokenizers

WORDS = ["one", "two", "three", "red", "green", "blue", "ball", "cube", "a"]
SIZE = 16
"""Pixels along a side: latents are 8 x 8, for each autoencoder halves an image once."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer(folder: Path, length: int = 16) -> CLIPTokenizer:
    """Words as tokens, in CLIP's own files."""
    return tokenizers.build([" ".join(WORDS)] * 3, folder, length=length)


def t5_tokenizer() -> T5Tokenizer:
    """Words as tokens, after T5's three special ones."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    return T5Tokenizer(vocab=[*special, *words], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, with the chat markers that a template needs."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:], chat_template=TEMPLATE)


def clip_encoder(tokenizer: CLIPTokenizer, width: int, kind: Any = CLIPTextModel, layers: int = 2) -> Any:
    """A CLIP text encoder of that width."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """The encoder half of a T5 of that width."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Halves images once."""
    return AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2, sample_size=SIZE, **config,
    )  # fmt: skip


def unet(width: int, **config: Any) -> UNet2DConditionModel:
    """A U-Net over 8 x 8 latents that reads tokens of that width."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=2, norm_num_groups=4, **config,
    )  # fmt: skip


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """As Stable Diffusion 1.5."""
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(tokenizer, 16), tokenizer=tokenizer, unet=unet(16),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """As SDXL: saved with an Euler scheduler, two encoders side by side, six sizes among the conditions."""
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=clip_encoder(tokenizer, 16),
        text_encoder_2=clip_encoder(tokenizer, 32, CLIPTextModelWithProjection),
        unet=unet(
            48, addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True,
            projection_class_embeddings_input_dim=32 + 6 * 4, transformer_layers_per_block=2,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path, *, t5: bool = True) -> StableDiffusion3Pipeline:
    """As SD 3.5: two CLIP encoders and T5, a static shift of 3."""
    tokenizer, sentences = clip_tokenizer(folder), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(tokenizer, 16, CLIPTextModelWithProjection), tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, 16, CLIPTextModelWithProjection), tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder(sentences, 32) if t5 else None, tokenizer_3=sentences if t5 else None,
    )  # fmt: skip


def stable_diffusion_3_without_t5(folder: Path) -> StableDiffusion3Pipeline:
    """As SD 3.5 where its largest encoder was left out."""
    return stable_diffusion_3(folder, t5=False)


def flux(folder: Path, *, distilled: bool = True) -> FluxPipeline:
    """As FLUX.1-dev (``distilled``: the guidance scale is an input), else as FLUX.1-schnell; a dynamic shift."""
    tokenizer, sentences = clip_tokenizer(folder), t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=distilled, shift=3.0 if distilled else 1.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(tokenizer, 16), tokenizer=tokenizer,
        text_encoder_2=t5_encoder(sentences, 32), tokenizer_2=sentences,
    )  # fmt: skip


def flux_schnell(folder: Path) -> FluxPipeline:
    """As FLUX.1-schnell."""
    return flux(folder, distilled=False)


def z_image(folder: Path) -> ZImagePipeline:
    """As Z-Image: one language model reads the text."""
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 2, 2], axes_lens=[640, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=640,
            )
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


TINY: Mapping[str, Callable[[Path], DiffusionPipeline]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3-without-t5": stable_diffusion_3_without_t5,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "z-image": z_image,
}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Makes the tiny pipeline of that name and saves it as the hub lays it out; returns its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        TINY[name](folder / "tokenizer").save_pretrained(folder / name)
    return folder / name
