"""Pixels of a case's image, and their hash, which is the same in every format.

Shape legend: ``H`` and ``W`` pixels. Pixels are ``(H, W)`` greyscale or ``(H, W, 3)`` colour, uint8 or uint16.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import InputError

Pixels = NDArray[Any]


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


def digest(pixels: Pixels) -> str:
    """SHA-256 of type, shape and values. Greyscale has the same one, whether it is stored as grey or as RGB."""
    pixels = without_needless_colour(pixels)
    values = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{pixels.dtype.name} {pixels.shape} ".encode() + values.tobytes()).hexdigest()
