"""Arithmetic on tokens and their logits.

Shape legend: ``B`` samples, ``T`` tokens, ``K`` steps asked about, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[list[int]], filler: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor, int64, and which of it is no filler, bool, both ``(B, longest)``."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), filler)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[i, place] = torch.tensor(row)
        mask[i, place] = True
    return tokens, mask


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def kl_of(own: Tensor, reference: Tensor) -> Tensor:
    """KL ``(B, T)`` of distributions given by their log-probabilities ``(B, T, V)``."""
    return (own.exp() * (own - reference)).sum(-1)


def inverted(logits: Tensor, chance: Tensor) -> Tensor:
    """int64 ``(B,)``: the tokens at which the cumulated probabilities ``(B, V)`` pass the chances in [0, 1)."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulated, chance[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities ``(B, T)`` of the tokens, without a second tensor of the logits' size."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def at(values: Tensor, steps: Tensor) -> Tensor:
    """``values (B, T)`` at steps ``(B, K)``; 0 at those beyond T, which are padding."""
    beyond = steps >= values.shape[1]
    return values.gather(1, steps.clamp(max=values.shape[1] - 1)).masked_fill(beyond, 0.0)
