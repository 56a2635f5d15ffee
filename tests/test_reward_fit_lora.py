"""Encoders that are tuned to pairs: what a frozen one cannot see is learned, saved, loaded, and changes nothing else.

The encoder is a tiny ViT whose first layer is blind to red. Raters judge two things in one set of pairs: whether a
corner is marked in red, which it cannot see, and which image is greener, which it can.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from apps import reward_fit, reward_fit_card
from apps.cli import main
from apps.progress import Status
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.preferences import read, write
from diffalign.types import Preference, Prompt, Sample
from rewards import fit_lora
from rewards.clip import ClipReward
from rewards.fit_adapter import AdaptedClip, Adapter, add, attach, chosen
from rewards.fit_config import FitConfig, parse
from rewards.fit_data import divide, gather
from rewards.fit_model import RewardModel
from rewards.registry import load as load_reward
from tests import tiny_clip

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "epochs": 6, "batch_size": 8}


def picture(rng: np.random.Generator, marked: bool, green: float) -> Image.Image:
    """A soft green pattern of this level, with or without a red corner of 12 x 12 pixels."""
    levels = np.zeros((32, 32, 3))
    coarse = np.kron(rng.normal(green, 12, (4, 4)), np.ones((8, 8)))
    levels[..., 1] = coarse + rng.normal(0, 2, (32, 32))
    levels[:12, :12, 0] = 200 * marked
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def pairs(count: int, seed: int = 0) -> list[Preference]:
    """Every pair judged by both criteria; one of the two images is marked, and which is greener is independent."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        asked = Prompt(f"picture {i % 40}")
        marked = bool(rng.random() < 0.5)
        greens = rng.permutation([90.0, 130.0])
        first, second = (Sample(asked, picture(rng, m, g)) for m, g in zip((marked, not marked), greens, strict=True))
        made.append(Preference(asked, first, second, float(marked), criterion="marked"))
        made.append(Preference(asked, first, second, float(greens[0] > greens[1]), criterion="greener"))
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs, and the encoder that is blind to red (and blue)."""
    folder = tmp_path_factory.mktemp("lora")
    write(folder / "pairs.parquet", pairs(160))
    weights = tiny_clip.build(folder / "clip") / "open_clip_model.safetensors"
    tensors = load_file(weights)
    tensors["visual.conv1.weight"][:, [0, 2]] = 0
    save_file(tensors, weights)
    return folder


def config(place: Path, lora: dict[str, Any] | None, **fields: object) -> FitConfig:
    quick: dict[str, object] = {
        "preferences": str(place / "pairs.parquet"), "encoder": str(place / "clip"), "pixel_statistics": False,
        "held_out": 0.4, "ensemble": 2, "hidden": 0, "learning_rate": 1e-2, "patience": 4, "learning_curve": False,
    }  # fmt: skip
    return parse(quick | {"lora": lora} | fields)


def fitted(place: Path, folder: Path, lora: dict[str, Any] | None, **fields: object) -> dict[str, Any]:
    with Status() as status:
        return reward_fit.fit_into(config(place, lora, **fields), folder, "card", status)


@pytest.fixture(scope="module")
def tuned(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the reward model, and its card."""
    card = fitted(place, place / "tuned", LORA, learning_curve=True)
    return place / "tuned" / "reward", card


def test_what_the_frozen_encoder_cannot_see_is_learned(tuned: tuple[Path, dict[str, Any]]) -> None:
    """Red reaches the blind encoder not at all, so its heads are at chance (0.5, over 64 pairs or so) or refused."""
    marked, greener = (tuned[1]["criteria"][name] for name in ("marked", "greener"))
    assert marked["accuracy"]["value"] > 0.85 and greener["accuracy"]["value"] > 0.75
    frozen = marked["frozen_encoder"]["accuracy"]
    assert frozen is None or frozen["value"] < 0.7
    assert greener["frozen_encoder"]["accuracy"]["value"] > 0.75
    reward = load_reward(f"preference?folder={tuned[0]}&criterion=marked")
    fresh = [pair for pair in pairs(40, seed=5) if pair.criterion == "marked"]
    first, second = ([getattr(pair, side) for pair in fresh] for side in ("first", "second"))
    right = (reward(first).total > reward(second).total).tolist()
    assert sum(r == (pair.label == 1) for r, pair in zip(right, fresh, strict=True)) > 32


def test_without_tuning_it_is_not_learned(place: Path, tmp_path: Path) -> None:
    """A blind fit is refused, or is at chance where a head happened to stop well."""
    try:
        found = fitted(place, tmp_path / "frozen", None, criteria=["marked"])["criteria"]["marked"]["accuracy"]["value"]
    except RefusedError:
        return
    assert found < 0.7


def test_the_card_says_that_the_encoder_was_tuned(tuned: tuple[Path, dict[str, Any]]) -> None:
    """All 5 matrices of the tower: first layer, and in one block the fused and the outer projection and two of the MLP.

    Rank 4 of the first layer (32 x 192), the projections (96 x 32, 32 x 32) and the MLP (128 x 32, 32 x 128).
    """
    folder, card = tuned
    lora = card["encoder"]["lora"]
    assert lora["layers"] == 5
    assert lora["parameters"] == 4 * ((32 + 192) + (96 + 32) + (32 + 32) + (128 + 32) + (32 + 128))
    assert 0 < lora["best_epoch"] < len(lora["losses"]) <= 7
    assert min(lora["losses"]) == lora["losses"][lora["best_epoch"]]
    for page in ("card.md", "card.html"):
        text = (folder.parent / page).read_text()
        for said in ("frozen encoder", "what tuning the encoder brought", "LoRA of rank 4", "about the heads alone"):
            assert said in text, (page, said)
    frozen = {"accuracy": None, "gain": None}
    assert "nothing could be learned" in reward_fit_card.tuning_in_words(frozen)
    sure = {"value": 0.9, "ci95": [0.8, 0.95], "n": 50}
    for ends, said in (([0.02, 0.1], "is better"), ([-0.1, -0.02], "leave lora out"), ([-0.1, 0.1], "no clear")):
        gain = {"value": sum(ends) / 2, "ci95": ends}
        assert said in reward_fit_card.tuning_in_words({"accuracy": sure, "gain": gain})


def test_saved_and_loaded_it_sees_what_the_heads_were_fitted_to(
    place: Path, tuned: tuple[Path, dict[str, Any]]
) -> None:
    """The tower in training, its copy with the adapter added, and the one that is loaded encode alike."""
    settings = config(place, LORA)
    assert settings.lora is not None
    eyes = fit_lora.Watched(ClipReward(settings.encoder))
    study = gather(read(settings.preferences), eyes, None, False)
    again = fit_lora.tune(study, divide(study, 0.4, 0), ["greener", "marked"], settings, settings.lora, eyes)
    loaded = RewardModel(tuned[0])
    samples = [pair.first for pair in pairs(160) if pair.criterion == "marked"]
    images = [sample.image for sample in samples if sample.image is not None]
    number = {int(n): i for i, n in enumerate(study.first[::2].tolist())}
    found = loaded.eyes.encode_images(images)
    known = torch.stack([again.study.images[n] for n in number])
    assert torch.allclose(found, known, atol=1e-6)
    assert not torch.allclose(found, loaded.encoder.encode_images(images), atol=1e-2)
    alone = torch.cat([loaded.judge([sample]).mean for sample in samples[:9]], 1)
    assert torch.allclose(loaded.judge(samples[:9]).mean, alone, atol=1e-4)
    assert torch.equal(loaded.judge(samples).mean, RewardModel(tuned[0]).judge(samples).mean)


def test_the_encoder_of_other_rewards_is_not_changed(place: Path, tuned: tuple[Path, dict[str, Any]]) -> None:
    """Before a fit, after it, and beside a loaded reward model: the same bytes of weights, the same scores."""
    clip = ClipReward(str(place / "clip"))
    samples = [pair.first for pair in pairs(8)]
    before = clip(samples).total
    model = clip._loaded.model
    weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    other = AdaptedClip(clip, RewardModel(tuned[0])._adapter)
    assert not torch.allclose(other(samples).total, before, atol=1e-2)
    RewardModel(tuned[0]).judge(samples)
    after = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    assert after == weights and torch.equal(clip(samples).total, before)
    assert torch.equal(ClipReward(str(place / "clip"))(samples).total, before)
    assert other.tower is not model.visual and other._loaded.model.transformer is model.transformer


def test_a_fit_repeats_to_the_byte(place: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    fitted(place, tmp_path, LORA)
    for name in ("reward.json", "heads.safetensors", "encoder-lora.safetensors"):
        assert (tmp_path / "reward" / name).read_bytes() == (tuned[0] / name).read_bytes(), name
    assert {path.name for path in tuned[0].iterdir()} == {path.name for path in (tmp_path / "reward").iterdir()}


def test_the_distance_is_that_of_the_frozen_encoder(
    place: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """So it equals that of a fit without tuning, near and far; far images abstain, near ones do not."""
    fitted(place, tmp_path, None, criteria=["greener"])
    near = [pair.first for pair in pairs(20, seed=6)][::2]
    grain = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    halves = np.zeros((32, 32, 3), dtype=np.uint8)
    halves[:, 16:] = 255
    away = [Sample(near[0].prompt, Image.fromarray(one)) for one in (grain, halves)]
    found = [RewardModel(folder).judge([*near, *away]).distance for folder in (tuned[0], tmp_path / "reward")]
    assert torch.equal(*found)
    cautious = load_reward(f"clinician?folder={tuned[0]}")
    scores = cautious([*near, *away]).total
    assert bool(scores[-2:].isnan().all()) and float(scores[:-2].isfinite().double().mean()) > 0.9


def test_a_folder_that_is_not_whole_is_told(place: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    one = Path(shutil.copytree(tuned[0], tmp_path / "one"))
    weights = one / "encoder-lora.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"encoder-lora\.safetensors is not the file that reward\.json describes"):
        RewardModel(one)
    weights.unlink()
    with pytest.raises(NotFoundError, match=r"it has no encoder-lora\.safetensors"):
        RewardModel(one)
    tensors = load_file(tuned[0] / "encoder-lora.safetensors")
    for change, message in (("conv1.weight.B", "conv1.weight is not whole"), ("", "no weight strange.weight")):
        changed = {name: tensor for name, tensor in tensors.items() if name != change}
        if not change:
            changed |= {"strange.weight.A": torch.ones(1, 2), "strange.weight.B": torch.ones(2, 1)}
        save_file(changed, weights)
        header = json.loads((tuned[0] / "reward.json").read_text())
        header["encoder"]["lora"]["weights"] = f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
        (one / "reward.json").write_text(json.dumps(header))
        with pytest.raises(InputError, match=message):
            RewardModel(one).judge([pairs(1)[0].first])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["lora={targets: [mpl]}"],
            "has no layer 'mpl'; there are conv1, transformer, resblocks, attn, ",
        ),
        (["lora.rnak=4"], "unknown field lora.rnak; did you mean lora.rank?"),
        (["lora.rank=0"], "lora.rank: input should be greater than or equal to 1"),
        (["lora.targets=[]"], "lora.targets: list should have at least 1 item"),
        (["lora.learning_rate=1e9"], "lora: "),
    ],
)
def test_a_mistake_is_told_in_one_sentence(place: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    own = [f"preferences={place / 'pairs.parquet'}", f"encoder={place / 'clip'}", "patience=1", *settings]
    words = [word for setting in own for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["reward", "fit", "clinician", *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_targets_are_parts_of_names() -> None:
    vit = tower({"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32})
    assert chosen(vit, ["mlp"], "it") == [
        f"transformer.resblocks.{n}.mlp.{layer}.weight" for n in range(2) for layer in ("c_fc", "c_proj")
    ]
    assert chosen(vit, ["conv1", "in_proj_weight"], "it") == [
        "conv1.weight", *(f"transformer.resblocks.{n}.attn.in_proj_weight" for n in range(2))
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="the image tower of it has no linear or convolutional layer"):
        chosen(nn.LayerNorm(4), None, "it")


def tower(vision: dict[str, Any]) -> nn.Module:
    """The image tower of an open_clip model with random weights; scales of normalisation are 1, some start at 0."""
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    made: nn.Module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).visual
    for layer in made.modules():
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "patch_size": None},
        {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    ],
    ids=["vit", "resnet with an attention pool", "timm vit", "timm resnet"],
)
def test_every_adapted_weight_counts_and_adding_equals_training(vision: dict[str, Any]) -> None:
    """Fused and pooled projections too. ``B`` is drawn at random, as at 0 no gradient reaches ``A``."""
    trained = tower(vision)
    plain = copy.deepcopy(trained)
    pixels = torch.randn(2, 3, vision["image_size"], vision["image_size"], generator=torch.Generator().manual_seed(1))
    before = plain(pixels)
    made = attach(trained, chosen(trained, None, "it"), 2, 4.0, 0)
    assert torch.allclose(trained(pixels), before, atol=1e-4)  # with and without gradient torch takes other kernels
    for one in made.values():
        nn.init.normal_(one.B, std=0.05)
    after = trained(pixels)
    (after * torch.randn(after.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    silent = [name for name, one in made.items() if one.A.grad is None or not bool(one.A.grad.any())]
    assert not silent and not torch.allclose(after, before, atol=1e-3)
    halves = {f"{name}.{half}": getattr(one, half).detach() for name, one in made.items() for half in ("A", "B")}
    add(plain, Adapter(halves, 2, 4.0))
    assert torch.allclose(plain(pixels), after, atol=1e-4)
