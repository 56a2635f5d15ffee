"""Reward heads on studies whose answer is known: vectors in place of embeddings, a hidden direction as the utility."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.preferences.splitting import is_held_out
from rewards import fit_measure
from rewards.fit import Fitted, check, draws, fit
from rewards.fit_config import FitConfig
from rewards.fit_data import MOST, Study, divide, spaced
from rewards.fit_measure import Judged, accuracy, agreement, sentence
from rewards.fit_pixels import NAMES, statistics
from rewards.heads import Heads, distances, features, shrunk_covariance, whitening
from tests import reward_studies
from tests.reward_studies import config, logistic, study, swapped

ROWS = 900


def fitted_on(made: Study, settings: FitConfig | None = None) -> Fitted:
    """Fitted on two thirds of the rows, stopped and calibrated by the rest."""
    rows = range(len(made))
    train = [row for row in rows if made.text[row] % 3 != 0]
    tune = [row for row in rows if made.text[row] % 3 == 0]
    return fit(made, train, tune, "overall", settings or config())


@pytest.fixture(scope="module")
def known() -> tuple[Study, Fitted]:
    made, _ = study(ROWS)
    return made, fitted_on(made)


def test_a_known_utility_is_recovered(known: tuple[Study, Fitted]) -> None:
    """On pairs never seen, of the same hidden direction, predicted and true differences nearly lie on a line.

    The slope makes log-odds of them, so the line's gradient is near 1: the raters answered with odds e^difference.
    """
    fresh, truth = study(2000, seed=1)
    found = known[1].differences(fresh, range(2000))
    assert float(torch.corrcoef(torch.stack([found, truth]))[0, 1]) > 0.93
    gradient = float((known[1].calibration.slope * found * truth).sum() / truth.square().sum())
    assert 0.75 < gradient < 1.25
    best = float((truth.sign() == (fresh.label * 2 - 1).sign()).double().mean())
    own = accuracy(Judged(found.double().numpy(), fresh.label.double().numpy(), fresh.group))
    assert own["value"] > best - 0.04 and own["ci95"][0] < own["value"] < own["ci95"][1]


def test_the_scores_of_the_training_samples_are_standardised(known: tuple[Study, Fitted]) -> None:
    made, fitted = known
    train = [row for row in range(ROWS) if made.text[row] % 3 != 0]
    scores = fitted.heads.standardised(features(*made.samples(train)))
    assert torch.allclose(scores.mean(1), torch.zeros(5), atol=1e-4)
    assert float(scores.mean(0).std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_swapping_a_pair_flips_the_sign(known: tuple[Study, Fitted]) -> None:
    made, fitted = known
    there, back = (fitted.differences(one, range(50)) for one in (made, swapped(made)))
    assert torch.equal(there, -back)
    win, tie = fitted.calibration.probabilities(there)
    loss, _ = fitted.calibration.probabilities(back)
    assert torch.allclose(win + tie + loss, torch.ones(50))


def test_probabilities_are_calibrated(known: tuple[Study, Fitted]) -> None:
    """Over 2000 fresh pairs, bins of 200: the standard error of a bin's share is at most 0.035."""
    fresh, _ = study(2000, seed=2)
    win, _ = known[1].calibration.probabilities(known[1].differences(fresh, range(2000)))
    found = fit_measure.calibration(win.double().numpy(), fresh.label.double().numpy())
    assert found["expected_calibration_error"] < 0.05
    raw, _ = dataclasses.replace(known[1].calibration, slope=10.0).probabilities(
        known[1].differences(fresh, range(2000))
    )
    worse = fit_measure.calibration(raw.double().numpy(), fresh.label.double().numpy())
    assert worse["expected_calibration_error"] > 0.1


def test_ties_are_an_outcome(known: tuple[Study, Fitted]) -> None:
    """With v = 1.5 ties are told from wins: as many are predicted as were seen, most of them between near equals."""
    made, _ = study(ROWS, ties=1.5, seed=3)
    fitted = fitted_on(made)
    assert fitted.calibration.tie_log_strength == pytest.approx(math.log(1.5), abs=0.35)
    fresh, truth = study(2000, ties=1.5, seed=4)
    _, tie = fitted.calibration.probabilities(fitted.differences(fresh, range(2000)))
    assert float(tie.mean()) == pytest.approx(float((fresh.label == 0.5).double().mean()), abs=0.05)
    assert float(tie[truth.abs() < 0.5].mean()) > float(tie[truth.abs() > 3].mean()) + 0.1
    assert known[1].calibration.tie_log_strength is None


def test_ties_as_half_are_soft_labels() -> None:
    made, _ = study(ROWS, ties=1.5, seed=3)
    fitted = fitted_on(made, config(ties="half"))
    assert fitted.calibration.tie_log_strength is None
    soft = dataclasses.replace(made, label=torch.where(made.label == 0.5, 0.6, made.label))
    assert fitted_on(soft).calibration.tie_log_strength is None
    with pytest.raises(ConfigError, match="ties: outcome needs hard labels"):
        fitted_on(soft, config(ties="outcome"))


def test_soft_labels_carry_as_much_as_many_raters() -> None:
    """Labels that are the true probabilities have no noise, so few pairs do."""
    made, truth = study(300, seed=5)
    fitted = fitted_on(dataclasses.replace(made, label=truth.sigmoid()))
    fresh, other = study(1000, seed=6)
    found = fitted.differences(fresh, range(1000))
    assert float(torch.corrcoef(torch.stack([found, other]))[0, 1]) > 0.9


def test_a_rater_who_answers_at_random_is_discounted() -> None:
    rng = np.random.default_rng(0)
    careful, careless = logistic(rng), lambda difference: float(rng.random() < 0.5)
    raters = {"a": careful, "b": careful, "dice": careless}
    made, _ = study(1200, seed=7, raters=raters)
    told = fitted_on(made)
    assert told.raters["dice"]["reliability"] < 0.45
    assert min(told.raters[name]["reliability"] for name in "ab") > 1
    ignored = fitted_on(made, config(rater_effects=False))
    assert {one["reliability"] for one in ignored.raters.values()} == {1.0}
    fresh, truth = study(2000, seed=8)
    with_effects, without = (
        float(torch.corrcoef(torch.stack([one.differences(fresh, range(2000)), truth]))[0, 1])
        for one in (told, ignored)
    )
    assert with_effects > without


def test_a_rater_who_favours_a_side_does_not_bend_the_heads() -> None:
    """Log-odds of +2 for the first are found, and at inference two equal samples are even."""
    rng = np.random.default_rng(0)
    plain = logistic(rng)
    made, _ = study(1200, seed=9, raters={"even": plain, "left": lambda difference: plain(difference + 2)})
    fitted = fitted_on(made)
    assert fitted.raters["left"]["side_bias"] == pytest.approx(2, abs=0.7)
    assert fitted.raters["even"]["side_bias"] == pytest.approx(0, abs=0.4)
    same = dataclasses.replace(made, second=made.first)
    assert torch.equal(fitted.differences(same, range(10)), torch.zeros(10))


def test_strength_is_a_weight() -> None:
    """Of weak judgements that say the opposite of strong ones: unweighted the two kinds would cancel."""
    made, truth = study(600, seed=10)
    weak = torch.arange(600) % 2 == 0
    label = torch.where(weak, (truth < 0).float(), (truth > 0).float())
    made = dataclasses.replace(made, label=label, strength=torch.where(weak, 0.05, 1.0))
    fresh, other = study(500, seed=11)
    found = fitted_on(made).differences(fresh, range(500))
    assert float((found.sign() == other.sign()).double().mean()) > 0.8
    with pytest.raises(InputError, match="strength of every pair is 0"):
        fitted_on(dataclasses.replace(made, strength=torch.zeros(600)))


def test_the_same_seed_gives_the_same_heads_and_another_does_not(known: tuple[Study, Fitted]) -> None:
    made, fitted = known
    again, other = fitted_on(made), fitted_on(made, config(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fitted.heads.parameters(), again.heads.parameters(), strict=True))
    assert not torch.equal(fitted.heads.linear, other.heads.linear)


def test_heads_differ_and_doubt_more_where_there_were_no_data(known: tuple[Study, Fitted]) -> None:
    """Twice as far along the line from the mean feature, a linear part differs twice as much between heads."""
    made, fitted = known
    found = features(made.images[:100], made.texts[:1].expand(100, -1))
    near = fitted.heads.standardised(found).std(0)
    far = fitted.heads.standardised(fitted.heads.centre + 4 * (found - fitted.heads.centre)).std(0)
    assert float(near.min()) > 0
    assert float((far > near).double().mean()) > 0.9


def test_bootstrap_draws_whole_prompts() -> None:
    """Each head counts as many draws as there are prompts; rows of one prompt count alike; one head sees all once."""
    groups = ["a", "a", "b", "c", "c", "c", "d"]
    counts = draws(groups, 200, seed=0)
    by_prompt = counts[:, [0, 2, 3, 6]]
    assert torch.equal(by_prompt.sum(1), torch.full((200,), 4.0))
    assert torch.equal(counts[:, 0], counts[:, 1]) and torch.equal(counts[:, 3], counts[:, 5])
    # A prompt is left out of a draw with probability (1 - 1/4)^4 = 0.316; sd over 800 dependent draws about 0.02.
    assert float((by_prompt == 0).double().mean()) == pytest.approx(0.316, abs=0.06)
    assert torch.equal(draws(groups, 1, seed=0), torch.ones(1, 7))


def test_a_linear_head_and_a_single_one_work() -> None:
    made, _ = study(400, seed=12)
    fitted = fitted_on(made, config(hidden=0, ensemble=1))
    assert set(fitted.heads.tensors()) == {"linear", "centre", "scale", "limits", "level", "spread"}
    fresh, truth = study(500, seed=13)
    assert float((fitted.differences(fresh, range(500)).sign() == truth.sign()).double().mean()) > 0.8


def test_what_cannot_be_seen_is_not_learned() -> None:
    """All images have one embedding: no epoch beats no score, and that is said."""
    made, _ = study(300, seed=14)
    blind = dataclasses.replace(made, images=made.images[:1].expand(600, -1).contiguous())
    with pytest.raises(RefusedError, match="nothing was learned"):
        fitted_on(blind, config(side_bias=False, patience=2))


def test_one_sided_and_undecided_labels_are_refused() -> None:
    made, _ = study(60)
    first = dataclasses.replace(made, label=torch.ones(60))
    with pytest.raises(InputError, match=r"every decided pair prefers the first.*side_bias: false"):
        check(first, range(60), "overall", "learn from", side_bias=True)
    check(first, range(60), "overall", "learn from", side_bias=False)
    ties = dataclasses.replace(made, label=torch.full((60,), 0.5))
    with pytest.raises(InputError, match="none of the pairs to stop by is decided \\(all 60 are ties\\)"):
        check(ties, range(60), "overall", "stop by", side_bias=True)


def test_winners_first_teach_the_same_as_winners_on_any_side() -> None:
    made, truth = study(600, seed=15)
    turned = made.label < 0.5
    winners = dataclasses.replace(
        made,
        first=torch.where(turned, made.second, made.first),
        second=torch.where(turned, made.first, made.second),
        label=torch.ones(600),
    )
    found = fitted_on(winners, config(side_bias=False)).differences(made, range(600))
    assert float(torch.corrcoef(torch.stack([found, truth]))[0, 1]) > 0.9


def test_parts_share_no_prompt() -> None:
    made, _ = study(400, prompts=100)
    parts = divide(made, 0.4, 0)
    groups = [{made.group[row] for row in rows} for rows in (parts.train, parts.tune, parts.measure)]
    assert sum(map(len, groups)) == 100 and len(set.union(*groups)) == 100
    assert sorted(parts.train + parts.tune + parts.measure) == list(range(400))
    # 40 % of 100 prompts with a binomial sd of 4.9, halved evenly.
    assert len(groups[0]) == pytest.approx(60, abs=15) and 0 <= len(groups[2]) - len(groups[1]) <= 1
    few, _ = study(30, prompts=3)
    seed = next(s for s in range(50) if sum(is_held_out(name, 0.4, s) for name in set(few.group)) == 1)
    with pytest.raises(InputError, match="holds out a single prompt"):
        divide(few, 0.4, seed)


def test_statistics_of_many_samples_are_taken_from_some() -> None:
    assert spaced(range(7)) == list(range(7))
    some = spaced(range(50_000))
    assert len(set(some)) == MOST and some[0] == 0 and 49_990 < some[-1] < 50_000


def test_agreement_counts_pairs_of_raters_whichever_side_stands_first() -> None:
    """Pair (0, 1) is judged by a, b, c: a and b choose 0, c (who sees it swapped) chooses 1, so 1 of 3 agree.

    Pair (2, 3) is judged by a and by b, who calls a tie: no decided pair of raters, and 1 of 4 has a tie. The repeat
    by an unnamed rater counts for nothing.
    """
    made, _ = study(6, prompts=1)
    made = dataclasses.replace(
        made,
        first=torch.tensor([0, 0, 1, 2, 2, 0]),
        second=torch.tensor([1, 1, 0, 3, 3, 1]),
        label=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 1.0]),
        rater=["a", "b", "c", "a", "b", ""],
    )
    found = agreement(made, range(6))
    assert (found["value"], found["n"], found["pairs"]) == (pytest.approx(1 / 3), 3, 2)
    assert found["ties"] == pytest.approx(1 / 4) and found["ci95"] is None
    nobody = agreement(dataclasses.replace(made, rater=["a"] * 6), range(6))
    assert nobody["value"] is None and nobody["n"] == 0


def test_expected_calibration_error_by_hand() -> None:
    """20 pairs in two bins. Ten at 0.6, of which 5 won: |0.6 - 0.5| = 0.1. Ten at 0.9, all won: 0.1. Mean 0.1.

    Four of the first ten are told from the other side, as 0.4 with the opposite label, which changes nothing.
    """
    predicted = np.array([0.6] * 6 + [0.4] * 4 + [0.9] * 10)
    label = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0, 0] + [1] * 10, dtype=np.float64)
    found = fit_measure.calibration(predicted, label)
    assert [row["n"] for row in found["bins"]] == [10, 10]
    assert found["bins"][0]["seen"] == pytest.approx(0.5)
    assert found["expected_calibration_error"] == pytest.approx(0.1)


def test_accuracy_leaves_ties_out_and_halves_equal_scores() -> None:
    """Right, wrong, equal, and a tie among the labels: (1 + 0 + 0.5) / 3."""
    judged = Judged(np.array([1.0, 1.0, 0.0, 5.0]), np.array([1.0, 0.0, 1.0, 0.5]), ["a", "b", "c", "d"])
    found = accuracy(judged)
    assert found["value"] == pytest.approx(0.5) and found["n"] == 3 and found["ci95"] is None


def test_the_numbers_of_a_card() -> None:
    made, _ = study(ROWS, ties=0.5, seed=16)
    settings = config(learning_curve=True, held_out=0.4, ensemble=3)
    parts = divide(made, 0.4, 0)
    fitted = fit(made, parts.train, parts.tune, "overall", settings)
    found = fit_measure.measure(made, parts, "overall", fitted, settings)
    assert found["accuracy"]["value"] > found["baselines"]["always the first"]["value"] + 0.15
    assert {g["value"] for g in found["subgroups"]} == {"even", "odd"}
    points = found["learning_curve"]["points"]
    assert [p["share"] for p in points] == [0.125, 0.25, 0.5, 1.0]
    assert points[-1]["accuracy"] == found["accuracy"] and points[-1]["pairs"] == found["pairs"]["train"]
    assert points[0]["prompts"] == round(found["prompts"]["train"] / 8)
    assert points[0]["accuracy"]["value"] < points[-1]["accuracy"]["value"]


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (None, "not known"),
        ({"mean": 0.05, "ci95": None, "n": 40}, "not known"),
        ({"mean": 0.05, "ci95": [0.01, 0.09], "n": 40}, "would probably help"),
        ({"mean": 0.0, "ci95": [-0.02, 0.015], "n": 200}, "would hardly help"),
        ({"mean": 0.02, "ci95": [-0.03, 0.07], "n": 200}, "cannot be told"),
        ({"mean": -0.08, "ci95": [-0.24, 0.0], "n": 25}, "cannot be told"),
        ({"mean": 0.0, "ci95": [-0.01, 0.01], "n": 140}, "cannot be told"),
    ],
)
def test_whether_more_labels_help_is_said_with_its_doubt(gain: dict[str, object] | None, words: str) -> None:
    assert words in sentence(gain)


def test_the_shrunk_covariance_is_that_of_ledoit_and_wolf() -> None:
    """Against the sums of the paper, written as loops; and with many values it is the sample covariance."""
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 1, 1])
    x = values.double().numpy() - values.double().numpy().mean(0)
    sample = sum(np.outer(row, row) for row in x) / 12
    level = np.trace(sample) / 5
    d = np.linalg.norm(sample - level * np.eye(5)) ** 2
    b = min(sum(np.linalg.norm(np.outer(row, row) - sample) ** 2 for row in x) / 12**2, d)
    mean, covariance, shrinkage = shrunk_covariance(values)
    assert shrinkage == pytest.approx(b / d) and 0 < shrinkage < 1
    assert np.allclose(covariance.numpy(), b / d * level * np.eye(5) + (1 - b / d) * sample)
    assert np.allclose(mean.numpy(), values.double().numpy().mean(0))
    many = torch.randn(50_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3])
    assert shrunk_covariance(many)[2] < 0.001


def test_distances_are_mahalanobis() -> None:
    """With covariance diag(1, 4) the point (3, 4) lies sqrt(3^2 / 1 + 4^2 / 4) = sqrt(13) from the origin."""
    covariance = torch.diag(torch.tensor([1.0, 4.0]))
    white = whitening(covariance)
    assert torch.allclose(white @ covariance.double() @ white.T, torch.eye(2, dtype=torch.float64), atol=1e-5)
    found = distances(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2), white)
    assert found.tolist() == pytest.approx([math.sqrt(13), 0], abs=1e-4)
    equal = shrunk_covariance(torch.ones(5, 3))
    assert bool(distances(torch.zeros(1, 3), equal[0], whitening(equal[1])) > 1000)


def test_a_statistic_of_pixels_counts_no_further_than_it_was_judged() -> None:
    """Labels follow a number from 0 to 1 beside the embedding. Above and below that range its score stays put."""
    made, _ = study(600, seed=17)
    number = torch.rand(1200, 1, generator=torch.Generator().manual_seed(0))
    gap = (number[made.first] - number[made.second])[:, 0]
    made = dataclasses.replace(made, images=torch.cat([made.images, number], 1), label=(gap > 0).float())
    heads = fitted_on(made).heads
    scores = []
    for level in (-5.0, 0.0, 0.3, 0.7, 1.0, 50.0):
        image = torch.cat([made.images[:20, :16], torch.full((20, 1), level)], 1)
        scores.append(heads.standardised(features(image, made.texts[:20])).mean(0))
    assert all(bool((scores[i] < scores[i + 1]).all()) for i in (1, 2, 3))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[4], scores[5])


def test_heads_come_back_as_they_were_and_strange_tensors_are_refused(known: tuple[Study, Fitted]) -> None:
    made, fitted = known
    tensors = fitted.heads.tensors()
    found = features(made.images[:7], made.texts[:7])
    assert torch.equal(Heads.of(tensors, 16, 0).standardised(found), fitted.heads.standardised(found))
    with pytest.raises(InputError, match="not those of reward heads"):
        Heads.of({name: tensor for name, tensor in tensors.items() if name != "centre"}, 16, 0)
    with pytest.raises(InputError, match="not those of reward heads"):
        Heads.of(tensors, 17, 0)
    with pytest.raises(InputError, match="not finite"):
        Heads.of(tensors | {"level": torch.full((5,), math.nan)}, 16, 0)


def test_features_hold_both_their_product_and_the_cosine() -> None:
    image, text = torch.tensor([[0.6, 0.8, 7.0]]), torch.tensor([[1.0, 0.0]])
    assert features(image, text).tolist() == [pytest.approx([0.6, 0.8, 1.0, 0.0, 0.6, 0.0, 0.6, 7.0])]
    assert features(image[:, :2], text).shape == (1, 7)


def test_statistics_of_pixels_measure_what_they_are_called() -> None:
    """White noise of 10 grey levels on mid-grey: brightness 0.5, contrast and noise 10 / 255, and sharpness twice the
    mean of |N(0, 2 (10 / 255)^2)|, which is 2 sqrt(2) sqrt(2 / pi) 10 / 255. A ramp over all levels has no noise, and
    levels 0 to 5 and 250 to 255 are within 2 % of an end. Pure red has colour 1.
    """
    noise = np.random.default_rng(0).normal(127.5, 10, (256, 256, 1)).round().astype(np.uint8)
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    red = np.broadcast_to(np.array([255, 0, 0], dtype=np.uint8), (2, 2, 3))
    images = [Image.fromarray(np.repeat(noise, 3, axis=2)), Image.fromarray(ramp), Image.fromarray(red)]
    found = [dict(zip(NAMES, row, strict=True)) for row in statistics(images).tolist()]
    level = 10 / 255
    assert found[0]["brightness"] == pytest.approx(0.5, abs=0.002)
    assert found[0]["contrast"] == pytest.approx(level, rel=0.02)
    assert math.exp(found[0]["noise"]) - 1e-3 == pytest.approx(level, rel=0.03)
    assert math.exp(found[0]["sharpness"]) - 1e-3 == pytest.approx(2 * math.sqrt(4 / math.pi) * level, rel=0.03)
    assert found[1]["noise"] == pytest.approx(math.log(1e-3), abs=0.01)
    assert (found[1]["dark"], found[1]["bright"]) == (pytest.approx(6 / 256), pytest.approx(6 / 256))
    assert found[2]["colour"] == 1 and math.exp(found[2]["noise"]) == pytest.approx(1e-3)
    assert statistics([]).shape == (0, len(NAMES))


def test_synthetic_pairs_say_what_they_claim() -> None:
    """About 81 % of the emoji labels, of those decided 90 %, name the right background; sides are shuffled."""
    pairs = reward_studies.emoji_pairs(300)
    decided = [pair for pair in pairs if pair.label != 0.5]
    assert 0.4 < sum(pair.label for pair in decided) / len(decided) < 0.6
