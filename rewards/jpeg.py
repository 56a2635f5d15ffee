"""The file size of an image: a reward that needs no weights (Black et al. 2023, DDPO, section 5.1)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image

from diffalign.images import to_rgb
from diffalign.types import Modality, Sample, Scores

QUALITY = 95


class Incompressibility:
    """The size of the image as a JPEG of quality 95: detail and noise score high."""

    name = "incompressibility"
    modality: Modality = "image"
    unit = "kB"
    """Of 1000 bytes."""
    range = (0.0, math.inf)
    higher_is_better = True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """kB ``(B,)``; NaN for a sample without an image."""
        return Scores(torch.tensor([_kilobytes(sample.image) for sample in samples], dtype=torch.float32))


class Compressibility:
    """Minus the size of the image as a JPEG of quality 95: smooth and simple images score high."""

    name = "compressibility"
    modality: Modality = "image"
    unit = "kB"
    """Of 1000 bytes, with a minus."""
    range = (-math.inf, 0.0)
    higher_is_better = True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Minus kB ``(B,)``; NaN for a sample without an image."""
        return Scores(-Incompressibility()(samples).total)


def _kilobytes(image: Image.Image | None) -> float:
    if image is None or 0 in image.size:
        return math.nan
    buffer = io.BytesIO()
    try:
        # Pillow would copy a comment of the file that the image came from, and count it.
        to_rgb(image).save(buffer, format="JPEG", quality=QUALITY, comment=b"")
    except OSError:
        return math.nan
    return buffer.tell() / 1000
