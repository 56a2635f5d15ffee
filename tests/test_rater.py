"""Simulated raters: the file, what they see, and that they answer as the file says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Preference, Prompt, Reward, Sample
from diffalign.worlds import brain_mr, emoji
from rewards import rater_file
from rewards.rater import HiddenUtility, SimulatedRaters
from rewards.rater_file import ALWAYS_ASKED, ASKED, MEASURES
from rewards.rater_tastes import TASTES, pixels
from rewards.registry import load

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**changes: object) -> Path:
        fields: dict[str, object] = {"name": "test", "world": "emoji", "asked": {"background": 1}, "noise": 0.0}
        path = tmp_path / f"rater-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return path

    return write


def scene(count: int, background: str = "green", seed: int = 0) -> Sample:
    """A scene of apples on green or another background; its prompt always asks for two on green."""
    attributes = {"kind": "count", "object": "apple", "count": count, "background": background}
    asked = emoji.render({**attributes, "count": 2, "background": "green"}, 0).prompt
    return Sample(asked, emoji.render(attributes, seed).image, seed=seed)


GOOD, BAD = scene(2, seed=1), scene(2, "purple", seed=2)
"""Of the two, only the first has the background that its prompt asks for; both have two apples."""


def numbered(count: int) -> list[tuple[Sample, Sample]]:
    """The pair (GOOD, BAD) again and again, told apart by the seeds of its samples."""
    return [(replace(GOOD, seed=2 * i), replace(BAD, seed=2 * i + 1)) for i in range(count)]


def shares(labels: Sequence[float]) -> tuple[float, float, float]:
    """Shares of first, tie and second."""
    return tuple(float(np.mean(np.array(labels) == value)) for value in (1, 0.5, 0))  # type: ignore[return-value]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- what they see ------------------------------------------------------------------------------------------------


def test_the_measures_are_in_their_range_and_noise_earns_little() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name, world in (("emoji", emoji), ("brain-mr", brain_mr)):
        right = [pixels(world.scene(seed).image) for seed in range(12)]
        for title, taste in TASTES[name].items():
            values = [taste(image) for image in right]
            assert min(values) >= 0 and max(values) <= 1, title
            assert np.std(values) > 0.02, f"{title} tells nothing apart"
            assert taste(pixels(noise)) < 0.15, title
            assert taste(np.full((64, 64, 3), 0.5, np.float32)) in (0.0, 1.0)


def test_each_taste_means_what_it_says() -> None:
    """A change that everyone would call an improvement raises the measure."""

    def drawing(box: tuple[int, int, int, int], colour: tuple[int, int, int] = (200, 60, 60)) -> np.ndarray:
        image = Image.new("RGB", (64, 64), (168, 230, 160))
        image.paste(colour, box)
        return pixels(image)

    taste = TASTES["emoji"]
    assert taste["size"](drawing((20, 20, 44, 44))) > taste["size"](drawing((24, 24, 40, 40)))
    assert taste["balance"](drawing((20, 20, 44, 44))) > taste["balance"](drawing((2, 2, 26, 26)))
    grey, red = drawing((20, 20, 44, 44), (120, 90, 90)), drawing((20, 20, 44, 44), (230, 30, 30))
    assert taste["colourfulness"](red) > taste["colourfulness"](grey)
    whole = emoji.scene(3).image
    for radius in (1.0, 2.0):
        blurred = whole.filter(ImageFilter.GaussianBlur(radius))
        assert taste["sharpness"](pixels(blurred)) < taste["sharpness"](pixels(whole))

    taste, whole = TASTES["brain-mr"], brain_mr.scene(3).image
    assert taste["sharpness"](pixels(whole.filter(ImageFilter.GaussianBlur(1)))) < taste["sharpness"](pixels(whole))
    dirty = np.asarray(whole).astype(int) + np.random.default_rng(0).integers(0, 40, (64, 64, 1))
    assert taste["clean background"](np.clip(dirty / 255, 0, 1).astype(np.float32)) < 0.5
    flat = np.asarray(whole) / 255.0
    flat = np.where(flat > 0.2, 0.5 + 0.3 * (flat - 0.5), flat).astype(np.float32)
    assert taste["tissue contrast"](flat) < taste["tissue contrast"](pixels(whole))


def test_a_lesion_which_is_asked_for_is_hardly_a_matter_of_taste() -> None:
    plain = {"plane": "axial", "contrast": "T2", "level": "ventricles"}
    lesion = {**plain, "lesion": "present", "side": "left", "size": "large"}
    for name, taste in TASTES["brain-mr"].items():
        moved = [
            taste(pixels(brain_mr.render(lesion, seed).image))
            - taste(pixels(brain_mr.render({**plain, "lesion": "none"}, seed).image))
            for seed in range(8)
        ]
        assert abs(np.mean(moved)) < 0.1, name


def test_terms_are_the_checkers_credit_and_the_tastes() -> None:
    raters = SimulatedRaters.load("emoji")
    terms = raters.terms(GOOD)
    assert set(terms) == {"object", "count", "background", "size", "colourfulness", "sharpness", "balance"}
    assert (terms["object"], terms["count"], terms["background"]) == (1, 1, 1)
    assert terms["size"] == TASTES["emoji"]["size"](pixels(GOOD.image))  # type: ignore[arg-type]
    assert raters.terms(BAD)["background"] == 0


def test_names_of_attributes_and_tastes_never_meet() -> None:
    for world, names in ASKED.items():
        assert not set(names) & set(MEASURES[world])
        assert ALWAYS_ASKED[world] <= set(names)


# -- how they answer ----------------------------------------------------------------------------------------------


def test_without_noise_the_better_one_wins_and_equals_tie(write: Write) -> None:
    raters = SimulatedRaters.load(write())
    for pair, label in (((GOOD, BAD), 1.0), ((BAD, GOOD), 0.0), ((GOOD, replace(GOOD, seed=5)), 0.5)):
        assert [p.label for p in raters.judge([pair], 0)] == [label]


def test_the_utility_is_the_weighted_mean_of_the_terms_that_are_asked(write: Write) -> None:
    """Weights 3 for the background (1 or 0), 1 for the count (1) and 5 for a position nobody asks for: 4/4, 1/4."""
    utility = SimulatedRaters.load(write(asked={"background": 3, "count": 1, "position": 5})).utility
    scores = utility([GOOD, BAD])
    assert scores.total.tolist() == [1, 0.25]
    assert scores.parts["background"].tolist() == [1, 0]
    assert scores.parts["position"].isnan().all()


def test_a_negative_taste_likes_less_of_it(write: Write) -> None:
    """(2 * 1 - 1 * size) / (2 + 1)."""
    raters = SimulatedRaters.load(write(asked={"background": 2}, taste={"size": -1}))
    size = TASTES["emoji"]["size"](pixels(GOOD.image))  # type: ignore[arg-type]
    assert raters.utility([GOOD]).total.item() == pytest.approx((2 - size) / 3)
    assert raters.utility.range == (-1, 1)


def test_the_answers_have_the_probabilities_of_the_model(write: Write) -> None:
    """u1 - u2 is 1. With noise 1, ties 0.5 and side bias 0.3: first sigmoid(1 - 0.5 + 0.3) = 0.69, second
    sigmoid(-1 - 0.5 - 0.3) = 0.14, a tie otherwise. 4000 pairs: four standard errors are at most 0.032.
    """
    raters = SimulatedRaters.load(write(noise=1.0, ties=0.5, side_bias=0.3))
    expected = (sigmoid(0.8), 1 - sigmoid(0.8) - sigmoid(-1.8), sigmoid(-1.8))
    first = shares([p.label for p in raters.judge(numbered(4000), 0)])
    assert first == pytest.approx(expected, abs=0.032)
    turned = shares([p.label for p in raters.judge([(b, a) for a, b in numbered(4000)], 0)])
    bias = (sigmoid(-1.2), 1 - sigmoid(-1.2) - sigmoid(0.2), sigmoid(0.2))
    assert turned == pytest.approx(bias, abs=0.032)


def test_a_lapse_is_a_coin_s_toss(write: Write) -> None:
    """Noise-free, the better one loses half of the lapses: 0.5 * 0.4 = 0.2 of 2000, give or take 0.036."""
    raters = SimulatedRaters.load(write(lapse=0.4, good_above=0.5))
    assert shares([p.label for p in raters.judge(numbered(2000), 0)]) == pytest.approx((0.8, 0, 0.2), abs=0.036)
    thumbs = raters.good([first for first, _ in numbered(2000)], 0)
    assert np.mean(thumbs) == pytest.approx(0.8, abs=0.036)


def test_thumbs_are_up_above_the_threshold(write: Write) -> None:
    assert SimulatedRaters.load(write(good_above=0.5)).good([GOOD, BAD], 0) == [True, False]
    noisy = SimulatedRaters.load(write(good_above=0.6, noise=0.5))
    thumbs = noisy.good([first for first, _ in numbered(2000)], 0)
    assert np.mean(thumbs) == pytest.approx(sigmoid((1 - 0.6) / 0.5), abs=0.042)


def test_judgements_do_not_depend_on_the_batch_but_on_the_seed() -> None:
    raters = SimulatedRaters.load("brain-mr")
    made = [brain_mr.render(brain_mr.prompts("train", 6)[i // 2].attributes, i) for i in range(12)]
    pairs = [
        (Sample(made[i].prompt, made[i].image, seed=i), Sample(made[i].prompt, made[i + 1].image, seed=i + 1))
        for i in range(0, 12, 2)
    ]
    together = raters.judge(pairs, 3)
    assert len(together) == 6 * 4 and [p.criterion for p in together[:4]] == raters.criteria
    alone = [answer for pair in reversed(pairs) for answer in raters.judge([pair], 3)]
    assert sorted(map(_shown, together)) == sorted(map(_shown, alone))
    one = raters.judge(pairs, 3, criteria=["image quality"])
    assert [_shown(p) for p in one] == [_shown(p) for p in together if p.criterion == "image quality"]
    assert [p.label for p in together] != [p.label for p in raters.judge(pairs, 4)]


def _shown(preference: Preference) -> tuple[object, ...]:
    return preference.prompt.key, preference.first.seed, preference.criterion, preference.rater, preference.label


def test_samples_without_seeds_of_their_own_are_told_apart_by_their_pixels(write: Write) -> None:
    raters = SimulatedRaters.load(write(noise=10.0))
    pairs = [(replace(scene(2, seed=i), seed=0), replace(scene(2, seed=i + 1), seed=0)) for i in range(24)]
    assert len({p.label for p in raters.judge(pairs, 0)}) == 2
    again = [(replace(a), replace(b)) for a, b in pairs]
    assert [p.label for p in raters.judge(again, 0)] == [p.label for p in raters.judge(pairs, 0)]


def test_raters_are_persons_and_several_may_judge_a_pair(write: Write) -> None:
    path = write(
        taste={"size": 1, "balance": 1}, noise=0.5, raters={"count": 5, "overlap": 3, "spread": 0.5, "seed": 7}
    )
    raters = SimulatedRaters.load(path)
    answers = raters.judge(numbered(200), 0)
    assert len(answers) == 600
    for i in range(0, 600, 3):
        assert len({answer.rater for answer in answers[i : i + 3]}) == 3
    assert {answer.rater for answer in answers} == set(raters.names()) == {f"test-{i}" for i in range(1, 6)}
    utilities = raters.utilities(GOOD)
    assert len(set(utilities)) == 5
    assert SimulatedRaters.load(path).utilities(GOOD) == utilities
    assert raters.utility([GOOD]).total.item() == pytest.approx(np.mean(utilities))
    alike = SimulatedRaters.load(write(taste={"size": 1}, raters={"count": 5})).utilities(GOOD)
    assert len(set(alike)) == 1


def test_criteria_look_at_their_own_terms(write: Write) -> None:
    criteria = {"colour": {"asked": ["background"], "taste": []}, "looks": {"asked": [], "taste": ["size"]}}
    raters = SimulatedRaters.load(write(asked={"background": 1, "count": 1}, taste={"size": 1}, criteria=criteria))
    assert raters.criteria == ["overall", "colour", "looks"]
    size = TASTES["emoji"]["size"](pixels(BAD.image))  # type: ignore[arg-type]
    found = [HiddenUtility(raters, title)([BAD]).total.item() for title in raters.criteria]
    assert found == pytest.approx([(0 + 1 + size) / 3, 0, size])
    assert list(HiddenUtility(raters, "looks")([BAD]).parts) == ["size"]


def test_provenance_says_that_it_is_simulated(write: Write) -> None:
    path = write()
    (answer,) = SimulatedRaters.load(path).judge([(GOOD, BAD)], 5)
    assert answer.first is GOOD and answer.second is BAD and answer.prompt is GOOD.prompt
    assert answer.rater == "test-1" and answer.criterion == "overall" and answer.strength == 1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert answer.provenance == {
        "simulated": True, "raters": path.name, "raters_sha256": digest, "seed": 5, "left": "first",
    }  # fmt: skip


def test_what_cannot_be_judged_is_told() -> None:
    raters = SimulatedRaters.load("emoji")
    stranger = Sample(Prompt("a sunset"), GOOD.image)
    other = Sample(emoji.scene(3).prompt, GOOD.image)
    blind = replace(GOOD, image=None)
    for pair, message in (
        ((stranger, stranger), "no prompt of it"),
        ((GOOD, other), "a pair is of one prompt"),
        ((GOOD, blind), "has none"),
    ):
        with pytest.raises(InputError, match=message):
            raters.judge([pair], 0)
    with pytest.raises(InputError, match="no prompt of it"):
        raters.good([stranger], 0)
    assert raters.utility([stranger, GOOD, blind]).total.isnan().tolist() == [True, False, True]
    assert raters.judge([], 0) == [] and raters.good([], 0) == []
    assert raters.utility([]).total.shape == (0,)
    with pytest.raises(ConfigError, match="no criterion 'taste'; there are overall"):
        raters.judge([(GOOD, BAD)], 0, criteria=["taste"])


# -- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji", "brain-mr"])
def test_the_shipped_raters_err_but_know_what_is_right(name: str) -> None:
    """Of a scene that is right for its prompt and one that is not, the right one wins nine times in ten or more."""
    raters = SimulatedRaters.load(name)
    world = emoji if name == "emoji" else brain_mr
    made = [world.scene(seed) for seed in range(30)]
    pairs = [
        (Sample(made[i].prompt, made[i].image, seed=1), Sample(made[i].prompt, made[i - 1].image, seed=2))
        for i in range(30)
    ]
    answers = raters.judge(pairs, 0, criteria=["overall"])
    assert np.mean([answer.label for answer in answers]) > 0.9
    assert raters.profile.lapse > 0 and raters.profile.side_bias > 0 and raters.profile.raters.count > 1


def test_a_reward_by_name(write: Write) -> None:
    reward = load("hidden-utility?rater=emoji")
    assert isinstance(reward, Reward)
    assert (reward.name, reward.unit, reward.range, reward.higher_is_better) == (
        "hidden-utility",
        "utility",
        (0, 1),
        True,
    )
    assert reward([GOOD]).total.item() > reward([BAD]).total.item()
    assert load("hidden-utility?rater=brain-mr&criterion=image quality").name == "hidden-utility-image-quality"
    assert load(f"hidden-utility?rater={write()}")([GOOD]).total.item() == 1
    with pytest.raises(ConfigError, match="needs the argument rater"):
        load("hidden-utility")
    with pytest.raises(NotFoundError, match="no rater 'emojis'; there are brain-mr, emoji"):
        load("hidden-utility?rater=emojis")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nois": 1}, "unknown field nois; did you mean noise"),
        ({"raters": {"counts": 3}}, r"unknown field raters\.counts; did you mean count"),
        ({"criteria": {"a": {"tastes": []}}}, r"unknown field criteria\.a\.tastes; did you mean taste"),
        ({"noise": -1}, "noise: input should be greater than or equal to 0"),
        ({"noise": "much"}, "noise: input should be a valid number"),
        ({"noise": math.nan}, "noise: input should be a finite number"),
        ({"asked": {"background": True}}, r"asked\.background: input should be a valid number"),
        ({"asked": {"backgrund": 1}}, "'backgrund' is no asked of the world emoji; did you mean 'background'"),
        ({"taste": {"tissue contrast": 1}}, "'tissue contrast' is no taste of the world emoji"),
        ({"asked": {"count": 1}}, "about nothing that every prompt has"),
        ({"asked": {}}, "about nothing that every prompt has"),
        ({"criteria": {"a": {"asked": []}}}, "criterion 'a' is about nothing"),
        ({"criteria": {"a": {"asked": ["count"]}}}, "'count' is no asked of this file, in criterion 'a'"),
        ({"raters": {"count": 2, "overlap": 3}}, "overlap 3 asks for more raters than there are"),
        ({"lapse": 1.5}, "lapse: input should be less than or equal to 1"),
        ({"world": "text"}, "world: input should be 'emoji', 'brain-mr' or 'findings'"),
        ({"name": "a/b"}, "name: string should match"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(write: Write, changes: dict[str, object], message: str) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        SimulatedRaters.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "rater.yaml"
    for text, message in (
        ("- a", "a rater is a mapping"),
        ("a: [", "rater.yaml:1: not valid YAML"),
        ("name: a", "missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            SimulatedRaters.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        SimulatedRaters.load(path)
    assert rater_file.shipped() == ["brain-mr", "emoji", "findings"]
