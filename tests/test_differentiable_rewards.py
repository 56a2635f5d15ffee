"""The second form of a reward: the same numbers from a tensor of pixels, with a gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffalign.errors import ConfigError, InputError
from diffalign.images import to_tensor
from diffalign.types import Prompt, Sample
from diffalign.worlds import emoji
from rewards import fit_pixels, load_reward, registry
from rewards.clinician import ClinicianReward
from rewards.clip import ClipReward
from rewards.custom import FunctionReward
from rewards.preference import PreferenceReward
from tests import test_clinician_reward

folder = test_clinician_reward.folder


def pixels(samples: list[Sample]) -> torch.Tensor:
    return to_tensor([s.image for s in samples if s.image is not None]).requires_grad_()


def prompts(samples: list[Sample]) -> list[Prompt]:
    return [sample.prompt for sample in samples]


def climbs(form, images: torch.Tensor, asked: list[Prompt]) -> None:  # type: ignore[no-untyped-def]
    """A small step along the gradient raises every score, and each image's gradient is its own alone."""
    scores = form(images, asked)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        assert (form(images + step, asked) > scores).all()
    (first,) = torch.autograd.grad(form(images, asked)[0], images)
    assert not first[1:].any()
    torch.testing.assert_close(first[0], gradient[0], rtol=1e-3, atol=1e-5)


def test_the_names_that_are_listed_are_those_that_have_one() -> None:
    """Known by hand: what looks through an open_clip model or ImageReward's, and what is fitted to such."""
    assert registry.differentiable() == [
        "clip", "preference", "clinician", "aesthetic", "hpsv2", "imagereward", "biomedclip",
    ]  # fmt: skip


def test_embedded_clip_needs_no_resizing_so_both_forms_agree() -> None:
    """Same pixels, both paths: the scenes are of the model's own size, so only the order of sums differs."""
    samples = [Sample(emoji.scene(i).prompt, emoji.scene(i).image) for i in range(6)]
    reward = ClipReward()
    images = pixels(samples)
    torch.testing.assert_close(
        reward.differentiable(images, prompts(samples)).detach(), reward(samples).total, rtol=0, atol=1e-5
    )
    climbs(reward.differentiable, images, prompts(samples))


def test_clip_has_no_score_where_nothing_is_asked() -> None:
    """An empty prompt is no question: NaN in both forms, and the others' scores and gradients are as without it."""
    samples = [Sample(emoji.scene(i).prompt, emoji.scene(i).image) for i in range(3)]
    mixed = [samples[0], Sample(Prompt(""), samples[1].image), Sample(Prompt(" \n"), samples[2].image)]
    reward = ClipReward()
    total = reward(mixed).total
    assert total.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(total[0], reward(samples).total[0])
    images = pixels(mixed)
    scores = reward.differentiable(images, prompts(mixed))
    assert scores.isnan().tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert gradient.isfinite().all() and gradient[0].any() and not gradient[1:].any()


def test_where_clip_resizes_torch_and_pillow_agree_to_a_thousandth() -> None:
    """A photograph-like image of 160 x 96 pixels, scaled down with antialiasing and cut by both. The cosines of the
    embedded model differ by less than 0.005, those of different images by more than ten times that."""
    images = []
    for number in range(4):
        shade = Image.linear_gradient("L").resize((160, 96)).rotate(20 * number)
        picture = Image.merge("RGB", (shade, shade.transpose(Image.Transpose.FLIP_LEFT_RIGHT), shade))
        ImageDraw.Draw(picture).ellipse((20 + 10 * number, 20, 90, 80), fill=(200, 40 * number, 30))
        images.append(picture)
    samples = [Sample(emoji.scene(i).prompt, image) for i, image in enumerate(images)]
    reward = ClipReward()
    scores = reward(samples).total
    gap = (reward.differentiable(pixels(samples), prompts(samples)).detach() - scores).abs().max()
    assert gap < 5e-3 and scores.std() > 10 * gap


# -- statistics of pixels ---------------------------------------------------------------------------------------------


def test_statistics_of_a_tensor_are_those_of_the_image() -> None:
    """On scenes, noise, flat grey and an image too small for neighbours, to 1e-4."""
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    groups = [
        [*(emoji.scene(i).image for i in range(4)), Image.fromarray(grain), Image.new("RGB", (64, 64), (90, 90, 90))],
        [Image.fromarray(grain[:2, :2])],
    ]
    for images in groups:
        found = fit_pixels.with_gradient(to_tensor(images))
        torch.testing.assert_close(found, fit_pixels.statistics(images), rtol=1e-4, atol=1e-4)


def test_statistics_have_the_gradient_of_finite_differences() -> None:
    """In float64 on a random image. Dark and bright are shares of pixels, so they have none. A flat image has one that
    is finite."""
    image = torch.rand((1, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fit_pixels.with_gradient(x)[:, :5], (image,), eps=1e-7, atol=1e-5)
    (shares,) = torch.autograd.grad(fit_pixels.with_gradient(image)[:, 5:].sum(), image)
    assert not shares.any()
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(fit_pixels.with_gradient(flat).sum(), flat)
    assert gradient.isfinite().all()


# -- fitted rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 1.5])
def test_clinician_and_preference_say_the_same_of_a_tensor(folder: Path, kappa: float) -> None:
    """To 2e-3 of the standard deviation that scores are in; each score climbs its own gradient."""
    samples = test_clinician_reward.slices(5)
    clinician = ClinicianReward(str(folder), kappa=kappa, abstain=1)
    preference = PreferenceReward(str(folder), criterion="image quality")
    for reward in (clinician, preference):
        images = pixels(samples)
        found = reward.differentiable(images, prompts(samples))
        torch.testing.assert_close(found.detach(), reward(samples).total.detach(), rtol=0, atol=2e-3)
        climbs(reward.differentiable, images, prompts(samples))


def test_an_image_far_from_the_data_is_nan_in_both_forms(folder: Path) -> None:
    reward = ClinicianReward(str(folder))
    samples = [*test_clinician_reward.slices(2), *test_clinician_reward.far()]
    total = reward(samples).total
    images = pixels(samples)
    found = reward.differentiable(images, prompts(samples))
    assert torch.equal(found.isnan(), total.isnan()) and bool(total.isnan().any()) and not bool(total.isnan().all())
    (gradient,) = torch.autograd.grad(torch.where(found.isnan(), 0.0, found).sum(), images)
    assert gradient.isfinite().all() and not gradient[found.isnan()].any()


# -- a user's own -----------------------------------------------------------------------------------------------------

OWN = """
import torch

def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) * torch.tensor([float(len(p)) for p in prompts])

redness.differentiable = True

def both(images):
    return images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))}

both.differentiable = True

def plain(images):
    return images.mean((1, 2, 3))

def numbers(images):
    return [float(image.mean()) for image in images]

numbers.differentiable = True

def of_samples(samples):
    return [0.0 for _ in samples]

of_samples.differentiable = True
"""


def test_a_function_says_that_it_is_differentiable(tmp_path: Path) -> None:
    """0.5 of red, and a prompt of five letters: 2.5; the gradient of a mean over 4 x 4 pixels times 5 is 5 / 16."""
    (tmp_path / "own.py").write_text(OWN)
    redness = load_reward(f"{tmp_path / 'own.py'}:redness")
    assert isinstance(redness, FunctionReward)
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    scores = redness.differentiable(images, [Prompt("a cat")])
    assert scores.tolist() == [2.5]
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient[0, 0].unique().tolist() == [5 / 16] and not gradient[0, 1:].any()
    both = load_reward(f"{tmp_path / 'own.py'}:both")
    assert isinstance(both, FunctionReward)
    assert both.differentiable(images, [Prompt("a cat")]).requires_grad


def test_a_function_that_does_not_say_so_or_cannot_is_told(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert not hasattr(load_reward(f"{tmp_path / 'own.py'}:plain"), "differentiable")
    with pytest.raises(ConfigError, match=r"of_samples says that it is differentiable, and takes no tensor of images"):
        load_reward(f"{tmp_path / 'own.py'}:of_samples")
    numbers = load_reward(f"{tmp_path / 'own.py'}:numbers")
    assert isinstance(numbers, FunctionReward)
    with pytest.raises(InputError, match=r"numbers says that it is differentiable, and returned \[0"):
        numbers.differentiable(torch.zeros(1, 3, 4, 4), [Prompt("a cat")])
