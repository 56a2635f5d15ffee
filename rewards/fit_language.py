"""Fits a language model to pairs of texts: Bradley-Terry on a scalar head (Ouyang et al. 2022, eq. 1).

The loss is that of the heads on images (``rewards.fit``): soft labels, ties as an outcome or as a half, margins or
weights by strength, rater effects, a term that holds the level of the scores (Eisenstein et al. 2023), stopped and
calibrated on held-out prompts. Here the encoder itself is trained, in every weight or by adapters.

Shape legend: ``B`` pairs of a batch, ``N`` texts, ``P`` pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from diffalign.errors import ConfigError, RefusedError
from diffalign.objectives.reward_model import centring
from diffalign.seeds import derive
from rewards.fit import CENTRING, Calibration, Effects, Progress, margins, tempered, tie_share, weights
from rewards.fit_config import TextFitConfig
from rewards.fit_stopping import until_no_better
from rewards.fit_texts import Texts, slope
from rewards.language_model import HEAD, Classifier, Reader, headed

WARM_UP = 0.1
"""Share of the updates over which the learning rate rises."""
EFFECTS_RATE = 0.03
"""Learning rate of the few numbers that say how raters are; their prior takes the place of decay."""


@dataclass(frozen=True)
class FittedLanguage:
    """A language model that judges, and what was learned on the way; see ``rewards.fit.Fitted``."""

    classifier: Classifier
    """Its raw scores over the training texts have standard deviation 1, once their length is taken out."""
    level: float
    """What is taken off a raw score, so that the training texts have mean 0."""
    length_coefficient: float
    """What ``log(1 + words)`` counts in a raw score, and is taken off; 0 where length is free."""
    known: Tensor
    """float32 ``(N,)``: the score of every text of the study."""
    calibration: Calibration
    raters: dict[str, dict[str, float]]
    best_epochs: list[int]
    losses: list[float]

    def scores(self, study: Texts, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores ``(1, P)`` of both sides; the study is the one that it was fitted to."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        return self.known[study.first[index]][None], self.known[study.second[index]][None]

    def differences(self, study: Texts, rows: Sequence[int]) -> Tensor:
        """First minus second, ``(P,)``."""
        first, second = self.scores(study, rows)
        return (first - second)[0]


class Fitter:
    """Fits anew from the same base model, whatever the rows."""

    def __init__(self, where: str | Path, reader: Reader) -> None:
        """``where`` is the folder or hub id of the base model."""
        self.where, self.reader = where, reader

    def __call__(
        self,
        study: Texts,
        train: Sequence[int],
        tune: Sequence[int],
        criterion: str,
        config: TextFitConfig,
        on_progress: Progress | None = None,
    ) -> FittedLanguage:
        """The model of one criterion from the rows ``train``, stopped and calibrated by ``tune``.

        RefusedError where no epoch was better than no score at all. The same arguments give the same model on a CPU.
        """
        share = tie_share(study, [*train, *tune], criterion, config)
        model = headed(self.where, config.encoder)
        model.requires_grad_(config.lora is None)
        if config.lora is not None:
            model = adapted(model, config)
        classifier = Classifier(model, self.reader, config.device)
        effects = Effects(sorted({study.rater[row] for row in train}), 1, config, share)
        training = _Training(classifier, effects, study, train, tune, criterion, config)
        best = training.run(on_progress)
        if config.lora is not None:
            classifier = Classifier(classifier.model.merge_and_unload(), self.reader, config.device)
        raw = classifier.scores(study.tokens)
        fitted = _standardised(classifier, raw, study, train, criterion, config)
        ordinary, raters = effects.found([study.rater[row] for row in train])
        first, second = (fitted[2][side[torch.tensor(list(tune))]] for side in (study.first, study.second))
        calibration = tempered(
            first - second, study.label[torch.tensor(list(tune))], weights(study, tune, config), fitted[3] * ordinary,
            float(effects.tie_log_strength.detach()[0]) if effects.ties else None,
        )  # fmt: skip
        level, coefficient, known, _ = fitted
        return FittedLanguage(classifier, level, coefficient, known, calibration, raters, [best], training.losses)


def adapted(model: Any, config: TextFitConfig) -> Any:
    """The model with adapters, which are trained with the head. ConfigError where a target is no layer of it."""
    assert config.lora is not None
    lora = LoraConfig(
        task_type="SEQ_CLS", r=config.lora.rank, lora_alpha=config.lora.alpha,
        target_modules=config.lora.targets or "all-linear",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "lora"))
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"lora.targets {config.lora.targets}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def _standardised(
    classifier: Classifier, raw: Tensor, study: Texts, train: Sequence[int], criterion: str, config: TextFitConfig
) -> tuple[float, float, Tensor, float]:
    """Level, length's coefficient, standardised scores ``(N,)``, and the spread that the head was divided by."""
    rows = torch.tensor(list(train))
    gap = study.gap(train)
    told = raw[study.first[rows]] - raw[study.second[rows]]
    coefficient = slope(told, gap) if config.length == "controlled" else 0.0
    free = raw - coefficient * study.size
    seen = free[torch.cat([study.first[rows], study.second[rows]]).unique()]
    spread = float(seen.std(correction=0))
    if not spread > 0:
        raise RefusedError(f"{criterion}: every training text got the same score; the encoder cannot tell them apart")
    classifier.model.get_parameter(HEAD).div_(spread)
    level = float(seen.mean()) / spread
    return level, coefficient / spread, free / spread - level, spread


class _Training:
    """Everything that changes while the model is trained."""

    def __init__(
        self, classifier: Classifier, effects: Effects, study: Texts, train: Sequence[int], tune: Sequence[int],
        criterion: str, config: TextFitConfig,
    ) -> None:  # fmt: skip
        self.classifier, self.effects, self.study, self.config = classifier, effects, study, config
        self.criterion, self.train, self.tune = criterion, list(train), list(tune)
        self.rater = effects.numbers(study.rater)
        self.weight, self.margin = torch.zeros(len(study)), torch.zeros(len(study))
        for rows in (self.train, self.tune):
            self.weight[rows] = weights(study, rows, config)
        self.margin[self.train] = margins(study, self.train, config)
        self.trained = [p for p in classifier.model.parameters() if p.requires_grad]
        self.learned = [*self.trained, *effects.parameters()]
        self.optimiser = torch.optim.AdamW([
            {"params": self.trained, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": list(effects.parameters()), "lr": EFFECTS_RATE, "weight_decay": 0.0},
        ])  # fmt: skip
        updates = config.epochs * -(-len(self.train) // config.batch_size)
        rising = max(1, round(WARM_UP * updates))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda done: min((done + 1) / rising, (updates - done) / max(1, updates - rising + 1))
        )
        self.losses: list[float] = []

    def run(self, on_progress: Progress | None) -> int:
        """Trains, leaves model and effects at their best epoch, and returns that."""
        order = random.Random(derive(self.config.seed, "order", self.criterion))

        def update(epoch: int) -> None:
            rows = order.sample(self.train, len(self.train))
            for i in range(0, len(rows), self.config.batch_size):
                some = rows[i : i + self.config.batch_size]
                self._update(some)
                if on_progress:
                    on_progress(f"fitting {self.criterion}, epoch {epoch}", i + len(some), len(rows))

        best, self.losses = until_no_better(
            self.learned, self.config.epochs, self.config.patience, update, self._tuning_loss
        )
        if not best:
            raise RefusedError(
                f"{self.criterion}: nothing was learned: on held-out prompts no epoch was better than no score at all"
                f" (loss {self.losses[0]:.4f}, then {self.losses[1]:.4f}); give more pairs, or another learning_rate"
            )
        self.classifier.model.requires_grad_(False)
        return best

    def _update(self, rows: Sequence[int]) -> None:
        self.optimiser.zero_grad()
        # Texts of like length together: a batch is as long as its longest.
        rows = sorted(rows, key=lambda row: max(len(self._tokens(row, side)) for side in (0, 1)))
        for i in range(0, len(rows), self.config.micro_batch_size):
            loss = self._loss(rows[i : i + self.config.micro_batch_size], level=True).sum() / len(rows)
            if not bool(loss.isfinite()):
                raise RefusedError(
                    f"{self.criterion}: the loss is no number any more; give a lower learning_rate"
                    f" ({self.config.learning_rate:g} was given)"
                )
            (loss + self.effects.prior() / len(self.train) if i == 0 else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.schedule.step()

    def _tokens(self, row: int, side: int) -> Sequence[int]:
        return self.study.tokens[int((self.study.first, self.study.second)[side][row])]

    def _loss(self, rows: Sequence[int], *, level: bool) -> Tensor:
        """Weighted loss of each of these rows ``(B,)``; with ``level`` the term that holds it, and the margins."""
        index = torch.tensor(list(rows))
        first, second = (
            self.classifier.raw([self._tokens(row, 0) for row in rows] + [self._tokens(row, 1) for row in rows])
            .cpu().chunk(2)
        )  # fmt: skip
        margin = self.margin[index] if level else 0.0
        label, rater = self.study.label[index], self.rater[index]
        found = self.effects.loss(first[None], second[None], label, rater, margin)[0]
        if level:
            found = found + CENTRING * centring(first, second)
        return found * self.weight[index]

    @torch.no_grad()
    def _tuning_loss(self) -> float:
        """Mean over the rows that stop training, of what is a likelihood."""
        size = self.config.micro_batch_size
        parts = [self._loss(self.tune[i : i + size], level=False) for i in range(0, len(self.tune), size)]
        return float(torch.cat(parts).mean())
