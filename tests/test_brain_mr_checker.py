"""The brain-mr checker: right pictures score 1, each wrong fact costs its own part, and non-brains earn nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Prompt, Reward, Sample
from diffalign.worlds import brain_mr
from rewards.brain_mr_augment import NON_BRAINS
from rewards.brain_mr_checker import BrainMRChecker, Finding
from rewards.brain_mr_net import FOLDER, OTHER, BrainMRNet, load, save, to_grey
from rewards.validate_brain_mr_checker import to_images, wilson

FIRST_SEED = 4_000_000_000
LEFT = {"plane": "axial", "contrast": "FLAIR", "level": "ventricles", "lesion": "present", "side": "left"}


@pytest.fixture(scope="module")
def checker() -> BrainMRChecker:
    return BrainMRChecker()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    scenes = [brain_mr.scene(FIRST_SEED + i) for i in range(100)]
    return [Sample(scene.prompt, image=scene.image) for scene in scenes]


def ask(image: Image.Image, **facts: str) -> Sample:
    return Sample(Prompt("", attributes=facts), image=image)


def test_it_is_a_reward(checker: BrainMRChecker) -> None:
    assert isinstance(checker, Reward)
    assert (checker.name, checker.modality, checker.unit) == ("brain-mr-checker", "image", "fraction")
    assert checker.range == (0.0, 1.0)
    assert checker.higher_is_better


def test_perfect_scenes_score_one(checker: BrainMRChecker, samples: list[Sample]) -> None:
    """At most 2 % of the asked facts of 100 clean scenes may be misread; graded credit stays near 1 too."""
    scores = checker(samples)
    assert scores.total.dtype == torch.float32
    assert float(scores.total.mean()) > 0.98
    assert float(BrainMRChecker(graded=True)(samples).total.mean()) > 0.96


def test_the_total_is_the_mean_of_the_asked_parts(checker: BrainMRChecker, samples: list[Sample]) -> None:
    """Without a lesion four facts are asked (plane, contrast, level, lesion), with one six."""
    scores = checker(samples)
    assert set(scores.parts) == {"plane", "contrast", "level", "lesion", "side", "size", "everything"}
    for i, sample in enumerate(samples):
        asked = {name: float(part[i]) for name, part in scores.parts.items() if not part[i].isnan()}
        assert asked.pop("everything") == float(set(asked.values()) == {1})
        assert len(asked) == (6 if sample.prompt.attributes["lesion"] == "present" else 4)
        assert float(scores.total[i]) == pytest.approx(sum(asked.values()) / len(asked))


@pytest.mark.parametrize("size", brain_mr.SIZES)
@pytest.mark.parametrize(
    ("part", "wrong", "total"),
    [
        ("side", {"side": "right"}, 5 / 6),
        ("size", {"size": "opposite"}, 5 / 6),
        ("contrast", {"contrast": "T2"}, 5 / 6),
        ("level", {"level": "vertex"}, 5 / 6),
    ],
)
def test_one_wrong_fact_costs_its_part(
    checker: BrainMRChecker, size: str, part: str, wrong: dict[str, str], total: float
) -> None:
    image = brain_mr.render({**LEFT, "size": size}, FIRST_SEED).image
    if part == "size":
        wrong = {"size": "small" if size == "large" else "large"}
    scores = checker([ask(image, **{**LEFT, "size": size}), ask(image, **{**LEFT, "size": size, **wrong})])
    assert float(scores.total[0]) == 1
    assert float(scores.total[1]) == pytest.approx(total)
    assert [name for name, values in scores.parts.items() if values[1] == 0] == [part, "everything"]


def test_a_wrong_plane_costs_plane_and_level(checker: BrainMRChecker) -> None:
    """Levels belong to planes, so of six facts two are wrong."""
    image = brain_mr.render({**LEFT, "size": "large"}, FIRST_SEED).image
    wrong = {**LEFT, "size": "large", "plane": "coronal", "level": "thalamus"}
    scores = checker([ask(image, **wrong)])
    assert [name for name, values in scores.parts.items() if values[0] == 0] == ["plane", "level", "everything"]
    assert float(scores.total[0]) == pytest.approx(4 / 6)


def test_an_absent_lesion_has_no_side_and_no_size(checker: BrainMRChecker) -> None:
    healthy = {"plane": "coronal", "contrast": "T1", "level": "thalamus", "lesion": "none"}
    image = brain_mr.render(healthy, FIRST_SEED).image
    scores = checker([ask(image, **{**healthy, "lesion": "present", "side": "left", "size": "small"})])
    assert [name for name, values in scores.parts.items() if values[0] == 0] == ["lesion", "side", "size", "everything"]
    ill = brain_mr.render({**healthy, "lesion": "present", "side": "left", "size": "large"}, FIRST_SEED).image
    scores = checker([ask(ill, **healthy)])
    assert [name for name, values in scores.parts.items() if values[0] == 0] == ["lesion", "everything"]


def test_sides_follow_the_pixels(checker: BrainMRChecker) -> None:
    """The atlas is symmetric, so a mirror image is a lesion of the other side; one in each half is on neither."""
    image = brain_mr.render({**LEFT, "size": "large"}, FIRST_SEED).image
    pixels = np.asarray(image)
    mirrored = Image.fromarray(pixels[:, ::-1].copy())
    both = Image.fromarray(np.maximum(pixels, pixels[:, ::-1]))
    right = {**LEFT, "size": "large", "side": "right"}
    assert checker([ask(image, **right), ask(mirrored, **right)]).parts["side"].tolist() == [0, 1]
    two = checker([ask(both, **{**LEFT, "size": "large"}), ask(both, **right)])
    assert two.parts["side"].tolist() == [0, 0]
    assert two.parts["lesion"].tolist() == [1, 1]


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_no_brain_earns_nothing(graded: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.new("RGB", (64, 64), value) for value in ("black", "grey", "white")] + [Image.fromarray(noise)]
    healthy = {"plane": "axial", "contrast": "T1", "level": "vertex", "lesion": "none"}
    total = BrainMRChecker(graded=graded)([ask(image, **healthy) for image in images]).total
    assert total.max() < 0.05


def test_garbled_brains_are_refused(checker: BrainMRChecker) -> None:
    grey = to_grey([brain_mr.scene(FIRST_SEED + i).image for i in range(16)])
    for make in NON_BRAINS.values():
        made = make(grey, torch.Generator().manual_seed(3))
        read = [finding.facts()["plane"] for finding in checker.read(to_images(made))]
        assert read.count(OTHER) >= 13


def test_scores_do_not_depend_on_the_batch(samples: list[Sample]) -> None:
    graded, ones = BrainMRChecker(graded=True), BrainMRChecker(graded=True, batch_size=1)
    whole, single = graded(samples[:16]), ones(samples[:16])
    torch.testing.assert_close(whole.total, single.total, atol=1e-5, rtol=0)
    for name, part in whole.parts.items():
        torch.testing.assert_close(part, single.parts[name], atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(graded(samples[15::-1]).total.flip(0), whole.total, atol=1e-5, rtol=0)
    assert torch.equal(graded(samples[:16]).total, whole.total)


def test_empty_and_unjudgeable(checker: BrainMRChecker, samples: list[Sample]) -> None:
    empty = checker([])
    assert empty.total.shape == (0,)
    assert all(part.shape == (0,) for part in empty.parts.values())
    image = samples[0].image
    odd = [
        Sample(Prompt("a cat"), image=image),
        Sample(Prompt("two cats", attributes={"kind": "count", "object": "cat", "count": 2}), image=image),
        Sample(samples[0].prompt, text="no image"),
        samples[0],
    ]
    scores = checker(odd)
    assert scores.total.isnan().tolist() == [True, True, True, False]
    assert scores.parts["plane"].isnan().tolist() == [True, True, True, False]


def test_the_caption_stands_in_for_missing_attributes(checker: BrainMRChecker) -> None:
    scene = brain_mr.render({**LEFT, "size": "small"}, FIRST_SEED)
    brief = "axial FLAIR brain MRI, small lesion in the left hemisphere"
    scores = checker([Sample(Prompt(scene.prompt.text), image=scene.image), Sample(Prompt(brief), image=scene.image)])
    assert scores.total.tolist() == [1, 1]
    assert scores.parts["level"].isnan().tolist() == [False, True]


def test_images_of_other_sizes_and_modes(checker: BrainMRChecker) -> None:
    facts = {**LEFT, "size": "large"}
    image = brain_mr.render(facts, FIRST_SEED).image
    shown = [image.resize((256, 256), Image.Resampling.BICUBIC), image.convert("L"), image.convert("RGBA")]
    assert checker([ask(other, **facts) for other in shown]).total.tolist() == [1, 1, 1]


def test_credit_by_hand() -> None:
    """brain = 1 - 0.2; e.g. side = 0.8 x 0.5 x 0.75 = 0.3 and size = 0.8 x 0.5 x (1 - 0.4) = 0.24."""
    finding = Finding(
        plane={"axial": 0.7, "coronal": 0.1, "sagittal": 0.0, OTHER: 0.2},
        contrast={"T1": 0.6, "T2": 0.3, "FLAIR": 0.1},
        level={"vertex": 0.9, "ventricles": 0.1},
        lesion=0.5,
        half={"first": 0.25, "second": 0.75},
        large=0.4,
        area_px=50.0,
    )
    asked = {
        "plane": "axial",
        "contrast": "T1",
        "level": "vertex",
        "lesion": "present",
        "side": "left",
        "size": "small",
    }
    expected = {"plane": 0.7, "contrast": 0.48, "level": 0.72, "lesion": 0.4, "side": 0.3, "size": 0.24}
    assert finding.credit(asked) == pytest.approx(expected)
    assert finding.decide().credit(asked) == {"plane": 1, "contrast": 1, "level": 1, "lesion": 0, "side": 0, "size": 0}


def test_wilson_interval() -> None:
    """95 of 100: centre (0.95 + 3.8415/200) / 1.038415 = 0.93336, half-width 0.04482."""
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=2e-4)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_weights_are_saved_and_refused(tmp_path: Path) -> None:
    network = BrainMRNet((4, 4, 4)).eval()
    save(network, tmp_path)
    image = torch.rand((2, 1, 64, 64))
    assert torch.equal(load(tmp_path)(image).plane, network(image).plane)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "contrasts": ["T1"]}))
    with pytest.raises(InputError, match="contrasts"):
        load(tmp_path)
    with pytest.raises(NotFoundError, match="train_brain_mr_checker"):
        BrainMRChecker(folder=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no device 'abacus'"):
        BrainMRChecker(device="abacus")
    with pytest.raises(ConfigError, match="at least 1"):
        BrainMRChecker(batch_size=0)


def test_the_shipped_network_is_small() -> None:
    count = sum(parameter.numel() for parameter in load().parameters())
    assert count == json.loads((FOLDER / "config.json").read_text())["parameters"]
    assert count < 150_000
    assert (FOLDER / "model.safetensors").stat().st_size < 1_000_000
