"""``fluency``: how likely a text is to the model that training started from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffalign.types import Draw, Modality, Sample, Scores
from pipelines.language import LanguagePolicy


class Fluency:
    """Mean log-probability of a text's tokens, and of its end, under the reference of a policy.

    Minus its exponential is the perplexity. It falls when a policy leaves the language that it began with, so it stands
    beside what was trained on; it is nothing to be maximised, for the likeliest text is dull.
    """

    name = "fluency"
    modality: Modality = "text"
    unit = "nats per token"
    range = (-math.inf, 0.0)
    higher_is_better = True
    tolerance = 0.1
    """Whatever a policy learns moves it away from its base: a perplexity that is 10 % higher is no alarm."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Totals float32 ``(B,)``; NaN for a sample that has no token."""
        found = torch.full((len(samples),), math.nan)
        known = [i for i, sample in enumerate(samples) if sample.text is not None and self.policy.length(sample)]
        for chunk in torch.tensor(known, dtype=torch.int64).split(self.policy.batch_size):
            some = [samples[i] for i in chunk.tolist()]
            with self.policy.reference():
                likely = self.policy.log_likelihood(some, Draw(torch.zeros(len(some)), tuple(range(len(some)))))
            found[chunk] = likely.cpu() / torch.tensor([float(self.policy.length(sample)) for sample in some])
        return Scores(found)
