"""A tiny random CLIP in open_clip's own format, made with the real classes: no weights file, no hub."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from rewards.train_clip import build_tokenizer

CAPTIONS = ["a cat left of a dog on a blue background", "three red apples on a white background"]


def build(folder: Path, seed: int = 0, resize_mode: str = "squash") -> Path:
    """Writes the model folder: 32x32 pixels, 0.1 M parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(folder)
    text = {"context_length": 32, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": "tiny"}}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": resize_mode}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    weights = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    return folder
