"""Low-rank adapters on the image tower of an open_clip model (Hu et al. 2021, "LoRA"), and the model with them added.

A matrix ``W`` of the tower becomes ``W + (alpha / r) B A`` with ``A (r, in)`` and ``B (out, r)``; the kernels of a
convolution count as the matrix ``(out, in * height * width)``. The weight itself is adapted, not the layer's output:
the fused projection of an attention and the projections of an attention pool are read as weights and never called, so
a wrapper around their layers would do nothing. What is saved is ``A`` and ``B``. What judges has them added once, and
is as fast as before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffalign.errors import ConfigError, InputError
from diffalign.seeds import derive
from rewards.clip import ClipReward, _Loaded


@dataclass(frozen=True)
class Adapter:
    """What was learned: by the name of each adapted weight, ``NAME.A`` and ``NAME.B``, float32 on the CPU."""

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float

    @property
    def names(self) -> list[str]:
        """The adapted weights."""
        return sorted({name[:-2] for name in self.tensors})

    def delta(self, name: str) -> Tensor:
        """What is added to a weight, as a matrix; KeyError where half of it is missing."""
        return low_rank(self.tensors[f"{name}.A"], self.tensors[f"{name}.B"], self.alpha / self.rank)


def low_rank(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * B A``, ``(out, in)``."""
    return scale * (b @ a)


class LowRank(nn.Module):
    """The parametrisation of one weight while it is trained; it starts as no change, since ``B`` is 0."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, seed: int) -> None:
        """A matrix smaller than ``rank`` gets as much as it can have."""
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        inner, self.scale = min(rank, rows, columns), alpha / rank
        start = torch.rand(inner, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.A = nn.Parameter((start / math.sqrt(columns)).to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, inner, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + low_rank(self.A, self.B, self.scale).view_as(weight).to(weight.dtype)


class AdaptedClip(ClipReward):
    """An open_clip model whose image tower is a copy of its own, with an adapter added; ``base`` is left as it is."""

    def __init__(self, base: ClipReward, adapter: Adapter | None = None) -> None:
        """Without an adapter it sees as ``base`` does, until its tower is changed."""
        super().__init__(base.model, base.pretrained, str(base.device), base.name)
        self._base, self._adapter = base, adapter

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        tower: nn.Module = self._loaded.model.visual
        return tower

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """float32 ``(B, D)``, on the device, with gradient, of what the model takes, ``(B, 3, H, W)``."""
        return self._encode_pixels(pixels.to(self.device))

    @cached_property
    def _loaded(self) -> _Loaded:
        loaded = self._base._loaded
        tower = copy.deepcopy(loaded.model.visual)
        if self._adapter is not None:
            add(tower, self._adapter)
        model = copy.copy(loaded.model)
        model._modules = {**loaded.model._modules, "visual": tower}
        return dataclasses.replace(loaded, model=model)


def matrices(tower: nn.Module) -> dict[str, Tensor]:
    """The weights that can be adapted: those of linear and convolutional layers and of attention, by their names."""
    return {
        name: weight
        for name, weight in tower.named_parameters()
        if name.endswith("weight") and weight.dim() > 1 and weight.is_floating_point()
    }


def chosen(tower: nn.Module, targets: Sequence[str] | None, model: str) -> list[str]:
    """Names of the weights that targets mean: those that have a target as one of the parts of their name.

    None means all. ConfigError where there is none, or a target means none.
    """
    known = list(matrices(tower))
    if not known:
        raise ConfigError(f"lora: the image tower of {model} has no linear or convolutional layer to adapt")
    if targets is None:
        return known
    parts = {name: name.split(".") for name in known}
    for target in targets:
        if not any(target in of for of in parts.values()):
            there = dict.fromkeys(p for of in parts.values() for p in of if not p.isdigit() and p != "weight")
            raise ConfigError(
                f"lora.targets: the image tower of {model} has no layer {target!r}; there are {', '.join(there)}"
            )
    return [name for name, of in parts.items() if set(of) & set(targets)]


def attach(tower: nn.Module, names: Sequence[str], rank: int, alpha: float, seed: int) -> dict[str, LowRank]:
    """Makes these weights adapted ones, and returns what is to be trained of them."""
    made = {}
    for name in names:
        place, _, weight = name.rpartition(".")
        layer = tower.get_submodule(place)
        made[name] = LowRank(getattr(layer, weight), rank, alpha, derive(seed, "lora", name))
        parametrize.register_parametrization(layer, weight, made[name])
    return made


@torch.no_grad()
def add(tower: nn.Module, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a tower; InputError where it is not one of this tower."""
    known = matrices(tower)
    for name in adapter.names:
        try:
            delta = adapter.delta(name)
            if name not in known or delta.shape != known[name].flatten(1).shape:
                raise InputError(f"the encoder has no weight {name} of this size")
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{name} is not whole: {error}") from None
        weight = known[name]
        weight.add_(delta.view_as(weight).to(weight.device, weight.dtype))
