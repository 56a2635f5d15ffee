"""What can go wrong with a picture of a brain: the degradations and the non-brains that the checker is trained on.

Everything works on grey batches ``(B, 1, 64, 64)`` in [0, 1] and draws from the generators it is given.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

SIDE = 64


def uniform(generator: Generator, count: int, low: float, high: float) -> Tensor:
    """``(B, 1, 1, 1)`` independent draws."""
    return low + (high - low) * torch.rand((count, 1, 1, 1), generator=generator)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one width in pixels per image, ``sigma`` of ``(B, 1, 1, 1)``."""
    count, radius = len(images), 6
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets[None] ** 2) / (2 * sigma.reshape(-1, 1).clamp_min(0.05) ** 2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    stacked = F.pad(images.transpose(0, 1), (radius,) * 4, mode="replicate")
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=count)
    return F.conv2d(stacked, kernel[:, None, :, None], groups=count).transpose(0, 1)


def rescale(images: Tensor, side: int) -> Tensor:
    """Shrinks to ``side`` pixels and enlarges again."""
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """One image ``(1, 64, 64)`` through a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray((image[0].clamp(0, 1) * 255).round().byte().numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer), dtype=np.float32) / 255)[None]


def smooth_noise(generator: Generator, count: int, side: int) -> Tensor:
    """Smooth noise ``(B, 1, 64, 64)`` whose grain is ``64 / side`` pixels."""
    coarse = torch.randn((count, 1, side, side), generator=generator)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True)


def warp(images: Tensor, generator: Generator, amplitude: Tensor, side: int, shift: float = 0.0) -> Tensor:
    """Elastic deformation by ``amplitude`` pixels ``(B, 1, 1, 1)`` with grain ``64 / side``, and a random shift."""
    count = len(images)
    axis = (torch.arange(SIDE, dtype=torch.float32) + 0.5) * 2 / SIDE - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    field = torch.cat([smooth_noise(generator, count, side) for _ in range(2)], dim=1) * amplitude
    field = field + shift * (2 * torch.rand((count, 2, 1, 1), generator=generator) - 1)
    grid = torch.stack((columns, rows), dim=-1)[None] + field.permute(0, 2, 3, 1) * (2 / SIDE)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def degrade(images: Tensor, masks: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random mixtures of what scanners, codecs and half-trained generators do, with the masks ``(B, 1, 64, 64)``."""
    count = len(images)

    def sometimes(share: float) -> Tensor:
        return (torch.rand((count, 1, 1, 1), generator=generator) < share).float()

    moved = warp(torch.cat((images, masks), dim=1), generator, uniform(generator, count, 0.0, 0.9), 8, shift=2.5)
    some = sometimes(0.5)
    images, masks = (some * moved + (1 - some) * torch.cat((images, masks), dim=1)).split(1, dim=1)
    images = blur(images, sometimes(0.5) * uniform(generator, count, 0.0, 1.3))
    if torch.rand((), generator=generator) < 0.4:
        side = int(torch.randint(26, 60, (), generator=generator))
        some = sometimes(0.5)
        images = some * rescale(images, side) + (1 - some) * images
    gamma = torch.exp(sometimes(0.6) * uniform(generator, count, -0.35, 0.35))
    images = images.clamp_min(0) ** gamma
    images = images * (1 + 0.12 * sometimes(0.5) * smooth_noise(generator, count, 3))
    images = images * uniform(generator, count, 0.7, 1.1) + sometimes(0.3) * uniform(generator, count, 0.0, 0.08)
    images = images + sometimes(0.6) * uniform(generator, count, 0.0, 0.07) * torch.randn(
        images.shape, generator=generator
    )
    images = images + sometimes(0.4) * uniform(generator, count, 0.0, 0.05) * smooth_noise(generator, count, 20)
    images = images.clamp(0, 1)
    for index in torch.nonzero(torch.rand(count, generator=generator) < 0.15).flatten().tolist():
        images[index] = jpeg(images[index], int(torch.randint(25, 90, (), generator=generator)))
    return images, masks


def _flat(brains: Tensor, generator: Generator) -> Tensor:
    """One grey value, with a gradient now and then."""
    count = len(brains)
    slope = smooth_noise(generator, count, 2) * uniform(generator, count, 0.0, 0.3)
    return (uniform(generator, count, 0.0, 1.0) + slope * (uniform(generator, count, 0.0, 1.0) > 0.5)).clamp(0, 1)


def _noise(brains: Tensor, generator: Generator) -> Tensor:
    """Noise of any grain: white, Gaussian or cloudy."""
    count = len(brains)
    side = int(torch.randint(3, SIDE + 1, (), generator=generator))
    noise = smooth_noise(generator, count, side) * uniform(generator, count, 0.05, 0.5)
    even = torch.rand(brains.shape, generator=generator)
    pick = (uniform(generator, count, 0.0, 1.0) < 0.3).float()
    return (pick * even + (1 - pick) * (noise + uniform(generator, count, 0.1, 0.7))).clamp(0, 1)


def _blob(brains: Tensor, generator: Generator) -> Tensor:
    """A brain-sized textured blob on black: the outline and the grey values of a brain without its anatomy."""
    count = len(brains)
    axis = (torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2) / (SIDE / 2)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    radius = torch.sqrt(
        (rows / uniform(generator, count, 0.5, 0.95)) ** 2 + (columns / uniform(generator, count, 0.5, 0.95)) ** 2
    )
    inside = torch.sigmoid((1 + 0.12 * smooth_noise(generator, count, 6) - radius) * 20)
    grain = int(torch.randint(3, 30, (), generator=generator))
    texture = uniform(generator, count, 0.3, 0.8) + uniform(generator, count, 0.0, 0.3) * smooth_noise(
        generator, count, grain
    )
    return (inside * texture).clamp(0, 1)


def _shuffled(brains: Tensor, generator: Generator) -> Tensor:
    """The tiles of a brain in another order."""
    tile = int(2 ** torch.randint(2, 5, (), generator=generator))
    tiles = F.unfold(brains, tile, stride=tile)
    order = torch.argsort(torch.rand((len(brains), 1, tiles.shape[-1]), generator=generator), dim=-1)
    return F.fold(torch.gather(tiles, 2, order.expand(-1, tiles.shape[1], -1)), (SIDE, SIDE), tile, stride=tile)


def _garbled(brains: Tensor, generator: Generator) -> Tensor:
    """A brain torn by a deformation with a short grain and a large amplitude."""
    grain = int(torch.randint(7, 16, (), generator=generator))
    return warp(brains, generator, uniform(generator, len(brains), 5.0, 10.0), grain)


def _turned(brains: Tensor, generator: Generator) -> Tensor:
    """A brain lying on its side; upside down is left out, since a high axial slice looks much the same both ways."""
    quarter = 1 if torch.rand((), generator=generator) < 0.5 else -1
    return torch.rot90(brains, quarter, (2, 3))


def _scrambled(brains: Tensor, generator: Generator) -> Tensor:
    """The spectrum of a brain with random phases."""
    spectrum = torch.fft.rfft2(brains)
    phases = torch.angle(torch.fft.rfft2(torch.rand(brains.shape, generator=generator)))
    scrambled: Tensor = torch.fft.irfft2(torch.polar(spectrum.abs(), phases), s=(SIDE, SIDE))
    return scrambled.clamp(0, 1)


def _melted(brains: Tensor, generator: Generator) -> Tensor:
    """A brain blurred until only a glow is left."""
    small = F.interpolate(brains, size=(5, 5), mode="area")
    return F.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)


def _double(brains: Tensor, generator: Generator) -> Tensor:
    """Two halves of different brains, one of them turned, side by side or faded into each other."""
    others = torch.rot90(brains.roll(1, dims=0), 1, (2, 3))
    if torch.rand((), generator=generator) < 0.5:
        return torch.cat((brains[..., : SIDE // 2], others[..., SIDE // 2 :]), dim=-1)
    return 0.5 * (brains + others)


NON_BRAINS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "flat": _flat,
    "noise": _noise,
    "blob": _blob,
    "shuffled": _shuffled,
    "garbled": _garbled,
    "turned": _turned,
    "scrambled": _scrambled,
    "melted": _melted,
    "double": _double,
}
"""Ways to make, from a batch of brains, as many images that are none."""
