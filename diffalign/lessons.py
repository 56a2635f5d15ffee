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
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from diffalign.config import ObjectiveConfig
from diffalign.denoising import denoising_error
from diffalign.errors import ConfigError
from diffalign.methods import POLICY_GRADIENT
from diffalign.objectives import policy_gradient, preference, supervised
from diffalign.objectives.policy_gradient import Metrics
from diffalign.seeds import derive, permutation
from diffalign.types import Capability, Draw, LikelihoodPolicy, Policy, Preference, Rollout, Sample

Inputs = dict[str, Tensor]
"""What a loss is a function of, each ``(n,)`` or ``(n, 1)``, by the names of the objective's arguments."""


PAIRWISE: Mapping[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "dpo": preference.dpo,
    "robust-dpo": preference.robust_dpo,
    "ipo": preference.ipo,
    "hinge": preference.hinge,
}
FEW = 8
"""Samples that a fingerprint asks about."""


@dataclass(frozen=True)
class Rows:
    """Rows to train on."""

    items: Tensor
    """int64 ``(n,)``: which sample or pair of the lesson."""
    count: int
    """Rows that the mean loss is over: those left out because they are 0 count, too."""
    steps: Tensor | None = None
    """int64 ``(n,)``: which step, where steps are asked about."""
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
    """float32 ``(N,)``."""
    step_fraction: float = 1.0
    samples_per_row: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self.rollout)

    def items(self, inner: int) -> Tensor:
        """See Lesson."""
        return torch.arange(len(self.rollout))

    def rows(self, items: Tensor, inner: int) -> Rows:
        """For each sample a random share of its steps, in random order.

        A row with advantage 0 has loss 0 and gradient 0: without a KL term, leaving it out changes only the time.
        """
        rows, steps = [], []
        for sample in items.tolist():
            own = self.rollout.mask[sample].nonzero()[:, 0].tolist()
            keep = max(1, round(len(own) * self.step_fraction))
            order = permutation(len(own), derive(self.seed, "steps", self.epoch, inner, sample))[:keep]
            steps += [own[i] for i in order]
            rows += [sample] * len(order)
        found = Rows(torch.tensor(rows, dtype=torch.int64), len(rows), torch.tensor(steps, dtype=torch.int64))
        return found if self.objective.kl_coefficient else found.take(self.advantages[found.items].nonzero()[:, 0])

    def inputs(self, rows: Rows) -> Inputs:
        """See Lesson."""
        assert rows.steps is not None
        steps, batch = rows.steps[:, None], self.rollout.take(rows.items)
        now = self.policy.step_log_probs(batch, steps, kl=bool(self.objective.kl_coefficient))
        device = now.log_probs.device
        inputs = {
            "log_probs": now.log_probs,
            "old_log_probs": batch.log_probs.gather(1, steps).to(device),
            "advantages": self.advantages[rows.items].to(device),
            "mask": batch.mask.gather(1, steps).to(device),
        }
        return inputs if now.kl is None else inputs | {"kl": now.kl}

    def loss(self, inputs: Inputs) -> tuple[Tensor, Metrics]:
        """See Lesson."""
        kl, rest = inputs.get("kl"), {name: values for name, values in inputs.items() if name != "kl"}
        if self.objective.name == "reinforce":
            loss, metrics = policy_gradient.reinforce(**rest)
        else:
            loss, metrics = policy_gradient.ppo_clip(**rest, clip_range=self.objective.clip_range or 0.0)
        if kl is not None:
            loss = loss + (self.objective.kl_coefficient or 0.0) * kl * inputs["mask"]
            metrics["kl"] = policy_gradient.masked_mean(kl.detach(), inputs["mask"])
        return loss[:, 0], metrics

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """See Lesson: the first steps of the first samples."""
        few = self.rollout.take(torch.arange(min(len(self.rollout), FEW)))
        return self.policy.step_log_probs(few, torch.zeros((len(few), 1), dtype=torch.int64)).log_probs


@dataclass
class _Whole:
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
        """Each item at every draw. Times are stratified over the batch: evenly spread, each one uniform in [0, 1)."""
        draws = self.objective.draws or 1
        repeated = items.repeat(draws)
        count = len(repeated)
        names = [(item, k) for k in range(draws) for item in items.tolist()]
        within = torch.tensor([_uniform(derive(self.seed, "time", self.epoch, inner, *name)) for name in names])
        seeds = tuple(derive(self.seed, "noise", self.epoch, inner, *name) for name in names)
        places = torch.tensor(permutation(count, derive(self.seed, "strata", self.epoch, inner, *items[:1].tolist())))
        time = ((places + within) / count).clamp(max=1 - 2**-24)  # rounding must not reach 1
        return Rows(repeated, count, time=time, seeds=seeds)

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
class Comparisons(_Whole):
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
        residual = cast(LikelihoodPolicy, self.policy).denoising_residual(samples, draw)
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
class Verdicts(_Whole):
    """KTO: is a good sample more, and a bad one less, likely than is usual?"""

    samples: Sequence[Sample]
    good: Tensor
    """bool ``(N,)``."""

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
        drift = []
        for chunk in torch.arange(len(rows)).split(self.policy.batch_size):
            few, draw = [samples[i] for i in chunk.tolist()], rows.take(chunk).draw()
            drift.append(self._ask(few, draw) - self._ask_reference(few, draw))
        known = torch.cat(drift)
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
class Examples(_Whole):
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
        return replace(rows, extra={"weights": weights})

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
        if objective.kl_coefficient:
            found |= {"step_kl", "reference"}
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


def _uniform(seed: int) -> float:
    """A number in [0, 1) that the seed stands for."""
    return (seed >> 10) / 2.0**53
