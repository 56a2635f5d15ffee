"""The network of ImageReward, built of transformers' BLIP modules, and the names of the released weights for them.

The names of the released checkpoint follow from the modules of its public code: ``blip.visual_encoder`` is a ViT with
the names of timm, ``blip.text_encoder`` BLIP's BERT, whose names transformers kept, and ``mlp.layers`` the head. The
released file itself has not been seen here: a name that is not in this table is an error, never a guess.

Shape legend: ``B`` samples, ``P`` patches and the class token, ``T`` tokens, ``D`` width of the text model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.errors import InputError
from rewards import weights as files

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw output over the data that it was trained on, as released."""
HEAD_WIDTH = 64
"""Dimensions of an attention head, in ViT-L/16 (1024 / 16) and BERT-base (768 / 12) alike."""

VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."
HEAD = "mlp."
VISION_NAMES = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.projection.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
    r"norm\.(weight|bias)": r"post_layernorm.\1",
}
"""Released name of a weight of the image model (a pattern), and transformers' name for it."""
UNUSED = (r"blip\.(vision|text)_proj\.(weight|bias)", r"blip\.text_encoder\.embeddings\.position_ids")
"""Weights of BLIP's contrastive training, and a counter that older versions stored: the score does not use them."""


class ImageRewardNet(torch.nn.Module):
    """Pixels and tokens to the released score."""

    def __init__(self, vision: torch.nn.Module, text: torch.nn.Module, head: files.LinearHead) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels."""
        return int(cast(Any, self.vision).config.image_size)

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        return int(cast(Any, self.text).config.vocab_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores ``(B,)`` of normalised pixels ``(B, 3, H, W)`` and tokens, with their mask, ``(B, T)``."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image)
        raw: Tensor = self.head(text.last_hidden_state[:, 0])
        return (raw - MEAN) / STD


def load(state: Mapping[str, Tensor], path: Path, need: str) -> ImageRewardNet:
    """The network of a state dict in the released layout; every size is read from the shapes of the weights."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision, text, head = split(state, path, need)
    try:
        configs = BlipVisionConfig(**_vision_sizes(vision)), BlipTextConfig(**_text_sizes(text, vision))
    except KeyError as error:
        raise InputError(f"{path} is not {need}: it lacks {error.args[0]}") from error
    if any(config.hidden_size % HEAD_WIDTH for config in configs):
        raise InputError(f"{path} is not {need}: its width is no multiple of {HEAD_WIDTH}, the width of a head")
    images, texts = BlipVisionModel(configs[0]), BlipTextModel(configs[1], add_pooling_layer=False)
    files.fill(images, vision, path, need)
    files.fill(texts, text, path, need)
    return ImageRewardNet(images, texts, files.LinearHead(head, path, need))


def split(state: Mapping[str, Tensor], path: Path, need: str) -> tuple[dict[str, Tensor], ...]:
    """The weights of image model, text model and head under the names of the modules here."""
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if any(re.fullmatch(pattern, name) for pattern in UNUSED):
            continue
        if name.startswith(VISION):
            vision[_vision_name(name.removeprefix(VISION), path, need)] = tensor
        elif name.startswith(TEXT):
            text[name.removeprefix(TEXT)] = tensor
        elif name.startswith(HEAD):
            head[name.removeprefix(HEAD)] = tensor
        else:
            raise InputError(f"{path} is not {need}: it holds {name}")
    return vision, text, head


def _vision_name(name: str, path: Path, need: str) -> str:
    for pattern, replacement in VISION_NAMES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise InputError(f"{path} is not {need}: it holds {VISION}{name}")


def _vision_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    patches = state["embeddings.patch_embedding.weight"]
    width, patch = int(patches.shape[0]), int(patches.shape[2])
    positions = int(state["embeddings.position_embedding"].shape[1])
    return {
        "hidden_size": width,
        "intermediate_size": int(state["encoder.layers.0.mlp.fc1.weight"].shape[0]),
        "num_hidden_layers": _layers(state, "encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
        # The epsilon of timm's ViT; transformers' default is ten times as large.
        "layer_norm_eps": 1e-6,
    }


def _text_sizes(state: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": int(vocabulary),
        "hidden_size": int(width),
        "encoder_hidden_size": int(vision["embeddings.patch_embedding.weight"].shape[0]),
        "intermediate_size": int(state["encoder.layer.0.intermediate.dense.weight"].shape[0]),
        "num_hidden_layers": _layers(state, "encoder.layer."),
        "num_attention_heads": max(1, int(width) // HEAD_WIDTH),
        "max_position_embeddings": int(state["embeddings.position_embeddings.weight"].shape[0]),
        "layer_norm_eps": 1e-12,
        # transformers builds the cross-attention only under this name; the forward stays that of an encoder.
        "is_decoder": True,
    }


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].partition(".")[0]) for name in state if name.startswith(prefix)), default=0)
