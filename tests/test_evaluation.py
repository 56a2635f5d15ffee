"""Evaluation: intervals, win rates, diversity and verdicts against hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluation import Evaluation, Measure, diversity, mean_interval, verdict
from diffalign.types import Prompt, Sample

GROUPS = np.repeat(np.arange(8), 2)


def evaluation(diversity_after: float = 1.0, **measures: Measure) -> Evaluation:
    return Evaluation(measures, GROUPS, next(iter(measures)), (1.0, diversity_after), {})


def flat(before: float, after: float, trained_on: bool, better: bool = True) -> Measure:
    return Measure(np.full(16, before), np.full(16, after), trained_on, better)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 draws of 40 prompts x 2 images that share half their variance; 95 % intervals, so about 285 cover 0.

    Binomial deviation is 3.8; the percentile bootstrap of 40 clusters is known to be slightly short.
    """
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 2)
    covered = 0
    for _ in range(300):
        values = rng.normal(size=40)[groups] + rng.normal(size=80)
        low, high = mean_interval(values, groups)["ci95"]
        covered += low <= 0 <= high
    assert 270 <= covered <= 296


def test_ignoring_that_images_share_a_prompt_would_be_too_sure() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=30), 4)
    clustered = mean_interval(values, np.repeat(np.arange(30), 4))["ci95"]
    naive = mean_interval(values, np.arange(120))["ci95"]
    assert clustered[1] - clustered[0] > 1.7 * (naive[1] - naive[0])


def test_win_rate_counts_ties_as_half() -> None:
    """Of 16 pairs: 8 won, 4 lost, 4 tied: (8 + 2) / 16."""
    gain = np.repeat([1.0, -1.0, 0.0], [8, 4, 4])
    result = evaluation(main=Measure(np.zeros(16), gain, True)).win_rate()
    assert result["value"] == 10 / 16 and result["ties"] == 4 / 16 and result["n"] == 16
    lower = evaluation(main=Measure(np.zeros(16), gain, True, higher_is_better=False)).win_rate()
    assert lower["value"] == 6 / 16


def test_a_failed_judgement_leaves_the_pair_out() -> None:
    before, after = np.zeros(16), np.ones(16)
    before[3] = np.nan
    row = evaluation(main=Measure(before, after, True)).to_json()["rewards"]["main"]
    assert row["before"] == {"mean": 0.0, "ci95": [0.0, 0.0], "n": 15} and row["difference"]["mean"] == 1.0


def test_a_measure_that_nobody_was_asked_is_null_not_zero() -> None:
    empty = Measure(np.full(16, np.nan), np.full(16, np.nan), False)
    data = evaluation(main=flat(0, 1, True), other=empty).to_json()
    assert data["rewards"]["other"]["difference"] == {"mean": None, "ci95": [None, None]}


@pytest.mark.parametrize(
    ("outcome", "alarm", "words"),
    [
        (
            evaluation(main=flat(0, 1, True), clip=flat(0.5, 0.3, False)),
            True,
            "clip, which was not trained on, fell by 0.2",
        ),
        (evaluation(main=flat(0, 1, True), clip=flat(0.5, 0.6, False)), False, "rose by 0.1"),
        (evaluation(main=flat(0, 1, True), fid=flat(5, 9, False, better=False)), True, "fid"),
        (evaluation(0.5, main=flat(0, 1, True), clip=flat(0.5, 0.5, False)), True, "diversity fell to 50%"),
        (evaluation(main=flat(0, 1, True)), False, "cannot be ruled out"),
        (evaluation(main=flat(1, 0, True), clip=flat(0, 0, False)), True, "the reward itself, fell"),
    ],
)
def test_verdict(outcome: Evaluation, alarm: bool, words: str) -> None:
    result = verdict(outcome)
    assert result["alarm"] is alarm and words in result["text"]


def test_diversity_compares_images_of_one_prompt_only() -> None:
    """Black and white of one prompt are 1 apart; two greys of another are 0 apart; mean 0.5."""
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (128, 128, 128)]
    samples = [Sample(Prompt("x"), image=Image.new("RGB", (32, 32), colour)) for colour in colours]
    groups = np.array([0, 0, 1, 1])
    assert diversity(samples, groups) == pytest.approx(0.5)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert diversity(samples, groups, lambda _: directions) == pytest.approx(0.5)
    assert np.isnan(diversity(samples[:1], groups[:1]))
