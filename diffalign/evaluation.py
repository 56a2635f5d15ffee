"""Before and after, measured honestly: held-out prompts, the same seeds for both, intervals, diversity, distance.

Shape legend: ``N`` images, ``P`` prompts (``N = P * seeds per prompt``), ``F`` features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign import images
from diffalign.seeds import derive
from diffalign.types import Policy, Prompt, Reward, Rollout, Sample

Floats = NDArray[np.float64]
RESAMPLES = 4000


@dataclass(frozen=True)
class Measure:
    """One reward, or one part of a reward, before and after."""

    before: Floats
    """``(N,)``; NaN where the measure was not asked of the sample, or failed."""
    after: Floats
    trained_on: bool
    higher_is_better: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What changed between a model and its reference on held-out prompts."""

    measures: Mapping[str, Measure]
    groups: NDArray[np.int64]
    """``(N,)``: number of each image's prompt. Intervals resample prompts: images of one are not independent."""
    main: str
    """The measure that training optimised; win rate is by it."""
    diversity: tuple[float, float]
    distance: Mapping[str, float]
    before: Sequence[Sample] = ()
    after: Sequence[Sample] = ()
    seconds: float = 0.0
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``."""
        return {
            "rewards": {name: self._reward(measure) for name, measure in self.measures.items()},
            "win_rate": self.win_rate(),
            "diversity": {"before": self.diversity[0], "after": self.diversity[1]},
            "distance": dict(self.distance),
            "prompts": "held-out",
            "verdict": verdict(self),
            "seconds": round(self.seconds, 1),
        }

    def _reward(self, measure: Measure) -> dict[str, Any]:
        known = np.isfinite(measure.before) & np.isfinite(measure.after)
        groups = self.groups[known]
        before, after = measure.before[known], measure.after[known]
        summary = {
            "before": mean_interval(before, groups) | {"n": len(before)},
            "after": mean_interval(after, groups) | {"n": len(after)},
            "difference": mean_interval(after - before, groups),
            "trained_on": measure.trained_on,
            "higher_is_better": measure.higher_is_better,
        }
        return summary

    def win_rate(self) -> dict[str, Any]:
        """Share of pairs in which the aligned model's image scores higher by the main measure; a tie is half a win."""
        measure = self.measures[self.main]
        known = np.isfinite(measure.before) & np.isfinite(measure.after)
        gain = (measure.after - measure.before)[known] * (1 if measure.higher_is_better else -1)
        won = np.where(np.abs(gain) < 1e-9, 0.5, gain > 0).astype(np.float64)
        interval = mean_interval(won, self.groups[known])
        return {
            "value": interval["mean"], "ci95": interval["ci95"], "n": len(won), "by": self.main,
            "ties": float((won == 0.5).mean()) if len(won) else 0.0,
        }  # fmt: skip


def mean_interval(values: Floats, groups: NDArray[np.int64]) -> dict[str, Any]:
    """Mean of the values with its 95 % percentile-bootstrap interval, resampling groups (Efron & Tibshirani 1993)."""
    if len(values) == 0:
        return {"mean": None, "ci95": [None, None]}
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    picked = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "ci95": [float(low), float(high)]}


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    main: Reward,
    others: Sequence[Reward] = (),
    *,
    trained_on: Sequence[str] = (),
    seeds_per_prompt: int = 2,
    seed: int = 0,
    features: Callable[[Sequence[Sample]], Tensor] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Samples every prompt with the reference and with the policy, at the same seeds, and scores both.

    ``trained_on`` names the rewards that training saw. ``features`` maps samples to unit vectors ``(N, F)`` for the
    diversity; without it coarse pixels are compared.
    """
    started = time.perf_counter()
    asked = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    seeds = [derive(seed, "evaluation", prompt.key, k) for prompt in prompts for k in range(seeds_per_prompt)]
    progress = on_progress or (lambda stage, done, total: None)
    with policy.reference():
        before = _sample(policy, asked, seeds, lambda done: progress("evaluating base", done, len(asked)))
    after = _sample(policy, asked, seeds, lambda done: progress("evaluating aligned", done, len(asked)))
    first = [sample for rollout in before for sample in rollout.samples]
    second = [sample for rollout in after for sample in rollout.samples]
    groups = np.repeat(np.arange(len(prompts)), seeds_per_prompt)
    return Evaluation(
        measures=_measures(first, second, main, others, set(trained_on)),
        groups=groups,
        main=main.name,
        diversity=(diversity(first, groups, features), diversity(second, groups, features)),
        distance=_distance(policy, after, first, second),
        before=first,
        after=second,
        seconds=time.perf_counter() - started,
    )


def _sample(
    policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], progress: Callable[[int], None]
) -> list[Rollout]:
    rollouts = []
    for i in range(0, len(prompts), policy.batch_size):
        rollouts.append(policy.rollout(prompts[i : i + policy.batch_size], seeds[i : i + policy.batch_size]))
        progress(min(i + policy.batch_size, len(prompts)))
    return rollouts


def _measures(
    before: Sequence[Sample], after: Sequence[Sample], main: Reward, others: Sequence[Reward], trained_on: set[str]
) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    for reward in (main, *others):
        first, second = reward(before), reward(after)
        pairs = {reward.name: (first.total, second.total)}
        pairs |= {f"{reward.name}/{part}": (first.parts[part], second.parts[part]) for part in sorted(first.parts)}
        for name, scores in pairs.items():
            a, b = (values.double().cpu().numpy() for values in scores)
            measures[name] = Measure(a, b, reward is main or reward.name in trained_on, reward.higher_is_better)
    return measures


def diversity(
    samples: Sequence[Sample],
    groups: NDArray[np.int64],
    features: Callable[[Sequence[Sample]], Tensor] | None = None,
) -> float:
    """Mean distance between two images of the same prompt: 1 - cosine of features, or RMS of 16x16 pixels in [0, 1]."""
    index = torch.from_numpy(groups)
    same = (index[:, None] == index[None]) & ~torch.eye(len(index), dtype=torch.bool)
    if not samples or not bool(same.any()):
        return float("nan")
    if features is not None:
        vectors = features(samples).double().cpu()
        distances = 1 - vectors @ vectors.T
    else:
        pixels = images.to_tensor([sample.image for sample in samples if sample.image is not None])
        coarse = torch.nn.functional.adaptive_avg_pool2d(pixels, 16).flatten(1).double()
        distances = torch.cdist(coarse, coarse) / coarse.shape[1] ** 0.5
    return float(distances[same].mean())


@torch.no_grad()
def _distance(
    policy: Policy, rollouts: Sequence[Rollout], before: Sequence[Sample], after: Sequence[Sample]
) -> dict[str, float]:
    """How far the policy is from its reference: closed-form KL along its own trajectories, and RMS pixel change."""
    result: dict[str, float] = {}
    if {"step_kl", "reference"} <= policy.capabilities:
        values = []
        for rollout in rollouts[:2]:
            steps = torch.arange(rollout.log_probs.shape[1]).expand(len(rollout), -1)
            kl = policy.step_log_probs(rollout, steps, kl=True).kl
            assert kl is not None
            values.append(kl[rollout.mask].mean())
        result["step_kl"] = float(torch.stack(values).mean())
    if before and before[0].image is not None:
        first, second = (images.to_tensor([s.image for s in side if s.image is not None]) for side in (before, after))
        result["pixel_rms"] = float(((first - second) ** 2).flatten(1).mean(1).sqrt().mean())
    return result


def verdict(evaluation: Evaluation) -> dict[str, Any]:
    """Was the reward over-optimised? ``alarm`` is True when something that was not trained on got clearly worse."""
    alarms, praise = [], []
    for name, measure in evaluation.measures.items():
        change = evaluation._reward(measure)["difference"]
        low, high = change["ci95"]
        if low is None:
            continue
        if not measure.higher_is_better:
            low, high = -high, -low
        if high < 0 and not measure.trained_on:
            alarms.append(f"{name}, which was not trained on, fell by {abs(change['mean']):.3g}")
        elif high < 0 and name == evaluation.main:
            alarms.append(f"{name}, the reward itself, fell by {abs(change['mean']):.3g}")
        elif low > 0 and not measure.trained_on:
            praise.append(f"{name}, which was not trained on, rose by {abs(change['mean']):.3g}")
    before, after = evaluation.diversity
    if before > 0 and after < 0.8 * before:
        alarms.append(f"diversity fell to {after / before:.0%} of the base model's")
    held_out = any(not measure.trained_on for measure in evaluation.measures.values())
    if alarms:
        text = "Over-optimised: " + "; ".join(alarms) + "."
    elif not held_out:
        text = "No measure was kept out of training, so over-optimisation cannot be ruled out."
    else:
        text = "No sign of over-optimisation: nothing that was measured and not trained on got clearly worse."
    if praise:
        text += " But " if alarms else " And "
        text += "; ".join(praise) + "."
    return {"alarm": bool(alarms), "text": text}
