"""The file of ``diffalign reward fit``: every field, its default and its limits. Unknown fields are refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from diffalign.config import Section, fields_of, standing_at
from diffalign.errors import ConfigError


class LoraConfig(Section):
    """Low-rank adapters on the image tower of the encoder, trained before the heads."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    """What is learned counts ``alpha / rank`` times."""
    learning_rate: float = Field(5e-4, gt=0)
    """Of the adapters; the heads beside them have their own."""
    epochs: int = Field(20, ge=1)
    """Most passes over the training pairs; the best one on the held-out prompts that stop it is kept."""
    patience: int = Field(3, ge=1)
    """Epochs without a better one after which the tuning ends. Few: an epoch of a tower is dear, and soon too many."""
    batch_size: int = Field(16, ge=1)
    """Pairs of images behind one update."""
    targets: list[str] | None = Field(None, min_length=1)
    """Parts of the names of the layers to adapt, such as ``attn``, ``mlp`` or ``layer4``; null is every layer."""


class Learning(Section):
    """What every reward model is learned by, whatever it looks at."""

    name: str = "reward"
    seed: int = Field(0, ge=0)
    preferences: str
    """A preference file or folder of any known format."""
    criteria: list[str] | None = None
    """What is to be learned; null is every criterion in the file."""
    held_out: float = Field(0.3, gt=0, lt=1)
    """Share of the prompts or cases that is not trained on. Half of it stops and calibrates, half of it measures."""
    ties: Literal["auto", "outcome", "half"] = "auto"
    """``outcome``: a tie is a third outcome. ``half``: it is a label of 0.5. ``auto``: the former for hard labels."""
    strength: Literal["weight", "margin", "ignore"] = "weight"
    """``weight``: a judgement of strength 2 counts as two of strength 1. ``margin``: the scores must differ by that
    much more (Touvron et al. 2023, Llama 2, eq. 2); not where ties are an outcome."""
    rater_effects: bool = True
    """Learn how reliable each rater is, along with the scores."""
    side_bias: bool = True
    """Learn how much each rater favours the first sample; not for files that put their winners first."""
    learning_curve: bool = True
    """Fit again on an eighth, a quarter and a half of the training prompts."""
    device: str = "cpu"
    """Where the encoder runs: ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""


class FitConfig(Learning):
    """Everything that determines a reward model of images: heads on an encoder of images and captions."""

    encoder: str = "embedded:clip"
    """``embedded:clip``, a folder in open_clip's format, ``NAME?pretrained=TAG``, or ``hf-hub:OWNER/NAME``."""
    lora: LoraConfig | None = None
    """Tune the encoder's image tower to the pairs first, by low-rank adapters; null leaves it frozen."""
    pixel_statistics: bool = True
    """Show the heads brightness, contrast, colour, noise and sharpness too, which encoders of captions overlook."""
    ensemble: int = Field(5, ge=1, le=100)
    """Heads for each criterion, each from another start and other draws of the training prompts."""
    hidden: int = Field(32, ge=0, le=4096)
    """Hidden units of a head; 0 leaves it linear."""
    epochs: int = Field(100, ge=1)
    """Most passes over the training pairs; a head keeps its best epoch on the held-out prompts that stop it."""
    patience: int = Field(10, ge=1)
    """Epochs without a better head after which training ends."""
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    batch_size: int = Field(64, ge=1)
    """Pairs behind one update."""


class TextLoraConfig(Section):
    """Low-rank adapters on every layer of a language model; what is saved has them added."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """What is learned counts ``alpha / rank`` times."""
    targets: list[str] | None = Field(None, min_length=1)
    """Names of the layers to adapt, such as ``q_proj``; null is every linear layer."""


class TextFitConfig(Learning):
    """Everything that determines a reward model of texts: a language model with a scalar head on its last token."""

    modality: Literal["text"] = "text"
    encoder: str
    """A transformers causal language model: ``embedded:NAME``, a folder, or a hub id. Its weights are where it starts
    from."""
    lora: TextLoraConfig | None = None
    """Train adapters and the head alone; null trains every weight."""
    length: Literal["free", "controlled"] = "free"
    """``controlled`` takes what a text's length explains out of the scores: a regression of their differences on those
    of ``log(1 + words)``, over the training pairs (Huang et al. 2024, "Post-hoc Reward Calibration")."""
    max_tokens: int = Field(1024, ge=2)
    """Pairs are left out of which a text, with its prompt, has more tokens than this, or than the model can read."""
    epochs: int = Field(3, ge=1)
    """Most passes over the training pairs; the best one on the held-out prompts that stop it is kept."""
    patience: int = Field(1, ge=1)
    """Epochs without a better one after which training ends: a language model soon knows its pairs by heart."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of the language model. It rises over the first tenth of the updates and falls linearly to 0."""
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(32, ge=1)
    """Pairs behind one update."""
    micro_batch_size: int = Field(16, ge=1)
    """Pairs in one forward and backward pass; memory only."""


AnyFitConfig = FitConfig | TextFitConfig


def load(path: Path, overrides: Sequence[str] = ()) -> AnyFitConfig:
    """The configuration in a YAML file, with ``field=value`` overrides on top.

    Raises NotFoundError if the file is missing, and ConfigError with file and line for anything wrong in it.
    """
    return parse(*fields_of(path, overrides, "preferences: pairs.parquet"))


def parse(data: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> AnyFitConfig:
    """A configuration from plain data; one of texts says ``modality: text``. ``origin`` says where each field stands,
    for messages.
    """
    modality = data.get("modality", "image")
    if modality not in ("image", "text"):
        raise ConfigError(f"{standing_at('modality', origin or {})}modality: image or text (given: {modality!r})")
    kind: type[AnyFitConfig] = TextFitConfig if modality == "text" else FitConfig
    try:
        return kind.model_validate({name: value for name, value in data.items() if name != "modality"})
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin or {}, kind)) from None


def dump(config: AnyFitConfig) -> str:
    """The fully resolved configuration as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _sentence(error: ValidationError, origin: Mapping[str, str], kind: type[AnyFitConfig]) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = "lora." if dotted.startswith("lora.") else ""
        lora = TextLoraConfig if kind is TextFitConfig else LoraConfig
        known = [f"{section}{field}" for field in (lora if section else kind).model_fields]
        near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"fields: {', '.join(known)}"
        whose = " of a reward model of texts" if kind is TextFitConfig else ""
        return f"{standing_at(dotted, origin)}unknown field {dotted}{whose}; {hint}"
    if first["type"] == "missing" and dotted == "preferences":
        return "preferences is not given: name the file with the pairs, such as --set preferences=pairs.parquet"
    reason = str(first["msg"])
    given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
    return f"{standing_at(dotted, origin)}{dotted}: {reason[0].lower() + reason[1:]}{given}"
