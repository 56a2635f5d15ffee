"""How well an image and its prompt agree, by any open_clip model (Radford et al. 2021; the cosine of CLIPScore).

Shape legend: ``B`` samples, ``D`` dimensions of the shared embedding, ``H W`` pixels, ``T`` tokens.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.images import to_rgb
from diffalign.types import Modality, Prompt, Sample, Scores
from rewards import chunked, devices

if TYPE_CHECKING:
    from open_clip import CLIP

EMBEDDED = Path(__file__).parent / "embedded" / "clip"
CHUNK = 32
"""Images or texts that go through the model at once: bounds the memory, whatever the batch is."""

_CONFIG = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class _Loaded:
    model: CLIP
    transform: Callable[[object], Tensor]
    """Resize, crop and normalise: takes an image, or a tensor ``(B, 3, H, W)`` in [0, 1]."""
    tokenize: Callable[[list[str]], Tensor]
    """int64 ``(B, T)``."""


class ClipReward:
    """The cosine between the embeddings of an image and of its prompt."""

    modality: Modality = "image"
    unit = "cosine"
    range = (-1.0, 1.0)
    higher_is_better = True

    def __init__(
        self, model: str = "embedded:clip", pretrained: str | None = None, device: str = "cpu", name: str = "clip"
    ) -> None:
        """Names a model; it is loaded when it is first used.

        ``model`` is ``embedded:clip``, a folder in open_clip's own format (``open_clip_config.json`` and weights), an
        open_clip name with ``pretrained`` (a tag or a weights file; also written ``NAME?pretrained=TAG``), or
        ``hf-hub:OWNER/NAME``. Only the last two go to the network, and only when the weights are not cached yet.
        Another ``name`` is for two CLIPs in one combination.
        """
        self.name = name
        self.model, mark, query = model.partition("?")
        if mark and (pretrained is not None or not query.startswith("pretrained=")):
            raise ConfigError(f"the model {model!r} is not NAME?pretrained=TAG with the tag given once")
        self.pretrained = query.removeprefix("pretrained=") if mark else pretrained
        self.device = devices.device(device)
        self._folder = _folder(self.model)
        if self._folder is not None:
            _require_model(self._folder, self.model)
            if self.pretrained is not None:
                raise ConfigError(
                    f"pretrained={self.pretrained!r} has no meaning for {model}: a folder has its weights"
                )

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Cosines ``(B,)``; NaN for a sample without an image, or without a prompt: there is nothing to agree with."""
        total = torch.full((len(samples),), math.nan)
        images = {
            i: s.image
            for i, s in enumerate(samples)
            if s.image is not None and 0 not in s.image.size and s.prompt.text.strip()
        }
        if images:
            features = self.encode_images(list(images.values()))
            texts = self.encode_texts([samples[i].prompt.text for i in images])
            total[list(images)] = (features * texts).sum(1).clamp(-1, 1)
        return Scores(total)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same cosines ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels.

        Equal to the score of the 8-bit image up to rounding, and, where the model resizes, up to the difference
        between Pillow's and torch's bicubic filter.
        """
        return chunked.where_asked(self._agreement(self.with_gradient(images), prompts), prompts)

    def _agreement(self, features: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (features * self.encode_texts([prompt.text for prompt in prompts]).to(self.device)).sum(1)

    def with_gradient(self, images: Tensor) -> Tensor:
        """float32 ``(B, D)``, each of length 1, with gradient to ``images``, ``(B, 3, H, W)`` in [0, 1]."""
        if any(type(step).__name__ == "ResizeKeepRatio" for step in getattr(self._loaded.transform, "transforms", ())):
            raise ConfigError(f"{self.model} resizes images in a way that has no gradient; it can only score images")
        return self._encode_pixels(self._loaded.transform(images.to(self.device).float()))

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 ``(B, D)`` on the CPU, each of length 1."""
        loaded = self._loaded
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        with torch.no_grad():
            found = [
                self._encode_pixels(torch.stack([loaded.transform(to_rgb(image)) for image in chunk]).to(self.device))
                for chunk in chunks
            ]
        return torch.cat([features.cpu() for features in found]) if found else torch.empty(0, self._dimensions)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 ``(B, D)`` on the CPU, each of length 1; a text that occurs often is read once."""
        distinct = list(dict.fromkeys(texts))
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for start in range(0, len(distinct), CHUNK):
                chunk = distinct[start : start + CHUNK]
                tokens = self._loaded.tokenize(chunk).to(self.device)
                found.update(
                    zip(chunk, self._loaded.model.encode_text(tokens, normalize=True).float().cpu(), strict=True)
                )
        return torch.stack([found[text] for text in texts]) if found else torch.empty(0, self._dimensions)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self._loaded.model.encode_image(pixels, normalize=True)).float()

    @property
    def _dimensions(self) -> int:
        return int(self.encode_texts([""]).shape[1])

    @cached_property
    def _loaded(self) -> _Loaded:
        import open_clip

        if self._folder is not None:
            name, pretrained = f"local-dir:{self._folder}", None
        else:
            name, pretrained = _hub_name(self.model, self.pretrained)
        try:
            with _offline(self._folder is not None):
                model, _, transform = open_clip.create_model_and_transforms(
                    name, pretrained=pretrained, device=self.device
                )
                tokenize = open_clip.get_tokenizer(name)
        # open_clip and the hub client report trouble by errors of many kinds, requests' own among them.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            if self._folder is not None:
                raise InputError(f"{self._folder} holds no model that open_clip can load: {reason}") from error
            raise NotFoundError(
                f"the weights of {self.model} could not be had ({reason}); with no connection, give a local folder: "
                "clip?model=FOLDER"
            ) from error
        model.eval().requires_grad_(False)
        return _Loaded(cast("CLIP", model), cast(Callable[[object], Tensor], transform), tokenize)


def _folder(name: str) -> Path | None:
    """The local folder that a model's name means, or None where it is a name for open_clip or the hub."""
    if name.startswith("embedded:"):
        if name != "embedded:clip":
            raise ConfigError(f"there is no embedded CLIP {name!r}; there is embedded:clip")
        return EMBEDDED
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    path = Path(name)
    local = (path / _CONFIG).is_file() or path.is_absolute() or name.startswith((".", "~"))
    return path.expanduser() if local else None


def _require_model(folder: Path, name: str) -> None:
    # Without this check open_clip would only log a warning, and score with random weights.
    if not folder.is_dir():
        what = "train one with `python -m rewards.train_clip`" if folder == EMBEDDED else "check the path"
        raise NotFoundError(f"there is no folder {folder} for the model {name}; {what}")
    if not (folder / _CONFIG).is_file():
        raise NotFoundError(f"{folder} has no {_CONFIG}; a model is a folder as open_clip writes it")
    if not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise NotFoundError(f"{folder} has a {_CONFIG} but no weights; put open_clip_model.safetensors beside it")


def _hub_name(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """The names under which open_clip knows a model and its weights."""
    import open_clip

    if name.startswith("hf-hub:"):
        if pretrained is not None:
            raise ConfigError(f"pretrained={pretrained!r} has no meaning for {name}: a hub repository has its weights")
        return name, None
    known = open_clip.list_models()
    cleaned = name.replace("/", "-")
    if cleaned not in known:
        near = difflib.get_close_matches(cleaned, known, 1)
        hint = f"the nearest is {near[0]}" if near else "`open_clip.list_models()` lists them"
        raise ConfigError(f"there is no folder and no open_clip model {name!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(cleaned)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        near = difflib.get_close_matches(pretrained or "", tags, 1) or tags[:4]
        given = "needs pretrained=TAG" if pretrained is None else f"has no weights {pretrained!r}"
        raise ConfigError(f"the model {name} {given}, such as {', '.join(near) or 'the path of a weights file'}")
    return cleaned, pretrained


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """A local folder may name a text tower of the hub; only the local cache may then answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
