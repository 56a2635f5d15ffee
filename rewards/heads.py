"""Reward heads over a frozen encoder, several of them as an ensemble; and how far an image lies from known ones.

Shape legend: ``B`` samples, ``D`` dimensions of an embedding, ``S`` statistics of pixels (may be none), ``F = 3 D + 1 +
S`` features, ``H`` hidden units, ``K`` members of the ensemble, ``N`` images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from diffalign.errors import InputError

STEADY = 0.01
"""Least standard deviation of a statistic of pixels: one that hardly varied must not shout when at last it moves."""


def features(image: Tensor, text: Tensor) -> Tensor:
    """``(B, F)``: both embeddings, their product element by element, its sum (the cosine), and what is seen besides.

    ``image`` is ``(B, D + S)``, the embedding and then statistics of the pixels; ``text`` is ``(B, D)``. The product
    lets even a linear head weigh on which dimensions image and prompt should agree.
    """
    embedding, pixels = image.split([text.shape[1], image.shape[1] - text.shape[1]], dim=1)
    product = embedding * text
    return torch.cat([embedding, text, product, product.sum(1, keepdim=True), pixels], dim=1)


class Heads(nn.Module):
    """``K`` heads that read the same features: linear, and with ``hidden`` units a small network beside it.

    A head starts at 0 for every sample. Features are centred, and divided by one number per block (image, text,
    product, cosine), so that no direction in which the encoder hardly varies is blown up. Statistics of pixels have
    units of their own, and are divided each by its own. They are held within the range of the training samples, but
    for their outermost hundredths: what is noisier than all that was judged scores as the noisiest of that. A generator
    could otherwise run off along so plain a number, for which nobody has judged anything.
    """

    centre: Tensor
    """float32 ``(F,)``."""
    scale: Tensor
    """float32 ``(F,)``."""
    level: Tensor
    """float32 ``(K,)``: mean raw score of each head over the training images."""
    limits: Tensor
    """float32 ``(2, S)``: lowest and highest value that a statistic of pixels is taken at."""
    spread: Tensor
    """float32 scalar: standard deviation of the mean raw score over the training images."""

    def __init__(self, dimensions: int, pixels: int, hidden: int, seeds: Sequence[int]) -> None:
        """``dimensions`` is ``D``, ``pixels`` is ``S``; one seed a head."""
        super().__init__()
        count, members = 3 * dimensions + 1 + pixels, len(seeds)
        self.blocks, self.hidden = [dimensions] * 3 + [1] * (1 + pixels), hidden
        self.linear = nn.Parameter(torch.zeros(members, count))
        if hidden:
            first = [
                torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)) / math.sqrt(count)
                for seed in seeds
            ]
            self.inner = nn.Parameter(torch.stack(first))
            self.inner_bias = nn.Parameter(torch.zeros(members, 1, hidden))
            self.outer = nn.Parameter(torch.zeros(members, hidden, 1))
        self.register_buffer("centre", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("limits", torch.zeros(2, pixels))
        self.register_buffer("level", torch.zeros(members))
        self.register_buffer("spread", torch.ones(()))

    @property
    def members(self) -> int:
        """``K``."""
        return len(self.linear)

    def forward(self, found: Tensor) -> Tensor:
        """Raw scores ``(K, B)`` of features ``(B, F)``."""
        known = (self._within(found) - self.centre) / self.scale
        scores = self.linear @ known.T
        if self.hidden:
            scores = scores + (gelu(known @ self.inner + self.inner_bias) @ self.outer)[..., 0]
        return scores

    def standardised(self, found: Tensor) -> Tensor:
        """Scores ``(K, B)`` of which the mean over the heads has mean 0 and standard deviation 1 in training."""
        scores: Tensor = self(found)
        return (scores - self.level[:, None]) / self.spread

    def _within(self, found: Tensor) -> Tensor:
        pixels = self.limits.shape[1]
        embedded, statistics = found.split([found.shape[1] - pixels, pixels], dim=1)
        return torch.cat([embedded, statistics.clamp(*self.limits)], 1)

    @torch.no_grad()
    def fit_features(self, found: Tensor) -> None:
        """Sets limits, centre and scale from the features ``(B, F)`` of the training samples."""
        statistics = found[:, found.shape[1] - self.limits.shape[1] :]
        if statistics.numel():
            self.limits.copy_(statistics.quantile(torch.tensor([0.01, 0.99]), dim=0))
        found = self._within(found)
        self.centre.copy_(found.mean(0))
        blocks = (found - self.centre).split(self.blocks, dim=1)
        floors = [1e-4] * 4 + [STEADY] * (len(blocks) - 4)
        sizes = [
            block.square().mean().sqrt().clamp_min(floor).expand(block.shape[1])
            for block, floor in zip(blocks, floors, strict=True)
        ]
        self.scale.copy_(torch.cat(sizes))

    @torch.no_grad()
    def fit_scores(self, scores: Tensor) -> None:
        """Sets level and spread from the raw scores ``(K, B)`` of the training samples.

        Pairs say nothing of a head's level; without this the heads would differ by what they never learned.
        """
        self.level.copy_(scores.mean(1))
        self.spread.copy_((scores - self.level[:, None]).mean(0).std(correction=0))

    def tensors(self) -> dict[str, Tensor]:
        """Everything to be saved, by name."""
        return {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dimensions: int, pixels: int) -> Heads:
        """The heads with these tensors, ready to score; InputError where they do not fit together, or the encoder."""
        try:
            members = len(tensors["linear"])
            hidden = tensors["outer"].shape[1] if "outer" in tensors else 0
            made = cls(dimensions, pixels, hidden, range(members))
            made.load_state_dict(dict(tensors))
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"the tensors are not those of reward heads ({reason})") from None
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise InputError("the tensors of the reward heads hold numbers that are not finite")
        return made.eval().requires_grad_(False)


def shrunk_covariance(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean ``(D,)``, covariance ``(D, D)`` and shrinkage in [0, 1] of values ``(N, D)``, float64.

    The sample covariance ``S`` is drawn towards ``mu I`` with ``mu = tr(S) / D``, by the share ``min(b, d) / d`` with
    ``d = |S - mu I|^2`` and ``b = (mean |x|^4 - |S|^2) / N`` over centred ``x`` (Ledoit & Wolf 2004, lemma 3.2 to 3.4),
    so that it can be inverted even of fewer images than dimensions.
    """
    values = values.double()
    mean = values.mean(0)
    centred = values - mean
    count, dimensions = values.shape
    sample = centred.T @ centred / count
    level = sample.diagonal().mean()
    target = level * torch.eye(dimensions, dtype=torch.float64)
    distance = (sample - target).square().sum()
    error = (centred.square().sum(1).square().mean() - sample.square().sum()) / count
    shrinkage = float((error.clamp_min(0) / distance).clamp(max=1)) if distance > 0 else 1.0
    return mean, (1 - shrinkage) * sample + shrinkage * target, shrinkage


def whitening(covariance: Tensor) -> Tensor:
    """``W`` ``(D, D)`` with ``W C W^T = I``, of a covariance ``C``; float64.

    A covariance without any extent, as of equal images, gets a tiny one, so that everything else is far away.
    """
    dimensions = len(covariance)
    floor = 1e-9 + 1e-6 * float(covariance.diagonal().mean())
    identity = torch.eye(dimensions, dtype=torch.float64)
    lower = torch.linalg.cholesky(covariance.double() + floor * identity)
    white: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return white


def distances(values: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    """Mahalanobis distances ``(N,)``, float32, of values ``(N, D)`` from a mean, by its whitening matrix."""
    away: Tensor = (values.double() - mean.double()) @ whiten.double().T
    return away.square().sum(1).sqrt().float()
