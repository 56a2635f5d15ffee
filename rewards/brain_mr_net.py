"""The small network behind ``brain-mr-checker``: what a 64x64 brain MR slice shows, and where its lesion is.

Shape legend: ``B`` images, ``H = W = 64`` pixels, ``h = w = 32`` cells of the lesion map (a cell is 2x2 pixels).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import InputError, NotFoundError
from diffalign.images import to_rgb
from diffalign.worlds import brain_mr

OTHER = "other"
PLANES: tuple[str, ...] = (*brain_mr.PLANES, OTHER)
"""Classes of the plane head; "other" is anything that is not one of the world's brain slices."""
LEVELS: tuple[str, ...] = tuple(level for plane in brain_mr.PLANES for level in brain_mr.LEVELS[plane])
CELL_AREA = 4
"""Pixels of a cell of the lesion map."""
PEAK_CELLS = 4
"""A lesion is present when its strongest cells, this many, say so on average (a small lesion fills at least five)."""

FOLDER = Path(__file__).parent / "embedded" / "brain-mr-checker"


class Readout(NamedTuple):
    """Raw outputs of the network, before any softmax or sigmoid."""

    plane: Tensor
    """``(B, 4)``, classes ``PLANES``."""
    contrast: Tensor
    """``(B, 3)``, classes ``brain_mr.CONTRASTS``."""
    level: Tensor
    """``(B, 9)``, classes ``LEVELS``."""
    lesion_map: Tensor
    """``(B, 32, 32)``: log-odds that a cell is lesion."""

    @property
    def lesion(self) -> Tensor:
        """``(B,)``: log-odds that there is a lesion."""
        return self.lesion_map.flatten(1).topk(PEAK_CELLS).values.mean(dim=1)


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class BrainMRNet(nn.Module):
    """A U-Net of two skips with three classification heads at its narrowest point."""

    def __init__(self, widths: tuple[int, int, int] = (24, 40, 64)) -> None:
        super().__init__()
        b, c, d = widths
        self.widths = widths
        self.down32 = nn.Sequential(_block(1, b, stride=2, kernel=5), _block(b, b))
        self.down16 = nn.Sequential(_block(b, c, stride=2), _block(c, c))
        self.down8 = nn.Sequential(_block(c, d, stride=2), _block(d, d))
        self.lateral16 = nn.Conv2d(d, c, 1)
        self.up16 = _block(c, c)
        self.lateral32 = nn.Conv2d(c, b, 1)
        self.up32 = _block(b, b)
        self.lesion_map = nn.Conv2d(b, 1, 1)
        self.hidden = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(inplace=True))
        self.plane = nn.Linear(d, len(PLANES))
        self.contrast = nn.Linear(d, len(brain_mr.CONTRASTS))
        self.level = nn.Linear(d, len(LEVELS))

    def forward(self, images: Tensor) -> Readout:
        """Reads normalised grey images ``(B, 1, 64, 64)``, see ``to_input``."""
        at32 = self.down32(images)
        at16 = self.down16(at32)
        at8 = self.down8(at16)
        up16 = self.up16(at16 + F.interpolate(self.lateral16(at8), scale_factor=2.0))
        up32 = self.up32(at32 + F.interpolate(self.lateral32(up16), scale_factor=2.0))
        summary = self.hidden(torch.cat((at8.mean(dim=(2, 3)), at8.amax(dim=(2, 3))), dim=1))
        return Readout(
            self.plane(summary), self.contrast(summary), self.level(summary), self.lesion_map(up32).squeeze(1)
        )


def to_grey(images: Sequence[Image.Image]) -> Tensor:
    """Float32 ``(B, 1, 64, 64)`` in [0, 1]; images of another size are resampled."""
    side = brain_mr.SIZE
    arrays = []
    for image in images:
        grey = to_rgb(image).convert("L")
        if grey.size != (side, side):
            grey = grey.resize(
                (side, side), Image.Resampling.BOX if min(grey.size) > side else Image.Resampling.BICUBIC
            )
        arrays.append(np.asarray(grey, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(arrays)[:, None])


def normalise(grey: Tensor) -> Tensor:
    """Divides each image by its own near-brightest value, so that the display window does not matter."""
    white = torch.quantile(grey.flatten(1), 0.99, dim=1).clamp_min(0.2)
    return (grey / white[:, None, None, None]).clamp(0, 1.5) - 0.4


def save(network: BrainMRNet, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "model": "brain-mr-net",
        "widths": list(network.widths),
        "planes": list(PLANES),
        "contrasts": list(brain_mr.CONTRASTS),
        "levels": list(LEVELS),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path = FOLDER) -> BrainMRNet:
    """The network of a folder written by ``save``, ready to read images."""
    weights, config_file = folder / "model.safetensors", folder / "config.json"
    for file in (weights, config_file):
        if not file.is_file():
            raise NotFoundError(f"{file} is not there; `python -m rewards.train_brain_mr_checker` makes it")
    config = json.loads(config_file.read_text())
    known = {"planes": PLANES, "contrasts": brain_mr.CONTRASTS, "levels": LEVELS}
    for name, values in known.items():
        if tuple(config.get(name, ())) != values:
            raise InputError(
                f"{config_file} was trained for {name} {config.get(name)}; this version has {list(values)}"
            )
    network = BrainMRNet(tuple(config["widths"]))
    network.load_state_dict(load_file(weights))
    return network.eval().requires_grad_(False)
