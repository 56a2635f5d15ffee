"""Trains the network of ``brain-mr-checker`` on freshly drawn scenes, degraded scenes and things that are no brain.

Run ``python -m rewards.train_brain_mr_checker``; it takes about ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from diffalign.seeds import derive
from diffalign.worlds import brain_mr
from rewards.brain_mr_augment import NON_BRAINS, degrade
from rewards.brain_mr_net import FOLDER, LEVELS, OTHER, PLANES, BrainMRNet, Readout, normalise, save

SCENES_FROM = 2_000_000_000
"""First scene seed of the training set; validation and tests use others."""


@dataclass(frozen=True)
class Targets:
    """What the scenes of a batch show; classes are indices into the heads' class tuples."""

    plane: Tensor
    contrast: Tensor
    level: Tensor
    lesion: Tensor
    """float32, 1 where there is a lesion."""

    def take(self, index: Tensor) -> Targets:
        """The rows at ``index``."""
        return Targets(self.plane[index], self.contrast[index], self.level[index], self.lesion[index])


def render_scenes(first: int, count: int) -> tuple[Tensor, Tensor, Targets]:
    """Images and lesion masks, uint8 ``(N, 1, 64, 64)``, and what they show."""
    images, masks, rows = [], [], []
    for seed in range(first, first + count):
        scene = brain_mr.scene(seed)
        facts = scene.prompt.attributes
        images.append(np.asarray(scene.image.convert("L")))
        masks.append(scene.lesion_mask.astype(np.uint8))
        rows.append(
            (
                PLANES.index(str(facts["plane"])),
                brain_mr.CONTRASTS.index(str(facts["contrast"])),
                LEVELS.index(str(facts["level"])),
                int(facts["lesion"] == "present"),
            )
        )
    plane, contrast, level, lesion = torch.tensor(rows).unbind(dim=1)
    stack = (torch.from_numpy(np.stack(arrays)[:, None]) for arrays in (images, masks))
    return next(stack), next(stack), Targets(plane, contrast, level, lesion.float())


def objective(readout: Readout, masks: Tensor, targets: Targets) -> Tensor:
    """Cross-entropies of the heads, of the lesion map (soft targets: the covered share of a cell) and of its peak."""
    count = len(targets.plane)
    brains = Readout(*(output[:count] for output in readout))
    plane = torch.cat((targets.plane, torch.full((len(readout.plane) - count,), PLANES.index(OTHER))))
    return (
        F.cross_entropy(readout.plane, plane)
        + F.cross_entropy(brains.contrast, targets.contrast)
        + F.cross_entropy(brains.level, targets.level)
        + 20 * F.binary_cross_entropy_with_logits(brains.lesion_map, F.avg_pool2d(masks, 2).squeeze(1))
        + F.binary_cross_entropy_with_logits(brains.lesion, targets.lesion)
    )


def non_brains(brains: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` images that are no brain, of one kind, some of them degraded like the rest."""
    kinds = list(NON_BRAINS.values())
    made = kinds[int(torch.randint(len(kinds), (), generator=generator))](brains[:count], generator)
    if torch.rand((), generator=generator) < 0.6:
        made, _ = degrade(made, torch.zeros_like(made), generator)
    return made


def train(scenes: int, epochs: int, batch: int, seed: int, rate: float = 4e-3) -> BrainMRNet:
    """Trains on ``scenes`` scenes, each seen ``epochs`` times in a new degradation; a quarter stays as drawn."""
    started = time.monotonic()
    torch.manual_seed(derive(seed, "brain-mr-checker", "weights"))
    generator = Generator().manual_seed(derive(seed, "brain-mr-checker", "batches"))
    images, masks, targets = render_scenes(SCENES_FROM, scenes)
    print(f"{time.monotonic() - started:.0f} s: {scenes} scenes drawn", flush=True)
    network = BrainMRNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * (scenes // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    running = 0.0
    for step in range(steps):
        if step % (scenes // batch) == 0:
            order = torch.randperm(scenes, generator=generator)
        index = order[(step % (scenes // batch)) * batch :][:batch]
        grey, mask = images[index].float() / 255, masks[index].float()
        clean = batch // 4
        worse, moved = degrade(grey[clean:], mask[clean:], generator)
        strange = non_brains(grey, batch // 6, generator)
        inputs = normalise(torch.cat((grey[:clean], worse, strange))).to(memory_format=torch.channels_last)
        loss = objective(network(inputs), torch.cat((mask[:clean], moved)), targets.take(index))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        running += (loss.item() - running) * (0.02 if step else 1)
        if step % 200 == 199 or step == steps - 1:
            print(f"{time.monotonic() - started:.0f} s: step {step + 1} of {steps}, loss {running:.4f}", flush=True)
    return network.to(memory_format=torch.contiguous_format).eval()


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    save(train(options.scenes, options.epochs, options.batch, options.seed), options.out)


if __name__ == "__main__":
    main()
