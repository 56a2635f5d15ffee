"""How much people prefer an image for its prompt: ImageReward (Xu et al. 2023, arXiv:2304.05977).

BLIP-large reads the prompt with cross-attention to the image: a ViT-L/16 at 224 pixels, and a BERT whose every layer
looks at the image. The first token's features go through five linear layers to one number, which is shifted and scaled
to mean 0 and deviation 1 on the data that it was trained on. Under too much optimisation images get worse while the
score climbs: keep a second judge beside it.

Shape legend: ``B`` samples, ``D`` width of the text model, ``H W`` pixels, ``T`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError, NotFoundError
from diffalign.images import to_rgb
from diffalign.types import Modality, Prompt, Sample, Scores
from rewards import chunked, devices, imagereward_weights
from rewards import weights as files

if TYPE_CHECKING:
    from rewards.imagereward_weights import ImageRewardNet

NEED = "an ImageReward checkpoint"
WEIGHTS = "hf-hub:THUDM/ImageReward/ImageReward.pt"
TOKENIZER = "bert-base-uncased"
LONGEST = 35
"""Tokens of a prompt, its two marks among them; what follows is cut, as in the released code."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CHUNK = 16
"""Samples that go through the model at once."""


@dataclass(frozen=True)
class _Loaded:
    model: ImageRewardNet
    transform: Callable[[object], Tensor]
    tokenize: Any


class ImageReward:
    """The released score: mean 0 and deviation 1 on its own data, and seldom beyond -2 or 2."""

    modality: Modality = "image"
    unit = "standard deviations"
    range = (-math.inf, math.inf)
    higher_is_better = True

    def __init__(
        self,
        weights: str = WEIGHTS,
        tokenizer: str = TOKENIZER,
        sha256: str = "",
        device: str = "cpu",
        name: str = "imagereward",
    ) -> None:
        """Names the checkpoint and the tokenizer of BERT; both are loaded, and fetched unless cached, on first use.

        ``weights`` is ``ImageReward.pt`` or the same tensors as safetensors: a path, or ``hf-hub:OWNER/NAME/FILE``;
        ``sha256`` pins it. ``tokenizer`` is a folder as transformers writes it, or a hub id.
        """
        self.name = name
        self.weights, self.tokenizer, self.sha256 = weights, tokenizer, sha256
        self.device = devices.device(device)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``; NaN for a sample without an image or a prompt."""
        found = chunked.scores(samples, lambda images, texts: self._score(self._pixels(images), texts), CHUNK)
        return Scores(chunked.where_asked(found.total, [sample.prompt for sample in samples]))

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same scores ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels (ReFL)."""
        # The first two steps resize and cut, the last normalises; a tensor needs no conversion to one.
        resize, cut, *_, normalize = getattr(self._loaded.transform, "transforms")  # noqa: B009
        pixels = normalize(cut(resize(images.to(self.device).float())).clamp(0, 1))
        return chunked.where_asked(self._score(pixels, [prompt.text for prompt in prompts]), prompts)

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._loaded.transform(to_rgb(image)) for image in images]).to(self.device)

    def _score(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        tokens = self._loaded.tokenize(
            list(texts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        ids, mask = (tokens[key].to(self.device) for key in ("input_ids", "attention_mask"))
        return cast(Tensor, self._loaded.model(pixels, ids, mask))

    @cached_property
    def _loaded(self) -> _Loaded:
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        path = files.local(self.weights, NEED)
        files.pinned(path, self.sha256, NEED)
        model = imagereward_weights.load(files.read(path, NEED), path, NEED)
        model.eval().requires_grad_(False).to(self.device)
        side = model.image_size
        resize = Resize(side, interpolation=InterpolationMode.BICUBIC)
        transform = Compose([resize, CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])
        tokenizer = self._tokenizer()
        if len(tokenizer) > model.vocabulary:
            raise ConfigError(f"{self.tokenizer} has {len(tokenizer)} tokens, and the checkpoint {model.vocabulary}")
        return _Loaded(model, cast(Callable[[object], Tensor], transform), tokenizer)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        # transformers and the hub client report trouble by errors of many kinds.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise NotFoundError(
                f"the tokenizer {self.tokenizer} could not be had ({reason}); with no connection, give a local folder: "
                "imagereward?tokenizer=FOLDER"
            ) from error
