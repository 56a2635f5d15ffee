"""What forward-process objectives learn from: finished samples, noised anew at several draws, and how good each was.

Shape legend: ``n`` rows. A row is one (sample, draw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffalign.denoising import denoising_error
from diffalign.lessons import Inputs, Rows, Whole, uniform
from diffalign.objectives import forward_process
from diffalign.objectives.policy_gradient import Metrics
from diffalign.seeds import derive
from diffalign.shadow import Shadow
from diffalign.steps import FEW
from diffalign.types import DenoisingPolicy, Draw, Sample


@dataclass
class Forward(Whole):
    """Is a good sample denoised better than by the weights that sampled, and a bad one worse?"""

    samples: Sequence[Sample]
    advantages: Tensor
    """float32 ``(N,)``."""
    largest: float
    """The most that an advantage can be."""
    old: Shadow | None = None
    """The weights that sampled, where the objective asks them."""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, items: Tensor, inner: int) -> Rows:
        """See Lesson. A sample with advantage 0 is left out, unless it is held to the reference.

        The samples of a prompt share their draws: what the draw does to all of them alike then cancels, as good and bad
        are weighed against each other. The draws of a prompt are spread evenly over the times.
        """
        draws = self.objective.draws or 1
        keys = [self.samples[i].prompt.key for i in items.tolist()]
        names = [(key, k) for k in range(draws) for key in keys]
        within = [uniform(derive(self.seed, "time", self.epoch, inner, *name)) for name in names]
        time = torch.tensor([(k + part) / draws for (_, k), part in zip(names, within, strict=True)])
        seeds = tuple(derive(self.seed, "noise", self.epoch, inner, *name) for name in names)
        rows = Rows(items.repeat(draws), len(names), time=self._times(time), seeds=seeds)
        return rows if self.objective.kl_coefficient else rows.take(self.advantages[rows.items].nonzero()[:, 0])

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson. Policy, old policy and reference: all three at the same draw."""
        samples, draw = [self.samples[i] for i in rows.items.tolist()], rows.draw()
        found = self._residual(samples, draw)
        inputs = {"advantages": self.advantages[rows.items].to(found.device)}
        if self.objective.kl_coefficient:
            inputs["distance"] = forward_process.output_distance(found, self._reference(samples, draw))
        if self.objective.name == "nft":
            policy, old = cast(DenoisingPolicy, self.policy), self._before(samples, draw, found)
            inputs["positive"], inputs["negative"] = forward_process.contrasted(
                policy.clean_error(found, draw), policy.clean_error(old, draw), beta=self.objective.beta or 0.0
            )
            return inputs
        inputs["log_likelihood"] = -denoising_error(found)
        if self.objective.name == "elbo-ppo-clip":
            inputs["old_log_likelihood"] = -denoising_error(self._before(samples, draw, found))
        return inputs

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        rest = dict(inputs)
        distance = rest.pop("distance", None)
        given = self.objective
        if given.name == "nft":
            loss, metrics = forward_process.nft(**rest, beta=given.beta or 0.0, largest=self.largest)
        elif given.name == "elbo-ppo-clip":
            loss, metrics = forward_process.elbo_ppo_clip(
                **rest, clip_range=given.clip_range or 0.0, clip_range_high=given.clip_range_high
            )
        else:
            loss, metrics = forward_process.elbo_reinforce(**rest)
        if distance is not None:
            loss = loss + (given.kl_coefficient or 0.0) * distance
            metrics["kl"] = distance.detach().mean()
        return loss, metrics

    def _residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        return cast(DenoisingPolicy, self.policy).denoising_residual(samples, draw)

    @torch.no_grad()
    def _before(self, samples: Sequence[Sample], draw: Draw, now: Tensor) -> Tensor:
        """What the weights that sampled got wrong; while they are the policy's own, that is what it says now."""
        assert self.old is not None
        if self.old.matches():
            return now.detach()
        with self.old():
            return self._residual(samples, draw)

    @torch.no_grad()
    def _reference(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        with self.policy.reference():
            return self._residual(samples, draw)

    def _few(self) -> Sequence[Sample]:
        return self.samples[:FEW]
