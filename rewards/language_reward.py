"""``language-reward``: what a language model with a scalar head says of a text.

``folder=PATH`` is what ``diffalign reward fit`` wrote of pairs of texts. It is a transformers folder
(``AutoModelForSequenceClassification`` of one label, with its tokenizer), so other programmes load it as it is; beside
the weights stands ``reward.json``. ``model=FOLDER_OR_HUB_ID`` is any other reward model of that kind.

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.runs import new_folder
from diffalign.types import Modality, Sample, Scores
from rewards.fit import Calibration
from rewards.fit_config import TextFitConfig
from rewards.fit_language import FittedLanguage
from rewards.language_model import Classifier, Reader, context, digest, judge, read_tokenizer
from rewards.text_rules import words

HEADER, WEIGHTS = "reward.json", "model.safetensors"
KIND: Literal["diffalign-language-reward"] = "diffalign-language-reward"


class Header(BaseModel):
    """``reward.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["diffalign-language-reward"] = KIND
    version: Literal[1] = 1
    name: str
    encoder: dict[str, str]
    """``name`` and ``hash`` of the model that it was fitted from."""
    criterion: str
    slope: float
    temperature: float
    tie_log_strength: float | None
    level: float
    """Taken off what the head says."""
    length_coefficient: float
    """What ``log(1 + words)`` counts in what the head says, and is taken off too; 0 where length is free."""
    max_tokens: int
    train_pairs: int
    data: str
    """SHA-256 of the pairs that were read."""
    weights: str
    """SHA-256 of ``model.safetensors``."""
    seed: int
    versions: dict[str, str]


def write(
    folder: Path, config: TextFitConfig, encoder: tuple[str, str], fitted: FittedLanguage, criterion: str,
    train_pairs: int, data: str,
) -> Header:  # fmt: skip
    """Writes the folder, whole or not at all. ``encoder`` is the name and the hash of the base model."""
    with new_folder(folder) as temporary:
        fitted.classifier.model.save_pretrained(temporary, max_shard_size="100GB")
        fitted.classifier.reader.tokenizer.save_pretrained(temporary)
        header = Header(
            name=config.name,
            encoder={"name": encoder[0], "hash": encoder[1]},
            criterion=criterion,
            **asdict(fitted.calibration),
            level=fitted.level,
            length_coefficient=fitted.length_coefficient,
            max_tokens=fitted.classifier.reader.longest,
            train_pairs=train_pairs,
            data=data,
            weights=digest(temporary / WEIGHTS),
            seed=config.seed,
            versions={package: metadata.version(package) for package in ("diffalign", "torch", "transformers")},
        )
        (temporary / HEADER).write_text(json.dumps(header.model_dump(), indent=2) + "\n", encoding="utf-8")
    return header


class LanguageReward:
    """The score of a text under its prompt, from that sample alone.

    Scores of a fitted folder are in standard deviations of its training texts, whose mean is 0; a difference of two
    scores of one prompt is what was learned. Those of another's model are its own.
    """

    modality: Modality = "text"
    range = (-math.inf, math.inf)
    higher_is_better = True

    def __init__(
        self, folder: str | None = None, model: str | None = None, device: str = "cpu", name: str = "language-reward"
    ) -> None:
        """One of ``folder`` and ``model``. NotFoundError or InputError where it holds no reward model."""
        if (folder is None) == (model is None):
            raise ConfigError(
                "language-reward wants either folder=, what `diffalign reward fit` wrote, or model=, a folder or hub id"
                " of another's reward model"
            )
        self.name, self.model = name, folder or model or ""
        self.device = device
        self.header = _read(Path(self.model).expanduser()) if folder is not None else None
        self.unit = "standard deviations" if self.header else "the model's own"
        if folder is None and not Path(self.model).expanduser().exists() and self.model.count("/") != 1:
            raise NotFoundError(f"language-reward?model={self.model}: there is no such folder, and it is no hub id")

    @cached_property
    def classifier(self) -> Classifier:
        """The model, loaded when it is first used; InputError where its weights are not those of its header."""
        path = Path(self.model).expanduser()
        where: str | Path = path if path.is_dir() else self.model
        if self.header is not None and digest(path / WEIGHTS) != self.header.weights:
            raise InputError(f"{path / WEIGHTS} is not the file that {HEADER} describes: it is cut off, or changed")
        found = judge(where, self.model)
        most = context(found)
        longest = min(most, self.header.max_tokens) if self.header else most
        return Classifier(found, Reader(read_tokenizer(where, self.model), self.model, longest), self.device)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``; NaN for a sample without a text, and for one that the model cannot read whole."""
        total = torch.full((len(samples),), math.nan)
        rows = {i: self.classifier.reader.tokens(sample) for i, sample in enumerate(samples) if sample.text is not None}
        places = [i for i, row in rows.items() if 0 < len(row) <= self.classifier.reader.longest]
        if places:
            total[places] = self.classifier.scores([rows[i] for i in places])
        if self.header is not None:
            size = torch.tensor([math.log1p(words(sample.text or "")) for sample in samples])
            total = total - self.header.level - self.header.length_coefficient * size
        return Scores(total)

    def probability(self, first: Sequence[Sample], second: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities ``(B,)`` that a rater prefers the first, and that it is a tie.

        The latter is 0 where ties were not learned as an outcome. The two samples of a pair have the same prompt.
        """
        if [sample.prompt.text for sample in first] != [sample.prompt.text for sample in second]:
            raise ConfigError("only samples of the same prompt can be compared")
        difference = self(first).total - self(second).total
        if self.header is None:
            return difference.sigmoid(), torch.zeros_like(difference)
        known = self.header
        return Calibration(known.slope, known.temperature, known.tie_log_strength).probabilities(difference)


def _read(folder: Path) -> Header:
    if not (folder / HEADER).is_file() and (folder / "reward" / HEADER).is_file():
        raise NotFoundError(f"{folder} is the folder of a fit; the reward model is in {folder / 'reward'}")
    for name in (HEADER, WEIGHTS):
        if not (folder / name).is_file():
            raise NotFoundError(f"{folder} is no reward model: it has no {name}; `diffalign reward fit` makes one")
    try:
        data = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / HEADER} is not JSON: {error}") from None
    if isinstance(data, dict) and data.get("kind") == "diffalign-reward-heads":
        raise ConfigError(f"{folder} holds a reward model of images; name it preference?folder={folder}")
    try:
        return Header.model_validate(data)
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise InputError(f"{folder / HEADER}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
