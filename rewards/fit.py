"""Fits reward heads to pairs: Bradley-Terry with ties, rater effects, a bootstrap ensemble, early stop, calibration.

For a pair with scores ``s1`` and ``s2`` of one head, judged by rater ``r``::

    d = exp(a_r) (s1 - s2) + b_r

is the log-odds that the first is preferred; with ties as an outcome, win : tie : loss are ``e^(d/2) : v : e^(-d/2)``
(Davidson 1970). ``exp(a_r)`` is how reliable the rater is (near 0: answers at random), ``b_r`` how much the rater
favours the first side (Bradley-Terry with annotator effects; Chen et al. 2013, "Crowd-BT", use a mixture instead). Both
have a normal prior of mean 0 and standard deviation 1, and are dropped when the heads judge.

Shape legend: ``B`` pairs of a batch, ``P`` pairs, ``K`` heads, ``R`` raters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.objectives.reward_model import LOSS, TIE, WIN, bradley_terry, bradley_terry_ties, centring
from diffalign.seeds import derive
from rewards.fit_config import FitConfig, Learning
from rewards.fit_data import Pairs, Study
from rewards.heads import Heads, features

CENTRING = 0.01
"""Weight of the term that holds the level of the scores (Eisenstein et al. 2023)."""
CHUNK = 4096
Progress = Callable[[str, int, int | None], None]


class Effects(nn.Module):
    """What the raters add to the heads: reliability and side bias, and how readily they call a tie."""

    def __init__(self, raters: Sequence[str], members: int, config: Learning, tie_share: float | None) -> None:
        """``tie_share`` is the share of ties where they are an outcome, else None."""
        super().__init__()
        self.raters = {name: number for number, name in enumerate(raters)}
        self.ties = tie_share is not None
        # One rater's reliability cannot be told from the scale of the scores.
        self.log_reliability = nn.Parameter(
            torch.zeros(members, len(raters)), requires_grad=config.rater_effects and len(raters) > 1
        )
        self.side = nn.Parameter(torch.zeros(members, len(raters)), requires_grad=config.side_bias)
        share = min(tie_share or 0.5, 0.99)
        start = math.log(2 * share / (1 - share))
        self.tie_log_strength = nn.Parameter(torch.full((members,), start), requires_grad=self.ties)

    def numbers(self, names: Sequence[str]) -> Tensor:
        """int64 ``(P,)``; a rater who was not seen in training gets the number after the last."""
        return torch.tensor([self.raters.get(name, len(self.raters)) for name in names])

    def loss(self, first: Tensor, second: Tensor, label: Tensor, rater: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """Negative log-likelihood ``(K, B)`` of scores ``(K, B)``; ``margin``, a number or ``(B,)``, goes without ties
        as an outcome.
        """
        members = len(first)
        unseen = torch.zeros(members, 1)
        reliability = torch.cat([self.log_reliability, unseen], 1)[:, rater].exp()
        side = torch.cat([self.side, unseen], 1)[:, rater]
        one, other = (reliability * first + side).flatten(), (reliability * second).flatten()
        if self.ties:
            strength = self.tie_log_strength[:, None].expand_as(first).flatten()
            found, _ = bradley_terry_ties(one, other, outcomes(label).repeat(members), strength)
        else:
            asked = margin.repeat(members) if isinstance(margin, Tensor) else margin
            found, _ = bradley_terry(one, other, label.repeat(members), asked)
        return found.view_as(first)

    def found(self, names: Sequence[str]) -> tuple[float, dict[str, dict[str, float]]]:
        """The mean reliability over judgements by these raters, and what was learned of each, as ``Fitted`` has it.

        Reliabilities are told in units of that mean: their level cannot be told from the scale of the scores.
        """
        reliability = self.log_reliability.detach().exp().mean(0)
        ordinary = float(reliability[self.numbers(names)].mean())
        side = self.side.detach().mean(0)
        raters = {
            name: {"reliability": float(reliability[i]) / ordinary, "side_bias": float(side[i])}
            for name, i in self.raters.items()
        }
        return ordinary, raters

    def prior(self) -> Tensor:
        """Minus the log of the prior, up to a constant; scalar."""
        return (self.log_reliability.square().sum() + self.side.square().sum()) / 2


@dataclass(frozen=True)
class Calibration:
    """From a difference of standardised scores to probabilities."""

    slope: float
    """Log-odds per unit of difference."""
    temperature: float
    """What calibration divided the heads' own log-odds by; above 1 they were too sure."""
    tie_log_strength: float | None
    """``log v`` where ties are an outcome."""

    def probabilities(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first being preferred and of a tie, each ``(B,)``; the latter is 0 without ties as an outcome."""
        odds = self.slope * difference
        if self.tie_log_strength is None:
            return odds.sigmoid(), torch.zeros_like(odds)
        logits = torch.stack([odds / 2, torch.full_like(odds, self.tie_log_strength), -odds / 2], 1)
        shares = logits.softmax(1)
        return shares[:, WIN], shares[:, TIE]


@dataclass(frozen=True)
class Fitted:
    """The heads of one criterion and what was learned on the way."""

    heads: Heads
    calibration: Calibration
    raters: dict[str, dict[str, float]]
    """Per rater of the training pairs: ``reliability``, 1 the mean over judgements, and ``side_bias``, log-odds."""
    best_epochs: list[int]
    """Per head; 0 means that no epoch was better than no scores at all."""
    losses: list[float]
    """Mean loss over the heads on the pairs that stop training, before training and after each epoch."""

    def scores(self, study: Study, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Standardised scores ``(K, P)`` of the first and the second samples of these rows."""
        return _scored(self.heads, study, rows, self.heads.standardised)

    def differences(self, study: Study, rows: Sequence[int]) -> Tensor:
        """Ensemble mean of first minus second, ``(P,)``."""
        first, second = self.scores(study, rows)
        return (first - second).mean(0)


def outcomes(label: Tensor) -> Tensor:
    """int64 ``(B,)`` of WIN, TIE, LOSS from hard labels."""
    return torch.where(label == 0.5, TIE, torch.where(label > 0.5, WIN, LOSS))


def ties_as(label: Tensor, wanted: Literal["auto", "outcome", "half"], criterion: str) -> bool:
    """Whether ties are an outcome of their own; ConfigError where they were asked to be and labels are soft."""
    hard = bool(((label == 0) | (label == 0.5) | (label == 1)).all())
    if wanted == "outcome" and not hard:
        raise ConfigError(
            f"ties: outcome needs hard labels, and some of {criterion} are soft: a label such as 0.7 does not say how"
            " much of it is a tie; use ties: half"
        )
    return wanted != "half" and hard and bool((label == 0.5).any())


def tie_share(study: Pairs, rows: Sequence[int], criterion: str, config: Learning) -> float | None:
    """The share of ties among these rows where they are an outcome of their own, else None."""
    label = study.label[torch.tensor(rows)]
    if not ties_as(label, config.ties, criterion):
        return None
    if config.strength == "margin":
        raise ConfigError("strength: margin is for pairs with a winner, and here ties are an outcome; set ties: half")
    return float((label == 0.5).float().mean())


def check(study: Pairs, rows: Sequence[int], criterion: str, what: str, *, side_bias: bool) -> None:
    """InputError where these pairs of a criterion cannot be learned from, or not be told from a habit."""
    label = study.label[torch.tensor(rows, dtype=torch.int64)]
    decided = label[label != 0.5]
    if len(decided) == 0:
        reason = f"all {len(rows)} are ties" if rows else "there is none"
        raise InputError(
            f"{criterion}: none of the pairs to {what} is decided ({reason}); take more prompts, another seed or share,"
            " or leave the criterion out"
        )
    if side_bias and len(decided) > 1 and bool((decided > 0.5).all() | (decided < 0.5).all()) and what == "learn from":
        side = "first" if decided[0] > 0.5 else "second"
        raise InputError(
            f"{criterion}: every decided pair prefers the {side}, so a preference cannot be told from a habit; if the"
            f" file puts its winners {side}, set side_bias: false; if not, the labels are wrong"
        )


def fit(
    study: Study,
    train: Sequence[int],
    tune: Sequence[int],
    criterion: str,
    config: FitConfig,
    on_progress: Progress | None = None,
) -> Fitted:
    """The heads of one criterion from the rows ``train``, stopped and calibrated by ``tune``.

    RefusedError where no head was ever better than none, or training diverged. The same arguments give the same heads.
    """
    share = tie_share(study, [*train, *tune], criterion, config)
    seeds = [derive(config.seed, "head", criterion, k) for k in range(config.ensemble)]
    dimensions = study.texts.shape[1]
    heads = Heads(dimensions, study.images.shape[1] - dimensions, config.hidden, seeds)
    heads.fit_features(features(*study.samples(train)))
    effects = Effects(sorted({study.rater[row] for row in train}), config.ensemble, config, share)
    best, losses = _optimise(heads, effects, study, train, tune, criterion, config, on_progress)
    if not any(best):
        raise RefusedError(
            f"{criterion}: nothing was learned: on held-out prompts no epoch was better than no score at all (loss"
            f" {losses[0]:.4f}); give more pairs, a lower learning_rate, or an encoder that sees what was judged, or"
            " leave the criterion out"
        )
    image, text = study.samples(train)
    with torch.no_grad():
        heads.fit_scores(heads(features(image, text)))
    if not float(heads.spread) > 0:
        raise RefusedError(f"{criterion}: every training image got the same score; the encoder cannot tell them apart")
    heads.eval().requires_grad_(False)
    ordinary, raters = effects.found([study.rater[row] for row in train])
    log_strength = float(effects.tie_log_strength.detach().mean()) if effects.ties else None
    calibration = calibrate(heads, ordinary, log_strength, study, tune, config)
    return Fitted(heads, calibration, raters, best, losses)


def _optimise(
    heads: Heads,
    effects: Effects,
    study: Study,
    train: Sequence[int],
    tune: Sequence[int],
    criterion: str,
    config: FitConfig,
    on_progress: Progress | None,
) -> tuple[list[int], list[float]]:
    """Trains all heads side by side; leaves each at its best epoch, and returns those and the losses."""
    rows = torch.tensor(list(train))
    counts = draws([study.group[row] for row in train], config.ensemble, derive(config.seed, "draws", criterion))
    weight = counts * weights(study, train, config)
    rater, margin = effects.numbers([study.rater[row] for row in train]), margins(study, train, config)
    prior = 1 / float(weight.sum(1).mean())
    optimiser = torch.optim.AdamW(
        [
            {"params": list(heads.parameters()), "weight_decay": config.weight_decay},
            # Few numbers that every pair of a rater speaks of: a larger step; their prior takes the place of decay.
            {"params": list(effects.parameters()), "lr": 30 * config.learning_rate, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    shuffle = torch.Generator().manual_seed(derive(config.seed, "order", criterion))
    keeper = _Best(heads, effects, _tuning_loss(heads, effects, study, tune, config))
    for epoch in range(1, config.epochs + 1):
        for batch in torch.randperm(len(rows), generator=shuffle).split(config.batch_size):
            picked = rows[batch]
            text = study.texts[study.text[picked]]
            first = heads(features(study.images[study.first[picked]], text))
            second = heads(features(study.images[study.second[picked]], text))
            loss = effects.loss(first, second, study.label[picked], rater[batch], margin[batch])
            loss = ((loss + CENTRING * centring(first, second)) * weight[:, batch]).mean(1).sum()
            optimiser.zero_grad()
            (loss + prior * effects.prior()).backward()
            optimiser.step()
        keeper.see(epoch, _tuning_loss(heads, effects, study, tune, config))
        if not math.isfinite(keeper.history[-1]):
            raise RefusedError(
                f"{criterion}: the loss is no number any more; give a lower learning_rate ({config.learning_rate:g} was"
                " given)"
            )
        if on_progress:
            on_progress(f"fitting {criterion}", epoch, config.epochs)
        if epoch - max(keeper.epochs) >= config.patience:
            break
    keeper.restore()
    return keeper.epochs, keeper.history


def draws(groups: Sequence[str], members: int, seed: int) -> Tensor:
    """How often each row counts for each head, float32 ``(K, P)``: prompts drawn with replacement (Efron 1979).

    A single head gets every prompt once.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if members == 1:
        return torch.ones(1, len(groups))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (members, len(names)), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=len(names)) for row in drawn])
    return counts[:, torch.tensor([names[name] for name in groups])].float()


def margins(study: Pairs, rows: Sequence[int], config: Learning) -> Tensor:
    """By how much more the scores of each of these rows should differ, ``(P,)``, in log-odds."""
    strength = study.strength[torch.tensor(list(rows))]
    return strength if config.strength == "margin" else torch.zeros_like(strength)


def weights(study: Pairs, rows: Sequence[int], config: Learning) -> Tensor:
    """How much each of these rows counts, ``(P,)`` of mean 1; InputError where none counts."""
    strength = study.strength[torch.tensor(list(rows))]
    if config.strength != "weight":
        return torch.ones_like(strength)
    if not float(strength.sum()) > 0:
        raise InputError("the strength of every pair is 0, so there is nothing to learn; set strength: ignore")
    return strength / strength.mean()


@torch.no_grad()
def _tuning_loss(heads: Heads, effects: Effects, study: Study, tune: Sequence[int], config: FitConfig) -> Tensor:
    """Mean loss ``(K,)`` of each head, with what is known of the raters."""
    first, second = _scored(heads, study, tune, heads)
    rater = effects.numbers([study.rater[row] for row in tune])
    loss = effects.loss(first, second, study.label[torch.tensor(list(tune))], rater)
    return (loss * weights(study, tune, config)).mean(1)


class _Best:
    """The best epoch of each head and of the rater effects that belong to it."""

    def __init__(self, heads: Heads, effects: Effects, loss: Tensor) -> None:
        self.parameters = [*heads.parameters(), *effects.parameters()]
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        self.loss = loss
        self.epochs = [0] * len(loss)
        self.history = [float(loss.mean())]

    def see(self, epoch: int, loss: Tensor) -> None:
        """Keeps what is better than before."""
        self.history.append(float(loss.mean()))
        for k in (loss < self.loss).nonzero().flatten().tolist():
            self.epochs[k], self.loss[k] = epoch, loss[k]
            for kept, parameter in zip(self.kept, self.parameters, strict=True):
                kept[k] = parameter.detach()[k]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts every head back to its best epoch."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)


def _scored(
    heads: Heads, study: Study, rows: Sequence[int], score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores ``(K, P)`` of both sides, without gradient."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for picked in torch.tensor(list(rows), dtype=torch.int64).split(CHUNK):
            text = study.texts[study.text[picked]]
            for side, images in zip(sides, (study.first, study.second), strict=True):
                side.append(score(features(study.images[images[picked]], text)))
    empty = torch.zeros(heads.members, 0)
    return torch.cat(sides[0] or [empty], 1), torch.cat(sides[1] or [empty], 1)


def calibrate(
    heads: Heads, ordinary: float, log_strength: float | None, study: Study, rows: Sequence[int], config: FitConfig
) -> Calibration:
    """The calibration of the ensemble mean on these rows. Rater effects stay out, but for the ``ordinary`` reliability:
    it is the probability for a rater like those.
    """
    first, second = _scored(heads, study, rows, heads.standardised)
    label, weight = study.label[torch.tensor(list(rows))], weights(study, rows, config)
    return tempered((first - second).mean(0), label, weight, float(heads.spread) * ordinary, log_strength)


def tempered(
    difference: Tensor, label: Tensor, weight: Tensor, spread: float, log_strength: float | None
) -> Calibration:
    """Slope (and tie strength) that make differences of scores ``(P,)`` likeliest (Platt 1999; Guo et al. 2017).

    ``spread`` is the slope to start from. The log of the temperature has a normal prior of mean 0 and standard
    deviation 1, so that a few pairs that are all ordered rightly do not claim certainty.
    """
    log_temperature = torch.zeros((), requires_grad=True)
    tie = torch.tensor(log_strength or 0.0, requires_grad=True)
    start = tie.detach().clone()
    parameters = [log_temperature] if log_strength is None else [log_temperature, tie]
    optimiser = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        odds = spread * difference / log_temperature.exp()
        if log_strength is None:
            loss, _ = bradley_terry(odds, torch.zeros_like(odds), label)
        else:
            loss, _ = bradley_terry_ties(odds, torch.zeros_like(odds), outcomes(label), tie)
        total = (loss * weight).sum() + (log_temperature.square() + (tie - start).square()) / 2
        total.backward()
        return total

    optimiser.step(closure)
    temperature = float(log_temperature.detach().exp())
    return Calibration(spread / temperature, temperature, None if log_strength is None else float(tie.detach()))
