"""The files of a study: each is named by the SHA-256 of what is in it, so that none is ever changed or mixed up."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path

from diffalign.errors import InputError, NotFoundError
from diffalign.types import Sample


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
    """A folder of contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> str:
        """Keeps the data, on the disk when this returns, and returns their hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{uuid.uuid4().hex}.part")
            with part.open("xb") as file:
                file.write(data)
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
