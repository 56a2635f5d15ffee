"""How different two images look to people: LPIPS (Zhang et al. 2018, arXiv:1801.03924), in its shift-tolerant form.

Both images go through a trunk trained on ImageNet (VGG16 or AlexNet); at five depths the features are made of length 1
per position, and the squared differences are weighted by learned weights, summed over channels and averaged over
positions; the distance is the sum of the five (equation 1). The weights are those of Ghildyal and Liu 2022
(arXiv:2207.13686), which blur before every step down, so that a shift that nobody sees does not count. They are the
asset ``lpips``; distances are not comparable with those of the first LPIPS.

Shape legend: ``B`` pairs, ``N`` images, ``C H W`` channels and pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign import assets
from diffalign.errors import InputError
from diffalign.images import to_tensor
from rewards import weights as files

Net = Literal["vgg", "alex"]
NEED = "the weights of shift-tolerant LPIPS"
CHUNK = 16
"""Images that go through the trunk at once."""

_VGG = ((0, 2), ("down", 6, 8), ("down", 12, 14, 16), ("down", 20, 22, 24), ("down", 28, 30, 32))
_ALEX = ((0,), ("down", 5), ("down", 9), (11,), (13,))
"""Per depth: the numbers of its convolutions, after a step down where there is one."""


class Lpips(torch.nn.Module):
    """The distance, with weights in the released layout."""

    def __init__(self, state: Mapping[str, Tensor], net: Net, path: Path) -> None:
        """All sizes are read from ``state``; ``path`` is named where it does not fit."""
        super().__init__()
        self.net = net
        self.depths = _VGG if net == "vgg" else _ALEX
        names = [f"net.slice{i}.{n}" for i, depth in enumerate(self.depths, 1) for n in depth if n != "down"]
        wanted = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
        wanted += [f"lin{i}.model.1.weight" for i in range(len(self.depths))]
        wanted += ["scaling_layer.shift", "scaling_layer.scale"]
        missing = [name for name in wanted if name not in state]
        if missing:
            raise InputError(f"{path} is not {NEED} for {net}: it lacks {missing[0]}")
        for name in wanted:
            self.register_buffer(name.replace(".", "/"), state[name].detach().float())

    def _weight(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))

    def features(self, images: Tensor) -> list[Tensor]:
        """Per depth ``(N, C, H', W')`` of images ``(N, 3, H, W)`` in [0, 1], each position of length 1."""
        x = (2 * images - 1 - self._weight("scaling_layer.shift")) / self._weight("scaling_layer.scale")
        found = []
        for i, depth in enumerate(self.depths, 1):
            for step in depth:
                x = self._down(x) if step == "down" else self._convolve(x, f"net.slice{i}.{step}")
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        # AlexNet's first filter is 11 wide and padded by 2; all others keep the size.
        first = self.net == "alex" and name.endswith("slice1.0")
        x = F.conv2d(x, weight, bias, padding=2 if first else weight.shape[-1] // 2)
        return (blur(x) if first else x).relu()

    def _down(self, x: Tensor) -> Tensor:
        return blur(F.max_pool2d(x, 2 if self.net == "vgg" else 3, stride=1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances ``(B,)``, 0 or more, of images ``(B, 3, H, W)`` in [0, 1]; with gradient to both."""
        return self.between(self.features(first), self.features(second))

    def between(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Distances ``(B,)`` of images whose features are known."""
        parts = [
            F.conv2d((a - b).square(), self._weight(f"lin{i}.model.1.weight")).mean((1, 2, 3))
            for i, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        return torch.stack(parts).sum(0)


def blur(x: Tensor) -> Tensor:
    """The binomial filter 1-2-1 in both directions, and every second position (Zhang 2019, arXiv:1904.11486)."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


@lru_cache(maxsize=2)
def load(net: Net = "vgg") -> Lpips:
    """The network of the asset ``lpips``, or a NotFoundError that says how to fetch it."""
    path = assets.file("lpips", f"{net}.pth")
    return Lpips(files.read(path, NEED), net, path).eval().requires_grad_(False)


def lpips_distance(
    first: Sequence[Image.Image], second: Sequence[Image.Image], net: Net = "vgg", model: Lpips | None = None
) -> Tensor:
    """Distances float32 ``(B,)`` of pairs of images of one size, on the CPU: 0 is the same, 1 is far."""
    if len(first) != len(second):
        raise InputError(f"pairs of images are compared; got {len(first)} and {len(second)}")
    model = model or load(net)
    found = []
    with torch.no_grad():
        for start in range(0, len(first), CHUNK):
            chunk = slice(start, start + CHUNK)
            found.append(model(to_tensor(first[chunk]), to_tensor(second[chunk])))
    return torch.cat(found) if found else torch.empty(0)


def lpips_diversity(images: Sequence[Image.Image], net: Net = "vgg", model: Lpips | None = None) -> float:
    """The mean distance over all pairs of the images: how different the images of one prompt look.

    0 where all are the same. At least two images, all of one size.
    """
    if len(images) < 2:
        raise InputError(f"diversity is a property of two images or more; got {len(images)}")
    pairs = [(i, j) for i in range(len(images)) for j in range(i)]
    model = model or load(net)
    with torch.no_grad():
        parts = [model.features(to_tensor(images[start : start + CHUNK])) for start in range(0, len(images), CHUNK)]
        features = [torch.cat(depth) for depth in zip(*parts, strict=True)]
        total = sum(float(model.between([f[[i]] for f in features], [f[[j]] for f in features])) for i, j in pairs)
    return total / len(pairs)
