"""Evaluation: intervals, win rates, diversity and verdicts against hand arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from apps.outcome import show
from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError
from diffalign.evaluation import Evaluation, Measure, _direction_of, diversity, evaluate, mean_interval, verdict
from diffalign.looks import coarse_pixels
from diffalign.types import Modality, Prompt, Rollout, Sample, Scores, StepLikelihood
from pipelines.diffusion import DiffusionPolicy

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
    assert row["before"]["mean"] == 0.0 and row["before"]["n"] == 15 and row["difference"]["mean"] == 1.0


def test_a_measure_that_nobody_was_asked_is_null_not_zero() -> None:
    empty = Measure(np.full(16, np.nan), np.full(16, np.nan), False)
    data = evaluation(main=flat(0, 1, True), other=empty).to_json()
    assert data["rewards"]["other"]["difference"] == {"mean": None, "ci95": None, "changed": 0}


def test_no_number_in_the_file_is_nan() -> None:
    """No pair could be judged, and one seed a prompt has no diversity: nulls, and JSON that any reader takes."""
    nothing = Measure(np.full(16, np.nan), np.full(16, np.nan), True)
    outcome = Evaluation({"main": nothing}, GROUPS, "main", (math.nan, math.nan), {"pixel_rms": math.inf})
    data = json.loads(outcome.dumps(), parse_constant=pytest.fail)
    assert data["diversity"] == {"before": None, "after": None} and data["distance"] == {"pixel_rms": None}
    assert data["win_rate"]["value"] is None and data["win_rate"]["ci95"] is None


def test_a_rate_on_which_all_prompts_agree_is_not_certain() -> None:
    """8 of 8: Wilson's interval of 8 of 8 is [1 / (1 + z²/8), 1] = [8 / (8 + 3.8415), 1] = [0.6756, 1]."""
    low = 8 / (8 + 1.959964**2)
    outcome = evaluation(main=flat(0, 1, True))
    row = outcome.to_json()["rewards"]["main"]
    assert outcome.win_rate()["ci95"] == pytest.approx([low, 1])
    assert row["before"]["ci95"] == pytest.approx([0, 1 - low])
    assert row["after"]["ci95"] == row["difference"]["ci95"] == pytest.approx([low, 1])
    lost = evaluation(main=flat(1, 0, True)).to_json()
    assert lost["win_rate"]["ci95"] == pytest.approx([0, 1 - low])
    assert lost["rewards"]["main"]["difference"]["ci95"] == pytest.approx([-1, -low])
    same = evaluation(main=flat(1, 1, True)).to_json()["rewards"]["main"]["difference"]
    assert same["ci95"] == pytest.approx([low - 1, 1 - low])


def test_four_prompts_have_no_interval_and_decide_nothing() -> None:
    measures = {"main": flat(0, 1, True), "clip": flat(0.5, 0.3, False)}
    few = Evaluation(measures, np.repeat(np.arange(4), 4), "main", (1.0, 1.0), {}).to_json()
    assert few["win_rate"]["ci95"] is None and few["win_rate"]["value"] == 1.0
    assert few["rewards"]["clip"]["difference"] == {"mean": pytest.approx(-0.2), "ci95": None, "changed": 16}
    assert not few["verdict"]["alarm"] and "too few judged prompts for an interval" in few["verdict"]["text"]
    assert mean_interval(np.arange(5.0), np.arange(5))["ci95"] is not None


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
        (
            evaluation(**{"main": flat(0, 1, True), "main/plane": flat(0.9, 0.86, True), "clip": flat(0, 0, False)}),
            True,
            "main/plane, a part of the reward, fell by 0.04",
        ),
        (
            evaluation(**{"main": flat(0, 1, True), "main/plane": flat(0.9, 0.89, True), "clip": flat(0, 0, False)}),
            False,
            "No sign of over-optimisation",
        ),
        (evaluation(**{"main": flat(0, 1, True), "main/kB": flat(-50, -50.5, True)}), False, "cannot be ruled out"),
        (evaluation(**{"main": flat(0, 1, True), "main/kB": flat(-50, -52, True)}), True, "main/kB"),
        (evaluation(**{"main": flat(0, 1, True), "main/kB": flat(9, 8, True, better=False)}), False, "ruled out"),
        (
            evaluation(**{"main": flat(0, 1, True), "j": flat(0.9, 0.9, False), "j/a": flat(0.9, 0.899, False)}),
            False,
            "No sign of over-optimisation",
        ),
        (
            evaluation(**{"main": flat(0, 1, True), "j": flat(0.9, 0.9, False), "j/a": flat(0.9, 0.897, False)}),
            True,
            "j/a, which was not trained on, fell by 0.003",
        ),
        (evaluation(one=flat(0.5, 0.3, False), two=flat(0, 1, False)), True, "Clearly worse: one fell by 0.2."),
        (evaluation(one=flat(0.3, 0.3, False)), False, "Nothing that was measured got clearly worse."),
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
    assert diversity(samples, groups, coarse_pixels) == pytest.approx(0.5)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert diversity(samples, groups, lambda _: 1 - directions @ directions.T) == pytest.approx(0.5)
    assert np.isnan(diversity(samples[:1], groups[:1], coarse_pixels))


def test_further_spreads_compare_images_of_one_prompt(make: Callable[..., DiffusionPolicy]) -> None:
    """A spread is asked of each prompt's own images, before and after, and stands beside the diversity."""
    policy, asked = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=2, batch_size=4)), []

    def spread(samples: Sequence[Sample]) -> float:
        asked.append(len(samples))
        return float(len(asked))

    outcome = evaluate(policy, PROMPTS, Scripted("a"), seeds_per_prompt=2, spreads={"lpips": spread})
    assert asked == [2] * 6
    assert outcome.to_json()["diversity"]["lpips"] == {"before": 2.0, "after": 5.0}


@pytest.mark.parametrize("count", [8, 2])
def test_the_terminal_shows_what_is_missing(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    measures = {
        "main": Measure(np.full(16, np.nan), np.full(16, np.nan), True),
        "clip": Measure(np.arange(16.0), np.arange(16.0) ** 2, False),
    }
    show(Evaluation(measures, np.repeat(np.arange(count), 16 // count), "main", (math.nan, math.nan), {}))
    shown = capsys.readouterr().out
    assert "win rate  unknown" in shown and "nan" not in shown and "None" not in shown
    assert ("too few prompts for an interval" in shown) is (count < 5)


@dataclass
class Scripted:
    """A reward that says the number of its samples, and has a part."""

    name: str
    modality: Modality = "image"
    unit: str = "number"
    range: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        total = torch.arange(len(samples)) / max(1, len(samples))
        return Scores(total, {"part": total})


PROMPTS = [Prompt("red ball"), Prompt("blue cube"), Prompt("one ball")]


def test_the_distance_asks_one_step_at_a_time(make: Callable[..., DiffusionPolicy]) -> None:
    """The mean over all steps of two rollouts (2 and 1 prompts), from one call per rollout, to float rounding."""
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=4, batch_size=2))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    rollouts: list[Rollout] = []
    asked: list[tuple[int, ...]] = []
    roll, ask = policy.rollout, policy.step_log_probs

    def rollout(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        rollouts.append(roll(prompts, seeds))
        return rollouts[-1]

    def step_log_probs(rollout: Rollout, steps: torch.Tensor, *, kl: bool = False) -> StepLikelihood:
        asked.append(tuple(steps.shape))
        return ask(rollout, steps, kl=kl)

    policy.rollout, policy.step_log_probs = rollout, step_log_probs  # type: ignore[method-assign]
    distance = evaluate(policy, PROMPTS, Scripted("one"), seeds_per_prompt=1).distance
    found = distance["step_kl"]
    assert len(asked) == 8 and all(rows <= 2 and columns == 1 for rows, columns in asked)
    whole, sums = [], []
    for rollout_ in rollouts[-2:]:
        steps = torch.arange(4).expand(len(rollout_), -1)
        kl = ask(rollout_, steps, kl=True).kl
        assert kl is not None
        whole.append(float(kl.detach()[rollout_.mask].mean()))
        sums += [float(row[mask].sum()) for row, mask in zip(kl.detach(), rollout_.mask, strict=True)]
    assert found > 0 and found == pytest.approx(sum(whole) / 2, rel=1e-5)
    assert distance["sample_kl"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)


def test_who_was_trained_on(make: Callable[..., DiffusionPolicy]) -> None:
    """By name; with nothing trained nobody is. A part follows its reward, and what is wanted of it."""
    policy = make(sampler=SamplerConfig(steps=2, batch_size=4))
    one, two = Scripted("one"), Scripted("two")
    usual = evaluate(policy, PROMPTS, one, [two]).measures
    assert {name for name, measure in usual.items() if measure.trained_on} == {"one", "one/part"}
    nobody = evaluate(policy, PROMPTS, one, [two], trained_on=()).measures
    assert not any(measure.trained_on for measure in nobody.values())
    less = evaluate(policy, PROMPTS, one, [two], wanted={"one/part": False}).measures
    assert [name for name, measure in less.items() if not measure.higher_is_better] == ["one/part"]
    with pytest.raises(ConfigError, match="are called one"):
        evaluate(policy, PROMPTS, one, [two, Scripted("one")])


def test_a_reward_that_fell_was_not_over_optimised() -> None:
    """Over-optimised is what rises while the rest falls. Where the reward fell too, training made it worse."""
    fell = verdict(evaluation(reward=flat(0.5, 0.4, True), other=flat(0.5, 0.3, False)))
    rose = verdict(evaluation(reward=flat(0.5, 0.6, True), other=flat(0.5, 0.3, False)))
    assert fell["alarm"] and fell["text"].startswith("Clearly worse: reward, the reward itself")
    assert rose["alarm"] and rose["text"].startswith("Over-optimised: other")


def test_parts_may_have_a_direction_of_their_own_or_none() -> None:
    """Less of `errors` is better, and `size` only describes: its fall is no alarm, the rise of errors is one."""

    class Described(Scripted):
        directions: ClassVar[dict[str, bool | None]] = {"errors": False, "size": None}

    rising = np.linspace(0, 1, 12)
    groups = np.arange(12)
    found = {
        name: Measure(rising, rising + step, False, direction)
        for name, step, direction in [("main", 0.0, True), ("main/errors", 0.1, False), ("main/size", -0.1, None)]
    }
    outcome = Evaluation(found, groups, "main", (1.0, 1.0), {})
    text = verdict(outcome)["text"]
    assert verdict(outcome)["alarm"] and "main/errors" in text and "size" not in text
    assert outcome.to_json()["rewards"]["main/size"]["higher_is_better"] is None
    assert _direction_of(Described("a"), "errors") is False
    assert _direction_of(Described("a"), "size") is None
    assert _direction_of(Described("a"), "other") is True


def test_a_measure_may_fall_within_its_tolerance() -> None:
    """0.05 of a tolerance of 0.1 is no alarm, 0.2 is one."""
    rising = np.linspace(-1, 0, 12)
    for fall, alarm in ((0.05, False), (0.2, True)):
        found = {
            "main": Measure(rising, rising + 0.1, True),
            "fluency": Measure(rising, rising - fall, False, True, 0.1),
        }
        assert verdict(Evaluation(found, np.arange(12), "main", (1.0, 1.0), {}))["alarm"] is alarm
