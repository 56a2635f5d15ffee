"""The one place where tensors, files and PIL images meet.

Shape legend: ``B`` images, 3 colours, ``H`` and ``W`` pixels. A tensor of images is float ``(B, 3, H, W)`` in [0, 1];
an image is an 8-bit RGB PIL image.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
"""Names of image files end so, in any case."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""What is decoded. Pillow hands some other formats to outside programs, which strangers' files must not reach."""
_WIDE_MODES = ("I", "F")
_CAPTION_LINES = 3


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit RGB images of a float ``(B, 3, H, W)``: values are clamped to [0, 1] and rounded to the nearest level."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(f"images are a float tensor (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
    images = images.detach().float().cpu()
    # A cast from NaN to uint8 gives whatever the processor likes, and the image would look merely strange.
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"image {broken[0]} of {len(images)} has pixels that are NaN or infinite")
    levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(level.numpy()) for level in levels.permute(0, 2, 3, 1).contiguous()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """float32 ``(B, 3, H, W)`` in [0, 1] of images of one size and any mode."""
    if not images:
        return torch.empty(0, 3, 0, 0)
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
        raise InputError(f"images of different sizes ({shown}) do not fit in one tensor; resize them to one size first")
    pixels = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at this size: scaled until it covers it, and cut at the middle; untouched where it fits already."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode.

    Greyscale of more than 8 bits (and floating-point greyscale) is stretched from its own lowest and highest value to
    0..255, because scanners use a part of the 16 bits only and Pillow's own conversion clips at 255. Transparent images
    are laid on white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.split(";")[0] in _WIDE_MODES:
        return _stretch(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def load(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file as 8-bit RGB, turned upright as its EXIF data say, fully decoded; see ``to_rgb``."""
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"there is no image file {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an image file")
    try:
        return _decoded(path)
    except PermissionError:
        raise InputError(f"{path} may not be read: permission denied") from None
    except InputError as error:
        raise InputError(f"{path} is not an image that can be decoded: {error}") from error


def decode(data: bytes, name: str = "the image") -> Image.Image:
    """The same of an image file's bytes; ``name`` is what an error calls it."""
    try:
        return _decoded(io.BytesIO(data))
    except InputError as error:
        raise InputError(f"{name} is not an image that can be decoded: {error}") from error


def require_whole(data: bytes, name: str = "the image") -> None:
    """Raises InputError as ``decode`` would, but decodes as little as it can: for a file of many images.

    Of PNG it checks every chunk's checksum, of JPEG and WebP that the file goes on to its end; others it decodes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = image.format
            if kind == "PNG":
                image.verify()
    except Exception:  # as in ``_decoded``
        decode(data, name)
        return
    ends = {
        "PNG": True,
        "JPEG": data.rstrip(b"\0").endswith(b"\xff\xd9"),
        "WEBP": len(data) >= int.from_bytes(data[4:8], "little") + 8,
    }
    if not ends.get(kind or "", False):
        decode(data, name)


def _decoded(source: Path | io.BytesIO) -> Image.Image:
    try:
        with Image.open(source, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise InputError(f"{image.width}x{image.height} pixels are too many, as in a decompression bomb")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (PermissionError, InputError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"it is none of {', '.join(FORMATS)}") from error
    # Pillow's decoders report a broken file by many errors, SyntaxError and struct.error among them.
    except Exception as error:
        given = repr(str(source)) if isinstance(source, Path) else repr(source)
        raise InputError(str(error).partition("\n")[0].replace(given, "the file") or type(error).__name__) from error


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes the PNG of ``png_bytes`` whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(png_bytes(image))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def png_bytes(image: Image.Image) -> bytes:
    """A PNG of the pixels, without metadata: 8-bit greyscale stays so, anything else becomes RGB."""
    image = image if image.mode == "L" and "transparency" not in image.info else to_rgb(image)
    # Pillow writes what it finds in `info` (colour profile, text, resolution); a copy of the pixels has none.
    buffer = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """One RGB image with the images in rows of ``columns``, each centred in a cell of the largest size.

    ``captions``, one per image, stand below their images, wrapped to three lines and cut with an ellipsis.
    """
    if not images:
        raise InputError("a grid needs at least one image")
    if columns < 1:
        raise ConfigError(f"a grid has at least one column; got {columns}")
    if captions is not None and len(captions) != len(images):
        raise InputError(f"{len(captions)} captions do not fit {len(images)} images; give one per image")
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    gap = max(2, width // 32)
    font = ImageFont.load_default(size=max(9, width // 16))
    line = math.ceil(font.getbbox("Ag")[3]) + 1
    below = 0 if captions is None else _CAPTION_LINES * line + gap
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        sheet.paste(to_rgb(image), (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for j, text in enumerate(_wrap(captions[i], font, width) if captions is not None else []):
            draw.text((left, top + height + gap // 2 + j * line), text, fill="black", font=font)
    return sheet


def _stretch(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("a greyscale image has pixels that are NaN or infinite")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low == high:
        # Nothing to stretch: a flat image keeps its place in the 16-bit range.
        low, high = 0.0, max(65535.0, high)
    return Image.fromarray(np.rint((values - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < _CAPTION_LINES:
        fits = _fitting(rest, font, width)
        if len(lines) == _CAPTION_LINES - 1 and fits < len(rest):
            while fits > 1 and font.getlength(rest[:fits].rstrip() + "…") > width:
                fits -= 1
            lines.append(rest[:fits].rstrip() + "…")
            break
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many characters stand on one line: up to the last space that fits, or inside a word that does not."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    if count == len(text) or text[count] == " ":
        return count
    space = text.rfind(" ", 1, count)
    return space if space > 0 else count
