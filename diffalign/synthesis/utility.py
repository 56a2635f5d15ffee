"""Is a synthetic dataset of use? Classifiers that are trained on it alone are tested on real images.

A linear probe reads the features that an encoder gives, and a small network the pixels; each learns an attribute of the
table row. Images are never flipped: left and right may be facts.

Shape legend: ``N`` training and ``M`` test images, ``D`` features, ``H W`` pixels, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.seeds import derive
from diffalign.synthesis.cases import Value
from diffalign.synthesis.estimates import Estimate, Floats, share, spread, weights

MOST_CLASSES = 20
FEWEST_OF_CLASS = 3
"""Synthetic cases that a value needs to be a class."""
FEWEST_TESTED = 20
NETWORKS = 3
"""Small networks that are trained, from seeds of their own; their accuracies are averaged."""
STEPS = 500
BATCH = 32
PASSES = 100
"""How often a network sees each training image at most: with fewer than 160 images it makes fewer steps."""


@dataclass(frozen=True)
class Task:
    """One attribute to be learnt."""

    classes: tuple[str, ...]
    train: NDArray[np.int64]
    """Which training images have it."""
    train_labels: Tensor
    """int64 ``(N,)``."""
    test: NDArray[np.int64]
    test_labels: Tensor

    @property
    def commonest(self) -> int:
        """The class that most test images have."""
        return int(self.test_labels.bincount().argmax())


def tasks(
    synthetic: Sequence[Mapping[str, Value]], real: Sequence[Mapping[str, Value]], kinds: Mapping[str, str]
) -> dict[str, Task]:
    """The attributes that can be learnt: categories that both tables have, with two or more values.

    An image whose cell is empty takes no part. A real value that no synthetic case has cannot be learnt, but counts: it
    is a class that the classifier never gives.
    """
    found = {}
    for name, kind in kinds.items():
        if kind not in ("category", "boolean"):
            continue
        cells = [[None if row.get(name) is None else str(row[name]) for row in rows] for rows in (synthetic, real)]
        counts = {value: cells[0].count(value) for value in cells[0] if value is not None}
        known = sorted(value for value, count in counts.items() if count >= FEWEST_OF_CLASS)
        classes = (*known, *sorted({value for value in cells[1] if value is not None} - set(known)))
        train = np.array([i for i, value in enumerate(cells[0]) if value in known], dtype=np.int64)
        test = np.array([i for i, value in enumerate(cells[1]) if value is not None], dtype=np.int64)
        if not 2 <= len(known) <= len(classes) <= MOST_CLASSES or len(test) < FEWEST_TESTED:
            continue
        labels = [
            torch.tensor([classes.index(str(values[i])) for i in index.tolist()])
            for values, index in zip(cells, (train, test), strict=True)
        ]
        found[name] = Task(classes, train, labels[0], test, labels[1])
    return found


def probe(task: Task, train: Floats, test: Floats) -> Floats:
    """Whether each test image ``(M,)`` is told right by logistic regression on features, standardised on training.

    The ridge penalty is 1 per standardised weight over all cases, as scikit-learn's default is; there is one optimum,
    which L-BFGS finds.
    """
    first, second = (
        torch.from_numpy(np.asarray(rows[index], dtype=np.float64))
        for rows, index in ((train, task.train), (test, task.test))
    )
    middle, scale = first.mean(0), first.std(0).clamp(min=1e-9)
    first, second = (first - middle) / scale, (second - middle) / scale
    weight = torch.zeros(first.shape[1], len(task.classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(task.classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(first @ weight + bias, task.train_labels) + (weight**2).sum() / (2 * len(first))
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        answers = (second @ weight + bias).argmax(1)
    return (answers == task.test_labels).double().numpy()


def small_network(classes: int) -> nn.Module:
    """Three strided convolutions and a linear layer over what each quarter of the image shows; 3 colours in."""
    widths, layers = (3, 16, 32, 48), list[nn.Module]()
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * widths[-1], classes)
    )


def network(task: Task, train: Tensor, test: Tensor, seed: int = 0) -> Floats:
    """How often each test image ``(M,)`` is told right by ``NETWORKS`` small networks trained on pixels.

    Pixels are ``(N, 3, H, W)`` in [0, 1]. Each makes as many steps of ``BATCH`` images as ``steps`` says. Leaves the
    random state as it was.
    """
    right = np.zeros(len(task.test))
    pixels, asked = train[torch.from_numpy(task.train)], test[torch.from_numpy(task.test)]
    middle, scale = pixels.mean(), pixels.std().clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]):
        for number in range(NETWORKS):
            torch.manual_seed(derive(seed, "utility", number))
            right += _trained(task, (pixels - middle) / scale, (asked - middle) / scale)
    return right / NETWORKS


def steps(n: int) -> int:
    """Of the training on ``n`` images: ``STEPS``, or as many as ``PASSES`` over all of them take."""
    return min(STEPS, math.ceil(PASSES * n / BATCH))


def _trained(task: Task, pixels: Tensor, asked: Tensor) -> Floats:
    # Strided convolutions of few channels take 0.6 of the time on a CPU where the channels lie side by side.
    beside = torch.channels_last
    model = small_network(len(task.classes)).to(memory_format=beside)
    pixels, asked = pixels.contiguous(memory_format=beside), asked.contiguous(memory_format=beside)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps(len(pixels)))
    for _ in range(steps(len(pixels))):
        batch = torch.randint(len(pixels), (BATCH,))
        loss = F.cross_entropy(model(pixels[batch]), task.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(some).argmax(1) for some in asked.split(256)])
    return (answers == task.test_labels).double().numpy()


def accuracy(right: Floats, seed: int = 0) -> Estimate:
    """Mean of what was told right ``(M,)``, with an interval over the test images.

    Two classifiers tested on the same images have paired resamples. Training again would differ a little more than the
    interval says: it does not know of the chance in which training images there are.
    """
    drawn = weights(len(right), seed, "tested")
    if np.isin(right, (0.0, 1.0)).all():
        return share(right > 0, drawn)
    found = spread(float(right.mean()), drawn @ right / len(right), len(right), (0.0, 1.0))
    if np.ptp(found.replicates) > 0:
        return found
    return Estimate(found.value, None, found.n, found.replicates)


def by_guessing(task: Task) -> Estimate:
    """Accuracy of always giving the commonest real class: the most that can be had without a look at the image."""
    return share((task.test_labels == task.commonest).numpy())
