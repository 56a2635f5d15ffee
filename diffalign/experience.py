"""Where batches come from: fresh samples and what was said of them, or what was recorded before.

A source gathers one epoch's experience. What it gathers is one of five things, and each kind of objective learns from
some of them: ``Scored`` (samples with their trajectories and scores), ``Chosen`` (the best of such samples), ``Paired``
(preferences), ``Judged`` (good or bad), ``Shown`` (samples to imitate).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffalign import checks, credit, overlap, shares
from diffalign.config import TrainerConfig
from diffalign.errors import ConfigError, InputError
from diffalign.processes import Processes
from diffalign.seeds import derive, permutation
from diffalign.types import Modality, Preference, Prompt, Reward, Rollout, Sample, Scores

Judge = Callable[[Sequence[tuple[Sample, Sample]], int], Sequence[Preference]]
"""Says which sample of each pair is better, from a seed."""
Each = Callable[[int, Sequence[Sample]], None]
"""What is done with each batch of samples, by its number."""


@dataclass(frozen=True)
class Scored:
    """Fresh samples, how they came about, and what a reward says of them."""

    rollout: Rollout
    scores: Scores


@dataclass(frozen=True)
class Paired:
    """Preferences between two samples of one prompt."""

    preferences: Sequence[Preference]


@dataclass(frozen=True)
class Judged:
    """Samples that are good, or not, each by itself."""

    samples: Sequence[Sample]
    good: Tensor
    """bool ``(N,)``."""


@dataclass(frozen=True)
class Shown:
    """Samples to imitate."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Chosen:
    """Fresh samples, how they came about, and which of them to imitate."""

    rollout: Rollout
    passes: Sequence[Tensor]
    """int64: which of them are imitated in each pass over the epoch."""


Experience = Scored | Chosen | Paired | Judged | Shown


@dataclass(frozen=True)
class Gathered:
    """One epoch's experience, and what there is to log about it."""

    experience: Experience
    metrics: Mapping[str, float] = field(default_factory=dict)


class Sampler(Protocol):
    """Makes samples under the current policy."""

    def __call__(self, prompts: Sequence[Prompt], each: Each | None = None) -> Rollout:
        """One of each prompt. ``each`` is given every batch by number as soon as it is there, where it was made."""
        ...


@dataclass(frozen=True)
class Epoch:
    """What a source may use of the training loop."""

    number: int
    """Epochs done before this one."""
    seed: int
    """Of the run."""
    settings: TrainerConfig
    sample: Sampler
    """One sample for each prompt under the current policy."""
    first: bool
    """Whether no update has been made yet."""
    score: Callable[[Reward, Sequence[Sample]], Scores] = lambda reward, samples: reward(samples)
    """What a reward says of samples; where there are several processes, each asks it about its share."""
    together: Callable[[Mapping[int, Scores]], Scores] = lambda own: shares.scores_of_batches(Processes(), own)
    """The scores of all samples, of those of batches by number; where there are several processes, of everybody's."""

    def picked(self, count: int, available: int, name: str) -> list[int]:
        """The next ``count`` numbers of an endless sequence of shuffles of those below ``available``."""
        found, first = [], self.number * count
        orders: dict[int, list[int]] = {}
        for i in range(first, first + count):
            cycle, place = divmod(i, available)
            if cycle not in orders:
                orders[cycle] = permutation(available, derive(self.seed, name, cycle))
            found.append(orders[cycle][place])
        return found


class Source(Protocol):
    """Where batches come from."""

    name: str
    modality: Modality

    def gather(self, epoch: Epoch) -> Gathered:
        """The experience of one epoch. It depends on the epoch's number, the seed and the policy alone."""
        ...


class Rollouts:
    """Fresh samples of the policy, scored by a reward: what policy gradients and reward weighting learn from."""

    name = "rollouts"

    def __init__(self, reward: Reward, prompts: Sequence[Prompt]) -> None:
        if not hasattr(reward, "modality"):
            raise ConfigError(
                f"{getattr(reward, '__name__', type(reward).__name__)} does not say what it judges (modality), so it is"
                " no reward; rewards.load_reward makes one of any function"
            )
        self.reward, self.prompts, self.modality = reward, list(prompts), reward.modality

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        scored, metrics = self._scored(epoch)
        return Gathered(scored, metrics)

    def sampled(self, epoch: Epoch) -> Rollout:
        """An epoch's samples, ``samples_per_prompt`` of each of its prompts."""
        return _sampled(epoch, self.prompts)

    def _scored(self, epoch: Epoch) -> tuple[Scored, dict[str, float]]:
        """Samples and their scores; a reward that waits for a server is asked while the next batch is made."""
        started = time.perf_counter()
        if overlap.waits(self.reward):
            with overlap.Overlap(self.reward) as asking:
                rollout = _sampled(epoch, self.prompts, asking.ask)
                sampled = time.perf_counter()
                scores = epoch.together(asking.scores())
        else:
            rollout = self.sampled(epoch)
            sampled = time.perf_counter()
            scores = epoch.score(self.reward, rollout.samples)
        checks.reward_is_usable(scores, start=epoch.first)
        times = {"time/sample": sampled - started, "time/reward": time.perf_counter() - sampled}
        return Scored(rollout, scores), reward_metrics(scores) | times


class BestOfN(Rollouts):
    """The best fresh samples of each prompt, to be imitated: RAFT, or ReST with a threshold that rises.

    An epoch samples ``samples_per_prompt`` of each prompt. Its first pass imitates the best ``keep[0]`` of them, its
    second the best ``keep[1]``, and so on (Gulcehre et al. 2023, "Reinforced self-training"; with one pass, Dong et al.
    2023, "RAFT"). The threshold is a rank within the prompt, so that an easy prompt does not push out a hard one.
    Samples that score the same share their rank: where all do, none is better, and none of them is imitated.
    """

    name = "best-of-n"

    def __init__(self, reward: Reward, prompts: Sequence[Prompt], keep: Sequence[float] = (0.5, 0.25)) -> None:
        super().__init__(reward, prompts)
        self.keep = list(keep)

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        scored, metrics = self._scored(epoch)
        samples = scored.rollout.samples
        better = oriented(self.reward, scored.scores.total)
        passes = [_best(better, samples, share) for share in self.keep]
        metrics["experience/kept"] = len(passes[0]) / len(samples)
        if len(passes[0]):
            metrics["experience/kept_reward"] = float(scored.scores.total[passes[0]].mean())
        return Gathered(Chosen(scored.rollout, passes), metrics)


class OnlinePairs(Rollouts):
    """Pairs made of fresh samples: the best and the worst of each prompt by a reward (online DPO).

    Guo et al. 2024, "Direct language model alignment from online AI feedback". Samples that score the same make no
    pair: a tie has no winner.
    """

    name = "online-pairs"

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        scored, metrics = self._scored(epoch)
        better = oriented(self.reward, scored.scores.total)
        pairs = []
        for index in _groups(scored.rollout.samples):
            own = better[index]
            known = own.isfinite()
            if not bool(known.any()) or float(own[known].max()) == float(own[known].min()):
                continue
            high = index[int(torch.where(known, own, -torch.inf).argmax())]
            low = index[int(torch.where(known, own, torch.inf).argmin())]
            first, second = scored.rollout.samples[high], scored.rollout.samples[low]
            pairs.append(Preference(first.prompt, first, second, 1.0, provenance={"judge": self.reward.name}))
        metrics["experience/pairs"] = len(pairs)
        return Gathered(Paired(pairs), metrics)


class JudgedPairs:
    """Pairs made of fresh samples, each prompt's first with its second and so on, judged by anyone who can."""

    name = "online-pairs"

    def __init__(self, judge: Judge, prompts: Sequence[Prompt], modality: Modality = "image") -> None:
        self.judge, self.prompts, self.modality = judge, list(prompts), modality

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        started = time.perf_counter()
        rollout = _sampled(epoch, self.prompts)
        sampled = time.perf_counter()
        pairs = [
            (rollout.samples[index[k]], rollout.samples[index[k + 1]])
            for index in _groups(rollout.samples)
            for k in range(0, len(index) - 1, 2)
        ]
        preferences = self.judge(pairs, derive(epoch.seed, "judge", epoch.number))
        metrics = {"time/sample": sampled - started, "time/reward": time.perf_counter() - sampled}
        return Gathered(Paired(preferences), metrics | {"experience/pairs": len(preferences)})


class Numbered(Protocol):
    """Preferences by number, such as a list or a file."""

    def __getitem__(self, index: int, /) -> Preference:
        """The preference of this number."""
        ...


class RecordedPairs:
    """Preferences that were recorded before the run, an epoch's share at a time."""

    name = "pairs"

    def __init__(self, table: Numbered, rows: Sequence[int], modality: Modality = "image") -> None:
        """``rows`` are the numbers of the pairs to train on; the others are held out."""
        if not rows:
            raise InputError("there is no preference to train on")
        self.table, self.train, self.modality = table, list(rows), modality

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        picked = epoch.picked(epoch.settings.samples_per_epoch, len(self.train), "pairs")
        numbers = [self.train[i] for i in picked]
        # In the file's own order: rows that stand together are read together.
        read = {number: self.table[number] for number in sorted(set(numbers))}
        return Gathered(Paired([read[number] for number in numbers]), {"experience/pairs": len(numbers)})


class Recorded:
    """Samples that were recorded before the run: with labels good or bad, or all of them to imitate."""

    def __init__(
        self, samples: Sequence[Sample], good: Sequence[bool] | None = None, modality: Modality = "image"
    ) -> None:
        if not samples:
            raise InputError("there is no sample to train on")
        if good is not None and len(set(good)) < 2:
            advice = "; imitate good samples with objective sft and source demonstrations" if good[0] else ""
            raise InputError(
                f"all {len(good)} labels are {'good' if good[0] else 'bad'}: there is nothing to tell apart{advice}"
            )
        self.name = "demonstrations" if good is None else "labels"
        self.samples, self.good, self.modality = samples, good, modality

    def gather(self, epoch: Epoch) -> Gathered:
        """See Source."""
        picked = epoch.picked(epoch.settings.samples_per_epoch, len(self.samples), "samples")
        read = {i: self.samples[i] for i in sorted(set(picked))}
        samples = [read[i] for i in picked]
        if self.good is None:
            return Gathered(Shown(samples))
        good = torch.tensor([self.good[i] for i in picked])
        return Gathered(Judged(samples, good), {"experience/good": float(good.float().mean())})


def judged(preferences: Sequence[Preference]) -> Judged:
    """Both sides of each pair as labels, winners good and losers bad; ties say nothing of either and are left out."""
    decided = [pair for pair in preferences if pair.label != 0.5]
    samples = [sample for pair in decided for sample in (pair.first, pair.second)]
    good = [value for pair in decided for value in (pair.label > 0.5, pair.label < 0.5)]
    return Judged(samples, torch.tensor(good, dtype=torch.bool))


def winners(preferences: Sequence[Preference]) -> Shown:
    """The preferred sample of each pair; a tie has none."""
    return Shown([pair.first if pair.label > 0.5 else pair.second for pair in preferences if pair.label != 0.5])


def oriented(reward: Reward, total: Tensor) -> Tensor:
    """Scores float32 ``(N,)`` on the CPU, turned so that more is better."""
    return total.float().cpu() if reward.higher_is_better else -total.float().cpu()


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Means, spread and failures of an epoch's scores."""
    metrics = {}
    for name, values in {"total": scores.total, **scores.parts}.items():
        known = values[values.isfinite()]
        if len(known):
            metrics[f"reward/{name}"] = float(known.mean())
    known = scores.total[scores.total.isfinite()]
    metrics["reward/std"] = float(known.std(correction=0))
    metrics["reward/failed"] = float(len(scores.total) - len(known))
    return metrics


def _sampled(epoch: Epoch, prompts: Sequence[Prompt], each: Each | None = None) -> Rollout:
    count, repeats = epoch.settings.samples_per_epoch, epoch.settings.samples_per_prompt
    picked = epoch.picked(count // repeats, len(prompts), "prompts")
    return epoch.sample([prompts[i] for i in picked for _ in range(repeats)], each)


def _groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Numbers of the samples of each prompt."""
    return [own.tolist() for own in credit.groups([sample.prompt.key for sample in samples]).values()]


def _best(scores: Tensor, samples: Sequence[Sample], share: float) -> Tensor:
    """int64: the best share of each prompt's samples, at least one; none where all score the same or failed."""
    kept = []
    for index in _groups(samples):
        known = [i for i in index if bool(scores[i].isfinite())]
        ranked = sorted(known, key=lambda i: -float(scores[i]))
        if not ranked or float(scores[ranked[0]]) == float(scores[ranked[-1]]):
            continue
        least = float(scores[ranked[max(1, round(share * len(ranked))) - 1]])
        kept += [i for i in ranked if float(scores[i]) >= least and float(scores[i]) > float(scores[ranked[-1]])]
    return torch.tensor(sorted(kept), dtype=torch.int64)
