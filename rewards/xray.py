"""Whether a chest X-ray shows the findings that its prompt asks for, and none that it rules out.

A DenseNet-121 of torchxrayvision (Cohen et al. 2022, arXiv:2111.00595) gives the probability of up to 18 findings. Its
input is one channel in [-1024, 1024] at 224 pixels; with any other range it answers all the same, and wrongly, so the
mapping is done here and nowhere else. The probabilities are recalibrated as published: each model's own operating point
of a finding becomes 0.5.

Shape legend: ``B`` samples, ``F`` findings, ``H W`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import ConfigError, InputError
from diffalign.images import to_rgb
from diffalign.types import Modality, Sample, Scores
from rewards import devices, xray_weights
from rewards import weights as files
from rewards.xray_findings import FINDINGS, THRESHOLDS, named

NEED = "the weights of a torchxrayvision DenseNet"
SIDE = 224
CHUNK = 32
"""Images that go through the network at once."""


def calibrated(probability: Tensor, threshold: Tensor) -> Tensor:
    """Probabilities ``(B, F)`` stretched in two straight pieces so that each threshold ``(F,)`` becomes 0.5.

    Below it p / (2 t), above it 1 - (1 - p) / (2 (1 - t)): torchxrayvision's own scale. NaN where the threshold is.
    """
    below = probability / (2 * threshold)
    above = 1 - (1 - probability) / (2 * (1 - threshold))
    return torch.where(probability < threshold, below, above)


def pixels(images: Sequence[Image.Image], side: int = SIDE) -> Tensor:
    """float32 ``(B, 1, side, side)`` in [-1024, 1024]: grey, cut to a square at the middle, resized."""
    made = []
    for image in images:
        grey = torch.from_numpy(np.asarray(to_rgb(image).convert("L"), dtype=np.float32))
        height, width = grey.shape
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        square = (2 * grey[top : top + short, left : left + short] / 255 - 1) * 1024
        made.append(F.interpolate(square[None, None], (side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(made)


class XrayFindings:
    """How far an image agrees with the findings of its prompt."""

    modality: Modality = "image"
    unit = "probability"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(
        self,
        weights: str = "",
        trained_on: Literal["all", "nih", "pc", "chex", "rsna", "mimic_nb", "mimic_ch"] = "all",
        sha256: str = "",
        device: str = "cpu",
        name: str = "xray-findings",
    ) -> None:
        """Names the weights; they are loaded when they are first used.

        ``weights`` is a published file of torchxrayvision, or its state dict as safetensors or by torch: a path, or
        ``hf-hub:OWNER/NAME/FILE``. The published files hold a whole module; they are read as data, and only with
        ``sha256``. ``trained_on`` is the end of the model's name there, as in ``densenet121-res224-all``: it
        decides which outputs mean anything, and at what probability a finding counts as present.
        """
        if not weights:
            raise ConfigError(
                "xray-findings needs its weights: write xray-findings?weights=FILE, where FILE is a densenet121 of the "
                "releases of github.com/mlmed/torchxrayvision"
            )
        self.name = name
        self.weights, self.sha256, self.trained_on = weights, sha256, trained_on
        self.device = devices.device(device)
        self.thresholds = torch.tensor([math.nan if t is None else t for t in THRESHOLDS[trained_on]])

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """The mean, over the findings that the prompt names, of how probable it is that the image agrees, ``(B,)``.

        The part of a finding is p where it is asked for and 1 - p where it is ruled out; NaN where the prompt does not
        name it. The total is NaN where no finding is judged: the prompt names none, or none that this model was trained
        for, or there is no image.
        """
        agreement = torch.full((len(samples), len(FINDINGS)), math.nan)
        images = {i: s.image for i, s in enumerate(samples) if s.image is not None and 0 not in s.image.size}
        if images:
            agreement[list(images)] = self.probabilities(list(images.values()))
        for i, sample in enumerate(samples):
            asked = named(sample.prompt.text)
            for column, finding in enumerate(FINDINGS):
                if finding not in asked:
                    agreement[i, column] = math.nan
                elif not asked[finding]:
                    agreement[i, column] = 1 - agreement[i, column]
        parts = {finding: agreement[:, column] for column, finding in enumerate(FINDINGS)}
        return Scores(agreement.nanmean(1), parts)

    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 ``(B, F)`` on the CPU in [0, 1], 0.5 at the operating point; NaN for what it was not trained for."""
        network = self._network
        with torch.no_grad():
            found = [
                torch.sigmoid(network(pixels(images[start : start + CHUNK]).to(self.device))).float().cpu()
                for start in range(0, len(images), CHUNK)
            ]
        return calibrated(torch.cat(found), self.thresholds) if found else torch.empty(0, len(FINDINGS))

    @cached_property
    def _network(self) -> torch.nn.Module:
        path = files.local(self.weights, NEED)
        network = xray_weights.densenet(xray_weights.load(path, self.sha256, NEED), path, NEED)
        channels = cast(Tensor, network.get_parameter("features.conv0.weight")).shape[1]
        outputs = cast(Tensor, network.get_parameter("classifier.weight")).shape[0]
        if (channels, outputs) != (1, len(FINDINGS)):
            raise InputError(
                f"{path} is not {NEED}: it takes {channels} channels and gives {outputs} findings, not 1 and "
                f"{len(FINDINGS)}"
            )
        return network.to(self.device)
