"""What moves the weights: AdamW, with its two moments in 32 bits or in 8.

In 8 bits a moment is cut into blocks of 256 numbers, each with a scale of its own (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization"); the arithmetic stays in 32 bits. The package bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from diffalign.config import TrainerConfig
from diffalign.errors import NotFoundError

BLOCK = 256
"""Numbers that share a scale."""
SMALL = 4096
"""Weights of fewer numbers keep moments in 32 bits: there is nothing to save."""


def check(settings: TrainerConfig) -> None:
    """NotFoundError where a package is missing that the optimiser takes."""
    if settings.optimiser == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise NotFoundError(
            "trainer.optimiser adamw-8bit takes the package bitsandbytes, which is not installed; pip install"
            " 'diffalign[memory]'"
        )


def make(settings: TrainerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser over the parameters, with the rate and decay of the settings. Raises as ``check`` does."""
    check(settings)
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(list(parameters), min_8bit_size=SMALL, **options)
    return made


def nbytes(settings: TrainerConfig, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the two moments of these parameters, scales included."""
    total = 0
    for size in (parameter.numel() for parameter in parameters):
        packed = settings.optimiser == "adamw-8bit" and size >= SMALL
        total += 2 * (size + 4 * -(-size // BLOCK) if packed else 4 * size)
    return total
