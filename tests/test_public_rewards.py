"""The public reward models, each by its own architecture with small random weights. Nothing is fetched."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.images import to_tensor
from diffalign.types import Prompt, Reward, Sample
from rewards import biomedclip, imagereward_weights, xray_weights
from rewards import weights as files
from rewards.aesthetic import AestheticReward
from rewards.biomedclip import BiomedClipReward
from rewards.clip import ClipReward
from rewards.hpsv2 import HPSv2Reward
from rewards.imagereward import MEAN, STD, ImageReward
from rewards.pickscore import PickScoreReward
from rewards.registry import REWARDS, load
from rewards.train_clip import build_tokenizer
from rewards.xray import XrayFindings, calibrated, pixels
from rewards.xray_findings import FINDINGS, THRESHOLDS, named
from tests import tiny_clip
from tests.random_weights import scatter

CAPTIONS = ["a cat left of a dog", "no effusion , but a large pneumothorax and an opacity"]
PUBLIC = ("aesthetic", "hpsv2", "pickscore", "imagereward", "biomedclip", "xray-findings")


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Nobody may look a name up, or connect."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it would try again for half a minute
        yield


def head(width: int, seed: int = 0) -> dict[str, Tensor]:
    """The released layout of the linear head, narrow."""
    widths = [width, 12, 8, 6, 4, 1]
    state: dict[str, Tensor] = {}
    for index, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{index}.weight"], state[f"layers.{index}.bias"] = torch.empty(narrow, wide), torch.empty(narrow)
    return scatter(state, seed)


def by_hand(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """The five affine maps, one after the other, in float64."""
    made = features.double()
    for index in (0, 2, 4, 6, 7):
        made = made @ state[f"layers.{index}.weight"].double().T + state[f"layers.{index}.bias"].double()
    return made[:, 0].float()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.build(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(CAPTIONS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aesthetic(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AestheticReward:
    path = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(head(16), path)
    return AestheticReward(str(path), clip=str(clip_folder))


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> HPSv2Reward:
    folder = tmp_path_factory.mktemp("hpsv2")
    vision = {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    (folder / "tiny-h.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    made = scatter(open_clip.create_model("tiny-h", load_weights=False).state_dict())
    # The released file: a checkpoint of open_clip's trainer.
    torch.save({"epoch": 1, "name": "hps", "state_dict": made}, folder / "HPS_v2.1_compressed.pt")
    return HPSv2Reward(weights=str(folder / "HPS_v2.1_compressed.pt"), model="tiny-h")


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("pickscore")
    tokenizer = build_tokenizer(CAPTIONS)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20}
    vision = {**small, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.load_state_dict({**scatter(model.state_dict()), "logit_scale": torch.tensor(3.0)})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pickscore(pick_folder: Path) -> PickScoreReward:
    return PickScoreReward(str(pick_folder))


def image_reward_state(vocabulary: int, layers: int = 2) -> dict[str, Tensor]:
    """A checkpoint in the released layout: ViT of width 128 (2 heads) on 2x2 patches, BERT of width 64 (1 head)."""
    wide, narrow = 128, 64
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, 5, wide),
        "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (wide,),
        "blip.visual_encoder.norm.weight": (wide,),
        "blip.visual_encoder.norm.bias": (wide,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, narrow),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, narrow),
        "blip.text_encoder.embeddings.LayerNorm.weight": (narrow,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (narrow,),
        "blip.vision_proj.weight": (8, wide),
        "blip.text_proj.bias": (8,),
    }
    for layer in range(layers):
        block = f"blip.visual_encoder.blocks.{layer}."
        linear = {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide)}
        linear |= {"mlp.fc1": (2 * wide, wide), "mlp.fc2": (wide, 2 * wide)}
        shapes |= {f"{block}norm{i}.{kind}": (wide,) for i in (1, 2) for kind in ("weight", "bias")}
        block_text = f"blip.text_encoder.encoder.layer.{layer}."
        inner = {"intermediate.dense": (2 * narrow, narrow), "output.dense": (narrow, 2 * narrow)}
        for kind, source in (("attention", narrow), ("crossattention", wide)):
            inner |= {f"{kind}.self.query": (narrow, narrow), f"{kind}.output.dense": (narrow, narrow)}
            inner |= {f"{kind}.self.key": (narrow, source), f"{kind}.self.value": (narrow, source)}
        for part in ("attention.output", "crossattention.output", "output"):
            shapes |= {f"{block_text}{part}.LayerNorm.{kind}": (narrow,) for kind in ("weight", "bias")}
        for prefix, found in ((block, linear), (block_text, inner)):
            for name, shape in found.items():
                shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    state = scatter({name: torch.empty(shape) for name, shape in shapes.items()})
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state | {f"mlp.{name}": tensor for name, tensor in head(narrow, 1).items()}


@pytest.fixture(scope="module")
def image_reward(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    path = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(image_reward_state(len(build_tokenizer(CAPTIONS))), path)
    return ImageReward(str(path), tokenizer=str(tokenizer_folder))


@pytest.fixture(scope="module")
def biomed(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BiomedClipReward:
    folder = tmp_path_factory.mktemp("biomedclip")
    for file in clip_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = biomedclip.CONTEXT
    config["preprocess_cfg"] |= {"mean": list(biomedclip.MEAN), "std": list(biomedclip.STD)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return BiomedClipReward(str(folder))


def tiny_densenet(outputs: int = 18) -> torch.nn.Module:
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    network = DenseNet(growth_rate=4, block_config=(2, 1), num_init_features=8, bn_size=2, num_classes=outputs)
    network.features.conv0 = torch.nn.Conv2d(1, 8, 7, stride=2, padding=3, bias=False)
    network.load_state_dict(scatter(network.state_dict()))
    return network.eval()


@pytest.fixture(scope="module")
def xray(tmp_path_factory: pytest.TempPathFactory) -> XrayFindings:
    path = tmp_path_factory.mktemp("xray") / "densenet.safetensors"
    save_file(tiny_densenet().state_dict(), path)
    return XrayFindings(str(path))


@pytest.fixture(params=PUBLIC)
def reward(request: pytest.FixtureRequest) -> Reward:
    fixture = {"imagereward": "image_reward", "biomedclip": "biomed", "xray-findings": "xray"}
    made: Reward = request.getfixturevalue(fixture.get(request.param, request.param))
    return made


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def samples() -> list[Sample]:
    return [Sample(Prompt(CAPTIONS[i % 2] if i else CAPTIONS[1]), picture(i)) for i in range(5)]


@pytest.fixture
def findings_samples(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, prompt=Prompt(CAPTIONS[1])) for sample in samples]


class TestPromises:
    """What every reward keeps, the public ones included."""

    def test_scores_are_one_finite_float32_column(self, reward: Reward, findings_samples: list[Sample]) -> None:
        assert isinstance(reward, Reward)
        total = reward(findings_samples).total
        assert total.dtype == torch.float32 and total.shape == (5,) and not total.requires_grad
        assert total.isfinite().all() and total.unique().numel() == 5
        assert (total >= reward.range[0]).all() and (total <= reward.range[1]).all()
        assert reward([]).total.shape == (0,)

    def test_a_score_does_not_depend_on_its_batch(self, reward: Reward, findings_samples: list[Sample]) -> None:
        total = reward(findings_samples).total
        alone = torch.cat([reward([sample]).total for sample in findings_samples])
        torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-5)

    def test_one_sample_without_an_image_is_one_nan(self, reward: Reward, findings_samples: list[Sample]) -> None:
        broken = [findings_samples[0], replace(findings_samples[1], image=None), findings_samples[2]]
        total = reward(broken).total
        assert total.isnan().tolist() == [False, True, False]
        whole = reward(findings_samples[:3]).total
        torch.testing.assert_close(total[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)

    def test_one_sample_without_a_prompt(self, reward: Reward, findings_samples: list[Sample]) -> None:
        """Nothing was asked, so nothing can agree with it: NaN, but of the look of an image."""
        bare = [findings_samples[0], replace(findings_samples[1], prompt=Prompt(" ")), findings_samples[2]]
        total, looks_alone = reward(bare).total, reward.name == "aesthetic"
        assert total.isnan().tolist() == [False, not looks_alone, False]
        torch.testing.assert_close(total[[0, 2]], reward(findings_samples[:3]).total[[0, 2]], rtol=1e-4, atol=1e-5)
        if hasattr(reward, "differentiable"):
            pixels = to_tensor([sample.image for sample in bare if sample.image is not None])
            found = reward.differentiable(pixels, [sample.prompt for sample in bare])
            assert found.isnan().tolist() == [False, not looks_alone, False]

    def test_greyscale_and_oblong_images_are_scored(self, reward: Reward) -> None:
        odd = [picture(1, 60, 30), picture(2, 30, 60).convert("L")]
        assert reward([Sample(Prompt(CAPTIONS[1]), image) for image in odd]).total.isfinite().all()


@pytest.mark.parametrize("name", PUBLIC)
def test_it_is_in_the_registry_under_its_name(name: str) -> None:
    assert name in REWARDS
    spec = f"{name}?weights=x.pt" if name in ("aesthetic", "xray-findings") else name
    reward = load(spec)
    assert reward.name == name
    assert isinstance(reward, Reward)
    assert not any(key.startswith("_") for key in vars(reward) if key not in ("_folder",)), "nothing is loaded yet"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aesthetic", "aesthetic needs its weights"),
        ("xray-findings", "xray-findings needs its weights"),
        ("hpsv2?version=2.2", "version='2.2' cannot be used"),
        ("hpsv2?model=hf-hub:a/b", "is the architecture"),
        ("xray-findings?weights=x&trained_on=everything", "trained_on='everything' cannot be used"),
        ("imagereward?device=abacus", "there is no device"),
    ],
)
def test_a_wrong_argument_is_told(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: AestheticReward(name, clip="embedded:clip"),
        lambda name: HPSv2Reward(weights=name),
        ImageReward,
        XrayFindings,
    ],
)
def test_a_file_that_cannot_be_had_is_one_sentence(make: Callable[[str], Reward], samples: list[Sample]) -> None:
    for name, message in (
        ("/nowhere/w.pt", "there is no file"),
        ("hf-hub:nobody/nothing/w.pt", "could not be had"),
    ):
        with pytest.raises(NotFoundError, match=message) as caught:
            make(name)(samples)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="OWNER/NAME/FILE"):
        make("hf-hub:nothing")(samples)


def test_a_model_that_cannot_be_had_is_one_sentence(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="could not be had"):
        PickScoreReward("nobody/nothing")(samples)
    with pytest.raises(NotFoundError, match="there is no folder"):
        PickScoreReward("./nothing")(samples)
    with pytest.raises(InputError, match="holds no CLIP"):
        PickScoreReward(str(tmp_path))(samples)


def test_a_pin_is_checked(aesthetic: AestheticReward, clip_folder: Path, samples: list[Sample]) -> None:
    found = files.digest(Path(aesthetic.weights))
    pinned = AestheticReward(aesthetic.weights, clip=str(clip_folder), sha256=found.upper())
    assert torch.equal(pinned(samples).total, aesthetic(samples).total)
    with pytest.raises(InputError, match=f"its SHA-256 is {found}"):
        AestheticReward(aesthetic.weights, clip=str(clip_folder), sha256="0" * 64)(samples)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        AestheticReward(aesthetic.weights, clip=str(clip_folder), sha256="abc")(samples)


class TestAesthetic:
    def test_it_is_the_linear_head_on_the_embedding_of_length_1(
        self, aesthetic: AestheticReward, clip_folder: Path, samples: list[Sample]
    ) -> None:
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
        with torch.no_grad():
            raw = model.eval().encode_image(torch.stack([transform(s.image) for s in samples]))
        expected = by_hand(head(16), raw / raw.norm(dim=1, keepdim=True))
        torch.testing.assert_close(aesthetic(samples).total, expected, rtol=1e-4, atol=1e-5)

    def test_the_prompt_plays_no_part(self, aesthetic: AestheticReward, samples: list[Sample]) -> None:
        other = [replace(sample, prompt=Prompt("something else")) for sample in samples]
        assert torch.equal(aesthetic(other).total, aesthetic(samples).total)

    def test_the_differentiable_form_agrees_and_climbs(self, aesthetic: AestheticReward, samples: list[Sample]) -> None:
        images = to_tensor([s.image for s in samples if s.image is not None]).requires_grad_()
        scores = aesthetic.differentiable(images, [])
        torch.testing.assert_close(scores.detach(), aesthetic(samples).total, rtol=0, atol=5e-3)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        assert (aesthetic.differentiable(images + step, []) > scores).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: {k: v for k, v in s.items() if not k.startswith("layers.4")}, "its head has"),
            (lambda s: {k.replace("layers.", "stages."): v for k, v in s.items()}, "its head has stages"),
            (lambda s: {**s, "layers.2.weight": torch.zeros(8, 5)}, "its layers do not follow"),
            (lambda s: {**s, "layers.2.bias": torch.zeros(5)}, "has another shape for layers.2.bias"),
            (lambda s: {"numbers": [1, 2]}, "holds no tensors"),
        ],
    )
    def test_another_file_is_refused(
        self,
        change: Callable[[dict[str, Tensor]], object],
        message: str,
        tmp_path: Path,
        clip_folder: Path,
        samples: list[Sample],
    ) -> None:
        torch.save(change(head(16)), tmp_path / "head.pt")
        with pytest.raises(InputError, match=message):
            AestheticReward(str(tmp_path / "head.pt"), clip=str(clip_folder))(samples)

    def test_the_wrong_clip_is_refused(self, clip_folder: Path, tmp_path: Path, samples: list[Sample]) -> None:
        save_file(head(24), tmp_path / "head.safetensors")
        with pytest.raises(InputError, match="24 dimensions"):
            AestheticReward(str(tmp_path / "head.safetensors"), clip=str(clip_folder))(samples)


class TestHPSv2:
    def test_it_is_the_plain_cosine_of_the_checkpoint(self, hpsv2: HPSv2Reward, samples: list[Sample]) -> None:
        """Square images at 28 pixels: no border, so CLIP's own transform is the released one."""
        model, _, transform = open_clip.create_model_and_transforms("tiny-h", load_weights=False)
        model.load_state_dict(torch.load(hpsv2.weights, weights_only=True)["state_dict"])
        tokens = open_clip.get_tokenizer("tiny-h")([s.prompt.text for s in samples])
        with torch.no_grad():
            images = model.eval().encode_image(torch.stack([transform(s.image) for s in samples]))
            expected = F.cosine_similarity(images, model.encode_text(tokens))
        torch.testing.assert_close(hpsv2(samples).total, expected, rtol=1e-4, atol=1e-5)

    def test_oblong_images_get_a_black_border_and_are_not_cut(self, hpsv2: HPSv2Reward) -> None:
        """A strip whose ends differ: cut at the middle, as CLIP does, both would score the same."""
        strip = picture(0, 84, 28)
        marked = strip.copy()
        marked.paste((255, 0, 0), (0, 0, 20, 28))
        first, second = hpsv2([Sample(Prompt("x"), image) for image in (strip, marked)]).total
        assert abs(float(first - second)) > 1e-3
        bordered = Image.new("RGB", (84, 84))
        bordered.paste(strip, (0, 28))
        padded = hpsv2([Sample(Prompt("x"), bordered)]).total
        torch.testing.assert_close(first[None], padded, rtol=0, atol=2e-2)

    def test_the_differentiable_form_agrees(self, hpsv2: HPSv2Reward, samples: list[Sample]) -> None:
        images = to_tensor([s.image for s in samples if s.image is not None]).requires_grad_()
        scores = hpsv2.differentiable(images, [s.prompt for s in samples])
        torch.testing.assert_close(scores.detach(), hpsv2(samples).total, rtol=0, atol=1e-2)
        assert torch.autograd.grad(scores.sum(), images)[0].abs().flatten(1).amax(1).gt(0).all()
        with pytest.raises(ConfigError, match="square"):
            hpsv2.differentiable(torch.rand(1, 3, 20, 30), [Prompt("x")])

    def test_another_checkpoint_is_refused(self, tmp_path: Path, samples: list[Sample]) -> None:
        torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "hps.pt")
        with pytest.raises(InputError, match="is not an HPSv2 checkpoint"):
            HPSv2Reward(weights=str(tmp_path / "hps.pt"), model="tiny-h")(samples)


class TestPickScore:
    def test_it_is_the_scaled_cosine_that_transformers_gives(
        self, pickscore: PickScoreReward, pick_folder: Path, samples: list[Sample]
    ) -> None:
        """The logit scale of the file is 3: exp(3) times the cosine. Images of 28 pixels need no resizing."""
        from transformers import AutoTokenizer, CLIPModel

        small = [replace(s, image=s.image.resize((28, 28))) for s in samples if s.image is not None]
        model, tokenizer = CLIPModel.from_pretrained(pick_folder).eval(), AutoTokenizer.from_pretrained(pick_folder)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        images = (to_tensor([s.image for s in small if s.image is not None]) - mean) / std
        expected = []
        for i, sample in enumerate(small):
            text = tokenizer(sample.prompt.text, return_tensors="pt")  # without padding: padding must not matter
            with torch.no_grad():
                image_features = model.get_image_features(pixel_values=images[i : i + 1]).pooler_output
                text_features = model.get_text_features(input_ids=text["input_ids"]).pooler_output
            expected.append(math.exp(3) * F.cosine_similarity(image_features, text_features))
        torch.testing.assert_close(pickscore(small).total, torch.cat(expected), rtol=1e-4, atol=1e-4)

    def test_unscaled_it_is_the_cosine(
        self, pickscore: PickScoreReward, pick_folder: Path, samples: list[Sample]
    ) -> None:
        cosine = load(f"pickscore?model={pick_folder}&scaled=false")
        assert (cosine.unit, cosine.range) == ("cosine", (-1.0, 1.0))
        torch.testing.assert_close(cosine(samples).total * math.exp(3), pickscore(samples).total)

    def test_a_folder_that_lacks_weights_is_refused(
        self, pick_folder: Path, tmp_path: Path, samples: list[Sample]
    ) -> None:
        """transformers would put random numbers in their place."""
        from safetensors.torch import load_file

        for file in pick_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        state = load_file(tmp_path / "model.safetensors")
        state.pop("visual_projection.weight")
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"lacks weights of CLIP, visual_projection\.weight"):
            PickScoreReward(str(tmp_path))(samples)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v per head; keys whose mask is 0 get no weight."""
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    weight = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
    if mask is not None:
        weight = weight.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (weight.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


class Blip:
    """The forward pass as the papers give it, straight from a checkpoint in the released layout."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def image(self, pixels: Tensor) -> Tensor:
        """ViT (Dosovitskiy et al. 2021): norms first."""
        at = "blip.visual_encoder."
        patches = F.unfold(pixels, 16, stride=16).transpose(1, 2)
        x = patches @ self.state[f"{at}patch_embed.proj.weight"].flatten(1).T + self.state[f"{at}patch_embed.proj.bias"]
        x = torch.cat([self.state[f"{at}cls_token"].expand(len(x), -1, -1), x], 1) + self.state[f"{at}pos_embed"]
        for layer in range(2):
            block = f"{at}blocks.{layer}."
            qkv = self.linear(f"{block}attn.qkv", self.norm(f"{block}norm1", x, 1e-6))
            x = x + self.linear(f"{block}attn.proj", attention(*qkv.chunk(3, -1), heads=2))
            hidden = F.gelu(self.linear(f"{block}mlp.fc1", self.norm(f"{block}norm2", x, 1e-6)))
            x = x + self.linear(f"{block}mlp.fc2", hidden)
        return self.norm(f"{at}norm", x, 1e-6)

    def text(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """BERT (norms last) with a second attention, to the image, in every layer (Li et al. 2022, BLIP)."""
        at = "blip.text_encoder."
        x = self.state[f"{at}embeddings.word_embeddings.weight"][tokens]
        x = x + self.state[f"{at}embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(f"{at}embeddings.LayerNorm", x, 1e-12)
        for layer in range(2):
            block = f"{at}encoder.layer.{layer}."
            for kind, other, seen in (("attention", None, mask), ("crossattention", image, None)):
                source = x if other is None else other
                parts = [
                    self.linear(f"{block}{kind}.self.{name}", given)
                    for name, given in (("query", x), ("key", source), ("value", source))
                ]
                mixed = self.linear(f"{block}{kind}.output.dense", attention(*parts, heads=1, mask=seen))
                x = self.norm(f"{block}{kind}.output.LayerNorm", x + mixed, 1e-12)
            hidden = self.linear(f"{block}output.dense", F.gelu(self.linear(f"{block}intermediate.dense", x)))
            x = self.norm(f"{block}output.LayerNorm", x + hidden, 1e-12)
        return x


class TestImageReward:
    def test_it_is_the_forward_pass_written_from_the_formula(
        self, image_reward: ImageReward, tokenizer_folder: Path, samples: list[Sample]
    ) -> None:
        """Images of 32 pixels, 2x2 patches, are not resized; prompts are padded to 35 tokens, and the pads masked."""
        from transformers import AutoTokenizer

        small = [replace(s, image=s.image.resize((32, 32))) for s in samples if s.image is not None]
        state = {name: t.double() if t.is_floating_point() else t for name, t in image_reward_state(
            len(build_tokenizer(CAPTIONS))).items()}  # fmt: skip
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        images = (to_tensor([s.image for s in small if s.image is not None]).double() - mean) / std
        tokens = AutoTokenizer.from_pretrained(tokenizer_folder)(
            [s.prompt.text for s in small], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        assert (tokens["attention_mask"] == 0).any()
        blip = Blip(state)
        first = blip.text(tokens["input_ids"], tokens["attention_mask"], blip.image(images))[:, 0]
        raw = by_hand({name.removeprefix("mlp."): t for name, t in state.items() if name.startswith("mlp.")}, first)
        expected = (raw - 0.16717362830052426) / 1.0333394966054072
        assert expected.std() > 1e-3
        torch.testing.assert_close(image_reward(small).total, expected, rtol=1e-4, atol=1e-5)

    def test_the_differentiable_form_agrees_and_has_a_gradient(
        self, image_reward: ImageReward, samples: list[Sample]
    ) -> None:
        images = to_tensor([s.image for s in samples if s.image is not None]).requires_grad_()
        scores = image_reward.differentiable(images, [s.prompt for s in samples])
        torch.testing.assert_close(scores.detach(), image_reward(samples).total, rtol=0, atol=2e-2)
        assert torch.autograd.grad(scores.sum(), images)[0].abs().flatten(1).amax(1).gt(0).all()

    def test_the_image_model_takes_every_name_that_timm_gives(self) -> None:
        """The public code builds its ViT of timm's parts; timm's own, without its classifier, has the same names."""
        import timm

        made = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
        named_so = {f"blip.visual_encoder.{name}": tensor for name, tensor in made.items()}
        vision, text, rest = imagereward_weights.split(named_so, Path("x"), "a test")
        assert len(vision) == len(made)
        assert not text and not rest

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s | {"blip.surprise": torch.zeros(1)}, r"it holds blip\.surprise"),
            (lambda s: s | {"blip.visual_encoder.fc.weight": torch.zeros(1)}, r"it holds blip\.visual_encoder\.fc"),
            (lambda s: {k: v for k, v in s.items() if "pos_embed" not in k}, "it lacks embeddings.position_embedding"),
            (lambda s: {k: v for k, v in s.items() if "crossattention.self.key.bias" not in k}, "lacks encoder"),
            (lambda s: {k: v for k, v in s.items() if not k.startswith("mlp.layers.7")}, "its head has"),
        ],
    )
    def test_another_layout_is_refused_and_never_guessed(
        self,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        message: str,
        image_reward: ImageReward,
        tmp_path: Path,
        samples: list[Sample],
    ) -> None:
        torch.save(change(torch.load(image_reward.weights, weights_only=True)), tmp_path / "other.pt")
        with pytest.raises(InputError, match=message):
            ImageReward(str(tmp_path / "other.pt"), tokenizer=image_reward.tokenizer)(samples)


class TestBiomedClip:
    def test_it_is_clip_with_the_published_reading(self, biomed: BiomedClipReward, samples: list[Sample]) -> None:
        assert torch.equal(biomed(samples).total, ClipReward(biomed.model)(samples).total)

    def test_another_model_is_refused(self, clip_folder: Path, samples: list[Sample]) -> None:
        reward = BiomedClipReward(str(clip_folder))
        for _ in range(2):
            with pytest.raises(InputError, match="texts of 32 tokens"):
                reward(samples)

    def test_another_normalisation_is_refused(
        self, biomed: BiomedClipReward, tmp_path: Path, samples: list[Sample]
    ) -> None:
        for file in Path(biomed.model).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="normalises images by"):
            BiomedClipReward(str(tmp_path))(samples)


class TestFindings:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("chest x-ray with a right pleural effusion", {"Effusion": True}),
            ("No pneumothorax.", {"Pneumothorax": False}),
            ("NO  \tPneumothorax", {"Pneumothorax": False}),
            ("cardiomegaly without effusion", {"Cardiomegaly": True, "Effusion": False}),
            (
                "no focal consolidation, effusion or pneumothorax",
                dict.fromkeys(("Consolidation", "Effusion", "Pneumothorax"), False),
            ),
            ("No effusion, but a large pneumothorax", {"Pneumothorax": True, "Effusion": False}),
            ("No pneumothorax. Small nodule.", {"Pneumothorax": False, "Nodule": True}),
            ("no evidence of pneumonia", {"Pneumonia": False}),
            ("negative for fractures", {"Fracture": False}),
            ("The effusion has resolved", {"Effusion": False}),
            ("pneumothorax is absent, small effusion", {"Pneumothorax": False, "Effusion": True}),
            ("small effusion, resolved pneumonia", {"Effusion": True, "Pneumonia": False}),
            ("A pneumothorax is not seen; there is oedema", {"Pneumothorax": False, "Edema": True}),
            ("no significant change in the effusion", {"Effusion": True}),
            ("effusion not resolved", {"Effusion": True}),
            ("left effusion, but no right effusion", {"Effusion": True}),
            ("opacities consistent with pneumonia", {"Pneumonia": True, "Lung Opacity": True}),
            ("no opacity consistent with pneumonia", {"Pneumonia": False, "Lung Opacity": False}),
            ("no pneumothorax with a small effusion", {"Pneumothorax": False, "Effusion": True}),
            ("enlarged heart and pleural_thickening", {"Cardiomegaly": True, "Pleural_Thickening": True}),
            ("pericardial effusion, subcutaneous emphysema, body mass index 30", {}),
            ("a nothing of a cat", {}),
            ("", {}),
        ],
    )
    def test_the_rule(self, prompt: str, expected: dict[str, bool]) -> None:
        assert named(prompt) == expected

    def test_every_finding_has_a_word_and_every_model_its_thresholds(self) -> None:
        assert all(named(finding) == {finding: True} for finding in FINDINGS)
        assert all(len(row) == len(FINDINGS) == 18 for row in THRESHOLDS.values())
        assert None not in THRESHOLDS["all"]


class TestXray:
    def test_pixels_run_from_minus_to_plus_1024(self) -> None:
        black, white = (Image.new("L", (300, 200), level) for level in (0, 255))
        made = pixels([black, white, Image.new("RGB", (8, 8), (51, 51, 51))])
        assert made.shape == (3, 1, 224, 224)
        torch.testing.assert_close(made.amax((1, 2, 3)), torch.tensor([-1024.0, 1024.0, (2 * 51 / 255 - 1) * 1024]))
        torch.testing.assert_close(made.amin((1, 2, 3)), made.amax((1, 2, 3)))

    def test_the_middle_square_is_read(self) -> None:
        wide = Image.new("L", (672, 224), 0)
        wide.paste(255, (224, 0, 448, 224))
        assert pixels([wide]).min() == 1024

    def test_the_operating_point_becomes_a_half(self) -> None:
        """t = 0.2: p = 0.1 is 0.1/0.4 = 0.25; p = 0.2 is 0.5; p = 0.6 is 1 - 0.4/1.6 = 0.75."""
        made = calibrated(torch.tensor([[0.0], [0.1], [0.2], [0.6], [1.0]]), torch.tensor([0.2]))
        torch.testing.assert_close(made[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        assert calibrated(torch.tensor([[0.3]]), torch.tensor([math.nan])).isnan().all()

    def test_the_score_is_the_mean_agreement(self, xray: XrayFindings) -> None:
        image = picture(3)
        with torch.no_grad():
            raw = tiny_densenet()(pixels([image])).sigmoid()
        p = calibrated(raw, torch.tensor([t or math.nan for t in THRESHOLDS["all"]]))[0]
        scores = xray([Sample(Prompt("a pneumothorax, but no effusion"), image), Sample(Prompt("a chest"), image)])
        agreed = torch.stack([p[FINDINGS.index("Pneumothorax")], 1 - p[FINDINGS.index("Effusion")]])
        torch.testing.assert_close(scores.total[0], agreed.mean())
        torch.testing.assert_close(scores.parts["Effusion"][0], agreed[1])
        assert scores.total[1].isnan() and scores.parts["Edema"].isnan().all()

    def test_findings_that_a_model_was_not_trained_for_are_not_judged(self, xray: XrayFindings) -> None:
        rsna = XrayFindings(xray.weights, trained_on="rsna")
        prompts = ("a pneumothorax", "a pneumothorax and pneumonia")
        total = rsna([Sample(Prompt(text), picture(1)) for text in prompts]).total
        assert total.isnan().tolist() == [True, False]

    @pytest.mark.parametrize("old_format", [True, False])
    def test_a_whole_module_is_read_without_being_rebuilt(
        self, old_format: bool, xray: XrayFindings, tmp_path: Path, samples: list[Sample]
    ) -> None:
        path = whole_module(tmp_path, old_format)
        made = xray_weights.module_tensors(path, "a test")
        expected = tiny_densenet().state_dict()
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
        assert "torchxrayvision" not in sys.modules

        asked = [replace(sample, prompt=Prompt("an effusion")) for sample in samples]
        with pytest.raises(InputError, match="pin it with sha256="):
            XrayFindings(str(path))(asked)
        pinned = XrayFindings(str(path), sha256=files.digest(path))
        torch.testing.assert_close(pinned(asked).total, xray(asked).total)
        with pytest.raises(InputError, match="its SHA-256 is"):
            XrayFindings(str(path), sha256="0" * 64)(asked)

    def test_what_a_file_wants_to_run_is_not_run(self, tmp_path: Path) -> None:
        witness = tmp_path / "witness"

        class Wicked:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
                return subprocess.getoutput, (f"touch {witness}",)

        for old in (True, False):
            torch.save({"state_dict": Wicked()}, tmp_path / "wicked.pt", _use_new_zipfile_serialization=not old)
            with pytest.raises(InputError):
                XrayFindings(str(tmp_path / "wicked.pt"), sha256=files.digest(tmp_path / "wicked.pt"))(
                    [Sample(Prompt("an effusion"), picture(0))]
                )
        assert not witness.exists()

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"weight": torch.zeros(2)}, "it lacks features.conv0.weight"),
            (tiny_densenet(5).state_dict(), "gives 5 findings"),
            ({**tiny_densenet().state_dict(), "more": torch.zeros(1)}, "also holds more"),
        ],
    )
    def test_another_network_is_refused(self, state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
        save_file(state, tmp_path / "net.safetensors")
        with pytest.raises(InputError, match=message):
            XrayFindings(str(tmp_path / "net.safetensors"))([Sample(Prompt("an effusion"), picture(0))])

    def test_bytes_that_are_no_weights_are_refused(self, tmp_path: Path) -> None:
        junk = {
            "junk.pt": b"nothing at all",
            "cut.pt": b"\x80\x02}q\x00",
            "zip.pt": b"PK\x03\x04",
            "x.safetensors": b"x",
        }
        for name, content in junk.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match="cannot be read as"):
                xray_weights.load(tmp_path / name, files.digest(tmp_path / name), "a test")


def whole_module(folder: Path, old_format: bool) -> Path:
    """A file as torchxrayvision published it: a pickled module of a class that is not here when it is read."""
    from torchvision.models import DenseNet

    module = types.ModuleType("torchxrayvision.models")
    kind = type("DenseNet", (DenseNet,), {"__module__": module.__name__})
    module.DenseNet = kind  # type: ignore[attr-defined]
    network = tiny_densenet()
    network.__class__ = kind
    names = {"torchxrayvision": types.ModuleType("torchxrayvision"), module.__name__: module}
    names["torchxrayvision"].models = module  # type: ignore[attr-defined]
    sys.modules |= names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the class has no source file
            torch.save(network, folder / "net.pt", _use_new_zipfile_serialization=not old_format)
    finally:
        for name in names:
            del sys.modules[name]
    return folder / "net.pt"


def test_scores_at_the_real_sizes_are_declared(samples: Sequence[Sample]) -> None:
    """The default names point at the published files; none of them is fetched by naming the reward."""
    assert HPSv2Reward(version="2.0").weights.endswith("HPSv2/HPS_v2_compressed.pt")
    assert HPSv2Reward().weights.endswith("HPSv2/HPS_v2.1_compressed.pt")
    assert PickScoreReward().model == "yuvalkirstain/PickScore_v1"
    assert BiomedClipReward().model.startswith("hf-hub:microsoft/BiomedCLIP")
    with pytest.raises(NotFoundError, match="could not be had"):
        BiomedClipReward()(samples)
