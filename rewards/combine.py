"""Several rewards as one: an explicit weighted sum of calibrated scores, with the breakdown kept.

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.types import DifferentiableReward, Modality, Prompt, Reward, Sample, Scores

Gradient = Callable[[Tensor, Sequence[Prompt]], Tensor]


@dataclass(frozen=True)
class _Term:
    reward: Reward
    weight: float
    center: float
    scale: float

    def of(self, score: Tensor) -> Tensor:
        """What a raw score adds to the total; a score of which less is better counts with a minus."""
        sign = 1.0 if self.reward.higher_is_better else -1.0
        return sign * self.weight * (score - self.center) / self.scale


class Combined:
    """``sum of weight * (score - center) / scale``, with a minus where lower scores are better.

    A reward of weight 0 is measured and does not count. The parts hold every reward's raw score under its name, and
    what that reward itself breaks down under ``NAME/PART``.
    """

    unit = "weighted sum"
    higher_is_better = True

    def __init__(
        self, rewards: Sequence[tuple[Reward, float, Mapping[str, float] | None]], name: str = "combined"
    ) -> None:
        """Takes ``(reward, weight, calibration)``; a calibration is ``{"center": c, "scale": s}``, None for 0, 1."""
        self.name = name
        self._terms = tuple(_term(*item) for item in rewards)
        if not self._terms:
            raise ConfigError("a combination needs at least one reward")
        names = [term.reward.name for term in self._terms]
        twice = sorted({found for found in names if names.count(found) > 1})
        if twice:
            raise ConfigError(
                f"a combination has {', '.join(twice)} twice; give one of them another name or one weight"
            )
        modalities = {term.reward.name: term.reward.modality for term in self._terms}
        if len(set(modalities.values())) > 1:
            told = ", ".join(f"{found} judges {modality}s" for found, modality in modalities.items())
            raise ConfigError(f"rewards of different modalities cannot be combined: {told}")
        if all(term.weight == 0 for term in self._terms):
            raise ConfigError(f"every reward of the combination ({', '.join(names)}) has weight 0; give one a weight")
        self.modality: Modality = self._terms[0].reward.modality
        self.range = self._range()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Totals ``(B,)`` and the breakdown; a NaN of a reward that counts is a NaN of that sample's total."""
        total = torch.zeros(len(samples))
        parts: dict[str, Tensor] = {}
        for term in self._terms:
            scores = term.reward(samples)
            parts[term.reward.name] = scores.total
            parts.update({f"{term.reward.name}/{part}": values for part, values in scores.parts.items()})
            if term.weight != 0:
                total = total + term.of(scores.total)
        return Scores(total, parts)

    @property
    def waits(self) -> bool:
        """Whether one of them waits for a server: the next samples are made meanwhile."""
        return any(getattr(term.reward, "waits", False) for term in self._terms)

    @property
    def differentiable(self) -> Gradient:
        """The differentiable form ``(images, prompts) -> (B,)``; none unless every reward that counts has one."""
        terms = [term for term in self._terms if term.weight != 0]
        if self.without_gradient:
            raise AttributeError(f"{', '.join(self.without_gradient)} cannot be differentiated")

        def total(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            given = (term.of(cast(DifferentiableReward, term.reward).differentiable(images, prompts)) for term in terms)
            return torch.stack(list(given)).sum(0)

        return total

    @property
    def without_gradient(self) -> list[str]:
        """Names of the rewards that count and have no differentiable form."""
        counting = [term.reward for term in self._terms if term.weight != 0]
        return [reward.name for reward in counting if not hasattr(reward, "differentiable")]

    def _range(self) -> tuple[float, float]:
        low = high = 0.0
        for term in self._terms:
            if term.weight != 0:
                ends = [float(term.of(torch.tensor(end, dtype=torch.float64))) for end in term.reward.range]
                low, high = low + min(ends), high + max(ends)
        return low, high


def _term(reward: Reward, weight: float, calibration: Mapping[str, float] | None) -> _Term:
    if not math.isfinite(weight):
        raise ConfigError(f"the weight of {reward.name} is {weight}; a weight is a finite number")
    if "/" in reward.name:
        raise ConfigError(f"the reward name {reward.name!r} has a slash, which is kept for the parts of a reward")
    calibration = calibration or {}
    if unknown := set(calibration) - {"center", "scale"}:
        raise ConfigError(f"the calibration of {reward.name} has {', '.join(sorted(unknown))}; it has center and scale")
    center, scale = calibration.get("center", 0.0), calibration.get("scale", 1.0)
    if not (math.isfinite(center) and math.isfinite(scale) and scale > 0):
        raise ConfigError(
            f"the calibration of {reward.name} is center {center}, scale {scale}; both are finite, and scale is above 0"
        )
    return _Term(reward, weight, center, scale)
