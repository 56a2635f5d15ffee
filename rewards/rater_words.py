"""What a simulated rater likes in a text although no prompt asks for it: each measure is in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from diffalign.types import Sample
from rewards.findings_checker import FindingsChecker
from rewards.findings_gold import FindingsGold

Words = Callable[[Sample], float]


def _part(name: str) -> Words:
    def measure(sample: Sample) -> float:
        return float(FindingsGold()([sample]).parts[name][0])

    return measure


def nothing_invented(sample: Sample) -> float:
    """1 where the text has nothing that is not in its row, a half with one such thing, a third with two."""
    return 1 / (1 + float(FindingsChecker()([sample]).parts["invented"][0]))


WORDS: Final[Mapping[str, Mapping[str, Words]]] = {
    "findings": {"ease": _part("ease"), "brevity": _part("brevity"), "nothing invented": nothing_invented},
}
"""Per world of texts and name: the measure. Ease and brevity are those of ``findings-gold``."""
