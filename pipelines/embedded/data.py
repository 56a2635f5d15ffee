"""Training scenes of the embedded worlds, as tensors.

Shape legend: ``N`` scenes, images uint8 ``(N, 3, 64, 64)``.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from diffalign.seeds import derive


def scenes(world: str, count: int, start: int = 0) -> tuple[Tensor, list[str]]:
    """``count`` scenes of a world from number ``start`` on, and their captions in mixed wording."""
    module = import_module(f"diffalign.worlds.{world.replace('-', '_')}")
    images = np.empty((count, 64, 64, 3), np.uint8)
    captions = []
    for i in range(count):
        scene = module.scene(derive(start + i, "training scene", world))
        images[i] = np.asarray(scene.image)
        template = derive(start + i, "template") % 6  # half of the captions in the canonical wording
        captions.append(module.caption(scene.prompt.attributes, template if template < 3 else 0))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def to_model(images: Tensor) -> Tensor:
    """uint8 ``(N, 3, H, W)`` to float32 in [-1, 1], the range of diffusers' autoencoders."""
    return images.float() / 127.5 - 1
