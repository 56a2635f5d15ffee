"""What is kept of the scenes of a world: an evaluation goes on with it, and never takes it for something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps import dataset_features
from apps.dataset_features import Encoder, Looks, World, encoder, look, source
from apps.evaluate_dataset import Stages
from apps.hashes import NOT_HASHED
from apps.progress import Status
from tests.synthetic import drawn

CASES = 10
PIECE = 4
"""Ten scenes are kept in pieces of 4, 4 and 2."""


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset_features, "PIECE", PIECE)
    monkeypatch.setattr(dataset_features, "CHUNK", 2)
    return tmp_path / "cache" / "looks"


def features(some: Sequence[Image.Image]) -> np.ndarray:
    """Mean and spread of each channel, as an encoder that counts in single precision."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in some])
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], axis=1).astype(np.float64)


ENCODER = Encoder("stub", "sha256:1", False, features, "cpu")


def seen(encode: Encoder = ENCODER, cases: int = CASES) -> tuple[Looks, list[int]]:
    """What is known of the scenes, and which of them had to be drawn for it."""
    scenes = World("brain-mr", cases, training=True)
    asked: list[int] = []
    draw = scenes.picture

    def picture(i: int) -> Image.Image:
        asked.append(i)
        return draw(i)

    scenes.picture = picture  # type: ignore[method-assign]
    with Status(quiet=True) as status:
        return look(scenes, encode, status, "scenes"), asked


def same(one: Looks, other: Looks) -> bool:
    return (
        np.array_equal(one.features, other.features) and np.array_equal(one.pixels, other.pixels)
        and (one.digests, one.rows, one.index) == (other.digests, other.rows, other.index)
    )  # fmt: skip


def test_a_second_look_draws_nothing_and_knows_the_same(place: Path) -> None:
    first, drawn_first = seen()
    second, drawn_then = seen()
    assert drawn_first == [*range(CASES)] and drawn_then == []
    assert same(first, second) and len(list(place.iterdir())) == 3
    assert first.features.dtype == second.features.dtype and first.rows[0]["plane"] in ("axial", "coronal", "sagittal")
    _, more = seen(cases=CASES + 2)
    assert more == [8, 9, 10, 11]


def test_one_that_was_interrupted_goes_on(place: Path) -> None:
    """It stops in the sixth scene: the first piece of four is kept."""
    count = 0

    def stops(some: Sequence[Image.Image]) -> np.ndarray:
        nonlocal count
        count += len(some)
        if count > 5:
            raise KeyboardInterrupt
        return features(some)

    with pytest.raises(KeyboardInterrupt):
        seen(replace(ENCODER, encode=stops))
    assert len(list(place.iterdir())) == 1
    found, asked = seen()
    assert asked == [*range(4, CASES)]
    assert same(found, seen(replace(ENCODER, sha256=NOT_HASHED))[0])


def test_another_encoder_code_or_set_finds_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen()
    assert seen(replace(ENCODER, sha256="sha256:2"))[1] == [*range(CASES)]
    assert seen(replace(ENCODER, device="cuda:0"))[1] == [*range(CASES)]
    monkeypatch.setattr("apps.dataset_cache._code", lambda: "changed")
    assert seen()[1] == [*range(CASES)]


@pytest.mark.parametrize("package", ["timm", "open_clip_torch", "torch"])
def test_another_version_of_a_package_finds_nothing_kept(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm has image towers of open_clip in it."""
    seen()
    assert seen()[1] == []
    monkeypatch.setattr("apps.dataset_cache.version", lambda name: "0.0" if name == package else version(name))
    assert seen()[1] == [*range(CASES)]


def test_the_device_is_the_one_that_the_encoder_computes_on() -> None:
    assert encoder("embedded:clip").device == "cpu"


def test_an_encoder_without_a_hash_keeps_nothing(place: Path) -> None:
    assert seen(replace(ENCODER, sha256=NOT_HASHED))[1] == [*range(CASES)]
    assert not place.exists()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-9], lambda data: b"", lambda data: b"{}" * 99])
def test_what_is_damaged_is_made_anew(place: Path, damage: Callable[[bytes], bytes]) -> None:
    first, _ = seen()
    for path in place.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    second, asked = seen()
    assert asked == [*range(CASES)] and same(first, second)
    assert seen()[1] == []


def test_where_nothing_can_be_kept_it_is_said_and_the_work_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.parent.mkdir()
    place.write_text("a file where the folder should be", encoding="utf-8")
    with Stages() as status:
        found = look(World("brain-mr", CASES, training=True), ENCODER, status, "scenes")
    assert len(found) == CASES
    assert capsys.readouterr().err.count("is not kept") == 1


def test_images_of_a_folder_are_never_kept(place: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for number in range(5):
        drawn(number).save(tmp_path / "real" / f"{number}.png")
    with Status(quiet=True) as status:
        assert len(look(source(str(tmp_path / "real")), ENCODER, status, "images")) == 5
    assert not place.exists()


def test_each_stage_says_how_much_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with Stages() as status:
            look(World("brain-mr", CASES, training=True), ENCODER, status, "training images")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("training images (world:brain-mr): 10 in ") and first.endswith(" s")
    assert second.startswith("training images (world:brain-mr), 10 of them kept from before: 10 in ")
