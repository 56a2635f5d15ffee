"""One table of promises that every reward keeps, then each reward's own numbers."""

from __future__ import annotations

import importlib
import io
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.images import to_tensor
from diffalign.types import Prompt, Reward, Sample, Scores
from diffalign.worlds import brain_mr, emoji
from rewards.brain_mr_net import FOLDER as BRAIN_MR_CHECKER
from rewards.clip import CHUNK, ClipReward
from rewards.combine import Combined
from rewards.custom import FunctionReward
from rewards.jpeg import Compressibility, Incompressibility
from tests import tiny_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.build(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> ClipReward:
    return ClipReward(str(clip_folder))


def brightness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> list[float]:
    return [float(image.mean()) for image in images]


class Fake:
    """A reward that says what it is told to, for the colour of the first pixel (-1: no image)."""

    modality = "image"
    unit = "points"

    def __init__(
        self,
        name: str,
        table: dict[int, float],
        *,
        better: bool = True,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        parts: bool = False,
    ) -> None:
        self.name, self.table, self.higher_is_better, self.range, self.parts = name, table, better, bounds, parts

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        keys = [-1 if s.image is None else s.image.getpixel((0, 0))[0] for s in samples]  # type: ignore[index]
        total = torch.tensor([self.table.get(int(key), math.nan) for key in keys], dtype=torch.float32)
        return Scores(total, {"half": total / 2} if self.parts else {})


MAKERS: dict[str, Callable[[ClipReward], Reward]] = {
    "compressibility": lambda clip: Compressibility(),
    "incompressibility": lambda clip: Incompressibility(),
    "clip": lambda clip: clip,
    "emoji-checker": lambda clip: _checker("rewards.emoji_checker", "EmojiChecker"),
    "emoji-checker-graded": lambda clip: _checker("rewards.emoji_checker", "EmojiChecker", graded=True),
    "brain-mr-checker": lambda clip: _checker("rewards.brain_mr_checker", "BrainMRChecker"),
    "custom": lambda clip: FunctionReward(lambda samples: [_mean(sample) for sample in samples], "custom"),
    "custom-tensors": lambda clip: FunctionReward(brightness, "brightness"),
    "combined": lambda clip: Combined([(Compressibility(), 0.5, {"center": -2.0, "scale": 0.3}), (clip, 2.0, None)]),
}


def _mean(sample: Sample) -> float | None:
    return None if sample.image is None else float(np.asarray(sample.image).mean())


def _checker(module: str, name: str, **options: bool) -> Reward:
    if "brain" in module and not BRAIN_MR_CHECKER.is_dir():
        pytest.skip("the weights of brain-mr-checker are not here")
    made: Reward = getattr(importlib.import_module(module), name)(**options)
    return made


@pytest.fixture(params=MAKERS)
def reward(request: pytest.FixtureRequest, clip: ClipReward) -> Reward:
    return MAKERS[request.param](clip)


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Sample]]:
    """Per world: seven scenes, some with the prompt of another one."""
    found = {}
    for name, world in (("emoji", emoji), ("brain-mr", brain_mr)):
        made = [world.scene(seed) for seed in range(7)]
        found[name] = [Sample(made[i - i % 2].prompt, made[i].image, seed=i) for i in range(7)]
    return found


@pytest.fixture
def samples(reward: Reward, scenes: dict[str, list[Sample]]) -> list[Sample]:
    return scenes["brain-mr" if reward.name == "brain-mr-checker" else "emoji"]


def test_it_says_what_it_is(reward: Reward) -> None:
    assert isinstance(reward, Reward)
    assert reward.modality == "image"
    assert reward.range[0] < reward.range[1]


def test_scores_are_one_float32_column_each_inside_the_range(reward: Reward, samples: list[Sample]) -> None:
    scores = reward(samples)
    for column in (scores.total, *scores.parts.values()):
        assert column.dtype == torch.float32
        assert column.shape == (7,)
        assert column.device.type == "cpu"
        assert not column.requires_grad
    assert scores.total.isfinite().all()
    assert (scores.total >= reward.range[0]).all()
    assert (scores.total <= reward.range[1]).all()


def test_an_empty_batch_has_no_scores(reward: Reward) -> None:
    scores = reward([])
    assert all(column.shape == (0,) for column in (scores.total, *scores.parts.values()))


def test_the_same_samples_get_the_same_scores(reward: Reward, samples: list[Sample]) -> None:
    assert torch.equal(reward(samples).total, reward(samples).total)


def test_a_score_does_not_depend_on_its_batch(reward: Reward, samples: list[Sample]) -> None:
    total = reward(samples).total
    alone = torch.cat([reward([sample]).total for sample in samples])
    turned = reward(samples[::-1]).total.flip(0)
    torch.testing.assert_close(alone, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned, total, rtol=1e-5, atol=1e-5)


def test_one_sample_that_cannot_be_judged_is_one_nan(reward: Reward, samples: list[Sample]) -> None:
    whole = reward(samples).total
    broken = [*samples[:3], replace(samples[3], image=None), *samples[4:]]
    total = reward(broken).total
    assert total.isnan().tolist() == [False] * 3 + [True] + [False] * 3
    kept = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(total[kept], whole[kept], rtol=1e-5, atol=1e-5)


def test_images_are_not_changed(reward: Reward, samples: list[Sample]) -> None:
    before = [sample.image.tobytes() for sample in samples if sample.image is not None]
    reward(samples)
    assert before == [sample.image.tobytes() for sample in samples if sample.image is not None]


def plain(*shades: int) -> list[Sample]:
    return [Sample(Prompt("a shade"), Image.new("RGB", (16, 16), (n, n, n))) for n in shades]


def test_kilobytes_are_those_of_a_file_of_quality_95(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "noise.jpg", quality=95)
    size = (tmp_path / "noise.jpg").stat().st_size / 1000
    sample = Sample(Prompt("noise"), noise)
    assert Incompressibility()([sample]).total.item() == pytest.approx(size)
    assert Compressibility()([sample]).total.item() == pytest.approx(-size)
    assert Incompressibility()(plain(7)).total.item() < size / 4


def test_what_is_not_pixels_does_not_count() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG", comment=b"x" * 5000)
    noted = Image.open(buffer)
    noted.load()
    bare = Image.frombytes("RGB", noted.size, noted.tobytes())
    scores = Incompressibility()([Sample(Prompt(""), noted), Sample(Prompt(""), bare)]).total
    assert scores[0] == scores[1]


def test_clip_is_the_cosine_that_open_clip_gives(
    clip: ClipReward, clip_folder: Path, scenes: dict[str, list[Sample]]
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")([s.prompt.text for s in scenes["emoji"]])
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(s.image) for s in scenes["emoji"]]))
        texts = model.encode_text(tokens)
    expected = torch.nn.functional.cosine_similarity(images, texts)
    torch.testing.assert_close(clip(scenes["emoji"]).total, expected, rtol=1e-5, atol=1e-5)


def test_more_images_than_a_chunk(clip: ClipReward) -> None:
    many = plain(*range(CHUNK + 3))
    features = clip.encode_images([s.image for s in many if s.image is not None])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(CHUNK + 3))
    torch.testing.assert_close(clip(many).total[-2:], clip(many[-2:]).total, rtol=1e-5, atol=1e-5)
    assert clip.encode_images([]).shape == (0, features.shape[1])


def test_the_differentiable_form_agrees_and_climbs(clip: ClipReward, scenes: dict[str, list[Sample]]) -> None:
    """The pictures are 64x64 and the model's 32x32, so both forms resize."""
    chosen = scenes["emoji"]
    pixels = to_tensor([s.image for s in chosen if s.image is not None]).requires_grad_()
    prompts = [sample.prompt for sample in chosen]
    scores = clip.differentiable(pixels, prompts)
    torch.testing.assert_close(scores.detach(), clip(chosen).total, rtol=0, atol=5e-3)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all()
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (clip.differentiable(pixels + step, prompts) > scores).all()


def test_it_is_loaded_once_and_not_before_it_is_used(clip_folder: Path) -> None:
    reward = ClipReward(f"local-dir:{clip_folder}")
    assert "_loaded" not in vars(reward)
    reward(plain(1))
    first = vars(reward)["_loaded"]
    reward(plain(2))
    assert vars(reward)["_loaded"] is first
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_a_local_model_needs_no_network(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert ClipReward(str(clip_folder))(plain(1, 2)).total.isfinite().all()


def test_a_model_that_is_not_there_is_told(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        ClipReward(str(tmp_path / "none"))
    with pytest.raises(NotFoundError, match=r"has no open_clip_config\.json"):
        ClipReward(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(NotFoundError, match="no weights"):
        ClipReward(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="holds no model"):
        ClipReward(str(tmp_path))(plain(1))


def test_names_that_mean_nothing_are_told() -> None:
    with pytest.raises(ConfigError, match="nearest is ViT-B-32"):
        ClipReward("ViT-B-33", "openai")(plain(1))
    with pytest.raises(ConfigError, match="needs pretrained=TAG"):
        ClipReward("ViT-B-32")(plain(1))
    with pytest.raises(ConfigError, match=r"no weights 'laion2b_s34b_b79'.*laion2b_s34b_b79k"):
        ClipReward("ViT-B-32?pretrained=laion2b_s34b_b79")(plain(1))
    with pytest.raises(ConfigError, match="embedded:clip"):
        ClipReward("embedded:dog")
    with pytest.raises(ConfigError, match="device"):
        ClipReward("ViT-B-32", "openai", device="abacus")


def test_a_combination_is_the_weighted_sum_of_calibrated_scores() -> None:
    """Shade 1: 0.5*(10-8)/4 + 3*1 = 3.25; shade 2: 0.5*(6-8)/4 + 3*0 = -0.25."""
    first, second = Fake("first", {1: 10, 2: 6}, parts=True), Fake("second", {1: 1, 2: 0})
    scores = Combined([(first, 0.5, {"center": 8, "scale": 4}), (second, 3.0, None)])(plain(1, 2))
    assert scores.total.tolist() == [3.25, -0.25]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "first": [10, 6],
        "first/half": [5, 3],
        "second": [1, 0],
    }


def test_less_is_better_counts_with_a_minus() -> None:
    """1*2 - 1*5 = -3, and the range of an error in [0, 9] beside a score in [0, 2] is [0-9, 2-0]."""
    score, error = Fake("score", {1: 2}, bounds=(0, 2)), Fake("error", {1: 5}, better=False, bounds=(0, 9))
    combined = Combined([(score, 1.0, None), (error, 1.0, None)])
    assert combined(plain(1)).total.tolist() == [-3]
    assert combined.range == (-9, 2)
    assert combined.higher_is_better


def test_a_nan_stays_with_its_sample_and_a_weight_of_0_only_measures() -> None:
    known, unknown = Fake("known", {1: 1, 2: 2}), Fake("unknown", {2: 5})
    total = Combined([(known, 1.0, None), (unknown, 1.0, None)])(plain(1, 2)).total
    assert total.isnan().tolist() == [True, False]
    scores = Combined([(known, 1.0, None), (unknown, 0.0, None)])(plain(1, 2))
    assert scores.total.tolist() == [1, 2]
    assert scores.parts["unknown"].isnan().tolist() == [True, False]


def test_a_combination_has_a_gradient_when_all_that_counts_has(clip: ClipReward) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    prompts = [Prompt("a cat"), Prompt("a dog")]
    combined = Combined([(clip, 2.0, {"center": 0.1, "scale": 0.5}), (Compressibility(), 0.0, None)])
    expected = 2 * (clip.differentiable(pixels, prompts) - 0.1) / 0.5
    torch.testing.assert_close(combined.differentiable(pixels, prompts), expected)
    assert not hasattr(Combined([(clip, 1.0, None), (Compressibility(), 1.0, None)]), "differentiable")


def test_combinations_that_make_no_sense_are_refused() -> None:
    one, same, text = Fake("one", {}), Fake("one", {}), Fake("text", {})
    text.modality = "text"  # type: ignore[misc]
    for rewards, message in [
        ([], "at least one"),
        ([(one, 1.0, None), (same, 1.0, None)], "one twice"),
        ([(one, 1.0, None), (text, 1.0, None)], "different modalities"),
        ([(one, math.nan, None)], "finite"),
        ([(one, math.inf, None)], "finite"),
        ([(one, 0.0, None)], "weight 0"),
        ([(one, 1.0, {"center": 0, "scale": 0})], "scale is above 0"),
        ([(one, 1.0, {"centre": 0})], "has centre"),
        ([(Fake("a/b", {}), 1.0, None)], "slash"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Combined(rewards)  # type: ignore[arg-type]
