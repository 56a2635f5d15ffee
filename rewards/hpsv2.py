"""How much people prefer an image for its prompt: Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341).

The cosine of open_clip's ViT-H-14, fine-tuned on 798 000 choices between images of the same prompt. There is no logit
scale in it: scores lie near 0.2 to 0.35, and the tables of the benchmark show them times 100. Scores of version 2.0 and
2.1 are on different scales, and only images of one prompt compare.

Shape legend: ``B`` samples, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Prompt
from rewards import chunked
from rewards import weights as files
from rewards.clip import ClipReward

if TYPE_CHECKING:
    from rewards.clip import _Loaded

NEED = "an HPSv2 checkpoint"
CHECKPOINTS = {
    "2.0": "hf-hub:xswu/HPSv2/HPS_v2_compressed.pt",
    "2.1": "hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt",
}


class HPSv2Reward(ClipReward):
    """The cosine of an image and its prompt after training on people's choices."""

    def __init__(
        self,
        version: Literal["2.0", "2.1"] = "2.1",
        weights: str = "",
        sha256: str = "",
        model: str = "ViT-H-14",
        device: str = "cpu",
        name: str = "hpsv2",
    ) -> None:
        """Names the checkpoint; it is loaded, and fetched from the hub where it is not cached, on first use.

        ``weights`` is the file of that version where it lies elsewhere: a path, or ``hf-hub:OWNER/NAME/FILE``;
        ``sha256`` pins it. ``model`` is open_clip's name of the architecture.
        """
        if model.startswith("hf-hub:") or "?" in model:
            raise ConfigError(f"model={model!r} is the architecture, such as ViT-H-14; the checkpoint is weights=FILE")
        super().__init__(model, device=device, name=name)
        self.version = version
        self.weights = weights or CHECKPOINTS[version]
        self.sha256 = sha256

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same cosines ``(B,)`` of square images ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels."""
        if images.shape[-1] != images.shape[-2]:
            raise ConfigError("HPSv2 pads images that are not square, which has no gradient here; make them square")
        features = self._encode_pixels(_square(self._loaded, images.to(self.device).float()))
        return chunked.where_asked(self._agreement(features, prompts), prompts)

    @cached_property
    def _loaded(self) -> _Loaded:
        path = files.local(self.weights, NEED)
        files.pinned(path, self.sha256, NEED)
        self.pretrained = str(path)
        try:
            loaded = super()._loaded
        except NotFoundError as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise InputError(f"{path} is not {NEED} for {self.model}: {reason}") from error
        return replace(loaded, transform=_padding(loaded.model.visual.image_size))


def _padding(size: int | tuple[int, int]) -> Callable[[object], Tensor]:
    """The released preprocessing: the longer side to ``size``, black borders; CLIP's own cuts at the middle instead."""
    from open_clip import image_transform

    made = image_transform(size, is_train=False, resize_mode="longest", interpolation="bicubic", fill_color=0)
    return cast(Callable[[object], Tensor], made)


def _square(loaded: _Loaded, images: Tensor) -> Tensor:
    """The released preprocessing of square tensors, which need no border."""
    from torchvision.transforms import Normalize

    steps: Sequence[object] = getattr(loaded.transform, "transforms", ())
    size: int | tuple[int, int] = loaded.model.visual.image_size
    sides = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] != sides:
        images = torch.nn.functional.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
    normalize = next(step for step in steps if isinstance(step, Normalize))
    return cast(Tensor, normalize(images))
