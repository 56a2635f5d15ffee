"""What an encoder makes of the scenes of an embedded world, kept in the cache folder between evaluations.

A training index of 30,000 scenes takes minutes to be drawn and encoded, and is the same for every dataset of its model.
It is kept in pieces, so that an evaluation that was interrupted goes on with what it had. A piece is named by the hash
of everything it follows from: the scenes, the encoder and its device, the code and assets that draw them, the versions
of the packages. One that is damaged counts as missing.

Images of folders are never kept: they may be those of people, and their small copies would stay behind on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import apps
import diffalign
import rewards
from apps import hashes
from diffalign import assets
from diffalign.errors import RefusedError
from diffalign.runs import new_file
from diffalign.synthesis.cases import Value
from diffalign.synthesis.estimates import Floats

FOLDER = "looks"
DIGEST = 32
"""Bytes of a SHA-256."""
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "scipy", "pillow")
_CODE: Mapping[str, tuple[str, ...]] = {
    "diffalign": ("worlds/*.py", "worlds/assets/**/*", "seeds.py", "images.py", "synthesis/gates.py"),
    "rewards": ("clip.py", "imagenet_trunk.py"),
    "apps": ("dataset_cache.py", "dataset_features.py"),
}
"""Files that decide what a scene looks like and what is told of it."""


@dataclass(frozen=True)
class Piece:
    """What is known of ``N`` images."""

    features: Floats
    """``(N, D)``; single precision, whatever the type."""
    pixels: NDArray[np.float32]
    """``(N, P)`` in [0, 1]."""
    digests: tuple[bytes, ...]
    rows: tuple[Mapping[str, Value], ...]


class Shelf:
    """The pieces of one set of scenes, as one encoder sees them."""

    def __init__(self, scenes: str, encoder: str, device: str, say: Callable[[str], None]) -> None:
        """``scenes`` names the set, ``encoder`` is the encoder's hash, ``device`` what it computes on.

        ``say`` is told what cannot be kept, and why.
        """
        self.facts, self.say, self.open = [scenes, encoder, device], say, encoder != hashes.NOT_HASHED
        self.taken = 0
        """Scenes that were there already."""

    def take(self, index: Sequence[int]) -> Piece | None:
        """What is known of the scenes at these places; None where it has to be made."""
        found = take(self._name(index), len(index)) if self.open else None
        self.taken += len(index) if found else 0
        return found

    def keep(self, index: Sequence[int], piece: Piece) -> None:
        """Keeps a piece. A disk that does not take it ends the keeping, not the evaluation."""
        if self.open:
            try:
                keep(self._name(index), piece)
            except (RefusedError, OSError) as error:
                self.open = False
                self.say(f"what was seen of the scenes is not kept: {error}")

    def _name(self, index: Sequence[int]) -> str:
        packages = {name: version(name) for name in _PACKAGES}
        return hashlib.sha256(json.dumps([*self.facts, list(index), _code(), packages]).encode()).hexdigest()


def keep(name: str, piece: Piece) -> None:
    """Writes a piece, whole or not at all; raises RefusedError where the disk does not take it."""
    arrays: dict[str, NDArray[Any]] = {
        "features": piece.features.astype(np.float32),
        "pixels": piece.pixels,
        "digests": np.frombuffer(b"".join(piece.digests), np.uint8).reshape(-1, DIGEST),
    }
    rows = json.dumps([dict(row) for row in piece.rows])
    facts = {"rows": rows, "sha256": _sha256(arrays, rows)}
    with new_file(_path(name)) as path:
        path.write_bytes(save(arrays, metadata=facts))


def take(name: str, count: int) -> Piece | None:
    """The piece of that name, of ``count`` images; None where there is none that is whole."""
    try:
        with safe_open(_path(name), framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {field: file.get_tensor(field) for field in ("features", "pixels", "digests")}
    except (OSError, SafetensorError):
        return None
    rows = facts.get("rows", "")
    if facts.get("sha256") != _sha256(arrays, rows) or len(arrays["features"]) != count:
        return None
    digests = tuple(one.tobytes() for one in arrays["digests"])
    return Piece(arrays["features"].astype(np.float64), arrays["pixels"], digests, tuple(json.loads(rows)))


def _path(name: str) -> Path:
    return assets.cache() / FOLDER / f"{name}.safetensors"


def _sha256(arrays: Mapping[str, NDArray[Any]], rows: str) -> str:
    digest = hashlib.sha256(rows.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@cache
def _code() -> str:
    found = {}
    for package, patterns in _CODE.items():
        module = {"diffalign": diffalign, "rewards": rewards, "apps": apps}[package]
        root = Path(str(module.__file__)).parent
        files = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
        found[package] = hashes.of_files(files, root)
    return json.dumps(found)
