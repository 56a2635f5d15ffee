"""Tunes the image tower of an encoder to pairs, by low-rank adapters, before the heads are fitted.

The adapters are trained together with one head per criterion on the loss of the heads (``rewards.fit``: Bradley-Terry
with ties and rater effects), stopped on the same held-out prompts. Then the tower is frozen, every image is encoded
again, and the ensemble is fitted to what the tuned tower sees; the heads of this stage are dropped.

Shape legend: ``B`` pairs of a batch, ``D`` dimensions of an embedding, ``N`` images, ``P`` pairs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.errors import RefusedError
from diffalign.images import to_rgb
from diffalign.objectives.reward_model import centring
from diffalign.seeds import derive
from rewards.clip import CHUNK, ClipReward
from rewards.fit import CENTRING, Effects, Progress, tie_share, weights
from rewards.fit_adapter import AdaptedClip, Adapter, attach, chosen
from rewards.fit_config import FitConfig, LoraConfig
from rewards.fit_data import Parts, Study
from rewards.fit_stopping import until_no_better
from rewards.heads import Heads, features


class Watched:
    """An encoder that keeps what its model was shown, in a file without a name: training sees every image again.

    The file takes 12 bytes a pixel of the model's input, 0.6 MB an image of 224 x 224.
    """

    def __init__(self, clip: ClipReward) -> None:
        self.clip = clip
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object, which reads it
        self._shape: tuple[int, ...] = ()

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """float32 ``(B, D)``."""
        for image in images:
            pixels = self.clip._loaded.transform(to_rgb(image)).float()
            self._shape = tuple(pixels.shape)
            self._file.write(pixels.numpy().tobytes())
        return self.clip.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 ``(M, D)``."""
        return self.clip.encode_texts(texts)

    def pixels(self, images: Tensor) -> Tensor:
        """What the model took of these images, float32 ``(B, 3, H, W)``, by their numbers."""
        self._file.flush()
        kept = np.memmap(self._file, dtype=np.float32, mode="r").reshape(-1, *self._shape)
        return torch.from_numpy(kept[images.numpy()])


@dataclass(frozen=True)
class Tuned:
    """A tuned tower and what was learned on the way."""

    adapter: Adapter
    study: Study
    """The same pairs as the tuned tower sees them."""
    best_epoch: int
    losses: list[float]
    """Mean loss over the criteria on the pairs that stop training, before training and after each epoch."""

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(tensor.numel() for tensor in self.adapter.tensors.values())


class _Criterion:
    """One criterion's head while the tower is trained."""

    def __init__(self, study: Study, parts: Parts, name: str, config: FitConfig) -> None:
        self.study, self.name = study, name
        self.rows = [study.rows_of(name, rows) for rows in (parts.train, parts.tune)]
        train, tune = self.rows
        dimensions = study.texts.shape[1]
        seed = derive(config.seed, "lora head", name)
        self.heads = Heads(dimensions, study.images.shape[1] - dimensions, config.hidden, [seed])
        self.heads.fit_features(features(*study.samples(train)))
        share = tie_share(study, [*train, *tune], name, config)
        self.effects = Effects(sorted({study.rater[row] for row in train}), 1, config, share)
        self.rater = self.effects.numbers(study.rater)
        self.weight = torch.zeros(len(study))
        for rows in self.rows:
            self.weight[torch.tensor(rows)] = weights(study, rows, config)

    def loss(self, rows: Tensor, images: Tensor, place: Tensor) -> Tensor:
        """Sum of the loss over those of the rows that judge this criterion; ``images[place[n]]`` is image ``n``."""
        study = self.study
        rows = rows[torch.tensor([study.criterion[row] == self.name for row in rows.tolist()])]
        text = study.texts[study.text[rows]]
        first, second = (self.heads(features(images[place[of[rows]]], text)) for of in (study.first, study.second))
        found = self.effects.loss(first, second, study.label[rows], self.rater[rows])
        return ((found + CENTRING * centring(first, second)) * self.weight[rows]).sum()


def tune(
    study: Study,
    parts: Parts,
    criteria: Sequence[str],
    config: FitConfig,
    lora: LoraConfig,
    eyes: Watched,
    on_progress: Progress | None = None,
) -> Tuned:
    """The tower tuned to the rows that train, of a study that ``eyes`` gathered.

    RefusedError where no epoch was better than no score at all, or the loss is no number. The same arguments give the
    same adapters on a CPU.
    """
    training = _Training(study, parts, criteria, config, lora, eyes)
    best = training.run(on_progress)
    adapter = training.adapter()
    seen = AdaptedClip(eyes.clip, adapter)
    with torch.no_grad():
        embeddings = [
            seen.encode_pixels(eyes.pixels(some)).cpu() for some in torch.arange(len(study.images)).split(CHUNK)
        ]
    images = torch.cat([torch.cat(embeddings), study.images[:, study.texts.shape[1] :]], 1)
    return Tuned(adapter, dataclasses.replace(study, images=images), best, training.losses)


class _Training:
    """Everything that changes while the tower is trained."""

    def __init__(
        self, study: Study, parts: Parts, criteria: Sequence[str], config: FitConfig, lora: LoraConfig, eyes: Watched
    ) -> None:
        self.study, self.config, self.lora, self.eyes = study, config, lora, eyes
        self.clip = AdaptedClip(eyes.clip)
        names = chosen(self.clip.tower, lora.targets, config.encoder)
        self.low_rank = attach(self.clip.tower, names, lora.rank, lora.alpha, config.seed)
        self.criteria = [_Criterion(study, parts, name, config) for name in criteria]
        self.train, self.tune = (
            torch.tensor(sorted(row for one in self.criteria for row in one.rows[side])) for side in (0, 1)
        )
        trained = [parameter for one in self.low_rank.values() for parameter in one.parameters()]
        heads = [parameter for one in self.criteria for parameter in one.heads.parameters()]
        effects = [parameter for one in self.criteria for parameter in one.effects.parameters()]
        self.trained = trained
        self.optimiser = torch.optim.AdamW([
            {"params": trained, "lr": lora.learning_rate, "weight_decay": 0.0},
            {"params": heads, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": effects, "lr": 30 * config.learning_rate, "weight_decay": 0.0},
        ])  # fmt: skip
        self.losses: list[float] = []

    def run(self, on_progress: Progress | None) -> int:
        """Trains, leaves the adapters at their best epoch, and returns that."""
        pairs = _pairs(self.study, self.train)
        shuffle = torch.Generator().manual_seed(derive(self.config.seed, "lora order"))

        def update(epoch: int) -> None:
            for batch in torch.randperm(len(pairs), generator=shuffle).split(self.lora.batch_size):
                self._update(torch.cat([pairs[i] for i in batch.tolist()]))
            if on_progress:
                on_progress("tuning the encoder", epoch, self.lora.epochs)

        best, self.losses = until_no_better(
            self.trained, self.lora.epochs, self.lora.patience, update, self._tuning_loss
        )
        if not best:
            raise RefusedError(
                f"lora: nothing was learned: on held-out prompts no epoch was better than no score at all (loss"
                f" {self.losses[0]:.4f}); give more pairs, a lower lora.learning_rate, or leave lora out"
            )
        return best

    def adapter(self) -> Adapter:
        """What was trained."""
        tensors = {
            f"{name}.{half}": getattr(one, half).detach().float().cpu()
            for name, one in self.low_rank.items()
            for half in ("A", "B")
        }
        return Adapter(tensors, self.lora.rank, self.lora.alpha)

    def _update(self, rows: Tensor) -> None:
        loss = self._loss(rows) / len(rows)
        if not bool(loss.isfinite()):
            raise RefusedError("lora: the loss is no number any more; give a lower lora.learning_rate")
        prior = torch.stack([one.effects.prior() for one in self.criteria]).sum() / len(self.train)
        self.optimiser.zero_grad()
        (loss + prior).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()

    def _loss(self, rows: Tensor) -> Tensor:
        """Sum of the loss over rows; an image of several of them is encoded once."""
        numbers = torch.cat([self.study.first[rows], self.study.second[rows]]).unique()
        embeddings = self.clip.encode_pixels(self.eyes.pixels(numbers)).cpu()
        images = torch.cat([embeddings, self.study.images[numbers, embeddings.shape[1] :]], 1)
        place = torch.zeros(len(self.study.images), dtype=torch.int64)
        place[numbers] = torch.arange(len(numbers))
        return torch.stack([one.loss(rows, images, place) for one in self.criteria]).sum()

    @torch.no_grad()
    def _tuning_loss(self) -> float:
        """Mean over the rows that stop training."""
        batches = torch.stack([self._loss(rows) for rows in self.tune.split(CHUNK)])
        return float(batches.sum()) / len(self.tune)


def _pairs(study: Study, rows: Tensor) -> list[Tensor]:
    """The rows by the pair of images that they judge: its criteria and raters are learned in one update."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row in rows.tolist():
        found.setdefault((int(study.first[row]), int(study.second[row]), int(study.text[row])), []).append(row)
    return [torch.tensor(group) for group in found.values()]
