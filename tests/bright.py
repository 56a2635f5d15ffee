"""A reward in both forms that anyone can compute: how bright an image is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffalign.types import Prompt, Sample, Scores


class Bright:
    """Mean brightness of an image in [0, 1], in both forms."""

    name, modality, unit, range, higher_is_better = "bright", "image", "", (0.0, 1.0), True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.tensor([np.asarray(s.image, dtype=np.float32).mean() / 255 for s in samples]))

    def differentiable(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return images.mean((1, 2, 3))
