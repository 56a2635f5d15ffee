"""A scripted loss: it says when training ends, and which weights are left."""

from __future__ import annotations

import pytest
import torch

from rewards.fit_stopping import until_no_better


@pytest.mark.parametrize(
    ("script", "patience", "best", "seen"),
    [
        ([5.0, 4, 3, 3.5, 3.2, 1], 2, 2, 5),  # two epochs after the best of them, and the 1 is never reached
        ([5.0, 4, 3, 3.5, 2, 1], 2, 5, 6),  # one worse epoch is forgiven
        ([5.0, 6, 7, 1], 1, 0, 2),  # none was better than the start
        ([5.0, 5, 5, 5], 3, 0, 4),  # as good is no better
        ([5.0, float("nan"), 3], 2, 2, 3),  # an epoch whose loss is no number is not the best
    ],
)
def test_training_ends_and_leaves_the_best(script: list[float], patience: int, best: int, seen: int) -> None:
    """The weight is the number of epochs that have changed it."""
    weight = torch.zeros(1, requires_grad=True)
    losses = iter(script)

    def update(epoch: int) -> None:
        with torch.no_grad():
            weight.add_(1)
        assert weight.item() == epoch

    found = until_no_better([weight], len(script) - 1, patience, update, lambda: next(losses))
    assert found[0] == best and weight.item() == best
    assert len(found[1]) == seen and found[1][0] == 5
