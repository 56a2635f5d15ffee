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


class FitConfig(Section):
    """Everything that determines a reward model."""

    name: str = "reward"
    seed: int = Field(0, ge=0)
    preferences: str
    """A preference file or folder of any known format, with images."""
    encoder: str = "embedded:clip"
    """``embedded:clip``, a folder in open_clip's format, ``NAME?pretrained=TAG``, or ``hf-hub:OWNER/NAME``."""
    lora: LoraConfig | None = None
    """Tune the encoder's image tower to the pairs first, by low-rank adapters; null leaves it frozen."""
    pixel_statistics: bool = True
    """Show the heads brightness, contrast, colour, noise and sharpness too, which encoders of captions overlook."""
    criteria: list[str] | None = None
    """What is to be learned, each criterion by heads of its own; null is every criterion in the file."""
    held_out: float = Field(0.3, gt=0, lt=1)
    """Share of the prompts or cases that is not trained on. Half of it stops and calibrates, half of it measures."""
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
    ties: Literal["auto", "outcome", "half"] = "auto"
    """``outcome``: a tie is a third outcome. ``half``: it is a label of 0.5. ``auto``: the former for hard labels."""
    strength: Literal["weight", "ignore"] = "weight"
    """``weight``: a judgement of strength 2 counts as two of strength 1."""
    rater_effects: bool = True
    """Learn how reliable each rater is, along with the heads."""
    side_bias: bool = True
    """Learn how much each rater favours the first sample; not for files that put their winners first."""
    learning_curve: bool = True
    """Fit again on an eighth, a quarter and a half of the training prompts."""
    device: str = "cpu"
    """Where the encoder runs: ``cpu``, ``cuda``, ``cuda:1``, ``mps``. The heads are fitted on the CPU."""


def load(path: Path, overrides: Sequence[str] = ()) -> FitConfig:
    """The configuration in a YAML file, with ``field=value`` overrides on top.

    Raises NotFoundError if the file is missing, and ConfigError with file and line for anything wrong in it.
    """
    return parse(*fields_of(path, overrides, "preferences: pairs.parquet"))


def parse(data: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> FitConfig:
    """A configuration from plain data. ``origin`` says where each field stands, for messages."""
    try:
        return FitConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin or {})) from None


def dump(config: FitConfig) -> str:
    """The fully resolved configuration as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _sentence(error: ValidationError, origin: Mapping[str, str]) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = "lora." if dotted.startswith("lora.") else ""
        known = [f"{section}{field}" for field in (LoraConfig if section else FitConfig).model_fields]
        near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"fields: {', '.join(known)}"
        return f"{standing_at(dotted, origin)}unknown field {dotted}; {hint}"
    if first["type"] == "missing" and dotted == "preferences":
        return "preferences is not given: name the file with the pairs, such as --set preferences=pairs.parquet"
    reason = str(first["msg"])
    return f"{standing_at(dotted, origin)}{dotted}: {reason[0].lower() + reason[1:]} (given: {first['input']!r})"
