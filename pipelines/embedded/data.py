"""Training scenes of the embedded worlds, as tensors.

Shape legend: ``N`` scenes, images uint8 ``(N, 3, 64, 64)``, masks bool ``(N, 16, 16)`` on the grid of the latents.
"""

from __future__ import annotations

import hashlib
from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.seeds import derive
from diffalign.worlds import brain_mr


def scenes(world: str, count: int, start: int = 0) -> tuple[Tensor, list[str]]:
    """``count`` scenes of a world from number ``start`` on, and their captions in mixed wording."""
    module = import_module(f"diffalign.worlds.{world.replace('-', '_')}")
    images = np.empty((count, 64, 64, 3), np.uint8)
    captions = []
    for i in range(count):
        scene = module.scene(_seed(world, start + i))
        images[i] = np.asarray(scene.image)
        template = derive(start + i, "template") % 6  # half of the captions in the canonical wording
        captions.append(module.caption(scene.prompt.attributes, template if template < 3 else 0))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def lesion_cells(count: int, start: int = 0) -> Tensor:
    """Where the lesions of these brain-mr scenes are *or would be on the other side*, with one cell around them."""
    masks = np.stack([brain_mr.scene(_seed("brain-mr", start + i)).lesion_mask for i in range(count)])
    either = torch.from_numpy(masks | masks[:, :, ::-1]).float()[:, None]
    cells = F.max_pool2d(F.max_pool2d(either, 4), 3, stride=1, padding=1)
    return cells[:, 0] > 0


def fingerprint(*models: nn.Module) -> str:
    """Eight hexadecimal digits that stand for the weights, in the half precision of their files: what was made with
    other weights must not be taken up.
    """
    found = hashlib.sha256()
    for model in models:
        for name, weight in sorted(model.state_dict().items()):
            found.update(name.encode() + weight.detach().half().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def _seed(world: str, number: int) -> int:
    return derive(number, "training scene", world)


def to_model(images: Tensor) -> Tensor:
    """uint8 ``(N, 3, H, W)`` to float32 in [-1, 1], the range of diffusers' autoencoders."""
    return images.float() / 127.5 - 1
