"""Rules that a text keeps or not: ``length`` and ``format``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from diffalign.errors import ConfigError
from diffalign.types import Modality, Sample, Scores


def words(text: str) -> int:
    """The number of words: what stands between spaces."""
    return len(text.split())


class Length:
    """Minus the words by which a text misses a length: ``target=`` counts both ways, ``max=`` only what is too long."""

    modality: Modality = "text"
    unit = "words"
    range = (-math.inf, 0.0)
    higher_is_better = True

    def __init__(self, target: int | None = None, max: int | None = None, name: str = "length") -> None:
        if (target is None) == (max is None):
            raise ConfigError("length wants either a target or a max, in words: length?target=30, or length?max=40")
        self._wanted = target if target is not None else max or 0
        if self._wanted < 0:
            raise ConfigError(f"length is given {self._wanted} words; it is 0 or more")
        self._both = target is not None
        self.name = name

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Minus words ``(B,)``, and the number of words as a part; NaN for a sample without a text."""
        counts = torch.tensor([math.nan if sample.text is None else words(sample.text) for sample in samples])
        over = counts.float() - self._wanted
        return Scores(-(over.abs() if self._both else over.clamp_min(0)), {"words": counts.float()})


class Format:
    """1 where the whole text has the form of a regular expression (``pattern=``), otherwise 0.

    Spaces around the text do not count. ``.`` stands for line breaks, too. Write ``%26`` for ``&`` in a reward's name.
    """

    modality: Modality = "text"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self, pattern: str, name: str = "format") -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"format?pattern={pattern}: this is no regular expression: {error}") from None
        self.name = name

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """1 or 0 ``(B,)``; NaN for a sample without a text."""
        return Scores(torch.tensor([self._one(sample.text) for sample in samples], dtype=torch.float32))

    def _one(self, text: str | None) -> float:
        return math.nan if text is None else float(self._pattern.fullmatch(text.strip()) is not None)
