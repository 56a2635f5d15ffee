"""Makes ``assets/mni-icbm152/volumes.npz`` from the template files inside the ``nilearn`` wheel.

Run ``python -m diffalign.worlds.build_mni`` with nilearn 0.14.1 installed. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Volume = npt.NDArray[np.float32]

SPACING_MM = 2
OUTPUT = Path(__file__).parent / "assets" / "mni-icbm152" / "volumes.npz"


def _source(kind: str) -> tuple[Volume, npt.NDArray[np.float64]]:
    """One template map scaled to ``[0, 1]`` and its voxel-to-millimetre matrix."""
    nibabel = importlib.import_module("nibabel")
    folder = Path(str(importlib.import_module("nilearn").__file__)).parent / "datasets" / "data"
    image = nibabel.load(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asarray(image.dataobj, dtype=np.float32) / np.float32(255), np.asarray(image.affine, dtype=np.float64)


def _downsample(volume: Volume) -> Volume:
    """Means over blocks of ``SPACING_MM`` voxels a side; the size must divide."""
    i, j, k = (n // SPACING_MM for n in volume.shape)
    blocks: Volume = volume.reshape(i, SPACING_MM, j, SPACING_MM, k, SPACING_MM).mean(axis=(1, 3, 5))
    return blocks


def build() -> dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float64]]:
    """T1, grey matter, white matter and fluid at 2 mm, cropped to the brain, and where the first voxel's centre lies.

    The wheel holds no fluid map: fluid is what is inside the brain mask and neither grey nor white.
    """
    (t1, affine), (grey, _), (white, _) = _source("t1"), _source("gm"), _source("wm")
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(t1 > 0.05, iterations=2))
    fluid = np.clip(brain - grey - white, 0, 1).astype(np.float32)
    inside = np.argwhere(brain)
    low = np.maximum(inside.min(axis=0) - SPACING_MM, 0)
    size = -(-(inside.max(axis=0) + 1 + SPACING_MM - low) // SPACING_MM) * SPACING_MM
    crop = tuple(slice(int(a), int(a + n)) for a, n in zip(low, size, strict=True))
    arrays: dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float64]] = {
        name: np.round(_downsample(volume[crop]) * 255).astype(np.uint8)
        for name, volume in {"t1": t1, "grey": grey, "white": white, "fluid": fluid}.items()
    }
    arrays["origin_mm"] = affine[:3, 3] + low + (SPACING_MM - 1) / 2
    arrays["spacing_mm"] = np.array(float(SPACING_MM))
    return arrays


def write(path: Path) -> None:
    """Writes the arrays as a compressed ``.npz`` whose bytes do not depend on the clock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in build().items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="where to write the volumes")
    write(parser.parse_args().out)
