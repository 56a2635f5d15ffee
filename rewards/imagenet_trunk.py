"""Features of images that know neither prompts nor this project's worlds: MobileNetV2 trained on ImageNet.

Sandler et al. 2018, arXiv:1801.04381, with torchvision's weights (the asset ``imagenet-trunk``). For distances between
sets of images (a Fréchet distance is then one *of MobileNetV2 features*, and not comparable with published FIDs, which
use Inception), and for the diversity of the images of a prompt.

Shape legend: ``N`` images, ``D`` 1280 features, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from diffalign import assets
from diffalign.images import to_rgb
from rewards import weights as files

NEED = "torchvision's MobileNetV2"
SIDE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CHUNK = 32
"""Images that go through the network at once."""


def build(state: Mapping[str, Tensor], path: Path) -> torch.nn.Module:
    """MobileNetV2 with its classifier, from a state dict in torchvision's layout."""
    from torchvision.models import mobilenet_v2

    network = cast(torch.nn.Module, mobilenet_v2(weights=None))
    files.fill(network, state, path, NEED)
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def load() -> torch.nn.Module:
    """The network of the asset ``imagenet-trunk``, or a NotFoundError that says how to fetch it."""
    path = assets.file("imagenet-trunk", "mobilenet_v2.pth")
    return build(files.read(path, NEED), path)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """float32 ``(N, 3, 224, 224)``: the shorter side to 224, cut at the middle, normalised as in training."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    resize = Resize(SIDE, interpolation=InterpolationMode.BILINEAR)
    read = Compose([resize, CenterCrop(SIDE), ToTensor(), Normalize(MEAN, STD)])
    return torch.stack([cast(Tensor, read(to_rgb(image))) for image in images])


def features(images: Sequence[Image.Image], network: torch.nn.Module | None = None) -> Tensor:
    """float32 ``(N, D)`` on the CPU: what the trunk says before its classifier, averaged over positions."""
    network = network or load()
    trunk = network.get_submodule("features")
    with torch.no_grad():
        found = [trunk(pixels(images[start : start + CHUNK])).mean((2, 3)) for start in range(0, len(images), CHUNK)]
    return torch.cat(found) if found else torch.empty(0, 1280)
