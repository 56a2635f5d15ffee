"""Recorded pairs that are not trained on: in how many of them does the policy prefer what people preferred?

The accuracy on pairs that are trained on rises to 1 as they are learned by heart; this one says what carries over.

Shape legend: ``n`` rows, a row is one (pair, draw).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from diffalign.config import ObjectiveConfig
from diffalign.experience import Numbered
from diffalign.lessons import PAIRWISE, Comparisons
from diffalign.processes import Processes
from diffalign.types import Policy, Preference

ASKED_OF = (*PAIRWISE, "kto")
"""Objectives whose policy and reference, compared, are a preference."""
MOST = 256
"""Pairs that are asked about, of those that are held out: enough for a standard error of 3 points."""


@dataclass(frozen=True)
class HeldOutPairs(Sequence[Preference]):
    """Some rows of a file of pairs, each read when it is asked for. None of them should be a tie: it has no winner."""

    table: Numbered
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Preference]: ...
    def __getitem__(self, index: int | slice) -> Preference | Sequence[Preference]:
        if isinstance(index, slice):
            return HeldOutPairs(self.table, self.rows[index])
        return self.table[self.rows[index]]

    @torch.no_grad()
    def accuracy(
        self, policy: Policy, objective: ObjectiveConfig, seed: int, processes: Processes | None = None
    ) -> float:
        """Share of rows whose preferred sample gained more on the other than in the reference; equal is one half.

        Times and noise are those of ``objective.draws``, and the same at every call. Several processes share the work.
        """
        processes = processes or Processes()
        plain = objective.model_copy(update={"loser_safety": None})  # it scales gradients, and there are none
        lesson = Comparisons(policy, plain, seed, 0, self)
        rows = lesson.rows(torch.arange(len(self)), 0)
        right = torch.zeros(1)
        chunks = list(torch.arange(len(rows)).split(max(1, policy.batch_size // lesson.samples_per_row)))
        for chunk in self._own(chunks, processes):
            _, metrics = PAIRWISE["dpo"](**lesson.inputs(rows.take(chunk)), beta=1.0)
            right += float(metrics["accuracy"]) * len(chunk)
        return float(processes.summed("held-out pairs", right)) / len(rows)

    def _own(self, chunks: Sequence[torch.Tensor], processes: Processes) -> Iterator[torch.Tensor]:
        return (chunks[number] for number in processes.own(len(chunks)).tolist())
