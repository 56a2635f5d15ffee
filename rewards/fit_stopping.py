"""Training a reward model epoch by epoch until held-out prompts have had enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def until_no_better(
    learned: Sequence[Tensor],
    epochs: int,
    patience: int,
    update: Callable[[int], None],
    loss: Callable[[], float],
) -> tuple[int, list[float]]:
    """Calls ``update`` for epoch 1 and on, until ``loss`` was last at its least ``patience`` epochs ago, or all are
    made; leaves ``learned`` as it was in the best epoch. Returns that epoch, 0 where none was better than the start,
    and the losses, before training and after each epoch.
    """
    losses, best, kept = [loss()], 0, _copies(learned)
    for epoch in range(1, epochs + 1):
        update(epoch)
        losses.append(loss())
        if losses[-1] < min(losses[:-1]):
            best, kept = epoch, _copies(learned)
        if epoch - best >= patience:
            break
    with torch.no_grad():
        for parameter, value in zip(learned, kept, strict=True):
            parameter.copy_(value)
    return best, losses


def _copies(learned: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learned]
