"""A reward model of the frontier's own: the base model's trunk with a linear head, fitted to pairs as InstructGPT's is.

It learns from the same judgements as DPO, so what follows it knows no more of the gold reward than DPO does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.objectives.reward_model import bradley_terry
from diffalign.seeds import derive, permutation
from diffalign.types import Modality, Preference, Sample, Scores


class FittedReward(nn.Module):
    """What a text is worth: a line through the last hidden state of the trunk, after the text's end.

    Shape legend: ``B`` samples, ``T`` tokens of the longest.
    """

    name = "fitted"
    modality: Modality = "text"
    unit = "score"
    range = (-float("inf"), float("inf"))
    higher_is_better = True

    def __init__(self, trunk: nn.Module, tokenizer: Any, batch_size: int = 64) -> None:
        """``trunk`` is a transformers model without an output layer; all of it is trained."""
        super().__init__()
        self.trunk, self.tokenizer, self.batch_size = trunk, tokenizer, batch_size
        self.head = nn.Linear(int(trunk.config.hidden_size), 1)  # type: ignore[union-attr,arg-type]
        nn.init.normal_(self.head.weight, std=(int(self.head.in_features) + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def raw(self, samples: Sequence[Sample]) -> Tensor:
        """Scores ``(B,)`` with gradient, before they are put on the gold reward's scale."""
        rows = [self._tokens(sample) for sample in samples]
        last = torch.tensor([len(row) - 1 for row in rows])
        tokens = torch.zeros((len(rows), int(last.max()) + 1), dtype=torch.int64)  # on the right: causal, so unseen
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        hidden = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        found: Tensor = self.head(hidden[torch.arange(len(rows)), last])[:, 0]
        return found

    def _tokens(self, sample: Sample) -> list[int]:
        asked = self.tokenizer(sample.prompt.text).input_ids
        said = self.tokenizer(sample.text or "", add_special_tokens=False).input_ids
        return [*asked, *said, self.tokenizer.eos_token_id]

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample]) -> Scores:
        """See Reward: scores ``(B,)`` with the mean and spread that the gold reward has on the base's samples."""
        parts = [self.raw(samples[i : i + self.batch_size]) for i in range(0, len(samples), self.batch_size)]
        return Scores(torch.cat(parts) * self.scale + self.shift)

    def calibrate(self, samples: Sequence[Sample], gold: Tensor) -> None:
        """Puts the scores on the gold reward's scale, so that one KL coefficient means the same of both."""
        raw = self(samples).total
        self.scale = gold.std() / raw.std()
        self.shift = gold.mean() - self.scale * raw.mean()


def fit(reward: FittedReward, pairs: Sequence[Preference], *, epochs: int = 4, rate: float = 3e-4) -> None:
    """Fits by Bradley-Terry (Ouyang et al. 2022, eq. 1), 32 pairs an update, the rate falling linearly to 0."""
    optimiser = torch.optim.AdamW(reward.parameters(), lr=rate, weight_decay=0.01)
    total, done = epochs * -(-len(pairs) // 32), 0
    for epoch in range(epochs):
        order = permutation(len(pairs), derive(0, "fit", epoch))
        for i in range(0, len(pairs), 32):
            few = [pairs[k] for k in order[i : i + 32]]
            scores = reward.raw([pair.first for pair in few] + [pair.second for pair in few])
            first, second = scores.chunk(2)
            loss, _ = bradley_terry(first, second, torch.tensor([pair.label for pair in few]))
            optimiser.zero_grad()
            loss.mean().backward()
            nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - done / total)
            optimiser.step()
            done += 1


def accuracy(reward: FittedReward, pairs: Sequence[Preference]) -> float:
    """Share of the pairs that the reward orders as they were judged."""
    scores = reward([pair.first for pair in pairs] + [pair.second for pair in pairs]).total
    first, second = scores.chunk(2)
    return float(((first > second) == (torch.tensor([pair.label for pair in pairs]) > 0.5)).float().mean())


def save(reward: FittedReward, path: Path) -> None:
    """Writes the weights."""
    save_file({name: value.contiguous() for name, value in reward.state_dict().items()}, path)


def load(reward: FittedReward, path: Path) -> FittedReward:
    """Takes the weights of a file."""
    reward.load_state_dict(load_file(path))
    return reward.eval()
