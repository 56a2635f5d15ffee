"""What an image or text has to pass to become part of a dataset. Each gate says, in words, why it rejects.

Shape legend: ``N`` images, ``D`` numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign.synthesis.journal import Part
from diffalign.synthesis.privacy import nearest
from diffalign.types import Reward, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

Encoder = Callable[[Sequence["Image"]], NDArray[np.float32]]
"""Embeddings ``(N, D)`` of images, of length 1."""
GREY = 32
"""Side of the small grey images that are compared."""
_BLOCK = 4096
"""Training images that are compared with at a time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image or text that was made, and what is known of it."""

    sample: Sample | None
    """None where nothing could be made."""
    png: bytes = b""
    """Of an image: the file that would be kept."""
    scores: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""
    """Why it is not whole; empty where it is."""

    @property
    def picture(self) -> Image:
        """The image; only where there is one."""
        assert self.sample is not None
        assert self.sample.image is not None
        return self.sample.image


class Gate(Protocol):
    """A gate that looks at one image or text at a time."""

    name: str
    parts: frozenset[Part]
    """What it is about."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """Why each is rejected; empty for those that pass. The answer to one does not depend on the others."""
        ...


class Decodable:
    """What was made is whole: an image that decodes to its own pixels, a text that was not cut."""

    name = "decodable"
    parts: frozenset[Part] = frozenset({"image", "text"})

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """See Gate."""
        return [candidate.fault for candidate in candidates]


class Blank:
    """An image has some contrast, a text has letters."""

    name = "blank"
    parts: frozenset[Part] = frozenset({"image", "text"})

    def __init__(self, contrast: float) -> None:
        self.contrast = contrast

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """See Gate."""
        return [self._reason(candidate) for candidate in candidates]

    def _reason(self, candidate: Candidate) -> str:
        assert candidate.sample is not None
        if candidate.sample.text is not None:
            return "" if any(map(str.isalnum, candidate.sample.text)) else "the text says nothing"
        found = float(_unit(candidate.picture).std())
        return f"its contrast is {found:.4f}, below {self.contrast:g}" if found < self.contrast else ""


class Floor:
    """A score, or a part of it, is at least so much."""

    def __init__(self, reward: Reward, part: str | None, at_least: float) -> None:
        self.reward, self.at_least = reward, at_least
        self.name = f"{reward.name}/{part}" if part else reward.name
        self.parts: frozenset[Part] = frozenset({reward.modality})

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """See Gate. What could not be judged does not pass."""
        return [self._reason(candidate.scores) for candidate in candidates]

    def _reason(self, scores: Mapping[str, float]) -> str:
        found = scores.get(self.name)
        if found is None:
            return f"{self.name} could not judge it"
        if found >= self.at_least:
            return ""
        wrong = self._wrong(scores)
        return f"{self.name} is {found:.4g}, below {self.at_least:g}" + (f" ({', '.join(wrong)})" if wrong else "")

    def _wrong(self, scores: Mapping[str, float]) -> list[str]:
        """The parts of a checker's answer that are not right."""
        if tuple(self.reward.range) != (0.0, 1.0):
            return []
        directions: Mapping[str, bool | None] = getattr(self.reward, "directions", {})
        own = {
            key.removeprefix(f"{self.reward.name}/"): value
            for key, value in scores.items()
            if key.startswith(f"{self.reward.name}/") and key != self.name and not key.endswith("/everything")
        }
        return [name for name, value in own.items() if (value > 0 if directions.get(name) is False else value < 1)]


class Memorised:
    """An image is no copy of a training image: none is near in pixels.

    Of each training image only its small grey pixels are in memory: 4 KiB.
    """

    name = "memorised"
    parts: frozenset[Part] = frozenset({"image"})

    def __init__(self, training: Iterable[Image], distance: float) -> None:
        self.distance = distance
        left = (small(image).ravel() for image in training)
        self.blocks: list[NDArray[np.float32]] = []
        while block := list(islice(left, _BLOCK)):
            self.blocks.append(np.stack(block))

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """See Gate."""
        if not candidates:
            return []
        asked = np.stack([small(candidate.picture).ravel() for candidate in candidates])
        # A root mean square is a distance over the root of the number of pixels.
        found = np.min([nearest(asked, block)[0][:, 0] for block in self.blocks], axis=0) / GREY
        return [
            f"a training image is {rms:.4f} away in pixels, not above {self.distance:g}" if rms <= self.distance else ""
            for rms in found.tolist()
        ]


class Duplicates:
    """Finds images that are, or nearly are, another case's: alike by perceptual hash, and by embedding where there is
    an encoder. It compares with other cases, so it is asked at the end of a round, in the order of the rows.

    A look is the hash (8 bytes) and the embedding (16-bit floats); of earlier cases only the hashes are in memory.
    """

    name = "duplicate"

    def __init__(self, bits: int, similarity: float, encode: Encoder | None = None) -> None:
        self.bits, self.similarity, self.encode = bits, similarity, encode
        self._hashes = np.empty(1024, dtype=np.uint64)
        self._rows = np.empty(1024, dtype=np.int64)
        self._count = 0

    def looks(self, images: Sequence[Image]) -> list[bytes]:
        """What each image is known by."""
        if not images:
            return []
        hashes = [perceptual_hash(image).to_bytes(8, "big") for image in images]
        if self.encode is None:
            return hashes
        embeddings = self.encode(images).astype("<f2")
        return [known + embedding.tobytes() for known, embedding in zip(hashes, embeddings, strict=True)]

    def add(self, row: int, look: bytes) -> None:
        """Remembers the image of an accepted case."""
        if self._count == len(self._hashes):
            self._hashes, self._rows = (np.concatenate([one, one]) for one in (self._hashes, self._rows))
        self._hashes[self._count] = int.from_bytes(look[:8], "big")
        self._rows[self._count] = row
        self._count += 1

    def reason(self, look: bytes, look_of: Callable[[int], bytes]) -> str:
        """Why an image is a duplicate; empty where it is none. ``look_of`` gives the look of an earlier row."""
        own = np.uint64(int.from_bytes(look[:8], "big"))
        differ = np.bitwise_count(self._hashes[: self._count] ^ own)
        near = np.flatnonzero(differ <= self.bits)
        for i in near[np.lexsort((self._rows[near], differ[near]))].tolist():
            row, bits = int(self._rows[i]), int(differ[i])
            said = f"like case {row}: {bits} of 64 bits differ"
            if self.encode is None:
                return said
            cosine = _cosine(look[8:], look_of(row)[8:])
            if cosine >= self.similarity:
                return f"{said}, embeddings alike by {cosine:.4f}"
        return ""


def perceptual_hash(image: Image) -> int:
    """64 bits: which of the 8x8 lowest frequencies of the small grey image are above their median (Zauner 2010)."""
    steps = np.arange(GREY)
    waves = np.cos(np.pi / GREY * np.outer(np.arange(8), steps + 0.5))
    low = (waves @ small(image) @ waves.T).ravel()
    bits: NDArray[np.bool_] = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosine(first: bytes, second: bytes) -> float:
    one, two = (np.frombuffer(look, dtype="<f2").astype(np.float64) for look in (first, second))
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


def small(image: Image) -> NDArray[np.float32]:
    """``(32, 32)`` grey pixels in [0, 1]."""
    from PIL import Image as pillow

    grey = _grey(image).resize((GREY, GREY), pillow.Resampling.LANCZOS)
    return np.asarray(grey, dtype=np.float32)


def _grey(image: Image) -> Image:
    """Grey pixels in [0, 1], as Pillow's floats; 16-bit images keep their range."""
    from PIL import Image as pillow

    if image.mode.split(";")[0] == "I":
        return pillow.fromarray(np.asarray(image, dtype=np.float32) / 65535)
    return pillow.fromarray(np.asarray(image.convert("L"), dtype=np.float32) / 255)


def _unit(image: Image) -> NDArray[np.float32]:
    """Pixels in [0, 1], by channel."""
    most = 65535 if image.mode.split(";")[0] == "I" else 255
    return np.asarray(image, dtype=np.float32) / np.float32(most)
