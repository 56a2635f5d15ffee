"""The files of a study: each is named by the SHA-256 of what is in it, so that none is ever changed or mixed up."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import InputError, NotFoundError
from diffalign.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = ("I", "F")
"""What Pillow calls greyscale of more than 8 bits, before a semicolon."""


def contents_of(first: Sample, second: Sample) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """``content_of`` both samples of a pair. Two greyscale images of more than 8 bits get one common range.

    Each stretched by itself, a darker one would look as bright as the other, and could not be told from it.
    """
    if first.image is not None and second.image is not None and _wide(first.image) and _wide(second.image):
        from diffalign.images import png_bytes

        one, two = one_range(first.image, second.image)
        return ("image", png_bytes(one)), ("image", png_bytes(two))
    return content_of(first), content_of(second)


def one_range(first: Image, second: Image) -> tuple[Image, Image]:
    """Both as 8-bit greyscale: the lowest value of the two is 0, the highest is 255."""
    import numpy as np
    from PIL import Image as images

    values = [np.asarray(image, dtype=np.float64) for image in (first, second)]
    if not all(np.isfinite(one).all() for one in values):
        raise InputError("a greyscale image has pixels that are NaN or infinite")
    low, high = min(float(one.min()) for one in values), max(float(one.max()) for one in values)
    if low == high:
        # Nothing to stretch: flat images keep their place in the 16-bit range.
        low, high = 0.0, max(65535.0, high)
    one, two = (
        images.fromarray(np.rint((one - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)) for one in values
    )
    return one, two


def _wide(image: Image) -> bool:
    return image.mode.split(";")[0] in WIDE


def content_of(sample: Sample) -> tuple[str, bytes]:
    """``image`` and a PNG of the pixels alone, or ``text`` and its UTF-8: no metadata of the original remains."""
    if (sample.image is None) == (sample.text is None):
        raise InputError("a sample has an image or a text, and not both")
    if sample.image is not None:
        from diffalign.images import png_bytes

        return "image", png_bytes(sample.image)
    assert sample.text is not None
    return "text", sample.text.encode("utf-8", "surrogatepass")


class Files:
    """A folder of contents.

    ``flushed`` says whether what is put is on the disk when ``put`` returns. Who fills a new folder, which is flushed
    as a whole before it gets its name, need not wait for each file.
    """

    def __init__(self, folder: Path, flushed: bool = True) -> None:
        self.folder, self._flushed = folder, flushed

    def put(self, data: bytes) -> str:
        """Keeps the data and returns their hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{uuid.uuid4().hex}.part")
            with part.open("xb") as file:
                file.write(data)
                if self._flushed:
                    file.flush()
                    os.fsync(file.fileno())
            part.replace(path)
        return sha256

    def get(self, sha256: str) -> bytes:
        """The data of that hash, checked."""
        path = self.path(sha256)
        # The folder itself may be a link to another disk; what is in it may not lead elsewhere.
        if path.is_symlink() or path.parent.is_symlink():
            raise InputError(f"the file {sha256} of the study is a link, and links are not followed")
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"the file {sha256} of the study is no file")
            data = path.read_bytes()
        except OSError as error:
            raise NotFoundError(f"the study lacks its file {sha256}: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(f"the file {sha256} of the study was changed, or is damaged; bring it back from a backup")
        return data

    def path(self, sha256: str) -> Path:
        """Where the data of that hash lie; refuses whatever is no hash."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise InputError(f"{sha256!r} is no SHA-256")
        return self.folder / sha256[:2] / sha256
