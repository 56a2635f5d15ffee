"""The rewards ``preference`` and ``clinician``: what a fitted folder says of images near to its data and far away."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Prompt, Reward, Sample
from diffalign.worlds import brain_mr, emoji
from rewards import fit_model, load_reward
from rewards.clinician import ClinicianReward
from rewards.clip import ClipReward
from rewards.fit import fit
from rewards.fit_data import Study, divide, gather
from rewards.preference import PreferenceReward
from tests import reward_studies, tiny_clip

CRITERIA = ["contrast as asked", "image quality"]


@cache
def labels() -> Study:
    """Simulated labels of brain slices."""
    return gather(reward_studies.brain_pairs(150), ClipReward())


def fitted(folder: Path, **fields: object) -> Path:
    """A reward model from them."""
    settings, encoder, study = reward_studies.config(held_out=0.4, **fields), ClipReward(), labels()
    parts = divide(study, settings.held_out, settings.seed)
    heads = {
        criterion: fit(
            study, study.rows_of(criterion, parts.train), study.rows_of(criterion, parts.tune), criterion, settings
        )
        for criterion in CRITERIA
    }
    fit_model.write(folder, "brain", ("embedded:clip", "sha256:0"), encoder, study, parts, heads, 0)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("clinician") / "reward")


def slices(count: int, seed: int = 100, right: bool = True, noise: float = 0.0) -> list[Sample]:
    """Slices for prompts of the training side, none of which was seen."""
    asked = brain_mr.prompts("train", count, 0)
    return [Sample(p, reward_studies.brain(p, seed + i, right, noise)) for i, p in enumerate(asked)]


def far() -> list[Sample]:
    """Images that no clinician was shown: emoji, white noise, an inverted slice, plain white."""
    asked = brain_mr.prompts("train", 1, 0)[0]
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [emoji.scene(i).image for i in range(6)]
    return [Sample(asked, image) for image in [*images, Image.fromarray(grain), Image.new("RGB", (64, 64), "white")]]


def test_both_follow_the_protocol_and_load_by_name(folder: Path) -> None:
    for spec in (f"preference?folder={folder}&criterion=image quality", f"clinician?folder={folder}&kappa=0.5"):
        reward = load_reward(spec)
        assert isinstance(reward, Reward) and reward.name == spec.partition("?")[0]
        assert (reward.unit, reward.higher_is_better, reward.modality) == ("standard deviations", True, "image")
        scores = reward(slices(3))
        assert scores.total.shape == (3,) and scores.total.dtype == torch.float32 and list(scores.parts) == CRITERIA


def test_each_criterion_follows_its_own_labels(folder: Path) -> None:
    """Right contrast against wrong moves the one criterion most, noise the other."""
    reward = PreferenceReward(str(folder), "image quality")
    good, wrong, noisy = (reward(slices(40, **change)).parts for change in ({}, {"right": False}, {"noise": 40.0}))
    contrast, quality = CRITERIA
    assert float((good[contrast] > wrong[contrast]).double().mean()) > 0.8
    assert float((good[quality] > noisy[quality]).double().mean()) > 0.8
    falls = [float((good[name] - noisy[name]).mean()) for name in CRITERIA]
    assert falls[1] > falls[0]


def test_the_bound_is_the_mean_minus_kappa_deviations(folder: Path) -> None:
    samples = slices(12)
    judged = fit_model.RewardModel(folder).judge(samples)
    assert float(judged.sd.min()) > 0
    for kappa in (0.0, 1.0, 2.5):
        cautious = ClinicianReward(str(folder), kappa=kappa, abstain=1)(samples)
        bounds = judged.mean - kappa * judged.sd
        assert torch.allclose(torch.stack(list(cautious.parts.values())), bounds)
        assert torch.allclose(cautious.total, bounds.mean(0))
    least = ClinicianReward(str(folder), combine="min", abstain=1)(samples)
    assert torch.equal(least.total, torch.minimum(*least.parts.values()))
    plain = PreferenceReward(str(folder), CRITERIA[0])(samples)
    assert torch.equal(plain.total, judged.mean[0])


def test_far_images_get_no_score_and_near_ones_do(folder: Path) -> None:
    reward = ClinicianReward(str(folder))
    away = reward(far())
    assert bool(away.total.isnan().all()) and all(bool(part.isnan().all()) for part in away.parts.values())
    assert float(reward(slices(40)).total.isfinite().double().mean()) > 0.9
    assert bool(ClinicianReward(str(folder), abstain=1)(far()).total.isfinite().all())
    distance = fit_model.RewardModel(folder).judge([*far(), *slices(10)]).distance
    assert float(distance[:8].min()) > float(distance[8:].max())


def test_the_limit_is_a_quantile_of_held_out_distances(folder: Path) -> None:
    """Of about 100 held-out images the 99.9 % quantile is the largest; half lie within the median."""
    model = fit_model.RewardModel(folder)
    held = model.domain["held_out"]
    assert model.limit(0.999) == float(held.max()) and model.limit(1) == math.inf
    assert float((held <= model.limit(0.5)).double().mean()) == pytest.approx(0.5, abs=0.02)
    near = slices(40)
    strict, loose = (ClinicianReward(str(folder), abstain=q)(near).total.isfinite().sum() for q in (0.3, 0.999))
    assert strict < loose


def test_an_image_gets_the_same_score_in_any_batch(folder: Path) -> None:
    reward, samples = ClinicianReward(str(folder)), [*slices(9), *far()[:2]]
    together = reward(samples).total
    alone = torch.cat([reward([sample]).total for sample in samples])
    back = reward(samples[::-1]).total.flip(0)
    assert torch.allclose(together, alone, atol=1e-4, equal_nan=True)
    assert torch.allclose(together, back, atol=1e-4, equal_nan=True)


def test_a_sample_without_an_image_fails_alone(folder: Path) -> None:
    good = slices(1)[0]
    for reward in (ClinicianReward(str(folder)), PreferenceReward(str(folder), CRITERIA[0])):
        scores = reward([Sample(good.prompt, text="words"), good])
        assert scores.total.isfinite().tolist() == [False, True]
        assert reward([]).total.shape == (0,)


def test_probabilities_of_a_pair_add_up_and_turn_with_it(folder: Path) -> None:
    reward = PreferenceReward(str(folder), "contrast as asked")
    good, wrong = slices(20), slices(20, right=False)
    win, tie = reward.probability(good, wrong)
    loss, same = reward.probability(wrong, good)
    assert torch.allclose(win + tie + loss, torch.ones(20), atol=1e-5) and torch.allclose(tie, same, atol=1e-5)
    assert float(win.mean()) > float(loss.mean()) + 0.2 and float(tie.mean()) > 0.05
    with pytest.raises(ConfigError, match="same prompt"):
        reward.probability(good, wrong[::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": -1.0}, "kappa is -1"),
        ({"kappa": math.nan}, "kappa is nan"),
        ({"abstain": 0.0}, "abstain is 0"),
        ({"abstain": 1.5}, "abstain is 1.5"),
        ({"device": "abacus"}, "no device"),
    ],
)
def test_arguments_out_of_range_are_told(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClinicianReward(str(folder), **options)  # type: ignore[arg-type]


def test_a_criterion_has_to_be_chosen_from_those_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"several criteria and no overall one.*image quality"):
        PreferenceReward(str(folder))
    with pytest.raises(ConfigError, match="no criterion 'mood'"):
        PreferenceReward(str(folder), "mood")


def test_a_single_head_has_no_doubt_to_subtract(tmp_path: Path) -> None:
    alone = str(fitted(tmp_path / "one", ensemble=1))
    with pytest.raises(ConfigError, match="its doubt is not known; set kappa=0"):
        ClinicianReward(alone)
    assert bool(ClinicianReward(alone, kappa=0, abstain=1)(slices(2)).total.isfinite().all())


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def test_a_folder_that_is_none_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"is no reward model: it has no reward\.json"):
        load_reward(f"clinician?folder={tmp_path}")
    shutil.copytree(folder, tmp_path / "reward")
    with pytest.raises(NotFoundError, match="the reward model is in"):
        load_reward(f"preference?folder={tmp_path}")
    (tmp_path / "reward" / "heads.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"it has no heads\.safetensors"):
        load_reward(f"preference?folder={tmp_path / 'reward'}")


def test_truncated_or_exchanged_weights_are_told(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path)
    weights = place / "heads.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut off, changed, or another fit's"):
        load_reward(f"clinician?folder={place}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"criteria": {"a": 1}}, "criteria.a"),
    ],
)
def test_a_header_of_another_form_is_told(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    header = copied(folder, tmp_path) / "reward.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(InputError, match=message) as caught:
        load_reward(f"clinician?folder={header.parent}")
    assert "\n" not in str(caught.value)
    header.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_reward(f"clinician?folder={header.parent}")


def test_more_criteria_than_heads_are_told(folder: Path, tmp_path: Path) -> None:
    header = copied(folder, tmp_path) / "reward.json"
    data = json.loads(header.read_text())
    data["criteria"]["third"] = data["criteria"]["image quality"]
    header.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"does not fit reward\.json"):
        load_reward(f"clinician?folder={header.parent}")


def test_another_encoder_is_told(folder: Path, tmp_path: Path) -> None:
    tiny = tiny_clip.build(tmp_path / "clip")
    reward = load_reward(f"preference?folder={folder}&criterion=image quality&encoder={tiny}")
    with pytest.raises(InputError, match=r"is not the encoder that .* was fitted on"):
        reward(slices(1))


def test_an_encoder_may_have_moved(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ClipReward()._folder or "", tmp_path / "moved")
    samples = slices(3)
    here, there = (
        PreferenceReward(str(folder), "image quality", encoder=encoder)(samples).total
        for encoder in (None, str(tmp_path / "moved"))
    )
    assert torch.equal(here, there)


def test_without_held_out_images_of_their_own_there_is_no_limit(folder: Path, tmp_path: Path) -> None:
    model = fit_model.RewardModel(folder)
    model.domain["held_out"] = torch.zeros(0)
    with pytest.raises(ConfigError, match="cannot tell what is far; set abstain=1"):
        model.limit(0.999)
    assert model.limit(1) == math.inf


def test_a_prompt_of_the_other_world_is_still_a_number(folder: Path) -> None:
    """The distance is that of the image: a strange text is not noticed, which the page on reward models says."""
    near = slices(3)
    asked = Prompt("two cats on a blue background")
    scores = ClinicianReward(str(folder))([Sample(asked, sample.image) for sample in near])
    assert bool(scores.total.isfinite().any())
