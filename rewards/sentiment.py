"""``sentiment`` and ``profanity``: word lists that come inside packages, read on first use.

Both are of the extra ``text``: ``pip install 'diffalign[text]'``. They count words; irony, and what is meant, they do
not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch

from diffalign.errors import NotFoundError
from diffalign.types import Modality, Sample, Scores


class Sentiment:
    """VADER's compound score: how positive a text sounds (Hutto and Gilbert 2014, ICWSM 8:216).

    The parts are the shares of the text that are positive, neutral and negative. A text without a word is neutral: 0.
    """

    modality: Modality = "text"
    unit = "compound"
    range = (-1.0, 1.0)
    higher_is_better = True
    directions: ClassVar[Mapping[str, bool | None]] = {"positive": True, "neutral": None, "negative": False}

    def __init__(self, name: str = "sentiment") -> None:
        self.name = name

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Compound scores ``(B,)``; NaN for a sample without a text."""
        found = [self._one(sample.text) for sample in samples]
        names = {"compound": "compound", "pos": "positive", "neu": "neutral", "neg": "negative"}
        columns = {
            name: torch.tensor([one.get(key, math.nan) for one in found], dtype=torch.float32)
            for key, name in names.items()
        }
        return Scores(columns.pop("compound"), columns)

    def _one(self, text: str | None) -> dict[str, float]:
        if text is None:
            return {}
        found: dict[str, float] = self._analyse(text)
        return found

    @cached_property
    def _analyse(self) -> Callable[[str], dict[str, float]]:
        module = _package("vaderSentiment.vaderSentiment", "sentiment", "vaderSentiment")
        analyse: Callable[[str], dict[str, float]] = module.SentimentIntensityAnalyzer().polarity_scores
        return analyse


class Profanity:
    """1 where a text has a word of better-profanity's list, also in disguise (``sh1t``), else 0. Less is better."""

    modality: Modality = "text"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = False

    def __init__(self, name: str = "profanity") -> None:
        self.name = name

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """1 or 0 ``(B,)``; NaN for a sample without a text."""
        found = [math.nan if sample.text is None else float(self._has(sample.text)) for sample in samples]
        return Scores(torch.tensor(found, dtype=torch.float32))

    @cached_property
    def _has(self) -> Callable[[str], bool]:
        module = _package("better_profanity", "profanity", "better-profanity")
        judge = module.Profanity()
        judge.load_censor_words()
        has: Callable[[str], bool] = judge.contains_profanity
        return has


def _package(module: str, reward: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise NotFoundError(
            f"the reward {reward} needs the package {package}, and {error.name} is not installed; pip install"
            " 'diffalign[text]'"
        ) from None
