"""What a language model keeps of a text that it has read, so that texts with the same beginning read it once.

Shape legend: ``U`` texts that were read, ``B`` texts that go on from them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

FEWEST, PIECES = 16, 4
"""Rows that a pass has at least, and passes at most, where rows of one length are asked about together."""


@dataclass(frozen=True)
class Beginnings:
    """Prompts as a batch of different ones, and which of them each row has."""

    tokens: Tensor
    """int64 ``(U, longest)``, padded on the left."""
    real: Tensor
    """bool ``(U, longest)``: what is no padding."""
    own: Tensor
    """int64 ``(B,)``."""

    def repeats(self) -> bool:
        """Whether two rows have one prompt."""
        return len(self.own) > len(self.tokens)


def can_be_shared(cache: object) -> bool:
    """Whether a model's memory is plain keys and values of every token, whose rows can be picked and repeated."""
    layers = getattr(cache, "layers", None)
    return type(cache) is DynamicCache and bool(layers) and all(type(layer) is DynamicLayer for layer in layers or ())


def picked(cache: Any, rows: Tensor) -> Any:
    """The memory of these rows, int64, each as often as it stands there; the gradient goes through, and the memory
    that is given stays as it is.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows)
    return found


def of_one_length(lengths: Tensor) -> list[Tensor]:
    """Row numbers, int64, in groups of similar lengths ``(B,)``: what a pass pads is cut at its own longest.

    One group where sorting would not save a tenth.
    """
    count = min(PIECES, len(lengths) // FEWEST)
    if count > 1:
        groups = list(lengths.argsort(stable=True).tensor_split(count))
        padded = sum(len(group) * int(lengths[group[-1]]) for group in groups)
        if padded < 0.9 * len(lengths) * int(lengths.max()):
            return groups
    return [torch.arange(len(lengths), device=lengths.device)]


@contextmanager
def folded(model: nn.Module) -> Iterator[bool]:
    """Low-rank adapters added into the weights they adapt, one product in place of three, and taken back as they were.

    Yields whether that was done: only of float32 weights, where it changes nothing beyond rounding, and of none that
    another layer uses too, as a head that is tied to the embedding. Inside, adapters that are not switched off count
    twice.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    weights = [layer.get_base_layer().weight for layer in adapters if isinstance(layer, Linear)]
    if len(weights) < len(adapters) or any(w.dtype != torch.float32 or uses[id(w)] > 1 for w in weights):
        yield False
        return
    kept = [weight.data for weight in weights]
    try:
        for layer, weight in zip(adapters, weights, strict=True):
            for name in layer.active_adapters:
                weight.data = weight.data + layer.get_delta_weight(name)
        yield True
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data = values
