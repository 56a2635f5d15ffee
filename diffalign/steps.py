"""What policy gradients learn from: recorded steps, how likely each is now, and how good was what came of it.

Shape legend: ``N`` samples, ``S`` steps of each, ``n`` rows. A row is one sample at ``K`` of its steps: one at a time
where each step costs a pass of the model (images), all of them where one pass answers for all (texts). A row of the
other lessons is one (sample or pair, draw).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffalign.config import ObjectiveConfig
from diffalign.objectives import policy_gradient
from diffalign.objectives.policy_gradient import Metrics
from diffalign.seeds import derive, permutation
from diffalign.types import Draw, Policy, Rollout, StepLikelihood

Inputs = dict[str, Tensor]
"""What a loss is a function of, each ``(n,)`` or ``(n, K)``, by the names of the objective's arguments."""
FEW = 8
"""Samples that a fingerprint asks about."""


def in_turn(policy: Policy, rollout: Rollout) -> Iterator[Tensor]:
    """All steps of a rollout, int64 ``(B, K)`` at a time: as many as one pass of the model answers for."""
    every = torch.arange(rollout.log_probs.shape[1])
    for steps in every.split(policy.steps_at_once or len(every)):
        yield steps.expand(len(rollout), -1)


@dataclass(frozen=True)
class Rows:
    """Rows to train on."""

    items: Tensor
    """int64 ``(n,)``: which sample or pair of the lesson."""
    count: int
    """What the mean loss is over, rows or steps: those left out because they are 0 count, too."""
    steps: Tensor | None = None
    """int64 ``(n, K)``: which steps, where steps are asked about."""
    time: Tensor | None = None
    """float32 ``(n,)``: how noisy, where whole samples are asked about."""
    seeds: tuple[int, ...] = ()
    extra: Inputs = field(default_factory=dict)
    """What is known before the loss is: part of its inputs."""

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index``, int64."""
        return replace(
            self,
            items=self.items[index],
            steps=None if self.steps is None else self.steps[index],
            time=None if self.time is None else self.time[index],
            seeds=tuple(self.seeds[i] for i in index.tolist()) if self.seeds else (),
            extra={name: values[index] for name, values in self.extra.items()},
        )

    def draw(self) -> Draw:
        """The shared randomness of these rows."""
        assert self.time is not None
        return Draw(self.time, self.seeds)


class Lesson(Protocol):
    """One epoch's experience as an objective sees it."""

    samples_per_row: ClassVar[int]
    """Samples that a row sends through the model: a pair has two."""

    def __len__(self) -> int:
        """Items: samples or pairs."""
        ...

    def items(self, inner: int) -> Tensor:
        """int64: the items of one pass over the experience."""
        ...

    def rows(self, items: Tensor, inner: int) -> Rows:
        """The rows behind one update from these items."""
        ...

    def inputs(self, rows: Rows) -> Inputs:
        """What the loss of the rows is a function of; what the policy says carries gradient."""
        ...

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """Loss ``(n,)`` and detached metrics over all rows of the inputs."""
        ...

    def fingerprint(self) -> Tensor:
        """What the policy says of a few rows, without gradient: inside ``reference()`` it must never change."""
        ...


@dataclass
class Steps:
    """Policy gradients: how likely is each recorded step now, and how good was what came of it?"""

    policy: Policy
    objective: ObjectiveConfig
    seed: int
    epoch: int
    rollout: Rollout
    advantages: Tensor
    """float32 ``(N,)``, or ``(N, S)`` where each step has its own."""
    step_fraction: float = 1.0
    passes: Sequence[Tensor] = ()
    """int64: the samples of each pass over the epoch; a pass beyond the last repeats it. Empty: all, always."""
    samples_per_row: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self.rollout)

    def items(self, inner: int) -> Tensor:
        """See Lesson."""
        return self.passes[min(inner, len(self.passes) - 1)] if self.passes else torch.arange(len(self.rollout))

    def rows(self, items: Tensor, inner: int) -> Rows:
        """For each sample a random share of its steps.

        A row with advantage 0 has loss 0 and gradient 0: without a KL term, leaving it out changes only the time.
        """
        chosen = {sample: self._chosen(sample, inner) for sample in items.tolist()}
        count = sum(map(len, chosen.values()))
        found = self._together(chosen) if self.policy.steps_at_once is None else self._apart(chosen)
        found = replace(found, count=count)
        if self.objective.aggregation != "step-mean":
            own = self.objective.aggregation == "sample-mean"
            shares = {
                sample: count / len(chosen) / (max(1, len(steps)) if own else self.most)
                for sample, steps in chosen.items()
            }
            weights = torch.tensor([shares[sample] for sample in found.items.tolist()], dtype=torch.float32)
            found = replace(found, extra={**found.extra, "weights": weights[:, None]})
        return self._taught(found)

    def _taught(self, rows: Rows) -> Rows:
        """The rows that have something to teach."""
        return rows if self.objective.kl_coefficient else rows.take(self.advantages[rows.items].nonzero()[:, 0])

    @property
    def most(self) -> int:
        """Steps that a sample can have at most, S."""
        return self.rollout.log_probs.shape[1]

    def _chosen(self, sample: int, inner: int) -> list[int]:
        """The steps of a sample that are trained on, in random order."""
        own = self.rollout.mask[sample].nonzero()[:, 0].tolist()
        keep = max(1, round(len(own) * self.step_fraction))
        order = permutation(len(own), derive(self.seed, "steps", self.epoch, inner, sample))[:keep]
        return [own[i] for i in order]

    def _apart(self, chosen: dict[int, list[int]]) -> Rows:
        rows = [sample for sample, steps in chosen.items() for _ in steps]
        steps = torch.tensor([step for own in chosen.values() for step in own], dtype=torch.int64)
        return Rows(torch.tensor(rows, dtype=torch.int64), len(rows), steps[:, None])

    def _together(self, chosen: dict[int, list[int]]) -> Rows:
        kept = torch.zeros((len(chosen), self.most), dtype=torch.bool)
        for row, steps in enumerate(chosen.values()):
            kept[row, steps] = True
        every = torch.arange(self.most).expand(len(chosen), -1)
        return Rows(torch.tensor(list(chosen), dtype=torch.int64), len(chosen), every, extra={"mask": kept})

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        assert rows.steps is not None
        batch = self.rollout.take(rows.items)
        now = self.policy.step_log_probs(batch, rows.steps, kl=self._exact_kl)
        return self._recorded(rows, batch, now)

    @property
    def _exact_kl(self) -> bool:
        return bool(self.objective.kl_coefficient) and self.objective.kl_estimator == "exact"

    @torch.no_grad()
    def _reference(self, batch: Rollout, steps: Tensor) -> Tensor:
        with self.policy.reference():
            return self.policy.step_log_probs(batch, steps).log_probs

    def _recorded(self, rows: Rows, batch: Rollout, now: StepLikelihood) -> Inputs:
        """The answer about some rows, with what was recorded of them."""
        assert rows.steps is not None
        steps = rows.steps
        device = now.log_probs.device
        mask = batch.mask.gather(1, steps.to(batch.mask.device)).to(device)
        advantages = self.advantages[rows.items]
        inputs = {
            "log_probs": now.log_probs,
            "old_log_probs": batch.log_probs.gather(1, steps.to(batch.log_probs.device)).to(device),
            "advantages": (advantages if advantages.ndim == 1 else advantages.gather(1, steps)).to(device),
            "mask": mask & rows.extra["mask"].to(device) if "mask" in rows.extra else mask,
        }
        if "weights" in rows.extra:
            inputs["weights"] = rows.extra["weights"].to(device)
        if now.kl is not None:
            inputs["kl"] = now.kl
        elif self.objective.kl_coefficient:
            reference = self._reference(batch, steps)
            inputs["kl"] = policy_gradient.kl_estimate(now.log_probs, reference, self.objective.kl_estimator or "")
        return inputs

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        kl, weights = inputs.get("kl"), inputs.get("weights")
        rest = {name: values for name, values in inputs.items() if name not in ("kl", "weights")}
        if self.objective.name == "reinforce":
            loss, metrics = policy_gradient.reinforce(**rest)
        else:
            low, high = self.objective.clip_range or 0.0, self.objective.clip_range_high
            loss, metrics = policy_gradient.ppo_clip(**rest, clip_range=low, clip_range_high=high)
        if kl is not None:
            loss = loss + (self.objective.kl_coefficient or 0.0) * kl * inputs["mask"]
            metrics["kl"] = policy_gradient.masked_mean(kl.detach(), inputs["mask"])
        return (loss if weights is None else loss * weights).sum(1), metrics

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """See Lesson: the first steps of the first samples."""
        few = self.rollout.take(torch.arange(min(len(self.rollout), FEW)))
        return self.policy.step_log_probs(few, torch.zeros((len(few), 1), dtype=torch.int64)).log_probs
