"""What an encoder of captions does not look at: exposure, contrast, colour, noise, sharpness.

An encoder that was trained to match images with captions learns to overlook how an image was taken, as captions say
nothing of it. Raters do not overlook it. A few plain numbers beside the embedding let the heads see it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.images import to_rgb

NAMES = ("brightness", "contrast", "colour", "noise", "sharpness", "dark", "bright")
SMALLEST = 3
"""Pixels of a side below which there is no neighbourhood to tell noise from."""


def statistics(images: Sequence[Image]) -> Tensor:
    """float32 ``(B, 7)`` in the order of ``NAMES``, of each image alone."""
    return torch.tensor([_of(image) for image in images], dtype=torch.float32).reshape(-1, len(NAMES))


def with_gradient(images: Tensor) -> Tensor:
    """The same ``(B, 7)`` of a tensor ``(B, 3, H, W)`` in [0, 1], to 1e-4, with gradient to the pixels.

    Dark and bright are shares, which have none: to the gradient they are constants.
    """
    grey = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    noise = sharpness = images.new_zeros(len(images))
    if min(grey.shape[1:]) >= SMALLEST:
        across = grey[:, :, :-2] - 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
        mask = across[:, :-2] - 2 * across[:, 1:-1] + across[:, 2:]
        noise = math.sqrt(math.pi / 2) / 6 * mask.abs().mean((1, 2))
        sharpness = grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))
    # The standard deviation has no gradient at 0, where an image is flat.
    contrast = (grey - grey.mean((1, 2), keepdim=True)).square().mean((1, 2)).clamp_min(1e-12).sqrt()
    columns = [
        grey.mean((1, 2)),
        contrast,
        (images.amax(1) - images.amin(1)).mean((1, 2)),
        (noise + 1e-3).log(),
        (sharpness + 1e-3).log(),
        (grey < 0.02).float().mean((1, 2)),
        (grey > 0.98).float().mean((1, 2)),
    ]
    return torch.stack(columns, 1)


def _of(image: Image) -> list[float]:
    """Of grey levels ``g`` in [0, 1], at the image's own size.

    Brightness and contrast are mean and standard deviation of ``g``, colour the mean distance of the largest from the
    smallest channel. Noise is the standard deviation by Immerkaer 1996: the mean size of the mask (1 -2 1; -2 4 -2;
    1 -2 1), which flat areas and straight edges leave at 0, times sqrt(pi / 2) / 6. Sharpness is the mean size of the
    differences between neighbours. Both are logarithms, as their differences are seen in ratios. Dark and bright are
    the shares of pixels within 2 % of black and of white.
    """
    levels = np.asarray(to_rgb(image), dtype=np.float32) / 255
    grey = levels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    noise = sharpness = 0.0
    if min(grey.shape) >= SMALLEST:
        across = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
        noise = math.sqrt(math.pi / 2) / 6 * float(np.abs(across[:-2] - 2 * across[1:-1] + across[2:]).mean())
        sharpness = float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())
    return [
        float(grey.mean()),
        float(grey.std()),
        float((levels.max(2) - levels.min(2)).mean()),
        math.log(noise + 1e-3),
        math.log(sharpness + 1e-3),
        float((grey < 0.02).mean()),
        float((grey > 0.98).mean()),
    ]
