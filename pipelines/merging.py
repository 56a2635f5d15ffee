"""A LoRA added into the weights that it belongs to, for as long as nothing but samples is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside it each layer is one product, ``W + s B A``, in place of three: the same to rounding, in less time.

    Outside, the weights are the very ones that they were: they are put back, for subtracting what was added would leave
    rounding behind. Meanwhile the layers that have an adapter are in memory twice. Where any of them is more than a
    plain LoRA on float32 weights, or the adapters are off, nothing is done: half precisions would round ``s B A`` away.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    kept: list[tuple[BaseTunerLayer, torch.Tensor]] = []
    try:
        for layer in layers if all(map(_plain, layers)) else ():
            weight = layer.get_base_layer().weight
            kept.append((layer, weight.data))
            weight.data = _whole(layer)
            layer.merged_adapters = _names(layer)
        yield
    finally:
        for layer, own in kept:
            layer.get_base_layer().weight.data = own
            layer.merged_adapters = []


def _names(layer: BaseTunerLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _plain(layer: BaseTunerLayer) -> bool:
    return (
        type(layer) in (Linear, Conv2d)
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and not any(layer.lora_bias[name] for name in _names(layer))
        and layer.get_base_layer().weight.dtype == torch.float32
    )


@torch.no_grad()
def _whole(layer: BaseTunerLayer) -> torch.Tensor:
    weight: torch.Tensor = layer.get_base_layer().weight.data
    for name in _names(layer):
        weight = weight + layer.get_delta_weight(name)
    return weight
