"""The sizes on the page "which method, which model, which machine", counted from diffusers' own classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from peft import LoraConfig

from benchmarks import sizes_models
from pipelines.families import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "which.md"
MODELS: dict[str, tuple[str, Any, Mapping[str, Any]]] = {
    "Stable Diffusion 1.5": ("StableDiffusionPipeline", UNet2DConditionModel, sizes_models.SD15),
    "SDXL": ("StableDiffusionXLPipeline", UNet2DConditionModel, sizes_models.SDXL),
    "Stable Diffusion 3.5 medium": ("StableDiffusion3Pipeline", SD3Transformer2DModel, sizes_models.SD35_MEDIUM),
    "Z-Image": ("ZImagePipeline", ZImageTransformer2DModel, {}),
    "FLUX.1-dev": ("FluxPipeline", FluxTransformer2DModel, sizes_models.FLUX),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_the_page_has_the_sizes_that_the_classes_have(name: str) -> None:
    """Weights that take no memory. Each trained number is 4 bytes, four times over with AdamW, and 20 where all are."""
    pipeline, denoiser, config = MODELS[name]
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert row is not None
    millions, adapter, kept, states, every, packed = (float(cell.split()[0]) for cell in row[1].split("|"))
    with torch.device("meta"):
        model = denoiser(**config)
        count = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=16, target_modules=list(FAMILIES[pipeline].layers["attention"])))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (millions, adapter) == (round(count / 1e6, 1), round(trained / 1e6, 1))
    width = 4 if FAMILIES[pipeline].part == "unet" else 2
    assert (kept, states) == (round(count * width / 1e9, 1), round(trained * 16 / 1e9, 2))
    assert (every, packed) == (round(count * 20 / 1e9, 1), round(count * (12 + 2 + 2 * 4 / 256) / 1e9, 1))
