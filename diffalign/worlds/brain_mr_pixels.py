"""Draws one brain slice from the atlas: geometry, contrast and lesion. ``brain_mr`` says what to draw.

Geometry, kept everywhere and never flipped. Atlas millimetres: x grows to the patient's right-hand side of the
template (RAS), y to the front, z up. On the image, row 0 is the top and column 0 the left edge.

===========  ==================  ======================
plane        left of the image   top of the image
===========  ==================  ======================
axial        patient's right     front
coronal      patient's right     top of the head
sagittal     front               top of the head
===========  ==================  ======================

Axial and coronal slices follow the radiological convention: the patient's left is on the right of the image.

Shapes: ``(64, 64)`` arrays are indexed ``[row, column]``; ``(3, 64, 64)`` holds x, y, z in millimetres.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Field = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Rng = np.random.Generator

SIZE = 64
ASSET = Path(__file__).parent / "assets" / "mni-icbm152" / "volumes.npz"

PIXEL_MM = {"axial": 3.0, "coronal": 2.5, "sagittal": 3.1}
CENTRE_MM = (0.0, -16.0, 5.0)
LEVEL_MM = {
    "axial": {"cerebellum": -26.0, "ventricles": 12.0, "vertex": 46.0},
    "coronal": {"frontal lobes": 32.0, "thalamus": -16.0, "occipital lobes": -70.0},
    "sagittal": {"midline": 2.0, "putamen": 25.0, "temporal lobe": 47.0},
}
LEVEL_JITTER_MM = 3.0
"""Half-width of the uniform jitter around a level (the sagittal midline jitters by less, see ``slice_coordinates``)."""

DIAMETER_PX = {"small": (5.0, 6.2), "large": (11.0, 13.0)}
"""Diameter of the disk that has the lesion's area."""

MIDLINE_MARGIN_PX = 2.0

TISSUE = {
    "T1": {"fluid": (0.10, 0.20), "grey": (0.48, 0.60), "white": (0.76, 0.90), "lesion": (0.12, 0.22)},
    "T2": {"fluid": (0.84, 1.00), "grey": (0.48, 0.58), "white": (0.28, 0.38), "lesion": (0.92, 1.05)},
    "FLAIR": {"fluid": (0.06, 0.14), "grey": (0.52, 0.62), "white": (0.36, 0.44), "lesion": (0.88, 1.00)},
}
"""Ranges of brightness, as fractions of the display's white."""

_ATLAS_T1 = {"fluid": 0.27, "grey": 0.65, "white": 0.87}
"""Medians of the atlas's own T1 map inside pure tissue."""

_SUPERSAMPLE = 2


@functools.cache
def _atlas() -> tuple[tuple[Field, Field, Field, Field], npt.NDArray[np.float64], float]:
    """The maps (t1, grey, white, fluid) in ``[0, 1]``, the first voxel's centre and the spacing, in mm."""
    with np.load(ASSET, allow_pickle=False) as file:
        t1, grey, white, fluid = (file[name].astype(np.float32) / 255 for name in ("t1", "grey", "white", "fluid"))
        return (t1, grey, white, fluid), file["origin_mm"], float(file["spacing_mm"])


@functools.cache
def _cosines(size: int, terms: int) -> Field:
    """Cosine basis ``(size, terms)``: smooth random fields are two small matrix products."""
    position = (np.arange(size) + 0.5) / size
    return np.cos(np.pi * np.outer(position, np.arange(terms))).astype(np.float32)


def smooth_field(rng: Rng, size: int, terms: int) -> Field:
    """A smooth random field ``(size, size)`` with mean near 0 and variance near 1; more terms are rougher."""
    basis = _cosines(size, terms)
    weights = rng.standard_normal((terms, terms)).astype(np.float32)
    weights[0, 0] = 0
    norm = np.float32(np.sqrt((terms - 1) + (terms - 1) ** 2 / 4))
    return np.asarray(basis @ weights @ basis.T / norm, dtype=np.float32)


def slice_coordinates(plane: str, level: str, rng: Rng) -> Field:
    """Atlas position ``(3, 128, 128)`` of every sub-pixel, for one random subject and slice.

    A subject has its own size, pose, smooth deformation and ventricle width; all stay small enough that the level
    and the side of every structure keep their meaning.
    """
    size = SIZE * _SUPERSAMPLE
    steps = (np.arange(size, dtype=np.float32) + 0.5) / _SUPERSAMPLE - SIZE / 2
    down, right = np.meshgrid(-steps * PIXEL_MM[plane], steps * PIXEL_MM[plane], indexing="ij")
    jitter = rng.uniform(-1, 1) * LEVEL_JITTER_MM
    depth = LEVEL_MM[plane][level] + jitter * (0.5 if level == "midline" else 1.0)
    if plane == "sagittal":
        depth *= rng.choice((-1.0, 1.0))
    roll, tilt_down, tilt_right = np.deg2rad(rng.uniform(-1, 1, 3) * (5.0, 3.0, 2.0)).astype(np.float32)
    zoom = rng.uniform(0.97, 1.06, 2).astype(np.float32)
    shift = rng.uniform(-1, 1, 2).astype(np.float32) * np.float32(2.0)
    a = (np.cos(roll) * right - np.sin(roll) * down) * zoom[0] + shift[0]
    b = (np.sin(roll) * right + np.cos(roll) * down) * zoom[1] + shift[1]
    c = np.float32(depth) + tilt_right * a + tilt_down * b
    a, b, c = (axis + np.float32(mm) * smooth_field(rng, size, 5) for axis, mm in ((a, 1.8), (b, 1.8), (c, 1.0)))
    x0, y0, z0 = CENTRE_MM
    if plane == "axial":
        position = np.stack((-a + x0, b + y0, c))
    elif plane == "coronal":
        position = np.stack((-a + x0, c, b + z0))
    else:
        position = np.stack((c, -a + y0, b + z0))
    return _widen_ventricles(position.astype(np.float32), float(rng.uniform(-0.12, 0.35)))


def _widen_ventricles(position: Field, strength: float) -> Field:
    """Magnifies the anatomy around the lateral ventricles; a negative strength narrows them."""
    centre = np.array((0.0, -15.0, 12.0), dtype=np.float32)[:, None, None]
    offset = position - centre
    pull = np.exp(-(offset**2).sum(axis=0) / np.float32(2 * 26.0**2)) * np.float32(strength)
    return np.asarray(centre + offset * (1 - pull), dtype=np.float32)


def sample_atlas(position: Field) -> tuple[Field, Field, Field, Field]:
    """The maps t1, grey, white, fluid at ``position``, each ``(64, 64)`` after averaging the sub-pixels."""
    _, origin, spacing = _atlas()
    voxel = (position - origin.astype(np.float32)[:, None, None]) / np.float32(spacing)
    t1, grey, white, fluid = (_shrink(one) for one in between_voxels(voxel))
    return t1, grey, white, fluid


def between_voxels(voxel: Field) -> Field:
    """The four maps ``(4, ...)`` at ``voxel (3, ...)``, linear between voxels and 0 outside.

    Bit for bit what ``ndimage.map_coordinates`` with order 1 gives for each, in half the time, as scenes are drawn by
    the ten thousand: the corners of a point are found once for all maps, and not at all where every map is empty.
    """
    values, filled = _corners()
    points = voxel.reshape(3, -1)
    last = np.array(filled.shape)[:, None]
    low = np.minimum(np.floor(points).astype(np.int32), last - 1)
    within = np.flatnonzero((points >= 0).all(axis=0) & (points <= last).all(axis=0))
    within = within[filled[tuple(low[:, within])]]
    corner = low[:, within].astype(np.int64)
    fraction = points[:, within].astype(np.float64) - corner
    (_, y, z), total = np.array(filled.shape) + 1, np.zeros((len(within), 4))
    first = (corner[0] * y + corner[1]) * z + corner[2]
    for i, j, k in itertools.product((0, 1), repeat=3):
        part = values.take(first + (i * y + j) * z + k, axis=0).astype(np.float64)
        for axis, far in enumerate((i, j, k)):
            part *= (fraction[axis] if far else 1 - fraction[axis])[:, None]
        total += part
    found = np.zeros((4, points.shape[1]), dtype=np.float32)
    found[:, within] = total.T
    return found.reshape(4, *voxel.shape[1:])


@functools.cache
def _corners() -> tuple[Field, Mask]:
    """The maps side by side ``(voxels, 4)``, and which cells between eight voxels have anything in one of them."""
    maps = np.stack(_atlas()[0], axis=-1)
    there = (maps != 0).any(axis=-1)
    shape = [size - 1 for size in there.shape]
    parts = [there[i : shape[0] + i, j : shape[1] + j, k : shape[2] + k] for i, j, k in
             itertools.product((0, 1), repeat=3)]  # fmt: skip
    return maps.reshape(-1, 4), np.logical_or.reduce(parts)


def _shrink(array: Field) -> Field:
    """Mean over the sub-pixels of each pixel."""
    n = _SUPERSAMPLE
    total = sum(array[..., i::n, j::n] for i in range(n) for j in range(n))
    return np.asarray(total / np.float32(n * n), dtype=np.float32)


def draw_intensities(contrast: str, rng: Rng) -> dict[str, float]:
    """Brightness of each tissue and of a lesion, drawn from the ranges of the contrast."""
    return {tissue: float(rng.uniform(low, high)) for tissue, (low, high) in TISSUE[contrast].items()}


def tissue_image(maps: tuple[Field, Field, Field, Field], brightness: dict[str, float]) -> Field:
    """The lesion-free slice: tissue fractions give the contrast, the atlas's T1 values give the fine texture."""
    t1, grey, white, fluid = maps
    names = ("fluid", "grey", "white")
    mixed = fluid * brightness["fluid"] + grey * brightness["grey"] + white * brightness["white"]
    inside = grey + white + fluid
    anchors = [_ATLAS_T1[name] for name in names]
    textured = np.interp(t1 / np.maximum(inside, 0.3), anchors, [brightness[name] for name in names]) * inside
    return np.asarray(0.5 * mixed + 0.5 * textured, dtype=np.float32)


def lesion_region(plane: str, side: str, maps: tuple[Field, Field, Field, Field], position: Field) -> Mask:
    """The pixels that a lesion of this side may cover: inside the brain and clear of the dividing line.

    The side is read from the atlas position of every pixel, so a shifted or tilted head changes nothing. The image's
    own middle column divides too, with the same margin, so that position in the picture is enough to tell the side.
    """
    middle = np.float32((SIZE - 1) / 2)
    across = middle - np.arange(SIZE, dtype=np.float32)[None, :]
    if plane == "sagittal":
        beyond = (position[1] - np.float32(CENTRE_MM[1])) / PIXEL_MM[plane]
    else:
        beyond = position[0] / PIXEL_MM[plane]
    sign = 1 if side in ("anterior", "right") else -1
    inside = sum(maps[1:]) > 0.7
    return np.asarray(inside & (np.minimum(sign * beyond, sign * across) >= MIDLINE_MARGIN_PX), dtype=np.bool_)


def place_lesion(
    region: Mask, diameter: float, maps: tuple[Field, Field, Field, Field], rng: Rng
) -> tuple[float, float]:
    """A random centre ``(row, column)`` such that the lesion lies in the region and replaces little fluid."""
    _, grey, white, fluid = maps
    tissue = np.where(region, grey + white - fluid, -0.5)
    score = ndimage.uniform_filter(tissue, round(diameter * 0.9 + 1.5), mode="constant")
    candidates = np.argwhere(score >= min(0.85, float(score.max()) - 0.04))
    row, column = candidates[rng.integers(len(candidates))]
    return float(row + rng.uniform(-0.4, 0.4)), float(column + rng.uniform(-0.4, 0.4))


def lesion_shape(center: tuple[float, float], diameter: float, region: Mask, rng: Rng) -> tuple[Field, Mask]:
    """Opacity ``(64, 64)`` of an irregular soft-edged blob, and its mask inside the region.

    The mask has the area of the disk of this diameter, to a pixel.
    """
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    dy, dx = rows - np.float32(center[0]), columns - np.float32(center[1])
    angle = np.arctan2(dy, dx)
    outline = 1 + rng.uniform(0.0, 0.16) * np.cos(2 * (angle - rng.uniform(0, np.pi)))
    for k in (3, 4, 5):
        outline += rng.normal(0, 0.05) * np.cos(k * (angle - rng.uniform(0, 2 * np.pi)))
    distance = np.hypot(dy, dx) / outline
    area = round(np.pi * diameter**2 / 4)
    edge = float(np.sort(distance[region])[area - 1])
    softness = 0.45 if diameter < 8 else 0.7
    opacity = 1 / (1 + np.exp(np.clip((distance - edge - 0.2) / softness, -30, 30)))
    return np.asarray(opacity, dtype=np.float32), np.asarray((distance <= edge) & region, dtype=np.bool_)


def paint_lesion(image: Field, opacity: Field, brain: Field, brightness: float, rng: Rng) -> Field:
    """The slice with the lesion blended in where there is brain; its inside is a little uneven."""
    inside = brightness * (1 + 0.06 * smooth_field(rng, SIZE, 14))
    blend = 0.96 * opacity * np.clip(brain, 0, 1)
    return np.asarray(image * (1 - blend) + inside * blend, dtype=np.float32)


def acquire(image: Field, rng: Rng) -> npt.NDArray[np.uint8]:
    """What the scanner makes of it: receive-coil shading, Rician noise, display window, 8 bits."""
    bias = np.exp(np.float32(0.07) * smooth_field(rng, SIZE, 3))
    noise = rng.standard_normal((2, SIZE, SIZE)).astype(np.float32) * np.float32(rng.uniform(0.006, 0.02))
    magnitude = np.hypot(image * bias + noise[0], noise[1])
    gain = rng.uniform(0.86, 1.0) / max(1.0, float(np.quantile(magnitude, 0.995)))
    return np.asarray(np.clip(np.round(magnitude * gain * 255), 0, 255), dtype=np.uint8)


def draw(
    plane: str, contrast: str, level: str, lesion: tuple[str, str] | None, streams: dict[str, Rng]
) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Grey values ``(64, 64)`` and the lesion's mask.

    ``lesion`` is its side and size. Each of the ``streams`` (subject, contrast, lesion, scanner) drives one part, so
    that the same subject can be drawn again with another contrast or lesion.
    """
    position = slice_coordinates(plane, level, streams["subject"])
    maps = sample_atlas(position)
    brightness = draw_intensities(contrast, streams["contrast"])
    image = tissue_image(maps, brightness)
    mask: Mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    if lesion is not None:
        side, size = lesion
        rng = streams["lesion"]
        diameter = float(rng.uniform(*DIAMETER_PX[size]))
        region = lesion_region(plane, side, maps, _shrink(position))
        opacity, mask = lesion_shape(place_lesion(region, diameter, maps, rng), diameter, region, rng)
        image = paint_lesion(image, opacity, maps[1] + maps[2] + maps[3], brightness["lesion"], rng)
    return acquire(image, streams["scanner"]), mask
