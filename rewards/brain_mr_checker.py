"""``brain-mr-checker``: does a 64x64 brain MR slice show what its prompt asks for?

It looks at the image and the prompt's attributes (or at the caption, where there are none), and at nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.types import Modality, Prompt, Sample, Scores
from diffalign.worlds import brain_mr
from rewards import devices
from rewards.brain_mr_net import CELL_AREA, FOLDER, LEVELS, OTHER, PLANES, Readout, load, normalise, to_grey
from rewards.everything import EVERYTHING, everything

LARGE_FROM_PX = 55.0
"""Lesions of this many pixels and more are large: drawn ones have 20 to 30 (small) or 95 to 133 (large)."""
SIDE_SHARE = 0.75
"""Share of the lesion's area that must lie in the asked half: a lesion in each half is on neither side."""
_HALF = {"right": "first", "left": "second", "anterior": "first", "posterior": "second"}
"""Half of the image (columns 0-31 are the first) that shows a side; patients are seen from below and from the left."""


@dataclass(frozen=True)
class Finding:
    """What one image shows, as probabilities."""

    plane: Mapping[str, float]
    """Of each plane and of "other": no brain slice that this world knows."""
    contrast: Mapping[str, float]
    level: Mapping[str, float]
    lesion: float
    """Probability that there is a lesion."""
    half: Mapping[str, float]
    """Share of the lesion's area in the first and in the second half of the columns; zeros without any area."""
    large: float
    """Probability that a lesion of this area is a large one."""
    area_px: float

    def decide(self) -> Finding:
        """The same with every probability rounded to 0 or 1: the likeliest class, and more than half otherwise."""
        return Finding(
            plane=_likeliest(self.plane),
            contrast=_likeliest(self.contrast),
            level=_likeliest(self.level),
            lesion=float(self.lesion > 0.5),
            half={half: float(share >= SIDE_SHARE) for half, share in self.half.items()},
            large=float(self.large > 0.5),
            area_px=self.area_px,
        )

    def facts(self) -> dict[str, str]:
        """The table row that the image deserves; a plane of "other" stands alone, an undecided side is left out."""
        sure = self.decide()
        plane, contrast, level = (max(c, key=c.__getitem__) for c in (sure.plane, sure.contrast, sure.level))
        if plane == OTHER:
            return {"plane": OTHER}
        row = {"plane": plane, "contrast": contrast, "level": level, "lesion": "present" if sure.lesion else "none"}
        if sure.lesion:
            for side in brain_mr.SIDES[plane]:
                if sure.half[_HALF[side]]:
                    row["side"] = side
            row["size"] = "large" if sure.large else "small"
        return row

    def credit(self, asked: Mapping[str, str]) -> dict[str, float]:
        """Credit in [0, 1] for each asked attribute.

        Nothing in an image that is no brain earns credit, and no side or size does without a lesion.
        """
        brain = 1 - self.plane[OTHER]
        credit = {
            "plane": self.plane[asked["plane"]],
            "contrast": brain * self.contrast[asked["contrast"]],
            "lesion": brain * (self.lesion if asked["lesion"] == "present" else 1 - self.lesion),
        }
        if "level" in asked:
            credit["level"] = brain * self.level[asked["level"]]
        if asked["lesion"] == "present":
            credit["side"] = brain * self.lesion * self.half[_HALF[asked["side"]]]
            credit["size"] = brain * self.lesion * (self.large if asked["size"] == "large" else 1 - self.large)
        return credit


class BrainMRChecker:
    """Fraction of the asked facts (plane, contrast, level, lesion, side, size) that an image shows.

    The part ``everything`` is 1 where it shows all of them.

    ``graded=True`` gives credit by probability instead of right or wrong: a smoother signal for reinforcement
    learning, close to the same on images that are clearly right or clearly wrong.
    """

    modality: Modality = "image"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(
        self, *, graded: bool = False, device: str = "cpu", batch_size: int = 128, folder: str | Path = FOLDER
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.graded = graded
        self.name = "brain-mr-checker-graded" if graded else "brain-mr-checker"
        self.device = devices.device(device)
        self.batch_size = batch_size
        self._network = load(Path(folder)).to(self.device)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Accuracy over the asked attributes; NaN where the prompt cannot be understood or there is no image."""
        asked = [_asked(sample.prompt) if sample.image is not None else None for sample in samples]
        judged = [i for i, facts in enumerate(asked) if facts is not None]
        findings = self.read([image for i in judged if (image := samples[i].image) is not None])
        parts = {name: torch.full((len(samples),), math.nan) for name in brain_mr.FIELDS}
        total = torch.full((len(samples),), math.nan)
        for i, finding in zip(judged, findings, strict=True):
            credit = (finding if self.graded else finding.decide()).credit(asked[i] or {})
            for name, value in credit.items():
                parts[name][i] = value
            total[i] = sum(credit.values()) / len(credit)
        if not self.graded:
            parts[EVERYTHING] = everything(total)
        return Scores(total, parts)

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image]) -> list[Finding]:
        """What each image shows."""
        found: list[Finding] = []
        for start in range(0, len(images), self.batch_size):
            grey = to_grey(images[start : start + self.batch_size])
            found += _findings(self._network(normalise(grey).to(self.device)))
        return found


def _asked(prompt: Prompt) -> dict[str, str] | None:
    """The facts a prompt asks for, or None where it is not one of this world's."""
    if not prompt.attributes:
        return brain_mr.parse(prompt.text)
    try:
        return brain_mr.validate(prompt.attributes)
    except ConfigError:
        return None


def _findings(readout: Readout) -> list[Finding]:
    """The network's raw outputs as findings, one per image."""
    present = readout.lesion.float().sigmoid().cpu()
    cells = readout.lesion_map.float().sigmoid().cpu()
    # Faint cells far from any lesion would add up to pixels of area.
    cells = torch.where(cells > 0.25, cells, torch.zeros_like(cells))
    first, second = (half.sum(dim=(1, 2)) * CELL_AREA for half in cells.chunk(2, dim=2))
    area = first + second
    large = torch.sigmoid((area.clamp_min(1e-3) / LARGE_FROM_PX).log() / 0.12)
    planes, contrasts, levels = (
        _rows(logits, classes)
        for logits, classes in (
            (readout.plane, PLANES),
            (readout.contrast, brain_mr.CONTRASTS),
            (readout.level, LEVELS),
        )
    )
    whole = area.clamp_min(1e-6)
    return [
        Finding(planes[i], contrasts[i], levels[i], p, {"first": a, "second": b}, big, size)
        for i, (p, a, b, big, size) in enumerate(
            zip(*(t.tolist() for t in (present, first / whole, second / whole, large, area)), strict=True)
        )
    ]


def _rows(logits: Tensor, classes: tuple[str, ...]) -> list[dict[str, float]]:
    return [dict(zip(classes, row, strict=True)) for row in logits.float().softmax(dim=1).cpu().tolist()]


def _likeliest(classes: Mapping[str, float]) -> dict[str, float]:
    best = max(classes, key=classes.__getitem__)
    return {name: float(name == best) for name in classes}
