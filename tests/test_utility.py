"""Train on synthetic, test on real: what can be learnt is learnt, what cannot is not, and intervals say how surely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffalign.synthesis import estimates, utility

KINDS = {"side": "category", "age": "integer", "told": "text"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "STEPS", 60)
    monkeypatch.setattr(utility, "NETWORKS", 2)


def rows(seed: int, n: int) -> list[dict[str, str | int]]:
    sides = np.random.default_rng(seed).integers(0, 2, n).tolist()
    return [{"side": ("left", "right")[side], "age": 40, "told": "x"} for side in sides]


def images(table: list[dict[str, str | int]], seed: int) -> torch.Tensor:
    """A bright square in the half that the row names, on noise: ``(N, 3, 32, 32)``."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(len(table), 3, 32, 32, generator=generator) * 0.3
    for i, row in enumerate(table):
        left = 4 if row["side"] == "left" else 20
        pixels[i, :, 10:18, left : left + 8] += 0.5
    return pixels


def test_few_images_are_not_seen_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 steps of 32 images are 100 passes over 160 images: from there on there are as many as ever, of fewer images
    ceil(100 n / 32)."""
    monkeypatch.undo()
    assert [utility.steps(n) for n in (1, 20, 80, 159, 160, 161, 5000)] == [4, 63, 250, 497, 500, 500, 500]


def test_what_is_in_the_images_is_learnt_by_both() -> None:
    made, real = rows(0, 80), rows(1, 60)
    task = utility.tasks(made, real, KINDS)["side"]
    train, test = images(made, 0), images(real, 1)
    assert utility.accuracy(utility.network(task, train, test)).value > 0.95
    flat = [np.asarray(pixels.flatten(1)) for pixels in (train, test)]
    assert utility.accuracy(utility.probe(task, *flat)).value > 0.95


def test_wrong_labels_teach_nothing() -> None:
    """Synthetic sides are drawn anew: accuracy is a guess, 50 %; 200 tests have a spread of 3.5 points."""
    made, real = rows(0, 200), rows(1, 200)
    features = np.random.default_rng(3).normal(size=(400, 4))
    features[200:, 0] += [3.0 if row["side"] == "left" else -3.0 for row in real]
    task, right = (utility.tasks(table, real, KINDS)["side"] for table in (made, real))
    noise = np.random.default_rng(4).normal(size=(200, 4))
    assert 0.36 < utility.accuracy(utility.probe(task, features[:200], noise)).value < 0.64
    assert utility.accuracy(utility.probe(right, features[200:], features[200:])).value > 0.95


def test_the_probe_is_at_its_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the minimum the gradient of mean cross-entropy + |W|^2 / 2N is 0: with p the softmax and Y the labels,
    X'(p - Y) / N + W / N for the weights and the mean of p - Y for the bias. Flipped labels give the flipped answer.
    """
    found = list[list[torch.Tensor]]()

    class Watched(torch.optim.LBFGS):
        def __init__(self, params: list[torch.Tensor], **options: Any) -> None:
            found.append(params)
            super().__init__(params, **options)

    monkeypatch.setattr(torch.optim, "LBFGS", Watched)
    chance = np.random.default_rng(0)
    features = chance.normal(size=(60, 3))
    table = [{"side": "left" if x + 0.3 * chance.normal() > 0 else "right"} for x in features[:, 0]]
    other = [{"side": {"left": "right", "right": "left"}[row["side"]]} for row in table]
    first, second = (utility.tasks(made, table, KINDS)["side"] for made in (table, other))
    assert (utility.probe(first, features, features) + utility.probe(second, features, features)).tolist() == [1.0] * 60
    weight, bias = (one.detach().numpy() for one in found[0])
    known = (features - features.mean(0)) / features.std(0, ddof=1)
    odds = np.exp(known @ weight + bias)
    wrong = odds / odds.sum(1, keepdims=True) - np.eye(2)[first.train_labels.numpy()]
    assert np.abs(weight).max() > 0.5
    assert np.abs(known.T @ wrong + weight).max() / 60 < 1e-5 and np.abs(wrong.mean(0)).max() < 1e-5


def test_only_attributes_that_both_tables_have_are_tasks() -> None:
    made = [{"side": "left", "plane": "axial"}] * 5 + [{"side": "right", "plane": "axial"}] * 5 + [{"side": "both"}]
    real = [{"side": None, "plane": "axial"}] * 4 + [{"side": "left"}] * 20 + [{"side": "odd"}] * 3
    found = utility.tasks(made, real, {"side": "category", "plane": "category", "age": "integer"})
    assert list(found) == ["side"]
    task = found["side"]
    assert task.classes == ("left", "right", "odd")  # "both" has too few cases; "odd" cannot be learnt, and counts
    assert len(task.train) == 10 and task.test.tolist() == list(range(4, 27))
    assert utility.by_guessing(task).value == pytest.approx(20 / 23)


def test_guessing_knows_the_real_images_commonest_class() -> None:
    """And not that of the synthetic ones, which no real image may have."""
    made = [{"side": "left"}] * 6 + [{"side": "right"}] * 5
    real = [{"side": "odd"}] * 15 + [{"side": "right"}] * 5
    found = utility.tasks(made, real, {"side": "category"})
    assert utility.by_guessing(found["side"]).value == pytest.approx(0.75)


def test_training_leaves_the_random_state_alone_and_repeats() -> None:
    made, real = rows(0, 30), rows(1, 30)
    task = utility.tasks(made, real, KINDS)["side"]
    train, test = images(made, 0)[..., ::4, ::4], images(real, 1)[..., ::4, ::4]
    torch.manual_seed(3)
    first = utility.network(task, train, test)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert after == torch.rand(1)
    assert utility.network(task, train, test).tolist() == first.tolist()


def test_the_difference_of_two_classifiers_is_paired() -> None:
    """Of 100 images one is right on 80, the other on the same and 10 more: the gain is 10 points, sd of its mean 3."""
    worse, better = np.arange(100) < 80, np.arange(100) < 90
    found = estimates.difference(*(utility.accuracy(right.astype(float)) for right in (better, worse)))
    assert found["value"] == pytest.approx(0.1)
    assert found["ci95"][0] == pytest.approx(0.1 - 1.96 * 0.03, abs=0.015)
    assert found["ci95"][1] == pytest.approx(0.1 + 1.96 * 0.03, abs=0.015)
