"""The brain-mr world: caption, table row and pixels say the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from diffalign.errors import ConfigError
from diffalign.worlds import brain_mr, build_mni
from diffalign.worlds import brain_mr_pixels as pixels

LESIONS = [facts for facts in brain_mr.combinations() if facts["lesion"] == "present"]


def grey(scene: brain_mr.Scene) -> npt.NDArray[np.float64]:
    return np.asarray(scene.image)[..., 0].astype(np.float64)


def test_there_are_135_combinations() -> None:
    """3 planes x 3 contrasts x 3 levels x (no lesion, or 2 sides x 2 sizes) = 27 x 5."""
    found = brain_mr.combinations()
    assert len(found) == 135
    assert len({brain_mr.slug(facts) for facts in found}) == 135
    assert all(json.loads(json.dumps(facts)) == facts == brain_mr.validate(facts) for facts in found)


@pytest.mark.parametrize("template", range(brain_mr.TEMPLATES))
def test_captions_are_parsed_back(template: int) -> None:
    for facts in brain_mr.combinations():
        text = brain_mr.caption(facts, template)
        assert brain_mr.parse(text) == facts
        assert brain_mr.parse(f"  {text.upper()}.") == facts
        assert len(text.split()) <= 24
        brief = {name: value for name, value in facts.items() if name != "level"}
        assert brain_mr.parse(brain_mr.caption(brief, template)) == brief


def test_canonical_captions() -> None:
    assert brain_mr.parse("axial T2 brain MRI, large lesion in the left hemisphere") == {
        "plane": "axial",
        "contrast": "T2",
        "lesion": "present",
        "side": "left",
        "size": "large",
    }
    facts = {"plane": "coronal", "contrast": "FLAIR", "level": "thalamus", "lesion": "none"}
    assert brain_mr.caption(facts) == "coronal FLAIR brain MRI at the level of the thalamus, no lesion"
    assert brain_mr.slug(facts) == "brain-mr-coronal-flair-thalamus-no-lesion"
    words = {word for facts in brain_mr.combinations() for k in range(3) for word in brain_mr.caption(facts, k).split()}
    assert len(words) < 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "axial T3 brain MRI, no lesion",
        "sagittal T1 brain MRI, small lesion in the left hemisphere",
        "axial T1 brain MRI at the level of the thalamus, no lesion",
    ],
)
def test_other_texts_are_not_understood(text: str) -> None:
    assert brain_mr.parse(text) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plane": "oblique"}, "axial, coronal, sagittal"),
        ({"side": "anterior"}, "left, right"),
        ({"level": "thalamus"}, "cerebellum, ventricles, vertex"),
        ({"lesion": "none"}, "without a lesion"),
        ({"size": "medium"}, "small, large"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_attributes_are_refused(change: dict[str, str], said: str) -> None:
    facts = {
        "plane": "axial",
        "contrast": "T1",
        "level": "vertex",
        "lesion": "present",
        "side": "left",
        "size": "small",
    }
    with pytest.raises(ConfigError, match=said):
        brain_mr.render({**facts, **change}, 0)


def test_missing_attributes_are_refused() -> None:
    with pytest.raises(ConfigError, match="lack side, size"):
        brain_mr.caption({"plane": "axial", "contrast": "T1", "lesion": "present"})
    with pytest.raises(ConfigError, match="needs a level"):
        brain_mr.render({"plane": "axial", "contrast": "T1", "lesion": "none"}, 0)
    with pytest.raises(ConfigError, match="0 to 2"):
        brain_mr.caption(LESIONS[0], 3)


@pytest.mark.parametrize("facts", LESIONS, ids=brain_mr.slug)
def test_the_mask_agrees_with_side_and_size(facts: dict[str, str]) -> None:
    """The patient's left is on the right of the image (columns 32 to 63), anterior on the left (columns 0 to 31).

    The area is that of a disk: pi/4 x 5.0**2 = 19.6 to pi/4 x 6.2**2 = 30.2 px small, 95.0 to 132.7 px large.
    """
    for seed in range(2):
        scene = brain_mr.render(facts, seed)
        columns = np.flatnonzero(scene.lesion_mask.any(axis=0))
        if facts["side"] in ("left", "posterior"):
            assert columns.min() >= 33
        else:
            assert columns.max() <= 30
        low, high = {"small": (20, 30), "large": (95, 133)}[facts["size"]]
        assert low <= scene.lesion_mask.sum() <= high
        assert scene.prompt.attributes == facts


def test_lesions_are_bright_on_t2_and_flair_and_dark_on_t1() -> None:
    """Against the same subject without the lesion: at least 35 of 255 levels, and nothing changes far away."""
    for number, facts in enumerate(LESIONS[::5]):
        healthy = {k: v for k, v in facts.items() if k not in ("side", "size")} | {"lesion": "none"}
        ill, well = brain_mr.render(facts, number), brain_mr.render(healthy, number)
        change = grey(ill) - grey(well)
        inside = change[ill.lesion_mask].mean()
        assert (inside < -35) if facts["contrast"] == "T1" else (inside > 35)
        far_rows, far_columns = np.nonzero(ill.lesion_mask)
        far = np.ones((64, 64), dtype=bool)
        far[max(0, far_rows.min() - 5) : far_rows.max() + 6, max(0, far_columns.min() - 5) : far_columns.max() + 6] = (
            False
        )
        assert np.abs(change[far]).max() < 35
        assert not well.lesion_mask.any()


@pytest.mark.parametrize(
    ("contrast", "order"),
    [("T1", ("white", "grey", "fluid")), ("T2", ("fluid", "grey", "white")), ("FLAIR", ("grey", "white", "fluid"))],
)
def test_tissues_are_ordered_as_the_contrast_has_them(contrast: str, order: tuple[str, ...]) -> None:
    """Means over the purest half per cent of each tissue of ventricle-level slices, brightest first."""
    for seed in range(4):
        streams = {name: np.random.default_rng(seed) for name in ("subject", "contrast", "lesion", "scanner")}
        image, _ = pixels.draw("axial", contrast, "ventricles", None, streams)
        position = pixels.slice_coordinates("axial", "ventricles", np.random.default_rng(seed))
        _, *maps = pixels.sample_atlas(position)
        tissues = dict(zip(("grey", "white", "fluid"), maps, strict=True))
        means = [image[tissues[name] >= np.quantile(tissues[name], 0.995)].mean() for name in order]
        assert means[0] > means[1] + 8 > means[2] + 16


@pytest.mark.parametrize("plane", brain_mr.PLANES)
def test_the_image_axes_follow_the_radiological_convention(plane: str) -> None:
    """Corners of the image in atlas millimetres (x to the right side, y to the front, z up), whatever the subject."""
    for seed in range(20):
        level = brain_mr.LEVELS[plane][seed % 3]
        x, y, z = pixels.slice_coordinates(plane, level, np.random.default_rng(seed))
        across, down = {"axial": (x, y), "coronal": (x, z), "sagittal": (y, z)}[plane]
        assert (across[:, :8] > across[:, -8:] + 90).all()
        assert (down[:8] > down[-8:] + 90).all()


def test_brains_fill_the_picture() -> None:
    """About a quarter of the 4096 pixels and more is brain, at least 44 pixels long, on a black border."""
    for seed in range(40):
        image = grey(brain_mr.scene(seed))
        rows, columns = np.nonzero(image > 40)
        assert len(rows) > 900
        assert max(np.ptp(rows), np.ptp(columns)) >= 44
        assert np.median(np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))) < 25
        assert image.max() > 100


def test_scenes_are_repeatable_and_varied() -> None:
    first, again, other = brain_mr.scene(7), brain_mr.scene(7), brain_mr.scene(8)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.prompt == again.prompt
    assert first.image.tobytes() != other.image.tobytes()
    assert first.image.mode == "RGB"
    assert first.image.size == (brain_mr.SIZE, brain_mr.SIZE) == (64, 64)
    shown = [brain_mr.scene(seed).prompt for seed in range(200)]
    assert all(brain_mr.parse(prompt.text) == prompt.attributes for prompt in shown)
    for name, count in (("plane", 3), ("contrast", 3), ("level", 9)):
        seen = Counter(prompt.attributes[name] for prompt in shown)
        assert len(seen) == count
        assert min(seen.values()) > 200 / count / 2
    ill = sum(prompt.attributes["lesion"] == "present" for prompt in shown)
    # Binomial with n = 200 and p = 0.65: standard deviation 6.7.
    assert abs(ill - 130) < 4 * 6.7


def test_the_split_is_disjoint_and_complete() -> None:
    """A quarter of the 45 combinations of a plane is 11: 33 held out, 102 not."""
    train, held_out = brain_mr.prompts("train", 102), brain_mr.prompts("held-out", 33)
    assert len({prompt.id for prompt in train} | {prompt.id for prompt in held_out}) == 135
    assert all(brain_mr.is_held_out(prompt.attributes) for prompt in held_out)
    for prompts in (train, held_out):
        for name in ("plane", "contrast", "level", "lesion", "side", "size"):
            values = {facts[name] for facts in brain_mr.combinations() if name in facts}
            assert {prompt.attributes[name] for prompt in prompts if name in prompt.attributes} == values
    assert all(brain_mr.scene(seed, held_out=True).prompt.id in {p.id for p in held_out} for seed in range(5))
    assert [prompt.id for prompt in brain_mr.prompts("train", 5)] == [prompt.id for prompt in train[:5]]
    assert [prompt.id for prompt in brain_mr.prompts("train", 5, seed=1)] != [prompt.id for prompt in train[:5]]


def test_prompts_of_a_task() -> None:
    lesions = brain_mr.prompts("held-out", 5, task="lesion")
    assert all(prompt.attributes["lesion"] == "present" for prompt in lesions)
    with pytest.raises(ConfigError, match="has 33"):
        brain_mr.prompts("held-out", 34)
    with pytest.raises(ConfigError, match="unknown task"):
        brain_mr.prompts("train", 1, task="count")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown split"):
        brain_mr.prompts("test", 1)  # type: ignore[arg-type]


def test_the_atlas_ships_with_its_licence() -> None:
    folder = pixels.ASSET.parent
    assert pixels.ASSET.stat().st_size < 1_500_000
    licence = " ".join((folder / "LICENSE.txt").read_text().split())
    assert "Permission to use, copy, modify, and distribute" in licence
    assert "McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University" in licence
    assert "nilearn 0.14.1" in (folder / "NOTICE").read_text()


def test_the_atlas_can_be_made_again(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    build_mni.write(tmp_path / "volumes.npz")
    with np.load(tmp_path / "volumes.npz") as made, np.load(pixels.ASSET) as shipped:
        assert set(made) == set(shipped)
        for name in shipped:
            np.testing.assert_array_equal(made[name], shipped[name])


def test_maps_between_voxels_are_those_of_scipy() -> None:
    """Bit for bit, inside and outside, at whole voxels and on the border: a scene is the same on any day."""
    maps = pixels._atlas()[0]
    last = np.array(maps[0].shape)[:, None] - 1
    chance = np.random.default_rng(0)
    points = chance.uniform(-3, last + 3, (3, 30_000)).astype(np.float32)
    points[:, ::3] = np.round(points[:, ::3])
    points[:, 1::6] = np.where(chance.random((3, 5000)) < 0.5, points[:, 1::6], last)
    wanted = [ndimage.map_coordinates(one, points, order=1, prefilter=False) for one in maps]
    found = pixels.between_voxels(points)
    assert np.array_equal(found, wanted) and 0.1 < (found > 0).mean() < 0.5
    assert any((one[-1] != 0).any() or (one[:, -1] != 0).any() or (one[:, :, -1] != 0).any() for one in maps)
