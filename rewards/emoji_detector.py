"""Finds Noto Emoji drawings in 64x64 images of the emoji world, by explicit matched filtering.

The plain background is estimated first. Each drawing, alpha-blended over *that* background, is then a known pattern,
and a match is judged by how much of the pattern's and of the image's difference from the background they share.

Shape legend: ``C`` = 3 colours, ``N`` templates (kinds x sizes), ``K`` candidate places, ``S`` shifts
around a place, ``W`` = 31 width and height of a template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.worlds.emoji import BACKGROUND_RGB, OBJECTS, SIZE, SPRITE, sprite

ACCEPT = 0.65
"""Lowest score of a match that counts as an object. See docs/models/emoji-checker.md for how it was chosen."""
CANDIDATE = 0.25
"""Lowest score of a match that is reported at all."""
REJECT_DISTANCE = 15.0
"""CIELAB distance from which a background has no name; the named ones are at least 30 apart."""

_SIZES = (SPRITE - 1, SPRITE, SPRITE + 1)
_WINDOW = 31
_PAD = 16
_PLACES = 12
"""Most places that are looked at closely; a scene has at most four objects."""
_PROMISING = 0.2
"""Lowest score at half resolution that is looked at closely."""
_REACH = 2
"""Pixels around a place that are tried: what half resolution cannot tell."""
_RIVALS = 3
"""Kinds per place whose structure is compared."""
_APART = 14.0
"""Smallest distance between two objects in pixels; in the world it is 28."""
_BLUR = 0.8
"""Sigma in pixels of the blur given to image and templates, so that a slightly soft or noisy image still agrees."""
_STRUCTURE = 0.01
"""Variance below which structure is not asked for: a plain blue heart has none to show."""
_NEAR = 0.10
"""RGB distance within which two pixels have the same colour."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One drawing found in an image."""

    object: str
    score: float
    """How well it matches, at most 1."""
    center: tuple[float, float]
    """x and y in pixels."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What an image holds."""

    objects: tuple[Detection, ...]
    """Matches that score at least ``CANDIDATE``, best first; those from ``ACCEPT`` on are objects."""
    background: str | None
    """The nearest named colour, or None where none is within ``REJECT_DISTANCE``."""
    distances: dict[str, float]
    """CIELAB distance of the background to each named colour."""
    plain: float
    """Fraction of the pixels outside the accepted objects that have the colour of the background."""


@dataclass(frozen=True, slots=True)
class _Bank:
    color: Tensor
    """``(N, C, W, W)`` premultiplied colour in 0..1."""
    alpha: Tensor
    """``(N, 1, W, W)``."""
    near: Tensor
    """``(N, 1, W, W)``: 1 where the image has to agree with the template, the drawing and its rim."""


def look(images: Sequence[Image.Image]) -> list[Sight]:
    """What each image holds. Images that are not 64x64 are resized to it.

    One image at a time: a batch would be no faster on a CPU, and so no answer can depend on the other images.
    """
    threads = torch.get_num_threads()
    # The tensors are so small that threads only wait for each other; one is up to three times as fast.
    torch.set_num_threads(1)
    try:
        return [_look(_pixels(image)) for image in images]
    finally:
        torch.set_num_threads(threads)


def detect(images: Sequence[Image.Image]) -> list[list[Detection]]:
    """The objects in each image, most certain first."""
    return [[found for found in sight.objects if found.score >= ACCEPT] for sight in look(images)]


@torch.no_grad()
def _look(pixels: Tensor) -> Sight:
    background = estimate_background(pixels)
    excess = F.pad(pixels - background[:, None, None], (_PAD, _PAD, _PAD, _PAD))
    excess = _blur(excess[None], _BLUR)[0]
    return _sight(excess, background, _fine(excess, background, _coarse(excess, background)))


def estimate_background(pixels: Tensor) -> Tensor:
    """The commonest colour ``(C,)`` of an image ``(C, 64, 64)`` in 0..1, however much noise there is.

    The pixel with the most pixels like it, then twice the mean of those: a robust mode.
    """
    smooth = _blur(F.pad(pixels[None], (3, 3, 3, 3), mode="replicate"), 1.0)[0, :, 3:-3, 3:-3]
    probes, colors = smooth[:, 2::4, 2::4].flatten(1).T, smooth[:, ::2, ::2].flatten(1).T
    squares = probes.square().sum(1)[:, None] + colors.square().sum(1) - 2 * probes @ colors.T
    center = probes[(squares < _NEAR**2).sum(1).argmax()]
    colors = smooth.flatten(1).T
    for _ in range(2):
        like = ((colors - center).square().sum(1) < _NEAR**2).float()
        center = like @ colors / like.sum().clamp(min=1)
    return center


def _coarse(excess: Tensor, background: Tensor) -> Tensor:
    """The most promising centres ``(K, 2)`` as (y, x), found at half the resolution."""
    small = F.avg_pool2d(excess[None], 2)
    energy = small.square().sum(1, keepdim=True)
    score = _agreement(F.unfold(small, 16)[0], F.unfold(energy, 16)[0], _bank(True), background)
    best = score.amax(0).unflatten(0, (33, 33))
    peak = best == F.max_pool2d(best[None], 5, 1, 2)[0]
    value, chosen = torch.where(peak, best, -1.0).flatten().topk(_PLACES)
    chosen = chosen[value > _PROMISING]
    return torch.stack([chosen // 33, chosen % 33], -1) * 2 - 1


def _fine(excess: Tensor, background: Tensor, places: Tensor) -> list[Detection]:
    """The best match around each place, best first."""
    if not len(places):
        return []
    bank = _bank(False)
    reach = torch.arange(-_REACH, _REACH + 1)
    centers = (places[:, None] + torch.cartesian_prod(reach, reach)).clamp(0, SIZE - 1)  # (K, S, 2)
    windows = excess.unfold(1, _WINDOW, 1).unfold(2, _WINDOW, 1)  # (C, 66, 66, W, W)
    corner = centers + (_PAD - _WINDOW // 2)
    patches = windows[:, corner[..., 0], corner[..., 1]].movedim(0, 2)  # (K, S, C, W, W)
    energy = patches.square().sum(2).flatten(2).flatten(0, 1)
    score = _agreement(patches.flatten(2).flatten(0, 1).T, energy.T, bank, background)  # (N, K * S)
    score = score.unflatten(0, (len(OBJECTS), -1)).unflatten(2, (len(places), -1)).permute(2, 0, 3, 1)
    # Best shift and size of each kind, then the exact score of the best few kinds.
    by_kind, where = score.flatten(2).max(-1)  # (K, kinds)
    colored, rivals = by_kind.topk(_RIVALS, dim=-1)
    where = where.gather(-1, rivals)
    shift, size = where // len(_SIZES), where % len(_SIZES)
    template = rivals * len(_SIZES) + size
    patch = patches[torch.arange(len(places))[:, None], shift]  # (K, R, C, W, W)
    alpha = bank.alpha[template]
    wanted = bank.color[template] - alpha * background[:, None, None]
    final, winner = (colored * _structure(patch, wanted, alpha)).max(-1)
    found = []
    for i in final.argsort(descending=True, stable=True).tolist():
        y, x = centers[i, shift[i, winner[i]]].tolist()
        found.append(Detection(OBJECTS[int(rivals[i, winner[i]])], float(final[i]), (float(x), float(y))))
    return found


def _agreement(patches: Tensor, energy: Tensor, bank: _Bank, background: Tensor) -> Tensor:
    """Twice the shared energy over the sum of both, in -1..1: ``(N, P)`` for patches ``(C*W*W, P)``."""
    wanted = (bank.color - bank.alpha * background[:, None, None]).flatten(1)
    have = bank.near.flatten(1) @ energy
    return 2 * (wanted @ patches) / (have + wanted.square().sum(-1, keepdim=True) + 1e-3)


def _structure(patch: Tensor, wanted: Tensor, alpha: Tensor) -> Tensor:
    """Agreement of what is left when the mean colour inside the drawing is taken off, as in SSIM.

    A blob of the right colour and outline agrees in colour; only a drawing agrees in this. The soft rim is left out:
    it says how the outline falls off, which a blob gets right, too.
    """
    inside = (alpha > 0.9).float()
    weight = inside / inside.sum((-2, -1), keepdim=True)
    a = wanted - (weight * wanted).sum((-2, -1), keepdim=True)
    b = patch - (weight * patch).sum((-2, -1), keepdim=True)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (weight * x * y).sum((-3, -2, -1))

    return ((2 * inner(a, b) + _STRUCTURE) / (inner(a, a) + inner(b, b) + _STRUCTURE)).clamp(min=0)


def _sight(excess: Tensor, background: Tensor, found: list[Detection]) -> Sight:
    objects: list[Detection] = []
    uncovered = torch.ones(SIZE, SIZE, dtype=torch.bool)
    half = _WINDOW // 2
    for one in found:
        clear = all(math.dist(one.center, seen.center) >= _APART for seen in objects)
        if one.score >= CANDIDATE and clear:
            objects.append(one)
            if one.score >= ACCEPT:
                x, y = map(int, one.center)
                uncovered[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1] = False
    like = excess[:, _PAD:-_PAD, _PAD:-_PAD].square().sum(0) < (2 * _NEAR) ** 2
    plain = float(like[uncovered].float().mean()) if bool(uncovered.any()) else 1.0
    named = torch.tensor(list(BACKGROUND_RGB.values())) / 255
    far = (_lab(named) - _lab(background)).norm(dim=-1).tolist()
    distances = dict(zip(BACKGROUND_RGB, far, strict=True))
    nearest = min(distances, key=distances.__getitem__)
    return Sight(tuple(objects), nearest if distances[nearest] < REJECT_DISTANCE else None, distances, plain)


@cache
def _bank(coarse: bool) -> _Bank:
    """The templates at half resolution and one size, or at full resolution and every size; kinds are the outer axis."""
    tiles = np.zeros((len(OBJECTS), len(_SIZES), 32, 32, 4), dtype=np.float32)
    for i, name in enumerate(OBJECTS):
        for j, size in enumerate(_SIZES):
            drawing = sprite(name, size)
            height, width = drawing.shape[:2]
            top, left = _WINDOW // 2 - height // 2, _WINDOW // 2 - width // 2
            tiles[i, j, top : top + height, left : left + width] = drawing / 255
    stack = torch.from_numpy(tiles).flatten(0, 1).permute(0, 3, 1, 2)
    near = (_blur(stack[:, 3:], 1.0) > 0.05).float()
    stack = _blur(stack, _BLUR)
    if coarse:
        middle = slice(len(_SIZES) // 2, None, len(_SIZES))
        stack, near = F.avg_pool2d(stack[middle], 2), F.avg_pool2d(near[middle], 2)
    else:
        stack, near = stack[..., :_WINDOW, :_WINDOW], near[..., :_WINDOW, :_WINDOW]
    return _Bank(stack[:, :3].contiguous(), stack[:, 3:].contiguous(), near.contiguous())


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(B, C, H, W)``; what is outside is zero."""
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    rows = F.conv2d(images, kernel.view(1, 1, 1, 7).expand(channels, 1, 1, 7), padding=(0, 3), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 7, 1).expand(channels, 1, 7, 1), padding=(3, 0), groups=channels)


def _pixels(image: Image.Image) -> Tensor:
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _lab(rgb: Tensor) -> Tensor:
    """CIELAB (D65) of sRGB ``(..., 3)`` in 0..1."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = linear @ to_xyz.T / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
