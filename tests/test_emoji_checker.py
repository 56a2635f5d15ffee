"""The emoji checker answers as a person would, on true, false, damaged and hopeless images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from diffalign.types import Prompt, Reward, Sample
from diffalign.worlds import emoji
from rewards.emoji_checker import ATTRIBUTES, EmojiChecker, detect
from rewards.emoji_detector import estimate_background, look
from rewards.validate_emoji_checker import DEGRADATIONS, measure, report, wilson, wrong_captions

HARD, GRADED = EmojiChecker(), EmojiChecker(graded=True)
PLACES = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}


def paint(background: str, *things: tuple[str, tuple[float, float]]) -> Image.Image:
    """A picture made without the world's own layout: drawings centred on given points, pasted by Pillow."""
    picture = Image.new("RGB", (64, 64), emoji.BACKGROUND_RGB[background])
    for name, (x, y) in things:
        pixels = torch.from_numpy(emoji.sprite(name, 26).copy()).round().to(torch.uint8).numpy()
        drawing = Image.frombuffer("RGBa", (pixels.shape[1], pixels.shape[0]), pixels.tobytes()).convert("RGBA")
        picture.paste(drawing, (round(x - drawing.width / 2), round(y - drawing.height / 2)), drawing)
    return picture


def asked(text: str) -> Prompt:
    attributes = emoji.parse(text)
    assert attributes is not None
    return Prompt(text, attributes=attributes)


def judge(checker: EmojiChecker, text: str, image: Image.Image) -> dict[str, float]:
    scores = checker([Sample(asked(text), image)])
    parts = {name: float(part[0]) for name, part in scores.parts.items() if not math.isnan(float(part[0]))}
    if not checker.graded:
        assert parts.pop("everything") == float(all(value == 1 for value in parts.values()))
    assert float(scores.total[0]) == pytest.approx(sum(parts.values()) / len(parts))
    return parts


THREE = "three apples on a green background"
THREE_APPLES = [("apple", PLACES[corner]) for corner in ("top left", "top right", "bottom left")]
BESIDE = "a cat left of a dog on a blue background"
CAT_DOG = [("cat", (16.0, 30.0)), ("dog", (47.0, 33.0))]
CORNER = "a star in the bottom right corner on a pink background"


def test_it_is_a_reward() -> None:
    assert isinstance(HARD, Reward)
    assert (HARD.name, HARD.modality, HARD.unit, HARD.range, HARD.higher_is_better) == (
        "emoji-checker", "image", "fraction", (0.0, 1.0), True,
    )  # fmt: skip


@pytest.mark.parametrize("checker", [HARD, GRADED], ids=["hard", "graded"])
def test_right_images_score_exactly_one(checker: EmojiChecker) -> None:
    cases = {
        THREE: paint("green", *THREE_APPLES),
        BESIDE: paint("blue", *CAT_DOG),
        CORNER: paint("pink", ("star", (47, 49))),
    }
    assert judge(checker, THREE, cases[THREE]) == {"object": 1, "count": 1, "background": 1}
    assert judge(checker, BESIDE, cases[BESIDE]) == {"object": 1, "relation": 1, "background": 1}
    assert judge(checker, CORNER, cases[CORNER]) == {"object": 1, "position": 1, "background": 1}


@pytest.mark.parametrize(
    ("text", "image", "wrong"),
    [
        pytest.param(THREE, paint("green", *THREE_APPLES[:2]), {"count"}, id="one too few"),
        pytest.param(THREE, paint("green", *THREE_APPLES, ("apple", (48, 48))), {"count"}, id="one too many"),
        pytest.param(THREE, paint("green", *THREE_APPLES, ("boat", (48, 48))), {"object"}, id="an extra boat"),
        pytest.param(THREE, paint("purple", *THREE_APPLES), {"background"}, id="wrong background"),
        pytest.param(
            THREE, paint("green", *(("mushroom", at) for _, at in THREE_APPLES)), {"object", "count"}, id="wrong kind"
        ),
        pytest.param(THREE, paint("green"), {"object", "count"}, id="nothing there"),
        pytest.param(BESIDE, paint("blue", ("dog", (16, 30)), ("cat", (47, 33))), {"relation"}, id="swapped"),
        pytest.param(BESIDE, paint("blue", ("cat", (30, 16)), ("dog", (33, 47))), {"relation"}, id="above instead"),
        pytest.param(BESIDE, paint("blue", CAT_DOG[0]), {"object", "relation"}, id="the dog is missing"),
        pytest.param(BESIDE, paint("blue", ("cat", (16, 16)), ("dog", (47, 16)), ("car", (32, 48))), {"object"},
                     id="an extra car"),
        pytest.param(BESIDE, paint("blue", ("cat", (16, 16)), ("dog", (47, 16)), ("cat", (16, 48))), {"object"},
                     id="an extra cat"),
        pytest.param(CORNER, paint("pink", ("star", (16, 48))), {"position"}, id="other corner"),
        pytest.param(CORNER, paint("pink", ("star", (32, 32))), {"position"}, id="in the middle"),
        pytest.param(CORNER, paint("pink", ("star", (47, 49)), ("star", (16, 16))), {"object"}, id="two stars"),
    ],
)  # fmt: skip
def test_each_mistake_costs_the_right_part(text: str, image: Image.Image, wrong: set[str]) -> None:
    hard, graded = judge(HARD, text, image), judge(GRADED, text, image)
    assert {name for name, value in hard.items() if value == 0} == wrong
    assert {name for name, value in graded.items() if value < 0.99} == wrong


def test_graded_credit_orders_near_misses() -> None:
    """Four apples asked for: count credit is 1 - |n - 4| / 4 by definition."""
    four = "four apples on a green background"
    places = [("apple", at) for at in PLACES.values()]
    credit = [judge(GRADED, four, paint("green", *places[:n]))["count"] for n in range(5)]
    assert credit == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)
    toward_corner = [(16, 16), (32, 32), (36, 36), (42, 42)]
    credit = [judge(GRADED, CORNER, paint("pink", ("star", at)))["position"] for at in toward_corner]
    assert credit == sorted(credit)
    assert credit[0] == 0
    assert credit[-1] == 1
    turning = [(47, 32), (32, 16), (20, 16), (16, 32)]
    beside = [paint("blue", ("cat", at), ("dog", (64 - at[0], 64 - at[1]))) for at in turning]
    credit = [judge(GRADED, BESIDE, image)["relation"] for image in beside]
    assert credit == sorted(credit)
    assert len(set(credit)) > 2
    sharp = paint("pink", ("house", (47, 49)))
    text = "a house in the bottom right corner on a pink background"
    blurred = [sharp.filter(ImageFilter.GaussianBlur(sigma)) for sigma in (5.0, 2.0, 1.6, 0.0)]
    credit = [judge(GRADED, text, image)["object"] for image in blurred]
    assert credit == sorted(credit)
    assert len(set(credit)) > 2


@pytest.mark.parametrize("name", ["clean", "blur, sigma 1 px", "JPEG, quality 50", "bent, blurred, noisy, JPEG 70"])
def test_mild_damage_is_forgiven(name: str) -> None:
    """60 scenes: with a true rate of 99.5 % or more, four mistakes or more have a chance below 1 in 3000."""
    tally = measure(60, DEGRADATIONS[name], first_seed=90_000)
    assert tally.right["all"] >= 57
    assert tally.asked["all"] == 60


def test_wrong_captions_are_not_believed() -> None:
    fooled = wrong_captions(40, first_seed=70_000)
    assert set(fooled) == set(ATTRIBUTES)
    assert all(right == 0 for right, _ in fooled.values())


@pytest.mark.parametrize("name", ["car", "clock", "dog", "panda", "rocket", "house"])
def test_a_blob_is_no_object(name: str) -> None:
    """A drawing melted to one colour, or blurred beyond recognition, is not detected as itself."""
    sharp = paint("blue", (name, (32, 32)))
    assert [found.object for found in detect([sharp])[0]] == [name]
    blob = Image.new("RGB", (64, 64), emoji.BACKGROUND_RGB["blue"])
    drawing = torch.from_numpy(emoji.sprite(name, 26).copy())
    mean = drawing[..., :3].sum((0, 1)) / drawing[..., 3].sum() * 255
    ImageDraw.Draw(blob).ellipse((20, 20, 44, 44), fill=tuple(int(c) for c in mean.tolist()))
    for melted in (blob, sharp.filter(ImageFilter.GaussianBlur(4))):
        assert detect([melted])[0] == []


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(emoji.OBJECTS),
    st.sampled_from(emoji.BACKGROUNDS),
    st.integers(15, 48),
    st.integers(15, 48),
)
def test_an_object_is_found_wherever_it_is(name: str, background: str, x: int, y: int) -> None:
    sight = look([paint(background, (name, (x, y)))])[0]
    assert [found.object for found in sight.objects[:1]] == [name]
    assert math.dist(sight.objects[0].center, (x, y)) <= 1.5
    assert sight.objects[0].score > 0.95
    assert sight.background == background


def test_the_background_is_the_commonest_colour_and_may_have_no_name() -> None:
    black = Image.new("RGB", (64, 64), (10, 10, 10))
    assert look([black])[0].background is None
    half = torch.zeros(3, 64, 64)
    half[:, :40] = torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    assert estimate_background(half).tolist() == pytest.approx([0.2, 0.4, 0.6], abs=0.02)
    stripes = paint("green", ("apple", (32, 32)))
    ImageDraw.Draw(stripes).rectangle((0, 0, 64, 14), fill=(40, 40, 90))
    ImageDraw.Draw(stripes).rectangle((0, 50, 64, 64), fill=(140, 40, 90))
    parts = judge(HARD, "one apple on a green background", stripes)
    assert parts["background"] == 0
    assert parts["object"] == 1


def test_no_samples_and_samples_that_cannot_be_judged() -> None:
    empty = HARD([])
    assert empty.total.shape == (0,)
    assert set(empty.parts) == {*ATTRIBUTES, "everything"}
    assert set(GRADED([]).parts) == set(ATTRIBUTES)
    image = paint("green", *THREE_APPLES)
    scores = HARD([
        Sample(Prompt("a watercolour of the sea"), image),
        Sample(asked(THREE), None, text="no image"),
        Sample(Prompt(THREE, attributes={"plane": "axial"}), image),
        Sample(Prompt(THREE), image),
    ])  # fmt: skip
    assert scores.total.dtype == torch.float32
    assert scores.total.isnan().tolist() == [True, True, True, False]
    assert float(scores.total[3]) == 1
    assert all(part[:3].isnan().all() for part in scores.parts.values())


@pytest.mark.parametrize("checker", [HARD, GRADED], ids=["hard", "graded"])
def test_a_score_does_not_depend_on_the_batch(checker: EmojiChecker) -> None:
    soft = DEGRADATIONS["blur, sigma 1 px"]
    scenes = [emoji.scene(seed) for seed in range(8)]
    rng = np.random.default_rng(0)
    samples = [
        Sample(one.prompt, soft(other.image, rng)) for one, other in zip(scenes, scenes[2:] + scenes[:2], strict=True)
    ]
    together = checker(samples).total
    apart = torch.cat([checker([sample]).total for sample in reversed(samples)]).flip(0)
    assert torch.equal(together, apart)
    assert torch.equal(together, checker(samples).total)


def test_other_sizes_and_modes_are_read() -> None:
    image = paint("green", *THREE_APPLES)
    large = image.resize((256, 256), Image.Resampling.BICUBIC)
    for other in (large, large.convert("RGBA"), image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)):
        assert judge(HARD, THREE, other) == {"object": 1, "count": 1, "background": 1}


def test_wilson_interval() -> None:
    """20 of 20: the lower bound is n / (n + z^2) = 20 / 23.8415; 10 of 20 is symmetric about a half."""
    assert wilson(20, 20) == pytest.approx((0.83887, 1.0), abs=1e-4)
    low, high = wilson(10, 20)
    assert low + high == pytest.approx(1)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_report_has_every_row() -> None:
    text = report(2)
    assert all(f"| {label} |" in text for label in (*DEGRADATIONS, *ATTRIBUTES))
