"""``readability``: how easy a text is to read, by the formulas of Flesch (1948) and Kincaid et al. (1975).

Both count words, sentences and syllables, and nothing else: nonsense of short words is easy to read by them. Syllables
are estimated from the spelling, for English.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from diffalign.types import Modality, Sample, Scores

EASIEST = 206.835 - 1.015 - 84.6
"""The reading ease of sentences of one word of one syllable."""
LOWEST_GRADE = 0.39 + 11.8 - 15.59

_KNOWN = {
    "area": 3, "areas": 3, "being": 2, "brain": 1, "cerebellum": 4, "create": 2, "diameter": 4, "every": 2,
    "fluid": 2, "forehead": 2, "flair": 1, "foci": 2, "idea": 3, "ischaemia": 4, "lentiform": 3, "nuclei": 3,
    "nucleus": 3, "oedema": 3, "people": 2, "quiet": 2, "radiological": 6, "reality": 4, "science": 2,
    "something": 2, "haemorrhage": 3, "someone": 2, "sometimes": 2, "thalami": 3, "vertices": 3,
    "voluminous": 4, "appreciated": 5, "sided": 2, "sizeable": 3, "hemisphere": 3, "hemispheres": 3,
    "moreover": 3, "therefore": 2, "subcentimetre": 5, "centimetre": 4, "millimetre": 4, "whole": 1,
    "somewhere": 2, "elsewhere": 2, "otherwise": 3, "lives": 1, "comes": 1, "movement": 2, "statement": 2,
}  # fmt: skip
"""Words whose spelling misleads the rules."""
_SPLIT = (
    r"(?<![ctg])ia|ciat|(?<![ctsgx])io(?!n)|iu|eo$|eous$|creat|[aeiouy]ing|(?<![qg])ua(?!r[dn]|de)|uou|uity"
    r"|[^aeiou]sm$|thm$"
)
"""Vowels side by side that are two syllables, and endings that are one without a vowel."""


@dataclass(frozen=True)
class Counts:
    """What the formulas count."""

    words: int
    sentences: int
    syllables: int


def count(text: str) -> Counts:
    """Words, sentences and syllables. A sentence ends with a full stop, question or exclamation mark; the last may not.

    A decimal point ends none. A hyphenated word is one word.
    """
    found = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)
    ends = [part for part in re.split(r"[.!?]+(?=\s|$)", text) if re.search(r"\w", part)]
    return Counts(len(found), len(ends), sum(syllables(part) for word in found for part in word.split("-")))


@lru_cache(maxsize=65536)
def syllables(word: str) -> int:
    """The syllables of an English word, estimated: groups of vowels, less the silent ones; at least 1.

    Abbreviations and numbers are spelled: *MRI* has three, *T2* has two.
    """
    small = re.sub(r"[^a-z0-9]", "", word.lower().replace("’", "'").partition("'")[0])
    if small in _KNOWN:
        return _KNOWN[small]
    if re.search(r"\d", small) or not re.search(r"[aeiouy]", small) or (word.isupper() and 1 < len(word) < 4):
        return max(1, len(small) + small.count("w") * 2)
    found = len(re.findall(r"[aeiouy]+", small))
    found -= len(re.findall(r"[^aeiouy](?:es|ed|e|ely|eful|eless|ement|ements)$", small))
    found += len(re.findall(r"(?:[^aeiou]le|[td]ed|(?:[cgsxz]|sh|ch)es|[^aeiouy]les)$", small))
    found += len(re.findall(_SPLIT, small))
    return max(1, found)


def reading_ease(text: str) -> float:
    """Flesch's reading ease, at most 121.22: ``206.835 - 1.015 words/sentences - 84.6 syllables/words``.

    60 to 70 is plain English, below 30 is for graduates (Flesch 1948, J. Appl. Psychol. 32:221). NaN without words.
    """
    found = count(text)
    if not found.words:
        return math.nan
    return 206.835 - 1.015 * found.words / found.sentences - 84.6 * found.syllables / found.words


def grade_level(text: str) -> float:
    """The US school grade that understands it: ``0.39 words/sentences + 11.8 syllables/words - 15.59``.

    Kincaid et al. 1975, Naval Technical Training Command report 8-75. NaN without words.
    """
    found = count(text)
    if not found.words:
        return math.nan
    return 0.39 * found.words / found.sentences + 11.8 * found.syllables / found.words - 15.59


class Readability:
    """Flesch reading ease (``measure=ease``), or Flesch–Kincaid grade (``measure=grade``), where less is easier."""

    modality: Modality = "text"
    directions: ClassVar[Mapping[str, bool | None]] = dict.fromkeys(("words", "words a sentence", "syllables a word"))
    """The parts describe; none of them is better for being more, or less."""

    def __init__(self, measure: Literal["ease", "grade"] = "ease", name: str = "") -> None:
        self.name = name or ("readability" if measure == "ease" else "readability-grade")
        self.unit = "Flesch reading ease" if measure == "ease" else "US school grade"
        self.range = (-math.inf, EASIEST) if measure == "ease" else (LOWEST_GRADE, math.inf)
        self.higher_is_better = measure == "ease"
        self._formula = reading_ease if measure == "ease" else grade_level

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores ``(B,)``, and words, words a sentence and syllables a word as parts; NaN without a word."""
        total = [math.nan if sample.text is None else self._formula(sample.text) for sample in samples]
        counts = [count(sample.text or "") for sample in samples]
        parts = {
            "words": [math.nan if sample.text is None else c.words for sample, c in zip(samples, counts, strict=True)],
            "words a sentence": [c.words / c.sentences if c.words else math.nan for c in counts],
            "syllables a word": [c.syllables / c.words if c.words else math.nan for c in counts],
        }
        return Scores(
            torch.tensor(total, dtype=torch.float32),
            {name: torch.tensor(values, dtype=torch.float32) for name, values in parts.items()},
        )
