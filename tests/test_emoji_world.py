"""The emoji world: captions say what the pixels show, nothing overlaps, the split does not leak."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.worlds import build_noto, emoji

COMBINATIONS = [a for kind in emoji.KINDS for a in emoji.combinations(kind)]
ANY = st.sampled_from(COMBINATIONS)
SEEDS = st.integers(0, 2**31)


def test_there_are_as_many_combinations_as_arithmetic_says() -> None:
    """24 objects, 6 colours: counts 24*4*6, ordered pairs 24*23*4*6, corners 24*4*6."""
    sizes = {kind: len(emoji.combinations(kind)) for kind in emoji.KINDS}
    assert sizes == {"count": 576, "relation": 13248, "position": 576}
    assert len({emoji.slug(a) for a in COMBINATIONS}) == sum(sizes.values())


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"kind": "count", "object": "apple", "count": 3, "background": "green"}, "three apples on a green background"),
        ({"kind": "count", "object": "fish", "count": 2, "background": "pink"}, "two fish on a pink background"),
        ({"kind": "count", "object": "cat", "count": 1, "background": "orange"}, "one cat on an orange background"),
        (
            {"kind": "relation", "object": "cat", "relation": "left of", "other": "umbrella", "background": "blue"},
            "a cat left of an umbrella on a blue background",
        ),
        (
            {"kind": "position", "object": "star", "corner": "top left", "background": "white"},
            "a star in the top left corner on a white background",
        ),
    ],
)
def test_canonical_captions(attributes: dict[str, object], text: str) -> None:
    assert emoji.caption(attributes) == text
    assert emoji.parse(text) == attributes


@given(ANY, st.integers(0, emoji.TEMPLATES - 1))
def test_every_caption_parses_back(attributes: dict[str, object], template: int) -> None:
    text = emoji.caption(attributes, template)
    assert emoji.parse(text) == attributes
    assert emoji.parse(f"  {text.upper()}. ") == attributes


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("An apple on a green background", "one apple on a green background"),
        ("3 cakes, pink background", "three cakes on a pink background"),
        ("a dog to the right of a car, white background", "a dog right of a car on a white background"),
        (
            "on a blue background, there is a cat in the top-left corner",
            "a cat in the top left corner, blue background",
        ),
    ],
)  # fmt: skip
def test_other_wordings_are_understood(text: str, like: str) -> None:
    assert emoji.parse(text) == emoji.parse(like) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "three apples",
        "five apples on a green background",
        "three apple on a green background",
        "one apples on a green background",
        "three apples on a black background",
        "three unicorns on a green background",
        "a cat left of a cat on a blue background",
        "a photo of three apples on a green background at night",
    ],
)
def test_what_is_no_caption_is_none(text: str) -> None:
    assert emoji.parse(text) is None


@settings(max_examples=40)
@given(st.text(max_size=60))
def test_parse_never_raises(text: str) -> None:
    emoji.parse(text)


@settings(max_examples=60, deadline=None)
@given(ANY, SEEDS)
def test_a_scene_holds_what_its_attributes_say(attributes: dict[str, object], seed: int) -> None:
    made = emoji.render(attributes, seed)
    boxes = [placed.box for placed in made.boxes]
    assert made.image.size == (64, 64)
    assert made.image.mode == "RGB"
    assert all(0 <= left < right <= 64 and 0 <= top < bottom <= 64 for left, top, right, bottom in boxes)
    assert all(25 <= max(right - left, bottom - top) <= 27 for left, top, right, bottom in boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    counted = Counter(placed.object for placed in made.boxes)
    centers = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]
    if attributes["kind"] == "count":
        assert counted == {attributes["object"]: attributes["count"]}
    elif attributes["kind"] == "relation":
        assert counted == {attributes["object"]: 1, attributes["other"]: 1}
        (x, y), (other_x, other_y) = centers
        holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        assert holds[str(attributes["relation"])]
    else:
        assert counted == {attributes["object"]: 1}
        (x, y) = centers[0]
        assert ("top" if y < 32 else "bottom") + (" left" if x < 32 else " right") == attributes["corner"]


@settings(max_examples=30, deadline=None)
@given(ANY, SEEDS)
def test_outside_the_boxes_there_is_only_background(attributes: dict[str, object], seed: int) -> None:
    made = emoji.render(attributes, seed)
    pixels = np.asarray(made.image)
    outside = np.ones((64, 64), dtype=bool)
    for placed in made.boxes:
        left, top, right, bottom = placed.box
        outside[top:bottom, left:right] = False
        inside = pixels[top:bottom, left:right].astype(int)
        color = emoji.BACKGROUND_RGB[str(attributes["background"])]
        assert (np.abs(inside - color).sum(-1) > 60).mean() > 0.25
    assert (pixels[outside] == emoji.BACKGROUND_RGB[str(attributes["background"])]).all()


def test_a_drawing_is_blended_by_its_alpha() -> None:
    """One pixel by hand: premultiplied colour + (1 - alpha) * background, rounded."""
    attributes = {"kind": "count", "object": "banana", "count": 1, "background": "blue"}
    made = emoji.render(attributes, 5)
    left, top, right, bottom = made.boxes[0].box
    drawing = emoji.sprite("banana", max(right - left, bottom - top))
    row, column = np.argwhere((drawing[..., 3] > 100) & (drawing[..., 3] < 160))[0]
    red, green, blue, alpha = drawing[row, column]
    expected = [round(c + (1 - alpha / 255) * b) for c, b in zip((red, green, blue), (150, 208, 255), strict=True)]
    assert made.image.getpixel((left + int(column), top + int(row))) == tuple(expected)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_same_seed_makes_the_same_scene(seed: int) -> None:
    first, second = emoji.scene(seed), emoji.scene(seed)
    assert first.prompt == second.prompt
    assert first.boxes == second.boxes
    assert first.image.tobytes() == second.image.tobytes()
    assert emoji.parse(first.prompt.text) == first.prompt.attributes
    json.dumps(dict(first.prompt.attributes))


def test_scenes_come_in_their_shares() -> None:
    """2000 draws at 45, 35 and 20 %: standard error at most 1.1 points, so 4 points are 3.5 of them."""
    kinds = Counter(emoji.scene(seed).prompt.attributes["kind"] for seed in range(2000))
    for kind, share in (("count", 0.45), ("relation", 0.35), ("position", 0.20)):
        assert abs(kinds[kind] / 2000 - share) < 0.04


@pytest.mark.parametrize("held_out", [True, False])
def test_a_scene_can_be_asked_from_one_side(held_out: bool) -> None:
    for seed in range(30):
        assert emoji.is_held_out(emoji.scene(seed, held_out=held_out).prompt.attributes) == held_out


def test_the_split_is_a_fifth_and_does_not_leak() -> None:
    train, held_out = emoji.prompts("train", 1500), emoji.prompts("held-out", 1500)
    for side in (train, held_out):
        assert len({prompt.id for prompt in side}) == len({prompt.text for prompt in side}) == 1500
    assert not {prompt.id for prompt in train} & {prompt.id for prompt in held_out}
    share = sum(map(emoji.is_held_out, COMBINATIONS)) / len(COMBINATIONS)
    assert abs(share - 0.2) < 0.02
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for a in emoji.combinations("relation")[::17]:
        same_scene = {**a, "object": a["other"], "other": a["object"], "relation": inverse[str(a["relation"])]}
        assert emoji.is_held_out(a) == emoji.is_held_out(same_scene)


def test_the_split_never_moves() -> None:
    """Results on held-out prompts are comparable between versions only while the split stays: pinned by digest."""
    ids = "\n".join(sorted(emoji.slug(a) for a in COMBINATIONS if emoji.is_held_out(a)))
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "ca19d997f502d42e"


def test_prompts_are_prefixes_of_longer_lists_and_follow_the_seed() -> None:
    assert emoji.prompts("train", 20) == emoji.prompts("train", 50)[:20]
    assert emoji.prompts("train", 20, 1) != emoji.prompts("train", 20, 2)
    assert emoji.prompts("train", 0) == []
    kinds = {prompt.attributes["kind"] for prompt in emoji.prompts("held-out", 40, task="position")}
    assert kinds == {"position"}


def test_all_prompts_of_a_side_can_be_had_and_no_more() -> None:
    available = sum(not emoji.is_held_out(a) for a in emoji.combinations("count"))
    assert len({p.id for p in emoji.prompts("train", available, task="count")}) == available
    with pytest.raises(ConfigError, match=str(available)):
        emoji.prompts("train", available + 1, task="count")


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"kind": "portrait"},
        {"kind": "count", "object": "apple", "background": "green"},
        {"kind": "count", "object": "apple", "count": 5, "background": "green"},
        {"kind": "count", "object": "apple", "count": True, "background": "green"},
        {"kind": "count", "object": "apple", "count": 2, "background": "green", "corner": "top left"},
        {"kind": "relation", "object": "cat", "relation": "above", "other": "cat", "background": "blue"},
        {"kind": "position", "object": "cat", "corner": "middle", "background": "blue"},
    ],
)
def test_wrong_attributes_are_refused(attributes: dict[str, object]) -> None:
    for use in (emoji.caption, emoji.validate, lambda a: emoji.render(a, 0)):
        with pytest.raises(ConfigError):
            use(attributes)


def test_a_row_of_a_mixed_table_is_understood() -> None:
    row = {"object": "apple", "kind": "count", "count": 2.0, "background": "pink", "corner": None, "relation": None}
    assert json.dumps(emoji.validate(row)) == ('{"kind": "count", "object": "apple", "count": 2, "background": "pink"}')


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="template 4"):
        emoji.caption(COMBINATIONS[0], 4)
    with pytest.raises(ConfigError, match="split"):
        emoji.prompts("test", 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="task"):
        emoji.prompts("train", 1, task="style")  # type: ignore[arg-type]


def test_backgrounds_and_drawings_are_told_apart_in_words() -> None:
    words = [*emoji.OBJECTS, *emoji.BACKGROUNDS]
    assert len(set(words)) == len(words) == 30
    assert all(word.isalpha() and word.islower() for word in [*words, *emoji.PLURALS.values()])


def test_the_atlas_is_made_from_one_known_tarball(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        build_noto.build(tmp_path / "absent.tgz", tmp_path)
    (tmp_path / "other.tgz").write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256"):
        build_noto.build(tmp_path / "other.tgz", tmp_path)
    notice = (build_noto.ASSETS / "NOTICE").read_text()
    assert notice == build_noto.NOTICE
    assert all(word in notice for word in ("Google", "Apache License", build_noto.SHA256, "16.0.0"))
    assert "Apache License" in (build_noto.ASSETS / "LICENSE").read_text()
