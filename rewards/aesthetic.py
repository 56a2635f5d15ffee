"""How much people like the look of an image, whatever it shows: the LAION aesthetic predictor.

Schuhmann 2022, "improved aesthetic predictor" (``sac+logos+ava1-l14-linearMSE``), which LAION-Aesthetics was chosen by
and DDPO optimises: the image embedding of CLIP ViT-L/14, made of length 1, through five linear layers. Trained on
ratings of photographs and pictures from 1 to 10. The prompt plays no part.

Shape legend: ``B`` samples, ``D`` dimensions of the embedding, ``H W`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from diffalign.errors import ConfigError, InputError
from diffalign.types import Modality, Prompt, Sample, Scores
from rewards import weights as files
from rewards.clip import ClipReward

NEED = "the weights of the aesthetic predictor"
CLIP = "ViT-L-14-quickgelu?pretrained=openai"
"""OpenAI's ViT-L/14 was trained with the quick GELU; open_clip's plain ``ViT-L-14`` computes another function."""


class AestheticReward:
    """The rating that people would give an image, about 1 to 10."""

    modality: Modality = "image"
    unit = "rating"
    range = (-math.inf, math.inf)
    higher_is_better = True

    def __init__(
        self, weights: str = "", clip: str = CLIP, sha256: str = "", device: str = "cpu", name: str = "aesthetic"
    ) -> None:
        """Names the files; they are loaded when they are first used.

        ``weights`` is the predictor, ``sac+logos+ava1-l14-linearMSE.pth`` of the repository
        ``christophschuhmann/improved-aesthetic-predictor`` or the same tensors as safetensors: a path, or
        ``hf-hub:OWNER/NAME/FILE``. ``clip`` is any model that the reward ``clip`` knows; the released predictor goes
        with OpenAI's ViT-L/14 and with no other. ``sha256`` pins the predictor.
        """
        if not weights:
            raise ConfigError(
                "aesthetic needs its weights: write aesthetic?weights=FILE, where FILE is "
                "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        self.name = name
        self.weights, self.sha256 = weights, sha256
        self.clip = ClipReward(clip, device=device, name=f"{name}/clip")

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Ratings ``(B,)``; NaN for a sample without an image."""
        total = torch.full((len(samples),), math.nan)
        images = {i: s.image for i, s in enumerate(samples) if s.image is not None and 0 not in s.image.size}
        if images:
            with torch.no_grad():
                total[list(images)] = self._rate(self.clip.encode_images(list(images.values())))
        return Scores(total)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same ratings ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels."""
        return self._rate(self.clip.with_gradient(images).cpu()).to(images.device)

    def _rate(self, features: Tensor) -> Tensor:
        head = self._head
        if features.shape[1] != head.width:
            raise InputError(
                f"{self.weights} rates embeddings of {head.width} dimensions and {self.clip.model} makes "
                f"{features.shape[1]}; give the clip= that it was trained with"
            )
        rated: Tensor = head(features)
        return rated

    @cached_property
    def _head(self) -> files.LinearHead:
        path = files.local(self.weights, NEED)
        files.pinned(path, self.sha256, NEED)
        head = files.LinearHead(files.read(path, NEED), path, NEED)
        return head.eval().requires_grad_(False)
