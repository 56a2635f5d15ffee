"""What an objective learns from one epoch's experience: rows, how likely they are, and the loss of each.

A lesson puts three things together: what was gathered, the question that its objective asks of the policy (how likely
is each recorded step, or the whole sample?), and the pure function that turns the answers into a loss. The training
loop knows nothing else of an algorithm.

Shape legend: ``n`` rows. A row is one (sample, step), or one (sample or pair, draw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from diffalign.config import ObjectiveConfig
from diffalign.denoising import denoising_error
from diffalign.errors import ConfigError
from diffalign.methods import BACKPROP, FORWARD_PROCESS, POLICY_GRADIENT
from diffalign.objectives import preference, supervised
from diffalign.objectives.policy_gradient import Metrics
from diffalign.processes import Processes
from diffalign.seeds import derive, permutation
from diffalign.steps import FEW, Inputs, Lesson, Rows, Steps
from diffalign.types import Capability, DenoisingPolicy, Draw, LikelihoodPolicy, Policy, Preference, Sample

__all__ = ["PAIRWISE", "Comparisons", "Examples", "Inputs", "Lesson", "Rows", "Steps", "Verdicts", "needed"]

PAIRWISE: Mapping[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "dpo": preference.dpo,
    "robust-dpo": preference.robust_dpo,
    "ipo": preference.ipo,
    "hinge": preference.hinge,
}

LATEST = 1 - 2**-24
"""The largest float32 below 1: rounding must not take a time to 1."""


@dataclass
class Whole:
    """What lessons have in common that ask how likely whole samples are, at shared draws of timestep and noise."""

    policy: Policy
    objective: ObjectiveConfig
    seed: int
    epoch: int
    samples_per_row: ClassVar[int] = 1

    def items(self, inner: int) -> Tensor:
        """See Lesson."""
        return torch.arange(len(self))

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, items: Tensor, inner: int) -> Rows:
        """Each item at every draw. Times are stratified over the batch: evenly spread, each uniform in its part."""
        draws = self.objective.draws or 1
        repeated = items.repeat(draws)
        count = len(repeated)
        names = [(item, k) for k in range(draws) for item in items.tolist()]
        within = torch.tensor([uniform(derive(self.seed, "time", self.epoch, inner, *name)) for name in names])
        seeds = tuple(derive(self.seed, "noise", self.epoch, inner, *name) for name in names)
        places = torch.tensor(permutation(count, derive(self.seed, "strata", self.epoch, inner, *items[:1].tolist())))
        return Rows(repeated, count, time=self._times((places + within) / count), seeds=seeds)

    def _times(self, shares: Tensor) -> Tensor:
        """Times ``(n,)`` below 1 at these shares of ``objective.noise_range``."""
        low, high = self.objective.noise_range or (0.0, 1.0)
        return (low + (high - low) * shares).clamp(max=LATEST)

    def _ask(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        return cast(LikelihoodPolicy, self.policy).log_likelihood(samples, draw)

    @torch.no_grad()
    def _ask_reference(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        with self.policy.reference():
            return self._ask(samples, draw)

    def _few(self) -> Sequence[Sample]:
        raise NotImplementedError

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """See Lesson."""
        few = self._few()
        draw = Draw((torch.arange(len(few)) + 0.5) / len(few), tuple(range(len(few))))
        return self._ask(few, draw)


@dataclass
class Comparisons(Whole):
    """Preference objectives: of two samples of one prompt, is the preferred one more likely than it was?"""

    pairs: Sequence[Preference]
    samples_per_row: ClassVar[int] = 2

    def __len__(self) -> int:
        return len(self.pairs)

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson. Policy and reference, winner and loser: all four at the same draw."""
        pairs = [self.pairs[i] for i in rows.items.tolist()]
        samples = [pair.first for pair in pairs] + [pair.second for pair in pairs]
        draw = rows.draw()
        both = Draw(draw.time.repeat(2), draw.seeds * 2)
        reference_first, reference_second = self._ask_reference(samples, both).chunk(2)
        label = torch.tensor([pair.label for pair in pairs], dtype=torch.float32, device=reference_first.device)
        if self.objective.loser_safety is None:
            first, second = self._ask(samples, both).chunk(2)
        else:
            first, second = self._guarded(samples, both, label)
        return {
            "first": first, "second": second, "reference_first": reference_first,
            "reference_second": reference_second, "label": label,
        }  # fmt: skip

    def _guarded(self, samples: Sequence[Sample], draw: Draw, label: Tensor) -> tuple[Tensor, Tensor]:
        residual = cast(DenoisingPolicy, self.policy).denoising_residual(samples, draw)
        first, second = (-denoising_error(residual)).chunk(2)
        one, two = residual.detach().chunk(2)
        won = (label >= 0.5).reshape(-1, *[1] * (one.ndim - 1))
        scale = preference.safe_loser_scale(
            torch.where(won, one, two), torch.where(won, two, one), safety=self.objective.loser_safety or 0.0
        )
        return preference.scale_loser(first, second, label, scale)

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        loss, metrics = _pairwise(self.objective)(**inputs)
        if self.objective.sft_weight:
            weight = self.objective.sft_weight * (self.objective.beta or 0.0)
            term = preference.winner_sft(inputs["first"], inputs["second"], inputs["label"])
            loss = loss + weight * term
            metrics["winner_sft"] = term.detach().mean()
        return loss, metrics

    def _few(self) -> Sequence[Sample]:
        return [sample for pair in self.pairs[: FEW // 2] for sample in (pair.first, pair.second)]


@dataclass
class Verdicts(Whole):
    """KTO: is a good sample more, and a bad one less, likely than is usual?"""

    samples: Sequence[Sample]
    good: Tensor
    """bool ``(N,)``."""
    processes: Processes = field(default_factory=Processes)
    """They share the work of the baseline."""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, items: Tensor, inner: int) -> Rows:
        """See Lesson. The baseline belongs to the whole update, so it is known before its first micro-batch."""
        rows = super().rows(items, inner)
        return replace(rows, extra={"baseline": self._baseline(rows).expand(len(rows))})

    @torch.no_grad()
    def _baseline(self, rows: Rows) -> Tensor:
        """How far the policy has drifted on these rows, each sample under the prompt of another if mismatched."""
        items = rows.items.tolist()
        samples = [self._mismatched(i) if self.objective.baseline == "mismatched" else self.samples[i] for i in items]
        known = torch.zeros(len(rows))
        size = max(1, min(self.policy.batch_size, -(-len(rows) // self.processes.count)))
        chunks = torch.arange(len(rows)).split(size)
        for number in self.processes.own(len(chunks)).tolist():
            chunk = chunks[number]
            few, draw = [samples[i] for i in chunk.tolist()], rows.take(chunk).draw()
            known[chunk] = (self._ask(few, draw) - self._ask_reference(few, draw)).cpu()
        known = self.processes.summed("baseline", known)
        return preference.kto_baseline(known, torch.zeros_like(known))

    def _mismatched(self, item: int) -> Sample:
        """The sample with the prompt of the next one, among all of the epoch, that has another."""
        sample, count = self.samples[item], len(self.samples)
        others = (self.samples[(item + k) % count].prompt for k in range(1, count))
        other = next((prompt for prompt in others if prompt.key != sample.prompt.key), None)
        if other is None:
            raise ConfigError(
                "kto's mismatched baseline needs two prompts in an epoch at least: raise trainer.samples_per_epoch, or"
                " set objective.baseline to batch"
            )
        return replace(sample, prompt=other)

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        samples, draw = [self.samples[i] for i in rows.items.tolist()], rows.draw()
        reference = self._ask_reference(samples, draw)
        return {
            "log_likelihood": self._ask(samples, draw),
            "reference": reference,
            "desirable": self.good[rows.items].to(reference.device),
            "baseline": rows.extra["baseline"].to(reference.device),
        }

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        given = self.objective
        return preference.kto(
            inputs["log_likelihood"], inputs["reference"], inputs["desirable"], inputs["baseline"][0],
            beta=given.beta or 0.0, desirable_weight=given.desirable_weight or 0.0,
            undesirable_weight=given.undesirable_weight or 0.0,
        )  # fmt: skip

    def _few(self) -> Sequence[Sample]:
        return self.samples[:FEW]


@dataclass
class Examples(Whole):
    """Supervised objectives: make these samples more likely, all alike or the better ones more."""

    samples: Sequence[Sample]
    passes: Sequence[Tensor] = ()
    """int64: the samples of each pass over the epoch; a pass beyond the last repeats it. Empty: all, always."""
    advantages: Tensor | None = None
    """float32 ``(N,)``: weights the samples (``reward-weighted``); NaN is a failed judgement, of weight 0."""

    def __len__(self) -> int:
        return len(self.samples)

    def items(self, inner: int) -> Tensor:
        """See Lesson."""
        return self.passes[min(inner, len(self.passes) - 1)] if self.passes else super().items(inner)

    def rows(self, items: Tensor, inner: int) -> Rows:
        """See Lesson. Weights are relative to the whole update, so they are known before its first micro-batch."""
        rows = super().rows(items, inner)
        if self.advantages is None:
            return rows
        weights = supervised.exponential_weights(
            self.advantages[rows.items], temperature=self.objective.temperature or 1.0
        )
        # A row of weight 0 has loss 0 and gradient 0: leaving it out changes only the time.
        return replace(rows, extra={"weights": weights}).take(weights.nonzero()[:, 0])

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        asked = self._ask([self.samples[i] for i in rows.items.tolist()], rows.draw())
        return {"log_likelihood": asked} | {name: values.to(asked.device) for name, values in rows.extra.items()}

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        if self.advantages is None:
            return supervised.sft(**inputs)
        loss, metrics = supervised.weighted(**inputs)
        # A sample has as many rows as draws, all of one weight.
        metrics["effective_samples"] = metrics["effective_samples"] / (self.objective.draws or 1)
        return loss, metrics

    def _few(self) -> Sequence[Sample]:
        return self.samples[:FEW]


def needed(objective: ObjectiveConfig) -> frozenset[Capability]:
    """What a policy must be able to do for an objective."""
    found: set[Capability] = {"log_likelihood"}
    if objective.name in POLICY_GRADIENT:
        found = {"step_log_probs"}
        if objective.ptx_coefficient:
            found.add("log_likelihood")
        if objective.kl_coefficient:
            found |= {"step_kl", "reference"} if objective.kl_estimator == "exact" else {"reference"}
    elif objective.name in BACKPROP:
        found = {"differentiable_sampling", "reference"} if objective.kl_coefficient else {"differentiable_sampling"}
    elif objective.name in FORWARD_PROCESS:
        found = {"denoising_residual", "reference"} if objective.kl_coefficient else {"denoising_residual"}
    elif objective.name not in ("sft", "reward-weighted"):
        found.add("reference")
        if objective.loser_safety is not None:
            found.add("denoising_residual")
    return frozenset(found)


def _pairwise(objective: ObjectiveConfig) -> Callable[..., tuple[Tensor, Metrics]]:
    own: dict[str, float] = {"beta": objective.beta or 0.0}
    if objective.name == "dpo":
        own["label_smoothing"] = objective.label_smoothing or 0.0
    elif objective.name == "robust-dpo":
        own["flip_probability"] = objective.flip_probability or 0.0
    return partial(PAIRWISE[objective.name], **own)


def uniform(seed: int) -> float:
    """A number in [0, 1) that the seed stands for."""
    return (seed >> 10) / 2.0**53
