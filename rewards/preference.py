"""The reward that people's choices taught: ``preference?folder=PATH``, a folder that ``diffalign reward fit`` wrote.

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.types import Modality, Prompt, Sample, Scores
from rewards.fit_model import RewardModel


class PreferenceReward:
    """The mean of the ensemble for one criterion.

    The scores of the training images have mean 0 and standard deviation 1, so weights mean the same from one reward
    model to the next. A difference of two scores of one prompt is what was learned; the level of a prompt is not.
    """

    modality: Modality = "image"
    unit = "standard deviations"
    range = (-math.inf, math.inf)
    higher_is_better = True

    def __init__(
        self,
        folder: str,
        criterion: str | None = None,
        encoder: str | None = None,
        device: str = "cpu",
        name: str = "preference",
    ) -> None:
        """``criterion`` is by default ``overall``, or the only one. ``encoder`` is for one that has moved.

        NotFoundError or InputError where the folder holds no reward model, ConfigError for a criterion it has not.
        """
        self.name = name
        self.reward_model = RewardModel(Path(folder).expanduser(), encoder, device)
        self.criterion = _chosen(criterion, self.reward_model.criteria, folder)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``, and of every criterion as parts; NaN for a sample without an image."""
        mean = self.reward_model.judge(samples).mean
        parts = dict(zip(self.reward_model.criteria, mean, strict=True))
        return Scores(parts[self.criterion], parts)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same scores ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels."""
        mean = self.reward_model.judge_with_gradient(images, prompts).mean
        return mean[self.reward_model.criteria.index(self.criterion)]

    def probability(self, first: Sequence[Sample], second: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities ``(B,)`` that a rater prefers the first, and that it is a tie.

        The latter is 0 where ties were not learned as an outcome. The two samples of a pair have the same prompt.
        """
        if [sample.prompt.text for sample in first] != [sample.prompt.text for sample in second]:
            raise ConfigError("only samples of the same prompt can be compared")
        with torch.no_grad():
            difference = self(first).total - self(second).total
        return self.reward_model.calibration(self.criterion).probabilities(difference)


def _chosen(wanted: str | None, known: Sequence[str], folder: str) -> str:
    if wanted is not None and wanted in known:
        return wanted
    if wanted is None and ("overall" in known or len(known) == 1):
        return "overall" if "overall" in known else known[0]
    problem = "has several criteria and no overall one" if wanted is None else f"has no criterion {wanted!r}"
    raise ConfigError(f"{folder} {problem}; choose by criterion= one of: {', '.join(known)}")
