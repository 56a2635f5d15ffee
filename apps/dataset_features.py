"""Images with their table rows, from wherever they are, and what an encoder makes of them.

Shape legend: ``N`` images, ``D`` features, ``P`` pixels of a small grey image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from apps import hashes
from apps.dataset_cache import Piece, Shelf
from apps.progress import Status
from diffalign import assets, images, parquet
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.seeds import derive
from diffalign.synthesis import tables
from diffalign.synthesis.cases import Case, Value
from diffalign.synthesis.estimates import Floats
from diffalign.synthesis.gates import small
from diffalign.synthesis.naming import without_places
from diffalign.synthesis.rows import shown
from diffalign.synthesis.store import SPEC, Generated, unfinished

WORLDS = ("brain-mr", "emoji")
TRAINED_ON = 30_000
"""Scenes that each embedded model was trained on: the first ones (``pipelines/embedded/denoiser.py``)."""
REAL_CASES = 2000
LARGEST = 4000
"""Cases of a set that are compared at most, drawn by a fixed seed: kernels and distances grow with the square."""
CHUNK = 128
PIECE = 8 * CHUNK
"""Scenes of a world that are kept together: what an interrupted evaluation has to do again, at most."""
_TABLES = ("metadata.parquet", "metadata.jsonl", "metadata.csv", "rows.csv")
_FILE_COLUMNS = ("file_name", "file", "image")
_T = TypeVar("_T")


class Pictures(Protocol):
    """Images with their rows, one at a time."""

    name: str
    """As it may be written in what is handed out."""

    def __len__(self) -> int: ...

    def picture(self, i: int) -> Image.Image:
        """The image."""
        ...

    def row(self, i: int) -> Mapping[str, Value]:
        """Its table row; empty where there is none. Cells may still be the texts of a file: see ``Looks.typed``."""
        ...

    def caption(self, i: int) -> str:
        """What a model is asked, to get such an image; empty where it is not known."""
        ...


class Made:
    """The cases of a synthetic dataset that have an image."""

    def __init__(self, folder: Path) -> None:
        self.generated = Generated.open(folder)
        if not self.generated.complete:
            raise RefusedError(unfinished(folder))
        self.cases: list[Case] = [case for case in self.generated.cases() if case.image is not None]
        if not self.cases:
            raise InputError(f"{folder} has no images, and only images are evaluated")
        self.name = self.generated.manifest.name
        self.kinds = self.generated.manifest.columns

    def __len__(self) -> int:
        return len(self.cases)

    def picture(self, i: int) -> Image.Image:
        """See Pictures."""
        sha256 = self.cases[i].image
        assert sha256 is not None
        with Image.open(io.BytesIO(self.generated.image(sha256)), formats=("PNG",)) as image:
            image.load()
            return image

    def row(self, i: int) -> Mapping[str, Value]:
        """See Pictures."""
        return self.cases[i].row

    def caption(self, i: int) -> str:
        """See Pictures."""
        return self.cases[i].prompt

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the manifest says of the image model."""
        found: Mapping[str, Any] = self.generated.manifest.models.get("image") or {}
        return found

    @cached_property
    def strata(self) -> list[str]:
        """The columns that its strata are made of."""
        try:
            spec = yaml.safe_load((self.generated.folder / SPEC).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return []
        return [str(name) for name in (spec.get("strata") or [])] if isinstance(spec, dict) else []


class World:
    """Slices or scenes of an embedded world: those that its model was trained on, or others."""

    def __init__(self, world: str, cases: int, *, training: bool) -> None:
        self.world, self.cases, self.purpose = world, cases, "training scene" if training else "real scene"
        self.name = f"world:{world}"
        self.whole = cases >= TRAINED_ON
        """Of training scenes: whether these are all."""
        self._scene = lru_cache(maxsize=2 * CHUNK)(self._drawn)

    def __len__(self) -> int:
        return self.cases

    @cached_property
    def _module(self) -> ModuleType:
        return import_module(f"diffalign.worlds.{self.world.replace('-', '_')}")

    def _drawn(self, i: int) -> Any:
        return self._module.scene(derive(i, self.purpose, self.world))

    def picture(self, i: int) -> Image.Image:
        """See Pictures."""
        found: Image.Image = self._scene(i).image
        return found

    def row(self, i: int) -> Mapping[str, Value]:
        """See Pictures."""
        facts = self._scene(i).prompt.attributes
        return {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)}

    def caption(self, i: int) -> str:
        """See Pictures."""
        return str(self._module.caption(self._scene(i).prompt.attributes))


class Folder:
    """The images of a folder, with the rows of the table that names their files: ``_TABLES``."""

    def __init__(self, folder: Path) -> None:
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
        self.files = sorted(path for path in paths if not path.name.startswith("."))
        if not self.files:
            raise NotFoundError(f"there is no image in {folder}, and it is no dataset of diffalign")
        self.name = str(without_places(str(folder)))
        self.rows: dict[Path, dict[str, Value]] = {}
        for table in (path for name in _TABLES for path in sorted(folder.rglob(name))):
            self._read(table)

    def _read(self, table: Path) -> None:
        try:
            text = "" if table.suffix == ".parquet" else table.read_text(encoding="utf-8-sig")
            if table.suffix == ".parquet":
                found: list[Any] = [row for _, row in parquet.rows(table)]
            elif table.suffix == ".jsonl":
                found = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                found = list(csv.DictReader(io.StringIO(text), strict=True))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{table} is no table of images: {error}") from None
        for row in found:
            if not isinstance(row, dict):
                raise InputError(f"{table} is no table of images: {str(row)[:60]!r} is no object with columns")
            file = next((row.pop(name) for name in _FILE_COLUMNS if isinstance(row.get(name), str)), None)
            if file is not None:
                self.rows[(table.parent / file).resolve()] = row

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> Image.Image:
        """See Pictures."""
        return images.load(self.files[i])

    def row(self, i: int) -> Mapping[str, Value]:
        """See Pictures."""
        return self.rows.get(self.files[i].resolve(), {})

    def caption(self, i: int) -> str:
        """See Pictures."""
        row = self.row(i)
        return next((str(row[name]) for name in ("prompt", "caption", "text") if row.get(name)), "")


def source(name: str, *, training: bool = False) -> Pictures:
    """The images behind ``world:NAME``, ``world:NAME?cases=N``, a dataset's folder, or a folder of images."""
    if name.startswith("world:"):
        world, mark, argument = name.removeprefix("world:").partition("?")
        count = argument.removeprefix("cases=") if mark else str(TRAINED_ON if training else REAL_CASES)
        if mark and (not argument.startswith("cases=") or not count.isdecimal() or not int(count)):
            raise ConfigError(f"{name!r}: behind the ? of a world stands cases=N, a number above 0")
        if world not in WORLDS:
            raise ConfigError(f"{name!r} is no world; write {' or '.join('world:' + w for w in WORLDS)}, with ?cases=N")
        return World(world, int(count), training=training)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {name}; images come from a folder or from world:NAME")
    return Made(folder) if (folder / "manifest.json").is_file() else Folder(folder)


@dataclass(frozen=True)
class Encoder:
    """What images are compared by."""

    name: str
    sha256: str
    clip: bool
    """Whether it is the image tower of a CLIP."""
    encode: Callable[[Sequence[Image.Image]], Floats]
    device: str
    """What it computes on: the last digits of a feature depend on it."""

    def to_json(self) -> dict[str, Any]:
        """Its name and hash, which stand beside every number."""
        return {"name": self.name, "sha256": self.sha256}


def encoder(name: str) -> Encoder:
    """``imagenet-trunk`` (fetched), or a CLIP as the reward ``clip`` names it.

    The features of a CLIP have length 1; they are scaled to ``sqrt(D)``, so that KID's kernel is ``(cosine + 1)^3``.
    """
    if name == "imagenet-trunk":
        from rewards import imagenet_trunk

        path = assets.file("imagenet-trunk", "mobilenet_v2.pth")
        trunk = imagenet_trunk.load()
        sha256 = hashes.of_files([path], path.parent)
        device = str(next(trunk.parameters()).device)
        return Encoder(name, sha256, False, lambda some: _array(imagenet_trunk.features(some, trunk)), device)
    from rewards.clip import EMBEDDED, ClipReward

    clip = ClipReward(model=name)
    folder = EMBEDDED if name == "embedded:clip" else Path(name.removeprefix("local-dir:")).expanduser()
    sha256 = hashes.of_folder(folder) if folder.is_dir() else hashes.snapshot(name.removeprefix("hf-hub:"))

    def encode(some: Sequence[Image.Image]) -> Floats:
        found = clip.encode_images(some)
        return _array(found * found.shape[1] ** 0.5)

    return Encoder(str(without_places(name)), sha256, True, encode, str(clip.device))


def _array(found: torch.Tensor) -> Floats:
    return found.double().cpu().numpy()


@dataclass(frozen=True)
class Looks:
    """What is known of the images of a set."""

    features: Floats
    """``(N, D)``."""
    pixels: NDArray[np.float32]
    """``(N, P)`` in [0, 1]."""
    digests: tuple[bytes, ...]
    """Of the pixels of each."""
    rows: tuple[Mapping[str, Value], ...]
    index: tuple[int, ...]
    """Which images of the set these are."""

    def __len__(self) -> int:
        return len(self.index)

    def only(self, index: Sequence[int]) -> Looks:
        """Those of some of the images."""
        wanted = set(index)
        take = [k for k, i in enumerate(self.index) if i in wanted]
        return Looks(
            self.features[take], self.pixels[take], tuple(self.digests[k] for k in take),
            tuple(self.rows[k] for k in take), tuple(self.index[k] for k in take),
        )  # fmt: skip

    def typed(self, kinds: Mapping[str, str], name: str) -> Looks:
        """With the columns of ``kinds`` alone in the rows, each cell as its kind says: categories are texts throughout.

        Raises InputError for a cell that does not fit, of a set that is called ``name``.
        """
        rows = tuple(
            {column: _typed(row[column], kind, f"{name}, image {i + 1}: {column}")
             for column, kind in kinds.items() if column in row}
            for i, row in zip(self.index, self.rows, strict=True)
        )  # fmt: skip
        return replace(self, rows=rows)


def _typed(cell: Value, kind: str, where: str) -> Value:
    """A cell to be compared: a whole number may have a fraction on the other side."""
    text = shown(cell) if kind == "category" and cell is not None else cell
    return tables.converted(text, "number" if kind == "integer" else kind, where)


def chosen(pictures: Pictures, most: int | None = LARGEST) -> list[int]:
    """Which images are looked at: all, or ``most`` that a fixed seed draws."""
    count = len(pictures)
    if most is None or count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).permutation(count)[:most].tolist())


def look(pictures: Pictures, encode: Encoder, status: Status, what: str, *, most: int | None = LARGEST) -> Looks:
    """Encodes the images of a set; ``what`` they are is shown. Scenes of a world are kept: see ``dataset_cache``."""
    index, pieces = chosen(pictures, most), list[Piece]()
    stage, done = f"{what} ({pictures.name})", 0
    shelf = None
    if isinstance(pictures, World):
        shelf = Shelf(f"{pictures.purpose} of {pictures.world}", encode.sha256, encode.device, status.say)
    for some in _parts(index, PIECE):
        piece = shelf.take(some) if shelf else None
        if piece is None:
            piece = _seen(pictures, encode, some, partial(_tell, status, stage, done, len(index)))
            if shelf:
                shelf.keep(some, piece)
        pieces.append(piece)
        done += len(some)
        _tell(status, stage, 0, len(index), done)
    if shelf and shelf.taken:
        stage += f", {shelf.taken:,} of them kept from before"
    status(stage, len(index), len(index))
    return Looks(
        np.concatenate([piece.features for piece in pieces]), np.concatenate([piece.pixels for piece in pieces]),
        tuple(one for piece in pieces for one in piece.digests), tuple(row for piece in pieces for row in piece.rows),
        tuple(index),
    )  # fmt: skip


def _seen(pictures: Pictures, encode: Encoder, index: Sequence[int], on_progress: Callable[[int], None]) -> Piece:
    """Looks at some images of a set, a chunk at a time; the next chunk is drawn while one is encoded."""

    def load(some: Sequence[int]) -> tuple[list[Image.Image], list[Mapping[str, Value]]]:
        return [pictures.picture(i) for i in some], [pictures.row(i) for i in some]

    features, pixels = [], []
    digests: list[bytes] = []
    rows: list[Mapping[str, Value]] = []
    for drawn, their_rows in _ahead(load, _parts(index, CHUNK)):
        features.append(encode.encode([images.to_rgb(image) for image in drawn]))
        pixels.append(np.stack([small(image).ravel() for image in drawn]))
        digests += [hashlib.sha256(images.to_rgb(image).tobytes()).digest() for image in drawn]
        rows += their_rows
        on_progress(len(rows))
    return Piece(np.concatenate(features), np.concatenate(pixels), tuple(digests), tuple(rows))


def _tell(status: Status, stage: str, before: int, total: int, done: int) -> None:
    if before + done < total:
        status(stage, before + done, total)


def _parts(index: Sequence[int], size: int) -> list[Sequence[int]]:
    return [index[start : start + size] for start in range(0, len(index), size)]


def _ahead(load: Callable[[Sequence[int]], _T], parts: Sequence[Sequence[int]]) -> Iterator[_T]:
    """Loads each part in turn, and in another thread the next one while the caller works on it."""
    with ThreadPoolExecutor(1) as other:
        coming = other.submit(load, parts[0])
        for following in [*parts[1:], None]:
            here = coming.result()
            if following is not None:
                coming = other.submit(load, following)
            yield here


def small_pixels(image: Image.Image) -> Floats:
    """``(P,)`` grey pixels in [0, 1] of the image made small, by which copies are found."""
    return np.asarray(small(image), dtype=np.float64).ravel()


def tensor(pictures: Pictures, index: Sequence[int], side: int = 64) -> torch.Tensor:
    """Pixels ``(N, 3, side, side)`` in [0, 1] of some images of a set, for a small network."""
    return images.to_tensor([images.fit(images.to_rgb(pictures.picture(i)), side, side) for i in index])
