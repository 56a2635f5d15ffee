"""What was computed from an image, kept for as long as the image itself."""

from __future__ import annotations

import weakref
from typing import Any

from PIL.Image import Image
from torch import Tensor


class PerImage:
    """Tensors by image. An image is known by what it is, not by its pixels: a copy is another one."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Image], Tensor]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, image: Image) -> Tensor | None:
        """What was kept of this image, or None."""
        reference, tensor = self._found.get(id(image), (None, None))
        return tensor if reference is not None and reference() is image else None

    def put(self, image: Image, tensor: Tensor) -> None:
        """Keeps the tensor until the image is gone."""
        key = id(image)

        def forget(reference: Any) -> None:
            # Another image may have got the same id, and an entry of its own, in the meantime.
            if key in self._found and self._found[key][0] is reference:
                del self._found[key]

        self._found[key] = weakref.ref(image, forget), tensor
