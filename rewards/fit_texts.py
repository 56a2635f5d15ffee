"""Pairs of texts as a language model learns them: their tokens, how long they are, and what was judged, by whom.

Shape legend: ``N`` different texts of a prompt, ``P`` pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.preferences import Broken, Defects
from diffalign.types import Preference, Sample
from rewards.fit_data import Collected, Pairs, Unreadable, collect
from rewards.language_model import Reader
from rewards.text_rules import words


@dataclass(frozen=True, kw_only=True)
class Texts(Pairs):
    """Pairs of texts; ``first`` and ``second`` are numbers of ``tokens``."""

    tokens: Sequence[Sequence[int]]
    """``N`` texts, each with its prompt, as the reader has them."""
    size: Tensor
    """float32 ``(N,)``: ``log(1 + words)``. Lengths are compared in ratios."""

    def gap(self, rows: Sequence[int]) -> Tensor:
        """How much longer the first is, ``(P,)``."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        return self.size[self.first[index]] - self.size[self.second[index]]

    def naive(self, train: Sequence[int], rows: Sequence[int]) -> Mapping[str, Tensor]:
        """See Pairs."""
        longer = self.towards(train, self.size)
        return {"the longer text" if longer else "the shorter text": self.gap(rows) * (1 if longer else -1)}

    def traits(self, rows: Sequence[int]) -> Mapping[str, Sequence[str]]:
        """See Pairs: whether raters preferred the longer or the shorter text."""
        label = self.label[torch.tensor(list(rows), dtype=torch.int64)]
        towards = ((label - 0.5).sign() * self.gap(rows).sign()).tolist()
        names = {1.0: "the longer", -1.0: "the shorter", 0.0: "neither, or equally long"}
        return {"preferred text": [names[side] for side in towards]}

    def facts(self, rows: Sequence[int], difference: Tensor) -> Mapping[str, Any]:
        """See Pairs: what length has to do with the scores, and with what raters said.

        A correlation is one of differences within pairs, about 0, as which of two stands first means nothing.
        """
        index, gap = torch.tensor(list(rows), dtype=torch.int64), self.gap(rows)
        answer = 2 * self.label[index] - 1
        decided = (answer != 0) & (gap != 0)
        longer = float((answer * gap > 0)[decided].float().mean()) if bool(decided.any()) else None
        return {
            "length": {
                "correlation": correlation(difference, gap), "raters": correlation(answer, gap),
                "longer_preferred": longer, "n": int(decided.sum()),
            }
        }  # fmt: skip


def correlation(values: Tensor, others: Tensor) -> float | None:
    """Of two antisymmetric quantities ``(P,)``, about 0; None where one of them is 0 throughout."""
    size = float(values.double().square().sum() * others.double().square().sum())
    return float((values.double() * others.double()).sum()) / math.sqrt(size) if size > 0 else None


def slope(values: Tensor, others: Tensor) -> float:
    """The ``k`` of the least squares ``values = k others``, without a constant; 0 where ``others`` is 0 throughout."""
    size = float(others.double().square().sum())
    return float((values.double() * others.double()).sum()) / size if size > 0 else 0.0


def gather(
    items: Iterable[Preference | Broken],
    reader: Reader,
    criteria: Collection[str] | None = None,
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> Texts:
    """Goes through the pairs once; keeps those of ``criteria``, or all. Pairs that are too long count as broken.

    InputError where images are compared instead of texts, or nothing is left; ConfigError for a criterion that nobody
    judged.
    """
    collected = _Collected(reader)
    return collected.study(collect(items, collected, criteria, on_progress))


class _Collected(Collected):
    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.numbers: dict[tuple[int, ...], int] = {}
        self.size: list[float] = []

    def number(self, sample: Sample) -> tuple[int, bytes]:
        """See Collected; the hash is of the text."""
        if sample.text is None:
            raise InputError(
                f"the pairs compare images, and encoder {self.reader.name} reads texts; set encoder to one of images,"
                " such as embedded:clip"
            )
        tokens = tuple(self.reader.tokens(sample))
        if len(tokens) > self.reader.longest:
            raise Unreadable(f"longer than {self.reader.longest} tokens: {len(tokens)} with the prompt")
        number = self.numbers.setdefault(tokens, len(self.numbers))
        if number == len(self.size):
            self.size.append(math.log1p(words(sample.text)))
        return number, hashlib.sha256(sample.text.encode("utf-8", "surrogatepass")).digest()

    def study(self, broken: Defects) -> Texts:
        """Everything read."""
        return Texts(tokens=list(self.numbers), size=torch.tensor(self.size), **self.pairs(broken))
