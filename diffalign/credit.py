"""From scores to advantages.

Shape legend: ``N`` samples of an epoch. A score that is NaN or infinite (a failed judgement) has advantage 0 and counts
in no statistic. Scores that are all the same get advantage exactly 0: statistics are float64, and rounding must not
become a signal. Standard deviations are population ones. Every rule returns float32 ``(N,)``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

EPSILON = 1e-6


def batch(scores: Tensor, keys: Sequence[str]) -> Tensor:
    """Standardised over all samples of the epoch."""
    return _standardised(scores, scores)


def group(scores: Tensor, keys: Sequence[str]) -> Tensor:
    """Standardised within the samples of one prompt (GRPO, Shao et al. 2024, eq. in 4.1.2).

    A prompt whose samples all score the same teaches nothing: its advantages are 0.
    """
    return _per_group(scores, keys, lambda own: _standardised(own, own))


def group_mean(scores: Tensor, keys: Sequence[str]) -> Tensor:
    """Each score minus the mean of its prompt (Dr. GRPO, Liu et al. 2025).

    Not divided by a deviation: a prompt that is nearly solved does not count more than one that is half solved.
    """

    def rule(own: Tensor) -> Tensor:
        known = own[own.isfinite()].double()
        if _all_the_same(known):
            return torch.zeros_like(own, dtype=torch.float32)
        return torch.where(own.isfinite(), own - known.mean(), 0.0).float()

    return _per_group(scores, keys, rule)


def leave_one_out(scores: Tensor, keys: Sequence[str]) -> Tensor:
    """Each score minus the mean of the *other* samples of its prompt (RLOO, Kool et al. 2019; Ahmadian et al. 2024).

    Not divided by a deviation: unbiased. A prompt with a single sample gets 0.
    """

    def rule(own: Tensor) -> Tensor:
        known = own[own.isfinite()].double()
        if _all_the_same(known):
            return torch.zeros_like(own, dtype=torch.float32)
        others = (known.sum() - own.double()) / (len(known) - 1)
        return torch.where(own.isfinite(), own - others, 0.0).float()

    return _per_group(scores, keys, rule)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each step, float32 ``(N, S)``: generalised advantage estimation.

    ``A_s = sum_k (discount trace)^k d_(s+k)`` with ``d_s = r_s + discount V_(s+1) - V_s`` (Schulman et al. 2016, eq.
    16); returns are ``A + V``. ``rewards`` and ``values`` are ``(N, S)``. Where ``mask`` is False there is no step:
    what follows it follows what went before it, and both results are 0.
    """
    advantages = torch.zeros_like(values)
    later, expected = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        real = mask[:, step]
        surprise = rewards[:, step] + discount * expected - values[:, step]
        later = torch.where(real, surprise + discount * trace * later, later)
        expected = torch.where(real, values[:, step], expected)
        advantages[:, step] = torch.where(real, later, 0.0)
    return advantages, (advantages + values) * mask


def whitened(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values of deviation 1 where ``mask`` is True, and 0 elsewhere; their mean is 0, or kept without ``shift_mean``.

    The variance is the unbiased one. Values that are all the same become their mean, or 0.
    """
    known = values[mask].double()
    if len(known) == 0:
        return torch.zeros_like(values)
    mean = known.mean()
    variance = known.var() if len(known) > 1 else torch.zeros_like(mean)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0).float()


class AdaptiveKL:
    """The weight of a KL penalty, steered towards a target (Ziegler et al. 2019, section 2.2).

    After an epoch of ``count`` samples that drifted by ``kl`` nats each, the weight is multiplied by
    ``1 + clip(kl / target - 1, -0.2, 0.2) count / horizon``.
    """

    def __init__(self, weight: float, target: float | None, horizon: int) -> None:
        self.weight, self.target, self.horizon = weight, target, horizon

    def update(self, kl: float, count: int) -> None:
        """Steers by what was measured; without a target the weight stays."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.weight *= 1 + error * count / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The weight."""
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes the weight of ``state_dict``."""
        self.weight = float(state["weight"])


class PerPromptStatistics:
    """DDPO's tracker: each prompt's scores are standardised by the last scores of that prompt.

    Black et al. 2023, section 5.1. While a prompt has fewer than ``min_count`` scores, the epoch's statistics stand in.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def __call__(self, scores: Tensor, keys: Sequence[str]) -> Tensor:
        """Adds the scores to the buffers, then standardises them."""
        for score, key in zip(scores.tolist(), keys, strict=True):
            if math.isfinite(score):
                self.buffers.setdefault(key, deque(maxlen=self.buffer_size)).append(score)
        advantages = torch.empty_like(scores, dtype=torch.float32)
        for key, index in groups(keys).items():
            buffer = self.buffers.get(key, ())
            known = scores if len(buffer) < self.min_count else torch.tensor(list(buffer), dtype=torch.float64)
            advantages[index] = _standardised(scores[index], known)
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        """The buffers, as plain data."""
        return {key: list(buffer) for key, buffer in self.buffers.items()}

    def load_state_dict(self, state: dict[str, Iterable[float]]) -> None:
        """Takes the buffers of ``state_dict``."""
        self.buffers = {key: deque(values, maxlen=self.buffer_size) for key, values in state.items()}


def _standardised(scores: Tensor, known: Tensor) -> Tensor:
    known = known[known.isfinite()].double()
    if _all_the_same(known):
        return torch.zeros_like(scores, dtype=torch.float32)
    standardised = (scores.double() - known.mean()) / (known.std(correction=0) + EPSILON)
    return torch.where(scores.isfinite(), standardised, 0.0).float()


def _all_the_same(known: Tensor) -> bool:
    """Also of one score, or none."""
    return len(known) < 2 or bool(known.max() == known.min())


def groups(keys: Sequence[str]) -> dict[str, Tensor]:
    """int64: which places each key stands at, keys in the order of their first."""
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return {key: torch.tensor(index) for key, index in rows.items()}


def _per_group(scores: Tensor, keys: Sequence[str], rule: Callable[[Tensor], Tensor]) -> Tensor:
    advantages = torch.empty_like(scores, dtype=torch.float32)
    for index in groups(keys).values():
        advantages[index] = rule(scores[index])
    return advantages
