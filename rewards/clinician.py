"""A cautious reward from clinicians' labels: ``clinician?folder=PATH``, a folder that ``diffalign reward fit`` wrote.

Two guards against being optimised where it knows nothing. Each criterion counts by a lower confidence bound, the
ensemble's mean minus ``kappa`` times its standard deviation (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
Overoptimization", call it uncertainty-weighted). And an image far from those that were judged gets no score at all.

What the guards cannot do: heads of one ensemble share one encoder, so they agree about what it does not see; and an
image can be wrong in a way that leaves its embedding near the known ones.

Shape legend: ``B`` samples, ``C`` criteria.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.types import Modality, Prompt, Sample, Scores
from rewards.fit_model import Judgement, RewardModel


class ClinicianReward:
    """Lower confidence bounds, one per criterion, combined; NaN far from the data."""

    modality: Modality = "image"
    unit = "standard deviations"
    range = (-math.inf, math.inf)
    higher_is_better = True

    def __init__(
        self,
        folder: str,
        kappa: float = 1.0,
        combine: Literal["mean", "min"] = "mean",
        abstain: float = 0.999,
        encoder: str | None = None,
        device: str = "cpu",
        name: str = "clinician",
    ) -> None:
        """``kappa`` >= 0 weighs the doubt; 0 switches it off. ``combine`` is over the criteria.

        ``abstain`` in (0, 1] is the quantile of the distances of held-out images beyond which there is no score; 1
        switches it off. ConfigError for other values, and for a doubt that was not measured, as of a single head.
        """
        if not (kappa >= 0 and math.isfinite(kappa)):
            raise ConfigError(f"kappa is {kappa:g}; it is a finite number, 0 or more")
        if not 0 < abstain <= 1:
            raise ConfigError(
                f"abstain is {abstain:g}; it is a quantile above 0, such as 0.999, and 1 judges everything"
            )
        self.name, self.kappa, self.combine = name, kappa, combine
        self.reward_model = RewardModel(Path(folder).expanduser(), encoder, device)
        if kappa and any(heads.members < 2 for heads in self.reward_model.heads):
            raise ConfigError(f"{folder} has a single head a criterion, so its doubt is not known; set kappa=0")
        self.limit = self.reward_model.limit(abstain)
        """Distance above which there is no score."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Totals ``(B,)`` and the bound of each criterion; NaN for a sample without an image, or one too far away."""
        bound = self._bound(self.reward_model.judge(samples))
        return Scores(self._total(bound), dict(zip(self.reward_model.criteria, bound, strict=True)))

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same totals ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels.

        An image that is too far away is NaN here as well: nothing pulls it back, so watch how many there are.
        """
        return self._total(self._bound(self.reward_model.judge_with_gradient(images, prompts)))

    def _bound(self, judged: Judgement) -> Tensor:
        """Lower confidence bounds ``(C, B)``."""
        bound = judged.mean - self.kappa * judged.sd if self.kappa else judged.mean
        return torch.where(judged.distance <= self.limit, bound, math.nan)

    def _total(self, bound: Tensor) -> Tensor:
        return bound.mean(0) if self.combine == "mean" else bound.amin(0)
