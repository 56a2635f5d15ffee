"""Before and after, measured honestly: held-out prompts, the same seeds for both, intervals, diversity, distance.

Shape legend: ``N`` samples, ``P`` prompts (``N = P * seeds per prompt``), ``F`` features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign import shares
from diffalign.errors import ConfigError
from diffalign.intervals import wilson
from diffalign.looks import LOOKS
from diffalign.processes import Processes
from diffalign.seeds import derive
from diffalign.steps import in_turn
from diffalign.types import Policy, Prompt, Reward, Rollout, Sample

Floats = NDArray[np.float64]
RESAMPLES = 4000
FEWEST_PROMPTS = 5
"""Below this many prompts there is no interval: resampling so few says nothing of the others."""
MARGIN = 0.02
"""How far a part of what was trained on must fall to raise the alarm: 2 points of a fraction, else 2 % of its mean."""
LEAST = 0.002
"""The same of what was not trained on: many samples make a fall certain that nobody could see."""
SAME = 1e-9
"""Scores of a pair that differ by less than this are a tie."""


@dataclass(frozen=True)
class Measure:
    """One reward, or one part of a reward, before and after."""

    before: Floats
    """``(N,)``; NaN where the measure was not asked of the sample, or failed."""
    after: Floats
    trained_on: bool
    higher_is_better: bool | None = True
    """Of a part of a combination of rewards: what its weight asks for. None: neither, it only describes."""
    tolerance: float = 0.0
    """How far it may fall without an alarm, in its own unit, where the reward says so."""

    def known(self) -> NDArray[np.bool_]:
        """``(N,)``: the pairs of which both samples could be judged."""
        return np.isfinite(self.before) & np.isfinite(self.after)


@dataclass(frozen=True)
class Evaluation:
    """What changed between a model and its reference on held-out prompts."""

    measures: Mapping[str, Measure]
    groups: NDArray[np.int64]
    """``(N,)``: number of each sample's prompt. Intervals resample prompts: samples of one are not independent."""
    main: str
    """The measure that training optimised; win rate is by it."""
    diversity: tuple[float, float]
    distance: Mapping[str, float]
    before: Sequence[Sample] = ()
    after: Sequence[Sample] = ()
    seconds: float = 0.0
    perceived: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Diversity by other measures, such as LPIPS, before and after."""
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``; what could not be computed is None."""
        found: dict[str, Any] = _plain(
            {
                "rewards": {name: self._reward(measure) for name, measure in self.measures.items()},
                "win_rate": self.win_rate(),
                "diversity": {"before": self.diversity[0], "after": self.diversity[1]}
                | {name: {"before": old, "after": new} for name, (old, new) in self.perceived.items()},
                "distance": dict(self.distance),
                "prompts": "held-out",
                "verdict": verdict(self),
                "seconds": round(self.seconds, 1),
            }
        )
        return found

    def dumps(self) -> str:
        """``evaluation.json`` as text."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def _reward(self, measure: Measure) -> dict[str, Any]:
        known = measure.known()
        count = {"n": int(known.sum())}
        before, after = (
            mean_interval(values[known], self.groups[known], (0.0, 1.0) if _is_rate(values[known]) else None)
            for values in (measure.before, measure.after)
        )
        return {
            "before": before | count,
            "after": after | count,
            "difference": self.difference(measure),
            "trained_on": measure.trained_on,
            "higher_is_better": measure.higher_is_better,
        }

    def difference(self, measure: Measure) -> dict[str, Any]:
        """Mean and interval of after minus before, pair by pair, and how many pairs changed."""
        known = measure.known()
        before, after = measure.before[known], measure.after[known]
        rate = _is_rate(before) and _is_rate(after)
        found = mean_interval(after - before, self.groups[known], (-1.0, 1.0) if rate else None)
        return found | {"changed": int((np.abs(after - before) >= SAME).sum())}

    def win_rate(self) -> dict[str, Any]:
        """Share of pairs in which the aligned model's sample scores higher by the main measure; a tie is half a win."""
        measure = self.measures[self.main]
        known = measure.known()
        gain = (measure.after - measure.before)[known] * (1 if measure.higher_is_better else -1)
        won = np.where(np.abs(gain) < SAME, 0.5, gain > 0).astype(np.float64)
        interval = mean_interval(won, self.groups[known], (0.0, 1.0))
        return {
            "value": interval["mean"], "ci95": interval["ci95"], "n": len(won), "by": self.main,
            "ties": float((won == 0.5).mean()) if len(won) else 0.0,
        }  # fmt: skip


def _plain(value: Any) -> Any:
    """The value with None in place of every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_rate(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def mean_interval(
    values: Floats, groups: NDArray[np.int64], bounds: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Mean of the values with its 95 % percentile-bootstrap interval, resampling groups (Efron & Tibshirani 1993).

    Fewer than ``FEWEST_PROMPTS`` groups have no interval (None). ``bounds`` are the ends of the scale of a rate, or of
    a difference of rates: where all groups agree, resampling them would claim certainty, so the interval reaches as far
    as the share of other groups that Wilson's interval still allows after so many that agreed.
    """
    if len(values) == 0:
        return {"mean": None, "ci95": None}
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    mean = float(values.mean())
    if len(sums) < FEWEST_PROMPTS:
        return {"mean": mean, "ci95": None}
    if bounds and np.ptp(sums / counts) < 1e-9:
        others = wilson(0, len(sums))[1]
        return {"mean": mean, "ci95": [max(bounds[0], mean - others), min(bounds[1], mean + others)]}
    picked = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": mean, "ci95": [float(low), float(high)]}


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    main: Reward,
    others: Sequence[Reward] = (),
    *,
    trained_on: Collection[str] | None = None,
    wanted: Mapping[str, bool] | None = None,
    seeds_per_prompt: int = 2,
    seed: int = 0,
    features: Callable[[Sequence[Sample]], Tensor] | None = None,
    spreads: Mapping[str, Callable[[Sequence[Sample]], float]] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Samples every prompt with the reference and with the policy, at the same seeds, and scores both.

    ``trained_on`` names the rewards that training saw, by default ``main`` alone. ``wanted`` says of measures (and
    their parts) whether more of them is better, where their reward does not. ``features`` maps samples to unit vectors
    ``(N, F)`` for the diversity; without it they are compared as ``looks`` does. ``spreads`` are further measures of
    it: how different some samples of one prompt are. Several ``processes`` share the sampling and the rewards, and all
    have the result. Raises ConfigError if two rewards share a name.
    """
    names = [reward.name for reward in (main, *others)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two rewards that are measured are called {', '.join(twice)}; give one another name")
    trained = {main.name} if trained_on is None else set(trained_on)
    started = time.perf_counter()
    asked = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    seeds = [derive(seed, "evaluation", prompt.key, k) for prompt in prompts for k in range(seeds_per_prompt)]
    progress = on_progress or (lambda stage, done, total: None)
    processes = Processes() if processes is None else processes
    sample = partial(shares.rollouts, processes, policy, asked, seeds)
    with policy.reference():
        before = sample(lambda done: progress("evaluating base", done, len(asked)))
    after = sample(lambda done: progress("evaluating aligned", done, len(asked)))
    first = [sample for rollout in before for sample in rollout.samples]
    second = [sample for rollout in after for sample in rollout.samples]
    groups = np.repeat(np.arange(len(prompts)), seeds_per_prompt)
    look = LOOKS[policy.modality]
    distances = _cosine(features) if features else look.distances
    return Evaluation(
        measures=_measures(first, second, (main, *others), trained, wanted or {}, processes),
        groups=groups,
        main=main.name,
        diversity=(diversity(first, groups, distances), diversity(second, groups, distances)),
        distance=kl(policy, after[:2])
        | {name: change(first, second) for name, change in look.changes.items() if first},
        perceived={
            name: (_spread(first, groups, spread), _spread(second, groups, spread))
            for name, spread in {**look.spreads, **(spreads or {})}.items()
        },
        before=first,
        after=second,
        seconds=time.perf_counter() - started,
    )


def _measures(
    before: Sequence[Sample],
    after: Sequence[Sample],
    rewards: Sequence[Reward],
    trained_on: Collection[str],
    wanted: Mapping[str, bool],
    processes: Processes,
) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    for reward in rewards:
        first, second = (shares.scores(processes, reward, samples) for samples in (before, after))
        pairs = {reward.name: (first.total, second.total)}
        for part in sorted(first.parts.keys() | second.parts.keys()):
            missing = torch.full_like(first.total, math.nan)
            pairs[f"{reward.name}/{part}"] = first.parts.get(part, missing), second.parts.get(part, missing)
        for name, scores in pairs.items():
            a, b = (values.double().cpu().numpy() for values in scores)
            better: list[bool | None] = [value for key, value in wanted.items() if f"{name}/".startswith(f"{key}/")]
            own = reward.higher_is_better if name == reward.name else _direction_of(reward, name.rpartition("/")[2])
            tolerance = getattr(reward, "tolerance", 0.0) if name == reward.name else 0.0
            measures[name] = Measure(a, b, reward.name in trained_on, (better or [own])[0], tolerance)
    return measures


def _direction_of(reward: Reward, part: str) -> bool | None:
    """Whether more of a part is better: as the reward's ``directions`` say, or as of the reward itself."""
    directions: Mapping[str, bool | None] = getattr(reward, "directions", {})
    return directions.get(part, reward.higher_is_better)


def diversity(
    samples: Sequence[Sample],
    groups: NDArray[np.int64],
    distances: Callable[[Sequence[Sample]], Tensor],
) -> float:
    """Mean distance between two samples of the same prompt; NaN where no prompt has two."""
    index = torch.from_numpy(groups)
    same = (index[:, None] == index[None]) & ~torch.eye(len(index), dtype=torch.bool)
    if not samples or not bool(same.any()):
        return float("nan")
    return float(distances(samples)[same].mean())


def _cosine(features: Callable[[Sequence[Sample]], Tensor]) -> Callable[[Sequence[Sample]], Tensor]:
    def distances(samples: Sequence[Sample]) -> Tensor:
        vectors = features(samples).double().cpu()
        return 1 - vectors @ vectors.T

    return distances


def _spread(samples: Sequence[Sample], groups: NDArray[np.int64], spread: Callable[[Sequence[Sample]], float]) -> float:
    """Mean over prompts; NaN where no prompt has two samples."""
    own = [[s for s, number in zip(samples, groups == group, strict=True) if number] for group in np.unique(groups)]
    found = [spread(some) for some in own if len(some) > 1]
    return float(np.mean(found)) if found else math.nan


@torch.no_grad()
def kl(policy: Policy, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Closed-form KL to the reference along these samples; empty where no step has noise.

    ``step_kl`` is the mean over the steps, ``sample_kl`` the mean over the samples of the sum over their steps: an
    unbiased estimate of the divergence of whole samples, as the samples are the policy's own. Of an image both are per
    latent element. Sampling without noise (``eta`` 0) has no likelihood, so no KL either. It is asked a step at a time,
    so it needs no more memory than sampling.
    """
    likely = any(bool(rollout.mask.any()) for rollout in rollouts)
    if not likely or not {"step_kl", "reference"} <= policy.capabilities:
        return {}
    steps, samples = [], []
    for rollout in rollouts:
        columns = []
        for asked in in_turn(policy, rollout):
            found = policy.step_log_probs(rollout, asked, kl=True).kl
            assert found is not None
            columns.append(found)
        each = torch.cat(columns, 1)
        steps.append(each[rollout.mask].mean())
        samples.append(torch.where(rollout.mask, each, 0).sum(1))
    return {"step_kl": float(torch.stack(steps).mean()), "sample_kl": float(torch.cat(samples).mean())}


def verdict(evaluation: Evaluation) -> dict[str, Any]:
    """Was the reward over-optimised? ``alarm`` is True when something got clearly worse: its interval leaves out 0.

    That is a measure that was not trained on, the reward itself, a part of it that fell by more than ``MARGIN``, or the
    diversity. A measure without an interval decides nothing. What got clearly better is named too, but for parts.
    """
    alarms, praise = [], []
    for name, measure in evaluation.measures.items():
        change = evaluation.difference(measure)
        if change["ci95"] is None or measure.higher_is_better is None:
            continue
        low, high = change["ci95"] if measure.higher_is_better else [-end for end in reversed(change["ci95"])]
        if high < 0 and _matters(evaluation, name, abs(change["mean"])):
            alarms.append(_moved(evaluation, name, change["mean"]))
        elif low > 0 and not measure.trained_on and "/" not in name:
            praise.append(_moved(evaluation, name, change["mean"]))
    before, after = evaluation.diversity
    if before > 0 and after < 0.8 * before:
        alarms.append(f"diversity fell to {after / before:.0%} of the base model's")
    text = _conclusion(evaluation, alarms)
    if praise:
        text += (" But " if alarms else " And ") + "; ".join(praise) + "."
    return {"alarm": bool(alarms), "text": text}


def _conclusion(evaluation: Evaluation, alarms: Sequence[str]) -> str:
    trained = any(measure.trained_on for measure in evaluation.measures.values())
    judges = [measure for measure in evaluation.measures.values() if not measure.trained_on]
    if alarms:
        rose = evaluation.difference(evaluation.measures[evaluation.main])
        better = (
            rose["mean"] is not None and (rose["mean"] > 0) == evaluation.measures[evaluation.main].higher_is_better
        )
        return ("Over-optimised: " if trained and better else "Clearly worse: ") + "; ".join(alarms) + "."
    if not judges:
        return "No measure was kept out of training, so over-optimisation cannot be ruled out."
    if all(evaluation.difference(measure)["ci95"] is None for measure in judges):
        end = ", so over-optimisation cannot be ruled out." if trained else "."
        return f"There are too few judged prompts for an interval{end}"
    if not trained:
        return "Nothing that was measured got clearly worse."
    return "No sign of over-optimisation: nothing that was measured and not trained on got clearly worse."


def _matters(evaluation: Evaluation, name: str, fall: float) -> bool:
    """Whether a clear fall raises the alarm: of what was optimised always, of others if it is not too small."""
    measure = evaluation.measures[name]
    if name == evaluation.main and measure.trained_on:
        return True
    if measure.tolerance:
        return fall > measure.tolerance
    values = np.concatenate([measure.before[measure.known()], measure.after[measure.known()]])
    fraction = bool((values >= 0).all() and (values <= 1).all())
    margin = MARGIN if measure.trained_on else LEAST
    return fall > margin * (1.0 if fraction else float(np.abs(measure.before[measure.known()]).mean()))


def _moved(evaluation: Evaluation, name: str, change: float) -> str:
    """One measure's change in words."""
    measure = evaluation.measures[name]
    if not measure.trained_on:
        trained = any(other.trained_on for other in evaluation.measures.values())
        what = ", which was not trained on," if trained else ""
    else:
        what = ", the reward itself," if name == evaluation.main else ", a part of the reward,"
    less = "" if measure.higher_is_better is not False else " (less is better)"
    return f"{name}{what} {'fell' if change < 0 else 'rose'} by {abs(change):.3g}{less}"
