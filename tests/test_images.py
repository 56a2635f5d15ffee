from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from diffalign import images
from diffalign.errors import ConfigError, InputError, NotFoundError


def levels() -> Image.Image:
    """All 256 levels in every channel, each channel in another order."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], axis=-1))


def test_a_round_trip_keeps_every_level() -> None:
    tensor = images.to_tensor([levels(), levels().rotate(90)])
    assert tensor.dtype == torch.float32
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.min() == 0
    assert tensor.max() == 1
    back = images.to_pil(tensor)
    assert [image.tobytes() for image in back] == [levels().tobytes(), levels().rotate(90).tobytes()]


def test_values_are_rounded_not_cut_and_clamped() -> None:
    """0.6/255 is nearer to level 1 than to 0; 0.4/255 is nearer to 0; a decoder's overshoot is not wrapped around."""
    values = torch.tensor([0.4 / 255, 0.6 / 255, 254.6 / 255, -0.2, 1.3])
    image = images.to_pil(values.view(1, 1, 1, 5).expand(1, 3, 1, 5))[0]
    assert [image.getpixel((x, 0)) for x in range(5)] == [(n, n, n) for n in (0, 1, 255, 0, 255)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_too(dtype: torch.dtype) -> None:
    image = images.to_pil(torch.ones(1, 3, 2, 2, dtype=dtype))[0]
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"image 1 of 2 .* NaN"):
        images.to_pil(torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), float("nan"))]))
    with pytest.raises(InputError, match=r"\(B, 3, H, W\); got torch.uint8"):
        images.to_pil(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"\(1, 2, 2, 3\)"):
        images.to_pil(torch.zeros(1, 2, 2, 3))
    with pytest.raises(InputError, match="2x2, 4x2"):
        images.to_tensor([Image.new("RGB", (2, 2)), Image.new("RGB", (4, 2))])
    assert images.to_tensor([]).shape[0] == 0
    assert images.to_pil(torch.empty(0, 3, 4, 4)) == []


def save(tmp_path: Path, array: np.ndarray, name: str) -> Path:
    Image.fromarray(array).save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("highest", [4095, 65535])
def test_16_bit_greyscale_is_stretched_not_clipped(tmp_path: Path, highest: int) -> None:
    """A ramp from 0 over half to the highest value is 0, 128, 255, whether a scanner used 12 of the bits or all."""
    array = np.array([[0, (highest + 1) // 2, highest]], dtype=np.uint16)
    image = images.load(save(tmp_path, array, "wide.png"))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(3)] == [(n, n, n) for n in (0, 128, 255)]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_other_wide_greyscale_is_stretched(tmp_path: Path, kind: type) -> None:
    image = images.load(save(tmp_path, np.array([[-1000, 0, 1000]], dtype=kind), "wide.tiff"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


def test_a_flat_16_bit_image_keeps_its_brightness(tmp_path: Path) -> None:
    image = images.load(save(tmp_path, np.full((2, 2), 32768, np.uint16), "flat.png"))
    assert image.getpixel((0, 0)) == (128, 128, 128)


def test_8_bit_greyscale_is_taken_as_it_is(tmp_path: Path) -> None:
    image = images.load(save(tmp_path, np.array([[10, 20]], np.uint8), "grey.png"))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(10, 10, 10), (20, 20, 20)]


def test_transparent_images_lie_on_white(tmp_path: Path) -> None:
    """Red at alpha 0 is white; half-transparent black (alpha 128 of 255) is 127; an opaque pixel is itself."""
    array = np.array([[[255, 0, 0, 0], [0, 0, 0, 128], [1, 2, 3, 255]]], np.uint8)
    image = images.load(save(tmp_path, array, "clear.png"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (127, 127, 127), (1, 2, 3)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert images.load(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    """EXIF orientation 6 says: turn a quarter to the right to see it as it was taken."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(tmp_path / "photo.png", exif=exif)
    upright = images.load(tmp_path / "photo.png")
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 255, 255)


def test_missing_and_broken_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no image file .*nothing\.png"):
        images.load(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="is a folder"):
        images.load(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png is not an image") as caught:
        images.load(tmp_path / "text.png")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError):
        images.load(tmp_path / "empty.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_decoded_whole(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    levels().save(buffer, format=form)
    data = buffer.getvalue()
    refused = 0
    for cut in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:cut])
        try:
            assert images.load(tmp_path / "cut").size == (16, 16)
        except InputError:
            refused += 1
    assert refused > 0


def chunks(data: bytes) -> list[bytes]:
    """The names of a PNG's chunks: 8 bytes of signature, then length, name, data and checksum each."""
    names, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        names.append(data[at + 4 : at + 8])
        at += length + 12
    return names


def test_saved_files_hold_pixels_and_nothing_else(tmp_path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("patient", "somebody")
    levels().save(tmp_path / "noted.png", pnginfo=notes, dpi=(300, 300), icc_profile=b"profile")
    with Image.open(tmp_path / "noted.png") as noted:
        noted.load()
        assert noted.info["patient"] == "somebody"
        images.save_png(noted, tmp_path / "plain.png")
        images.save_png(noted, tmp_path / "again.png")
    data = (tmp_path / "plain.png").read_bytes()
    assert set(chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}
    assert data == (tmp_path / "again.png").read_bytes()
    assert images.load(tmp_path / "plain.png").tobytes() == levels().tobytes()


@pytest.mark.parametrize(("mode", "kept"), [("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("P", "RGB"), ("I;16", "RGB")])
def test_every_mode_can_be_saved(tmp_path: Path, mode: str, kept: str) -> None:
    images.save_png(Image.new(mode, (3, 2)), tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert image.mode == kept


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):  # noqa: PT011  which one depends on the system
        images.save_png(levels(), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_grid_has_every_image_in_its_cell() -> None:
    """Cells of 64 pixels with gaps of 64/32 = 2: column 1 of row 1 starts at 2 + 64 + 2 = 68."""
    shades = [Image.new("RGB", (64, 64), (n, n, n)) for n in (10, 20, 30)] + [Image.new("RGB", (32, 64), "red")]
    sheet = images.grid(shades, 2)
    assert sheet.size == (2 * 66 + 2, 2 * 66 + 2)
    assert [sheet.getpixel(at) for at in ((2, 2), (68, 2), (2, 68))] == [(10,) * 3, (20,) * 3, (30,) * 3]
    assert sheet.getpixel((68, 68)) == (255, 255, 255)  # a narrower image is centred
    assert sheet.getpixel((68 + 16, 68)) == (255, 0, 0)


def test_captions_stand_below_and_never_in_the_image() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    sheet = images.grid([picture, picture], 2, ["short", "a very " * 30 + "long one"])
    bare = images.grid([picture, picture], 2)
    assert sheet.size[0] == bare.size[0]
    assert sheet.size[1] > bare.size[1]
    assert sheet.crop((0, 0, *bare.size)).crop((0, 0, 134, 66)).tobytes() == bare.crop((0, 0, 134, 66)).tobytes()
    below = np.asarray(sheet)[66:]
    assert (below[:, :66] < 128).any()
    assert (below[:, 66:] < 128).any()


def test_a_grid_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError):
        images.grid([], 2)
    with pytest.raises(ConfigError):
        images.grid([levels()], 0)
    with pytest.raises(InputError, match="1 captions do not fit 2 images"):
        images.grid([levels(), levels()], 2, ["one"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_file_of_bytes_is_whole_or_refused(kind: str) -> None:
    """Refused is what ``decode`` refuses: a file without its end, and one that is no image."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    whole = buffer.getvalue()
    images.require_whole(whole)
    for broken in (whole[: len(whole) // 2], whole[: len(whole) * 9 // 10], b"", b"no image"):
        for refuse in (images.decode, images.require_whole):
            with pytest.raises(InputError, match="the picture is not an image that can be decoded"):
                refuse(broken, "the picture")
    images.require_whole(whole + b"\0\0 more")
