"""``findings-gold``: a text of the findings world that is consistent and easy to read, without getting longer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffalign.errors import ConfigError
from diffalign.types import Modality, Sample, Scores
from diffalign.worlds import findings
from rewards.findings_checker import FindingsChecker, row_of
from rewards.readability import reading_ease
from rewards.text_rules import words

HARD, EASY = 20.0, 80.0
"""Reading ease at and below which a text earns nothing for it, and at and above which nothing more."""


class FindingsGold:
    """``consistency * (1 + ease) / 2 * brevity``, each of them in [0, 1].

    Consistency is the total of ``findings-checker``. Ease is Flesch's reading ease between ``HARD`` and ``EASY``.
    Brevity is 1 up to the length that flawless texts of this row and task have on average (``reference_words``), and
    reference/words beyond. A wrong or missing fact of six costs a sixth; what that could gain in ease is less.
    """

    name = "findings-gold"
    modality: Modality = "text"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self) -> None:
        self._checker = FindingsChecker()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Totals ``(B,)``; the parts are the three factors. NaN for a sample without a text, 0 for an empty one."""
        consistency = self._checker(samples).total
        ease = torch.tensor([_ease(sample.text) for sample in samples])
        brevity = torch.tensor([_brevity(sample) for sample in samples])
        parts = {"consistency": consistency, "ease": ease, "brevity": brevity}
        return Scores(consistency * (1 + ease) / 2 * brevity, parts)


def _ease(text: str | None) -> float:
    if text is None:
        return math.nan
    found = reading_ease(text)
    return 0.0 if math.isnan(found) else min(1.0, max(0.0, (found - HARD) / (EASY - HARD)))


def _brevity(sample: Sample) -> float:
    if sample.text is None:
        return math.nan
    row, task = row_of(sample.prompt)
    try:
        reference = findings.reference_words({**row, "task": task})
    except ConfigError:
        raise ConfigError(
            f"findings-gold knows the length of the tasks {', '.join(findings.TASKS)}; the prompt"
            f" {sample.prompt.key[:80]!r} has the task {task!r}"
        ) from None
    return min(1.0, reference / max(1, words(sample.text)))
