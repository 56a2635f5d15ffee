"""How samples are compared with each other, per modality: how far apart two are, and how much a pair has changed.

Shape legend: ``N`` samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from diffalign import images
from diffalign.types import Modality, Sample


@dataclass(frozen=True)
class Look:
    """What can be said of samples of a modality without a model."""

    distances: Callable[[Sequence[Sample]], Tensor]
    """float64 ``(N, N)``: how far apart samples are."""
    changes: Mapping[str, Callable[[Sequence[Sample], Sequence[Sample]], float]] = field(default_factory=dict)
    """By name, how much samples changed, pair by pair."""
    spreads: Mapping[str, Callable[[Sequence[Sample]], float]] = field(default_factory=dict)
    """By name, how different some samples of one prompt are."""


def coarse_pixels(samples: Sequence[Sample]) -> Tensor:
    """Distances ``(N, N)`` of images: root mean square over 16x16 pixels in [0, 1]."""
    pixels = images.to_tensor([sample.image for sample in samples if sample.image is not None])
    coarse = torch.nn.functional.adaptive_avg_pool2d(pixels, 16).flatten(1).double()
    distances: Tensor = torch.cdist(coarse, coarse) / coarse.shape[1] ** 0.5
    return distances


def pixel_rms(before: Sequence[Sample], after: Sequence[Sample]) -> float:
    """Mean over pairs of the root mean square difference of two images, pixels in [0, 1]."""
    first, second = (images.to_tensor([s.image for s in side if s.image is not None]) for side in (before, after))
    return float(((first - second) ** 2).flatten(1).mean(1).sqrt().mean())


def words(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def phrases(samples: Sequence[Sample]) -> Tensor:
    """Distances ``(N, N)`` of texts: 1 - cosine of their counts of phrases of one to three words."""
    counts = [_phrases(words(sample.text or "")) for sample in samples]
    known = {phrase: i for i, phrase in enumerate(dict.fromkeys(phrase for own in counts for phrase in own))}
    vectors = torch.zeros((len(samples), max(1, len(known))), dtype=torch.float64)
    for row, own in enumerate(counts):
        for phrase, count in own.items():
            vectors[row, known[phrase]] = count
    vectors = torch.nn.functional.normalize(vectors)
    return 1 - vectors @ vectors.T


def _phrases(found: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(found[i : i + n]) for n in (1, 2, 3) for i in range(len(found) - n + 1))


def rewritten(before: Sequence[Sample], after: Sequence[Sample]) -> float:
    """Mean over pairs of 1 - cosine of the phrases of two texts: 0 where none has changed."""
    pairs = [float(phrases(pair)[0, 1]) for pair in zip(before, after, strict=True)]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def distinct_2(samples: Sequence[Sample]) -> float:
    """Different pairs of words over all pairs of words, in the texts of one prompt (Li et al. 2016)."""
    found = [words(sample.text or "") for sample in samples]
    pairs = [pair for own in found for pair in pairwise(own)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


LOOKS: Mapping[Modality, Look] = {
    "image": Look(coarse_pixels, {"pixel_rms": pixel_rms}),
    "text": Look(phrases, {"rewritten": rewritten}, {"distinct-2": distinct_2}),
}
