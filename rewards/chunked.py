"""Scoring images some at a time, so that memory does not grow with how many there are, and only where a prompt asks.

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.types import Prompt, Sample, Scores


@torch.no_grad()
def scores(
    samples: Sequence[Sample],
    judge: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
    size: int,
    usable: Callable[[Image.Image], bool] = lambda image: True,
) -> Scores:
    """Scores ``(B,)`` by ``judge``, which gets up to ``size`` images with the texts of their prompts at a time; NaN for
    a sample without an image, with one that has no pixels, or with one that is not ``usable``.
    """
    total = torch.full((len(samples),), math.nan)
    images = {
        i: sample.image
        for i, sample in enumerate(samples)
        if sample.image is not None and 0 not in sample.image.size and usable(sample.image)
    }
    order = list(images)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        total[chunk] = judge([images[i] for i in chunk], [samples[i].prompt.text for i in chunk]).float().cpu()
    return Scores(total)


def where_asked(scores: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Scores ``(B,)``, with their gradient if they have one, and NaN where the prompt is empty.

    For rewards that compare an image with its prompt: a model answers an empty text too, and its number says nothing.
    """
    asked = torch.tensor([bool(prompt.text.strip()) for prompt in prompts], dtype=torch.bool, device=scores.device)
    return torch.where(asked, scores, math.nan)
