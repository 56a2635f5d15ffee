"""How well a medical image and its text agree: BiomedCLIP (Zhang et al. 2023, arXiv:2303.00915), by open_clip.

A ViT-B/16 and PubMedBERT, trained on 15 million figures of biomedical articles with their captions. It is a general
model of the field, and not one of chest X-rays or of any other single kind of image.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from diffalign.errors import InputError
from rewards.clip import ClipReward

if TYPE_CHECKING:
    from rewards.clip import _Loaded

MODEL = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
CONTEXT = 256
"""Tokens that the text tower was trained with; with CLIP's 77 a report would be cut in the middle."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class BiomedClipReward(ClipReward):
    """The cosine of an image and its prompt by BiomedCLIP."""

    def __init__(self, model: str = MODEL, device: str = "cpu", name: str = "biomedclip") -> None:
        """Names the model; it is loaded, and fetched from the hub where it is not cached, on first use.

        ``model`` is the hub's, or a folder with the same files. The ``open_clip_config.json`` of the released files
        names a repository of the hub for its text tower and tokenizer (``hf_model_name``, ``hf_tokenizer_name``):
        without a connection, these must be in the hub's local cache, or the two names be changed to local folders.
        """
        super().__init__(model, device=device, name=name)

    @cached_property
    def _loaded(self) -> _Loaded:
        loaded = super()._loaded
        try:
            self._require_published(loaded)
        except InputError:
            vars(self).pop("_loaded", None)  # the base class has kept it already
            raise
        return loaded

    def _require_published(self, loaded: _Loaded) -> None:
        context = getattr(loaded.tokenize, "context_length", None)
        if context != CONTEXT:
            raise InputError(f"{self.model} reads texts of {context} tokens, and BiomedCLIP reads {CONTEXT}")
        normalize = [step for step in getattr(loaded.transform, "transforms", ()) if hasattr(step, "mean")]
        found = [(tuple(step.mean), tuple(step.std)) for step in normalize]
        if found != [(MEAN, STD)]:
            raise InputError(f"{self.model} normalises images by {found}, and BiomedCLIP by mean {MEAN}, std {STD}")
