"""Image files on their way into a study: only plain images, only from where one was told to look.

Strangers' files are refused before they cost memory: no format that runs or reads other things (SVG, EPS, …), no
decompression bomb, no link that leads out of the folder.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from diffalign import images
from diffalign.errors import InputError
from diffalign.study.content import WIDE

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 64 * 2**20
"""Bytes of one file."""
MOST_PIXELS = 50_000_000


def read(path: Path, root: Path) -> Image.Image:
    """The image of a file below ``root``, fully decoded; see ``decode``. Raises InputError in one sentence."""
    inside(path, root)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{path} has {size / 2**20:.0f} MB; an image file has at most {LARGEST // 2**20}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return decode(data, str(path))


def decode(data: bytes, name: str) -> Image.Image:
    """The image in the bytes of a file, as 8-bit RGB; ``name`` is what an error calls it.

    Greyscale of more than 8 bits stays what it is: a study maps both sides of a pair to 8 bits by one common range.
    """
    with warnings.catch_warnings():
        # Pillow only warns of what is a little too large; here it is refused.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                wide = image.mode.split(";")[0] in WIDE
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise InputError(f"{name} has too many pixels, as in a decompression bomb") from None
        # Pillow reports broken headers by many errors.
        except Exception:
            raise InputError(f"{name} is no PNG, JPEG or WebP image") from None
    if width * height > MOST_PIXELS:
        raise InputError(f"{name} has {width}x{height} pixels; a study takes images of up to {MOST_PIXELS:,}")
    return _wide(data, name) if wide else images.decode(data, name)


def _wide(data: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # As above.
    except Exception as error:
        raise InputError(f"{name} is not an image that can be decoded: {error}") from None


def inside(path: Path, root: Path) -> None:
    """Refuses a file that is reached by a link, or by ``..``, outside ``root``."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} leads out of {root}; copy the file there, for links are not followed")


def listed(folder: Path) -> Iterator[Path]:
    """The image files below a folder, sorted; hidden ones are left out. Raises InputError where there is an SVG."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        if path.suffix.lower() in (".svg", ".svgz"):
            raise InputError(f"{path} is an SVG, which can hold programs; convert it to PNG")
        if path.suffix.lower() in SUFFIXES:
            yield path
