"""How much people prefer an image for its prompt: PickScore (Kirstain et al. 2023, arXiv:2305.01569).

A CLIP ViT-H/14 in transformers' format, fine-tuned on choices that people made between two images of their own prompt
(Pick-a-Pic): exp(logit scale) times the cosine, so that a softmax over the scores of two images is the probability that
each is picked.

Shape legend: ``B`` samples, ``D`` dimensions of the shared embedding, ``H W`` pixels, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError, NotFoundError
from diffalign.images import to_rgb
from diffalign.types import Modality, Sample, Scores
from rewards import chunked, devices

if TYPE_CHECKING:
    from transformers import CLIPModel

MODEL = "yuvalkirstain/PickScore_v1"
CHUNK = 32
"""Images or texts that go through the model at once."""


@dataclass(frozen=True)
class _Loaded:
    model: CLIPModel
    images: Any
    """transformers' image processor and tokenizer: called, they give the tensors that the model takes."""
    texts: Any


class PickScoreReward:
    """The score that decides which of two images a person would pick."""

    modality: Modality = "image"
    higher_is_better = True

    def __init__(
        self,
        model: str = MODEL,
        processor: str = "",
        scaled: bool = True,
        device: str = "cpu",
        name: str = "pickscore",
    ) -> None:
        """Names the model; it is loaded, and fetched from the hub where it is not cached, on first use.

        ``model`` is a folder as transformers writes it, or a hub id. ``processor`` is where the tokenizer and the image
        processor come from, where the model has none (``laion/CLIP-ViT-H-14-laion2B-s32B-b79K`` has the same ones).
        Without ``scaled`` the score is the cosine; with it the cosine times the learned scale, which is about 100.
        """
        self.name = name
        self.unit = "logit" if scaled else "cosine"
        # The scale is a weight, and the weights are not loaded yet; training of CLIP cuts it at 100.
        self.range = (-100.0, 100.0) if scaled else (-1.0, 1.0)
        self.scaled = scaled
        self.model = model
        self.processor = processor or model
        self.device = devices.device(device)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``; NaN for a sample without an image or a prompt."""
        found = chunked.scores(samples, self._judge, CHUNK)
        return Scores(chunked.where_asked(found.total, [sample.prompt for sample in samples]))

    def _judge(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        cosine = (self._images(images) * self._texts(texts)).sum(1).clamp(-1, 1)
        return cosine * self._scale

    @property
    def _scale(self) -> float:
        # Rounded up, exp(log 100) would leave the range that the reward states.
        return min(float(self._loaded.model.logit_scale.exp()), 100.0) if self.scaled else 1.0

    def _images(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 ``(B, D)``, each of length 1."""
        found = self._loaded.images(images=[to_rgb(image) for image in images], return_tensors="pt")
        made = self._loaded.model.get_image_features(pixel_values=found["pixel_values"].to(self.device))
        return F.normalize(_pooled(made).float(), dim=1)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """float32 ``(B, D)``, each of length 1. Every text has the full length, whatever stands beside it."""
        longest = self._loaded.model.config.text_config.max_position_embeddings
        tokens = self._loaded.texts(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        made = self._loaded.model.get_text_features(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        return F.normalize(_pooled(made).float(), dim=1)

    @cached_property
    def _loaded(self) -> _Loaded:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        for folder in (self.model, self.processor):
            if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
                raise NotFoundError(f"there is no folder {folder} for the reward {self.name}")
        model_name, processor = (str(Path(name).expanduser()) for name in (self.model, self.processor))
        try:
            model, info = CLIPModel.from_pretrained(model_name, output_loading_info=True)
            # As the model was trained; the other implementation resizes a little differently.
            images = AutoImageProcessor.from_pretrained(processor, backend="pil")
            texts = AutoTokenizer.from_pretrained(processor)
        # transformers and the hub client report trouble by errors of many kinds.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            if Path(model_name).is_dir() and Path(processor).is_dir():
                raise InputError(f"{self.model} holds no CLIP that transformers can load: {reason}") from error
            raise NotFoundError(
                f"the model {self.model} or its processor {self.processor} could not be had ({reason}); with no "
                "connection, give a local folder: pickscore?model=FOLDER"
            ) from error
        if info["missing_keys"]:
            # transformers would fill them at random, and only warn.
            raise InputError(f"{self.model} lacks weights of CLIP, {sorted(info['missing_keys'])[0]} among them")
        model.eval().requires_grad_(False).to(self.device)
        return _Loaded(model, images, texts)


def _pooled(made: object) -> Tensor:
    """The projected embedding ``(B, D)``: transformers 4 returned it as it is, transformers 5 inside an object."""
    return cast(Tensor, made if isinstance(made, Tensor) else getattr(made, "pooler_output"))  # noqa: B009
