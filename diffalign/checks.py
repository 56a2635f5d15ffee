"""Self-checks: a run that would train wrongly is refused before its first update, with the reason; and the signs of a
run that has diverged.

Shape legend: ``B`` samples, ``S`` steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from diffalign.errors import ConfigError, RefusedError
from diffalign.processes import PATIENCE
from diffalign.steps import in_turn

if TYPE_CHECKING:
    from torch.nn import Parameter

    from diffalign.shadow import Shadow
    from diffalign.types import Policy, Rollout, Scores

log = logging.getLogger(__name__)

RATIO_TOLERANCE = {"fp32": 0.0, "fp16": 2e-3, "bf16": 2e-2}
"""Largest deviation of the on-policy ratio from 1 that a precision explains, in a replay of the rollout's own batch.

The half precisions may deviate by more than an image's clip range of 1e-4: see ``ratio_is_one``.
"""

COMPILED = 1e-5
"""Least that compiled versions of one model may be apart in fp32, in a ratio or an answer: a tenth of the clip range of
images. Measured on a CPU: at most 1.2e-7, one last bit of a log-probability between 1 and 2 (``docs/which.md``)."""

HUGE = 1e4
"""Largest weight of a model that works: they are of the order of 1, and what is wrong grows beyond all bounds."""

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP")
"""Kinds of Accelerate in which no process has the whole model, or that the loop was never tried with."""


def accelerator(*, cpu: bool) -> Accelerator:
    """The processes, and none of Accelerate's own mixed precision, accumulation or sharding beside what is ours."""
    foreign = "set by 'accelerate config' or an ACCELERATE_ variable"
    try:
        found = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    except ValueError as error:
        raise ConfigError(f"a setting of Accelerate, {foreign}, cannot be used here: {error}") from error
    if found.distributed_type.value in SHARDED:
        raise ConfigError(
            f"weights are not divided among processes by {found.distributed_type.value}, {foreign}: turn it off, and"
            " set trainer.shard where a LoRA's model does not fit on one device"
        )
    if found.mixed_precision != "no":
        raise ConfigError(
            f"Accelerate's mixed precision is {found.mixed_precision}, {foreign}: turn it off, and set precision"
            " in the configuration of the run"
        )
    if found.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"Accelerate's gradient accumulation is {found.gradient_accumulation_steps}, {foreign}: turn it off,"
            " and set trainer.micro_batch_size"
        )
    return found


def reward_is_usable(scores: Scores, *, start: bool) -> None:
    """Refuses a reward that is not finite, or, at the start of a run, the same for every sample: neither can teach.

    Later a reward may be the same for every sample because all of them are perfect.
    """
    total = scores.total
    finite = total[total.isfinite()]
    if len(finite) == 0:
        raise RefusedError(
            f"the reward is NaN or infinite for all {len(total)} samples of the epoch; try it with"
            " 'diffalign score' or 'diffalign reward check'"
        )
    if len(finite) < len(total) / 2:
        raise RefusedError(
            f"the reward is NaN or infinite for {len(total) - len(finite)} of {len(total)} samples of the epoch;"
            " see 'diffalign reward check'"
        )
    if start and len(finite) > 1 and float(finite.max() - finite.min()) == 0:
        raise RefusedError(
            f"the reward is constant: {finite[0]:.6g} for all {len(finite)} samples of the epoch, so no sample is"
            " better than another; see 'diffalign reward check'"
        )


def rollout_has_likelihood(rollout: Rollout) -> None:
    """Refuses a rollout without a single step that has a likelihood, or with a log-probability that is not finite."""
    if not bool(rollout.mask.any()):
        raise RefusedError("no sampling step has noise, so none has a likelihood; set sampler.eta above 0")
    if rollout_fault(rollout):
        raise RefusedError(
            "a log-probability of the rollout is not finite: the model's output overflows; try precision fp32"
        )


def rounding(policy: Policy, precision: str) -> float:
    """How far two answers may be apart that are the same by all but rounding.

    Nothing, but where the policy is compiled: with gradient and without, adapters on and off are versions of their own,
    in which sums can be made in another order.
    """
    return max(COMPILED, RATIO_TOLERANCE[precision]) if getattr(policy, "compiled", None) else 0.0


def ratio_is_one(
    policy: Policy, rollout: Rollout, precision: str, clip_range: float | None = None, micro_batch: int | None = None
) -> float:
    """Replays a rollout in the batches it was sampled in, and returns the largest ``|ratio - 1|``.

    In fp32 it must be exactly 0: then latents, guidance, noise and weights are the same in rollout and replay. In half
    precision ``RATIO_TOLERANCE`` is the limit above which a run is refused. A deviation below it, but above the
    ``clip_range`` of the objective, clips steps for their rounding alone, before any update: that is warned of.

    A compiled policy replays once more, with gradient and as many rows as an update has at a time (``micro_batch``):
    that is another version than the one that sampled, and may be ``rounding`` away.
    """
    with torch.no_grad():
        deviation = _deviation(policy, rollout, RATIO_TOLERANCE[precision], precision)
    if allowed := rounding(policy, precision):
        few = rollout.take(torch.arange(micro_batch or len(rollout)) % len(rollout))
        with torch.enable_grad():
            deviation = max(deviation, _deviation(policy, few, allowed, f"{precision}, compiled,"))
    if clip_range is not None and deviation > clip_range:
        log.warning(
            f"rounding in {precision} moves the ratio by up to {deviation:.2g}, more than objective.clip_range"
            f" {clip_range:g}: steps will be clipped that no update has moved; set objective.clip_range above"
            f" {deviation:.2g}, or precision to fp32"
        )
    return deviation


def _deviation(policy: Policy, rollout: Rollout, allowed: float, how: str) -> float:
    """The largest ``|ratio - 1|`` of a replay. Raises RefusedError where it is more than ``allowed``."""
    deviations = []
    for steps in in_turn(policy, rollout):
        replayed = policy.step_log_probs(rollout, steps).log_probs.detach().cpu()
        ratio = (replayed - rollout.log_probs.cpu().gather(1, steps)).double().exp()
        deviations.append(torch.where(rollout.mask.cpu().gather(1, steps), (ratio - 1).abs(), 0.0).max())
    deviation = float(torch.stack(deviations).max())  # unlike Python's max, keeps a NaN
    if not deviation <= allowed:
        raise RefusedError(
            f"replaying the rollout gives other probabilities than sampling it did: |ratio - 1| is {deviation:.3g},"
            f" allowed in {how} is {allowed:g}; the update would follow rounding noise"
        )
    return deviation


def reference_is_base(policy: Policy, ask: Callable[[], Tensor], allowed: float = 0.0) -> None:
    """Before training, the reference (adapters off) must be the policy itself: same question, same answer, to what is
    ``allowed`` (see ``rounding``).
    """
    ours, base = ask(), reference_fingerprint(policy, ask)
    if not (torch.allclose(ours, base, rtol=0.0, atol=allowed) if allowed else torch.equal(ours, base)):
        raise RefusedError(
            "the policy and its reference differ before training: the adapter does not start at zero; load the model"
            " anew, resume the run that trained it, or go on from what 'diffalign merge' makes of it"
        )


def old_is_policy(ask: Callable[[], Tensor], old: Shadow) -> None:
    """Before the first update the weights that sampled must say exactly what the policy says: then the ratio is 1."""
    now = ask()
    with old():
        before = ask()
    if not torch.equal(now, before):
        apart = float((now - before).abs().max())
        raise RefusedError(
            f"asked twice with the same weights, the policy gives two answers, {apart:.3g} apart: the ratio to the"
            " policy that sampled would start at something else than 1"
        )


def reference_fingerprint(policy: Policy, ask: Callable[[], Tensor]) -> Tensor:
    """What the reference answers; it must never change."""
    with policy.reference():
        return ask()


def reference_stays(policy: Policy, ask: Callable[[], Tensor], before: Tensor) -> None:
    """After an update the reference must still say what it said before."""
    if not torch.equal(before, reference_fingerprint(policy, ask)):
        raise RefusedError("the reference moved with the first update: it shares trained weights with the policy")


def gradients_reach(parameters: Mapping[str, Parameter]) -> None:
    """After the first backward pass every trainable parameter must have a gradient, and some must not be zero."""
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        raise RefusedError(
            f"{len(missing)} of {len(parameters)} trainable parameters got no gradient, {missing[0]} first"
        )
    if not any(bool(parameter.grad.any()) for parameter in parameters.values() if parameter.grad is not None):
        raise RefusedError("the gradient of every trainable parameter is zero: nothing would be learned")


def update_fault(loss: float, norm: float, scale: float = 1.0) -> str:
    """Why an update must not be made: its loss or gradient is not finite. Empty if it is.

    While the loss is scaled up (``scale`` above 1, float16 only) a gradient that overflows is no sign of divergence.
    """
    if abs(loss) < float("inf") and (norm < float("inf") or scale > 1):
        return ""
    return f"the loss became {loss:g} with gradient norm {norm:g}"


def rollout_fault(rollout: Rollout) -> str:
    """Why a rollout cannot be trained on: a log-probability is not finite. Empty if all are."""
    finite = rollout.log_probs[rollout.mask].isfinite().all()
    return "" if finite else "the model's samples have log-probabilities that are not finite"


def parameters_fault(parameters: Mapping[str, Parameter]) -> str:
    """Which trained weight is not finite, or so large that it will soon not be. Empty if all are in order."""
    largest = {
        name: float(parameter.detach().abs().max()) for name, parameter in parameters.items() if parameter.numel()
    }
    broken = [name for name, size in largest.items() if not math.isfinite(size)]
    if broken:
        return f"{len(broken)} of {len(parameters)} trained weights are not finite, {broken[0]} first"
    huge = max(largest, key=lambda name: largest[name], default="")
    return f"the trained weight {huge} has grown to {largest[huge]:.3g}" if huge and largest[huge] > HUGE else ""


class Diverged(RefusedError):
    """A run whose updates broke the model."""


def diverged(what: str, learning_rate: float, checkpoint: Path | None) -> Diverged:
    """The error of a run that went wrong, with what to change and what is left of it."""
    left = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return Diverged(
        f"training diverged: {what}. Lower trainer.learning_rate (now {learning_rate:g}) or trainer.max_grad_norm;"
        f" {left}"
    )
