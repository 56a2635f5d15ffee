"""Random weights for small networks of real architectures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scatter(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same names and shapes with values that no layer starts with, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif name.endswith("running_var"):
            found[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            scale = 0.2 if tensor.ndim < 2 else 1 / math.sqrt(tensor[0].numel())
            found[name] = torch.randn(tensor.shape, generator=generator) * scale
    return found
