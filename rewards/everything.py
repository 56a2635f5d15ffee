"""The part ``everything`` of the checkers: is a sample right in all that its prompt asks for?"""

from __future__ import annotations

import torch
from torch import Tensor

EVERYTHING = "everything"


def everything(accuracy: Tensor) -> Tensor:
    """1 where the accuracy ``(B,)`` is 1 and 0 below, NaN kept: how GenEval scores an image (Ghosh et al. 2023)."""
    return torch.where(accuracy.isnan(), accuracy, (accuracy == 1).to(accuracy))
