"""What a simulated rater likes although no prompt asks for it: measures of the pixels alone, each in [0, 1].

Shape legend: ``H = W = 64`` pixels. ``pixels`` is float32 ``(H, W, 3)`` in [0, 1], ``grey`` its ``(H, W)`` brightness
(Rec. 601). A *ramp* rises evenly from 0 at one raw value to 1 at another and is flat outside; both ends lie a little
outside what the embedded models and the worlds themselves draw.

Edges are measured after a slight blur, and only what looks like a drawing (or a head) is measured at all, so that
plain noise, which is all edge and all colour, earns little. See docs/simulated-rater.md for what still would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from diffalign.images import to_rgb
from diffalign.worlds.emoji import SIZE
from rewards.emoji_detector import estimate_background

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]
Taste = Callable[[Pixels], float]

_REC601 = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_UNLIKE = 0.15
"""RGB distance from the background at which a pixel belongs to a drawing; the world's colours are farther apart."""
_SPECK_PX = 20
"""Area below which something is no drawing and no part of a head."""
_LARGEST_PX = 32 * 32
"""Area above which something is no drawing: a quarter of the image; the largest drawing has 27x27."""
_HEAD_SHARE = (0.05, 0.8)
"""Share of the image that a head can fill; noise fills all of it."""


def pixels(image: Image.Image) -> Pixels:
    """``(64, 64, 3)`` in [0, 1] of an image of any mode; other sizes are resampled."""
    image = to_rgb(image)
    if image.size != (SIZE, SIZE):
        smaller = min(image.size) > SIZE
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def drawing_size(pixels: Pixels) -> float:
    """How large the drawings are: median area of the connected drawings, on a ramp from 4 % to 16 % of the image.

    The median, not the covered share, so that more drawings than were asked for are no gain. 0 without any drawing.
    """
    areas = [float(drawing.mean()) for drawing in _drawings(pixels)]
    return _ramp(float(np.median(areas)), 0.04, 0.16) if areas else 0.0


def balance(pixels: Pixels) -> float:
    """How well the drawings are balanced: 1 where their common centre is that of the image, 0 from 24 px off.

    0 without any drawing.
    """
    drawings = _drawings(pixels)
    if not drawings:
        return 0.0
    rows, columns = np.nonzero(np.any(drawings, axis=0))
    middle = (SIZE - 1) / 2
    return 1 - _ramp(float(np.hypot(rows.mean() - middle, columns.mean() - middle)), 0.0, 24.0)


def colourfulness(pixels: Pixels) -> float:
    """How colourful the drawings are: mean of largest minus smallest channel, on a ramp from 0.1 to 0.75.

    The background does not count, for the prompt names it. 0 without any drawing.
    """
    drawings = _drawings(pixels)
    if not drawings:
        return 0.0
    inside = pixels[np.any(drawings, axis=0)]
    return _ramp(float((inside.max(-1) - inside.min(-1)).mean()), 0.1, 0.75)


def drawing_sharpness(pixels: Pixels) -> float:
    """How sharp the edges are: ``edge_strength`` over the range of colours, on a ramp from 0.10 to 0.28.

    The range is the root of the summed squares of what the middle 98 % of the pixels span in each channel, at least
    0.1, so that a flat image has no edge. A share of the range, so that a drawing that is pale by nature can be sharp.
    """
    low, high = np.quantile(pixels, [0.01, 0.99], axis=(0, 1))
    return _ramp(edge_strength(pixels) / max(float(np.linalg.norm(high - low)), 0.1), 0.10, 0.28)


def slice_sharpness(pixels: Pixels) -> float:
    """How sharp the edges of a slice are: ``edge_strength`` over the tissue's brightness, on a ramp from 0.14 to 0.30.

    0 where there is no head.
    """
    grey = _grey(pixels)
    head = _head(grey)
    return 0.0 if head is None else _ramp(edge_strength(grey[..., None]) / _tissue(grey, head), 0.14, 0.30)


def clean_background(pixels: Pixels) -> float:
    """How dark and quiet the air is: 1 where it is below 1 % of the tissue's brightness, 0 from 6 % on.

    The air is what lies more than 2 px outside the head; measured is its root mean square. 0 where there is no head.
    """
    grey = _grey(pixels)
    head = _head(grey)
    if head is None:
        return 0.0
    air = grey[~ndimage.binary_dilation(head, iterations=2)]
    if not air.size:
        return 0.0
    return 1 - _ramp(float(np.sqrt(np.mean(air**2))) / _tissue(grey, head), 0.01, 0.06)


def tissue_contrast(pixels: Pixels) -> float:
    """How well tissues can be told apart: what the middle half of the brightness inside the head spans, over the
    tissue's brightness, on a ramp from 5 % to 55 %. The middle half, so that a lesion, which is asked for, hardly
    counts. 0 where there is no head.
    """
    grey = _grey(pixels)
    head = _head(grey)
    inside = None if head is None else ndimage.binary_erosion(head, iterations=2)
    if head is None or inside is None or not inside.any():
        return 0.0
    low, high = np.quantile(_blur(grey[..., None])[inside], [0.25, 0.75])
    return _ramp(float(high - low) / _tissue(grey, head), 0.05, 0.55)


def edge_strength(pixels: Pixels) -> float:
    """Mean slope of the edges of ``(H, W, C)``: length of the gradient over all channels, weighted by itself; per px.

    The gradient is taken after a blur of sigma 0.8 px, which takes most of the noise, and little of an edge, away.
    """
    down, right = np.gradient(_blur(pixels), axis=(0, 1))
    slope = np.sqrt((down**2 + right**2).sum(-1))
    total = float(slope.sum())
    return float((slope**2).sum()) / total if total > 0 else 0.0


TASTES: Final[Mapping[str, Mapping[str, Taste]]] = {
    "emoji": {
        "size": drawing_size,
        "balance": balance,
        "colourfulness": colourfulness,
        "sharpness": drawing_sharpness,
    },
    "brain-mr": {
        "sharpness": slice_sharpness,
        "clean background": clean_background,
        "tissue contrast": tissue_contrast,
    },
}
"""Per world and name: the measure."""


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _grey(pixels: Pixels) -> Pixels:
    grey: Pixels = pixels @ _REC601
    return grey


def _blur(pixels: Pixels) -> Pixels:
    blurred: Pixels = ndimage.gaussian_filter(pixels, 0.8, axes=(0, 1))
    return blurred


def _tissue(grey: Pixels, head: Mask) -> float:
    """Median brightness inside the head. A bright lesion moves it little, where it would move a brightest value."""
    return max(float(np.median(grey[head])), 0.1)


def _drawings(pixels: Pixels) -> list[Mask]:
    """Masks ``(64, 64)`` of the connected areas that differ from the background and can be one drawing."""
    background = estimate_background(torch.from_numpy(pixels).permute(2, 0, 1)).numpy()
    areas, count = ndimage.label(np.linalg.norm(pixels - background, axis=-1) > _UNLIKE)
    masks = (areas == number for number in range(1, count + 1))
    return [mask for mask in masks if _SPECK_PX <= int(mask.sum()) <= _LARGEST_PX]


def _head(grey: Pixels) -> Mask | None:
    """Mask ``(64, 64)`` of the bright areas with their holes filled; None where they cannot be a head.

    A slice can have several, such as the brain and the top of the cerebellum; a speck is none of them.
    """
    bright = grey > 0.25 * max(float(np.quantile(grey, 0.9)), 0.2)
    areas, _ = ndimage.label(ndimage.binary_fill_holes(bright))
    large = np.flatnonzero(np.bincount(areas.ravel()) >= _SPECK_PX)
    head: Mask = np.isin(areas, large[large > 0])
    least, most = _HEAD_SHARE
    return head if least <= float(head.mean()) <= most else None
