"""Pixels of a case's image, and their hash, which is the same in every format.

Shape legend: ``H`` and ``W`` pixels. Pixels are ``(H, W)`` greyscale or ``(H, W, 3)`` colour, uint8 or uint16.
"""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import InputError, RefusedError

if TYPE_CHECKING:
    from diffalign.synthesis.store import Generated

Pixels = NDArray[Any]
NOISE = 24
"""Levels by which the channels of a grey picture of a model may differ. Those of 2,000 images of ``embedded:brain-mr``
differ by up to 14; colour that one sees is more than 24."""


def of_png(data: bytes) -> Pixels:
    """Pixels of a PNG, 8- or 16-bit, just as they are stored; InputError where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            if image.info:
                raise InputError(f"the image holds more than pixels: {', '.join(sorted(map(str, image.info)))}")
            mode, array = image.mode, np.asarray(image)
    except InputError:
        raise
    # Pillow's decoder reports a broken file by many errors, SyntaxError and struct.error among them.
    except Exception as error:
        raise InputError(f"the image cannot be decoded: {str(error).partition(chr(10))[0]}") from error
    if mode not in ("L", "RGB", "I;16"):
        raise InputError(
            f"the image is of Pillow's mode {mode}; 8-bit greyscale or RGB, or 16-bit greyscale is exported"
        )
    return array


def without_needless_colour(pixels: Pixels) -> Pixels:
    """``(H, W)`` of a colour image whose three channels are equal everywhere; anything else as it is."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return np.ascontiguousarray(pixels[..., 0])
    return pixels


def grey(pixels: Pixels, whose: str) -> Pixels:
    """``(H, W)``: the luminance (ITU-R BT.601) of pixels that are grey but for a model's noise; grey ones as they are.

    Raises RefusedError for a picture in colour, which would lose more than noise; ``whose`` it is stands in the
    sentence.
    """
    if pixels.ndim == 2:
        return pixels
    spread = _spread(pixels)
    if spread > NOISE:
        raise RefusedError(
            f"{whose} is in colour: its channels differ by up to {spread} of 255 levels, and at most {NOISE} count as"
            " noise of a grey picture; export it without --grey"
        )
    return np.asarray(Image.fromarray(pixels).convert("L"))


def nearly_grey(source: Generated) -> bool:
    """Whether ``grey`` would change some image of a dataset, and refuse none."""
    spreads = [_spread(of_png(source.image(case.image))) for case in source.cases() if case.image is not None]
    return 0 < max(spreads, default=0) <= NOISE


def _spread(pixels: Pixels) -> int:
    """The most levels by which the channels of a pixel differ."""
    return int((pixels.max(axis=2).astype(int) - pixels.min(axis=2)).max()) if pixels.ndim == 3 else 0


def digest(pixels: Pixels) -> str:
    """SHA-256 of type, shape and values. Greyscale has the same one, whether it is stored as grey or as RGB."""
    pixels = without_needless_colour(pixels)
    values = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{pixels.dtype.name} {pixels.shape} ".encode() + values.tobytes()).hexdigest()
