"""How good a fitted reward model is, on prompts that it never saw: the numbers of its card.

Shape legend: ``P`` pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import RefusedError
from diffalign.evaluation import mean_interval
from diffalign.seeds import derive
from rewards.fit import Calibration, Progress, fit
from rewards.fit_config import Learning
from rewards.fit_data import Pairs, Parts

Floats = NDArray[np.float64]
BINS = 10
FEWEST_IN_BIN = 10
FEWEST_IN_GROUP = 10
"""Decided pairs below which a subgroup is not shown: its accuracy would be chance."""
MOST_VALUES = 8
"""Different values up to which an attribute of the prompts makes subgroups."""
HARDLY = 0.02
"""A gain of accuracy that nobody would collect labels for."""
SHARES = (0.125, 0.25, 0.5, 1.0)


class Model(Protocol):
    """A fitted reward model of one criterion, of images or texts, as the card sees it; see ``rewards.fit.Fitted``."""

    @property
    def calibration(self) -> Calibration: ...  # noqa: D102
    @property
    def raters(self) -> Mapping[str, Mapping[str, float]]: ...  # noqa: D102
    @property
    def best_epochs(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def losses(self) -> Sequence[float]: ...  # noqa: D102
    def scores(self, study: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def differences(self, study: Any, rows: Sequence[int]) -> Tensor: ...  # noqa: D102


Fit = Callable[[Any, Sequence[int], Sequence[int], str, Any, Progress | None], Model]
"""What fits such a model to rows of a study: ``rewards.fit.fit`` or its like. RefusedError where nothing is learned."""


@dataclass(frozen=True)
class Judged:
    """Pairs with what a judge makes of them: positive where the first is better."""

    difference: Floats
    label: Floats
    group: Sequence[str]

    def take(self, rows: Sequence[int]) -> Judged:
        """These pairs alone."""
        return Judged(self.difference[rows], self.label[rows], [self.group[row] for row in rows])

    def right(self) -> tuple[Floats, NDArray[np.int64]]:
        """Of the decided pairs: 1 where ordered as labelled, 0 where not, a half where equal; and their groups."""
        decided = self.label != 0.5
        towards = np.sign(self.difference) * np.sign(self.label - 0.5)
        groups = np.unique(np.asarray(self.group, dtype=object).astype(str), return_inverse=True)[1]
        return (towards[decided] + 1) / 2, groups[decided].astype(np.int64)


def accuracy(judged: Judged) -> dict[str, Any]:
    """Share of decided pairs ordered as labelled, with its interval over prompts: ``value``, ``ci95``, ``n``."""
    right, groups = judged.right()
    found = mean_interval(right, groups, (0.0, 1.0))
    return {"value": found["mean"], "ci95": found["ci95"], "n": len(right), "prompts": len(set(groups.tolist()))}


def agreement(study: Pairs, rows: Sequence[int]) -> dict[str, Any]:
    """How likely a second rater agrees about a pair that both decided, ``value``, ``ci95``, ``n`` pairs of raters.

    Judgements of one pair by different, named raters are compared, whichever side the samples stood on. ``value`` is
    None where no pair was judged twice. ``ties`` is the share of the pairs of raters in which one called a tie.
    """
    judged: dict[tuple[str, int, int, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        first, second, label = int(study.first[row]), int(study.second[row]), float(study.label[row])
        if not study.rater[row] or first == second:
            continue
        label = label if first < second else 1 - label
        pair = study.group[row], int(study.text[row]), min(first, second), max(first, second)
        judged[pair].setdefault(study.rater[row], label)
    agreed, groups, tied = [], [], 0
    for pair, labels in judged.items():
        for one, other in combinations(labels.values(), 2):
            if 0.5 in (one, other):
                tied += 1
                continue
            agreed.append(float((one > 0.5) == (other > 0.5)))
            groups.append(str(pair[0]))
    index = np.unique(np.array(groups, dtype=str), return_inverse=True)[1].astype(np.int64)
    found = mean_interval(np.array(agreed), index, (0.0, 1.0))
    both = tied + len(agreed)
    return {
        "value": found["mean"], "ci95": found["ci95"], "n": len(agreed), "ties": tied / both if both else None,
        "pairs": sum(len(labels) > 1 for labels in judged.values()),
    }  # fmt: skip


def baselines(study: Pairs, train: Sequence[int], rows: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Accuracy of judges that understand nothing, or were not taught. What they go by is learned on ``train``."""
    label, groups = study.label.double().numpy()[list(rows)], [study.group[row] for row in rows]
    judges = {"always the first": np.ones(len(rows))}
    judges |= {name: values.double().numpy() for name, values in study.naive(train, rows).items()}
    return {name: accuracy(Judged(values, label, groups)) for name, values in judges.items()}


def calibration(probability: Floats, label: Floats) -> dict[str, Any]:
    """Predicted against seen shares, and the expected calibration error (Naeini et al. 2015; Guo et al. 2017).

    Each pair counts from the side that the model prefers, as which side is the first means nothing, so predictions are
    0.5 or more. ``label`` is the share of the first, a tie a half. Bins hold equally many pairs, ``FEWEST_IN_BIN`` or
    more where there are as many; the error is the mean distance of the bins, weighted by their pairs.
    """
    turned = probability < 0.5
    predicted, seen = np.where(turned, 1 - probability, probability), np.where(turned, 1 - label, label)
    order = np.argsort(predicted, kind="stable")
    bins = np.array_split(order, max(1, min(BINS, len(order) // FEWEST_IN_BIN)))
    rows = [{"predicted": float(predicted[b].mean()), "seen": float(seen[b].mean()), "n": len(b)} for b in bins]
    error = sum(row["n"] * abs(row["predicted"] - row["seen"]) for row in rows) / len(order)
    return {"expected_calibration_error": error, "bins": rows}


def subgroups(study: Pairs, rows: Sequence[int], judged: Judged) -> list[dict[str, Any]]:
    """Accuracy per rater, per value of each attribute of the prompts that has few, and per trait of the pairs."""
    columns: dict[str, list[str]] = {"rater": [study.rater[row] or "(not known)" for row in rows]}
    for name in sorted({name for row in rows for name in study.attributes[row]}):
        columns[name] = [str(study.attributes[row].get(name, "(none)")) for row in rows]
    columns |= {name: list(values) for name, values in study.traits(rows).items()}
    found = []
    for name, values in columns.items():
        different = sorted(set(values))
        if not 1 < len(different) <= (MOST_VALUES if name != "rater" else len(different)):
            continue
        for value in different:
            one = accuracy(judged.take([i for i, v in enumerate(values) if v == value]))
            if one["n"] >= FEWEST_IN_GROUP:
                found.append({"by": name, "value": value, "accuracy": one})
    return found


def measure(
    study: Pairs, parts: Parts, criterion: str, fitted: Model, config: Learning, on_progress: Progress | None = None,
    frozen: Pairs | None = None, refit: Fit = fit,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of one criterion, on the pairs that measure.

    ``frozen`` is the same study as an encoder sees it that was not tuned, where this one was. ``refit`` is what
    ``fitted`` was fitted by.
    """
    train, tune, rows = (study.rows_of(criterion, part) for part in (parts.train, parts.tune, parts.measure))
    difference = fitted.differences(study, rows)
    judged = _judged(study, rows, difference)
    win, tie = fitted.calibration.probabilities(difference)
    counted = calibration((win + tie / 2).double().numpy(), judged.label)
    own = accuracy(judged)
    sides = fitted.scores(study, rows)
    found = {
        "pairs": {"train": len(train), "tune": len(tune), "measure": len(rows)},
        "prompts": {
            name: len({study.group[row] for row in of})
            for name, of in (("train", train), ("tune", tune), ("measure", rows))
        },
        "ties": {
            "share": float((judged.label == 0.5).mean()),
            "predicted": float(tie.mean()) if fitted.calibration.tie_log_strength is not None else None,
        },
        "accuracy": own,
        "agreement": agreement(study, study.rows_of(criterion, range(len(study)))),
        "baselines": baselines(frozen or study, train, rows),
        "calibration": {**counted, "temperature": fitted.calibration.temperature, "slope": fitted.calibration.slope},
        "subgroups": subgroups(study, rows, judged),
        "raters": fitted.raters,
        "ensemble_sd": float(torch.cat(sides, 1).std(0).mean()) if len(sides[0]) > 1 else None,
        "training": {"best_epochs": list(fitted.best_epochs), "losses": list(fitted.losses)},
        **study.facts(rows, difference),
    }
    if frozen is not None:
        without = _fitted_on(frozen, train, tune, rows, criterion, config, on_progress, refit)
        found["frozen_encoder"] = against_frozen(judged, without)
    if config.learning_curve:
        found["learning_curve"] = curve(study, train, tune, rows, criterion, fitted, config, on_progress, refit)
    return found


def against_frozen(tuned: Judged, frozen: Judged | None) -> dict[str, Any]:
    """Accuracy of heads on the frozen encoder, and what tuning gained, paired, with its interval over prompts.

    Both are None where nothing was learned on the frozen encoder.
    """
    if frozen is None:
        return {"accuracy": None, "gain": None}
    right, groups = tuned.right()
    gain = mean_interval(right - frozen.right()[0], groups, (-1.0, 1.0))
    return {"accuracy": accuracy(frozen), "gain": {"value": gain["mean"], "ci95": gain["ci95"]}}


def curve(
    study: Pairs,
    train: Sequence[int],
    tune: Sequence[int],
    rows: Sequence[int],
    criterion: str,
    fitted: Model,
    config: Learning,
    on_progress: Progress | None = None,
    refit: Fit = fit,
) -> dict[str, Any]:
    """Accuracy when fitted on a share of the training prompts, and what the last doubling was worth.

    The shares are nested. A share of which nothing could be learned has no accuracy.
    """
    order = sorted({study.group[row] for row in train}, key=lambda name: derive(config.seed, "curve", name))
    points: list[dict[str, Any]] = []
    last: Judged | None = None
    whole = _judged(study, rows, fitted.differences(study, rows))
    for share in SHARES:
        kept = set(order[: max(1, round(share * len(order)))])
        some = [row for row in train if study.group[row] in kept]
        judged = whole if share == 1 else _fitted_on(study, some, tune, rows, criterion, config, on_progress, refit)
        points.append({
            "share": share, "prompts": len(kept), "pairs": len(some), "accuracy": accuracy(judged) if judged else None,
        })  # fmt: skip
        if share == 0.5:
            last = judged
    gain = None
    if last is not None:
        more, groups = whole.right()
        gain = {**mean_interval(more - last.right()[0], groups, (-1.0, 1.0)), "n": len(more)}
    return {"points": points, "gain_of_last_doubling": gain, "more_labels": sentence(gain)}


def sentence(gain: Mapping[str, Any] | None) -> str:
    """Whether more labels would help, from what the last doubling of the training prompts gained in accuracy.

    That they hardly would is said of enough pairs only: where none of ``n`` went over from wrong to right, of other
    pairs a share of up to 3 / n still may (the rule of three).
    """
    if gain is None or gain["ci95"] is None:
        return "Whether more labels would help is not known: there are too few prompts to tell."
    low, high = gain["ci95"]
    size = f"{100 * gain['mean']:+.1f} points of accuracy (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0:
        return f"More labels would probably help: the last doubling of the training prompts gained {size}."
    if max(high, 3 / gain["n"]) < HARDLY:
        return f"More labels of this kind would hardly help: the last doubling of the training prompts gained {size}."
    return f"Whether more labels would help cannot be told: the last doubling of the training prompts gained {size}."


def _fitted_on(
    study: Pairs, train: Sequence[int], tune: Sequence[int], rows: Sequence[int], criterion: str, config: Learning,
    on_progress: Progress | None, refit: Fit,
) -> Judged | None:  # fmt: skip
    try:
        fitted = refit(study, train, tune, criterion, config, on_progress)
    except RefusedError:
        return None
    return _judged(study, rows, fitted.differences(study, rows))


def _judged(study: Pairs, rows: Sequence[int], difference: Tensor) -> Judged:
    label = study.label[torch.tensor(list(rows), dtype=torch.int64)].double().numpy()
    return Judged(difference.double().numpy(), label, [study.group[row] for row in rows])
