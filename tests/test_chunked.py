"""Scoring some at a time: every image once, at its place, with its own text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from diffalign.types import Prompt, Sample
from rewards import chunked


@pytest.mark.parametrize("size", [1, 2, 7])
def test_scores_stand_at_their_samples(size: int) -> None:
    """Image i is i + 1 pixels wide, and its text has i letters; a missing or unusable one has NaN, and is not asked."""
    pictures = [Image.new("RGB", (i + 1, 1)) for i in range(6)]
    samples = [Sample(Prompt("x" * i, str(i)), image=picture) for i, picture in enumerate(pictures)]
    samples[2] = Sample(Prompt("text"), text="no image")
    asked: list[int] = []

    def judge(images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        assert 0 < len(images) == len(texts) <= size
        asked.extend(image.width for image in images)
        pairs = zip(images, texts, strict=True)
        return torch.tensor([float(100 * image.width + len(text)) for image, text in pairs], dtype=torch.float64)

    found = chunked.scores(samples, judge, size, usable=lambda image: image.width != 5).total
    assert asked == [1, 2, 4, 6]
    expected = torch.tensor([100.0, 201, float("nan"), 403, float("nan"), 605])
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1)) and found.dtype == torch.float32
    assert len(chunked.scores([], judge, size).total) == 0
