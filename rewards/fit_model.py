"""A fitted reward model and its folder: ``reward.json`` says what it is, ``heads.safetensors`` holds the numbers.

Where the encoder was tuned, ``encoder-lora.safetensors`` holds what is added to it. The heads then judge by what the
tuned encoder sees; how far an image is from the known ones is told by the encoder as it was (see ``Judgement``).

Shape legend: ``B`` samples, ``C`` criteria, ``D`` dimensions of an embedding, ``S`` statistics of pixels, ``N``
held-out images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.runs import new_folder
from diffalign.types import Prompt, Sample
from rewards import fit_pixels
from rewards.clip import ClipReward
from rewards.fit import Calibration, Fitted
from rewards.fit_adapter import AdaptedClip, Adapter
from rewards.fit_data import Encoder, Parts, Study, look, spaced
from rewards.heads import Heads, distances, features, shrunk_covariance, whitening

HEADER, WEIGHTS, LORA = "reward.json", "heads.safetensors", "encoder-lora.safetensors"
PROBE_TEXT = "a photo of nothing in particular"
SAME = 0.99
"""Cosine below which an encoder that sees the probe is not the one that the heads were fitted on."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraEntry(_Closed):
    """What was added to the encoder's image tower."""

    rank: int
    alpha: float
    layers: int
    """How many weights were adapted."""
    weights: str
    """SHA-256 of ``encoder-lora.safetensors``."""


class EncoderEntry(_Closed):
    """The encoder under the heads."""

    name: str
    """As it is written in a configuration; a folder is looked up from where the program runs."""
    hash: str
    """Of its files, its package, or its snapshot."""
    dimensions: int
    pixel_statistics: bool
    """Whether statistics of the pixels stand beside the embedding."""
    lora: LoraEntry | None = None
    """None where the encoder was left as it is."""


class CriterionEntry(_Closed):
    """The heads of one criterion."""

    slope: float
    temperature: float
    tie_log_strength: float | None
    train_pairs: int


class DomainEntry(_Closed):
    """How the distance from the training images is told."""

    train_images: int
    held_out_images: int
    shrinkage: float


class Header(_Closed):
    """``reward.json``."""

    kind: Literal["diffalign-reward-heads"] = "diffalign-reward-heads"
    version: Literal[1] = 1
    name: str
    encoder: EncoderEntry
    criteria: dict[str, CriterionEntry]
    """In the order in which their tensors are numbered."""
    domain: DomainEntry
    data: str
    """SHA-256 of the pairs that were read."""
    weights: str
    """SHA-256 of ``heads.safetensors``."""
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Judgement:
    """What the ensemble says of ``B`` samples; NaN where a sample has no image."""

    mean: Tensor
    """float32 ``(C, B)``, in standard deviations of the training images."""
    sd: Tensor
    """float32 ``(C, B)``: standard deviation over the heads; NaN of a single head."""
    distance: Tensor
    """float32 ``(B,)``: Mahalanobis distance of the image's embedding from those of the training images.

    By the encoder as it was, whether it was tuned or not: tuning keeps what tells winners from losers, and may map an
    image unlike any that was judged onto a known one ("feature collapse", van Amersfoort et al. 2020).
    """


def write(
    folder: Path,
    name: str,
    encoder: tuple[str, str],
    eyes: Encoder,
    study: Study,
    parts: Parts,
    fitted: Mapping[str, Fitted],
    seed: int,
    adapter: Adapter | None = None,
) -> Header:
    """Writes the folder, whole or not at all. ``encoder`` is its name and hash, ``eyes`` the encoder itself.

    ``study`` is what the encoder sees as it was; ``adapter`` is what was added to it before the heads were fitted.
    """
    domain, tensors = _domain(study, parts)
    for number, one in enumerate(fitted.values()):
        tensors |= {f"{number}.{key}": tensor for key, tensor in one.heads.tensors().items()}
    tensors["probe.image"], tensors["probe.text"] = probe(eyes)
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    lora, added = _packed(adapter)
    header = Header(
        name=name,
        encoder=EncoderEntry(
            name=encoder[0],
            hash=encoder[1],
            dimensions=study.texts.shape[1],
            pixel_statistics=study.images.shape[1] > study.texts.shape[1],
            lora=lora,
        ),
        criteria={
            criterion: CriterionEntry(**asdict(one.calibration), train_pairs=len(study.rows_of(criterion, parts.train)))
            for criterion, one in fitted.items()
        },
        domain=domain,
        data=study.digest,
        weights=f"sha256:{hashlib.sha256(data).hexdigest()}",
        seed=seed,
        versions={package: metadata.version(package) for package in ("diffalign", "torch", "open_clip_torch")},
    )
    with new_folder(folder) as temporary:
        (temporary / HEADER).write_text(json.dumps(header.model_dump(), indent=2) + "\n", encoding="utf-8")
        (temporary / WEIGHTS).write_bytes(data)
        if added is not None:
            (temporary / LORA).write_bytes(added)
    return header


def _packed(adapter: Adapter | None) -> tuple[LoraEntry | None, bytes | None]:
    if adapter is None:
        return None, None
    data = save({key: tensor.contiguous() for key, tensor in adapter.tensors.items()})
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return LoraEntry(rank=adapter.rank, alpha=adapter.alpha, layers=len(adapter.names), weights=digest), data


def probe(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Embeddings ``(1, D)`` of an image and a text that are always the same: by them an encoder is recognised."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), axis=2).astype(np.uint8)
    pixels[16:32, 16:48] = (200, 30, 30)
    return encoder.encode_images([Image.fromarray(pixels)]), encoder.encode_texts([PROBE_TEXT])


def _domain(study: Study, parts: Parts) -> tuple[DomainEntry, dict[str, Tensor]]:
    """Where the training images lie, and how far from them the held-out images are that are none of them."""
    known = _images(study, parts.train)
    others = sorted(set(_images(study, parts.tune + parts.measure)) - set(known))
    train = spaced(known)
    embeddings = study.images[:, : study.texts.shape[1]]
    mean, covariance, shrinkage = shrunk_covariance(embeddings[train])
    white = whitening(covariance)
    held = distances(embeddings[others], mean, white).sort().values
    entry = DomainEntry(train_images=len(known), held_out_images=len(others), shrinkage=shrinkage)
    return entry, {"domain.mean": mean.float(), "domain.whitening": white.float(), "domain.held_out": held}


def _images(study: Study, rows: Sequence[int]) -> list[int]:
    index = torch.tensor(rows)
    found: list[int] = torch.cat([study.first[index], study.second[index]]).unique().tolist()
    return found


class RewardModel:
    """A folder that ``write`` made, ready to judge. The encoder is loaded when it is first used."""

    def __init__(self, folder: Path, encoder: str | None = None, device: str = "cpu") -> None:
        """``encoder`` is where the encoder is now, if not where the header says."""
        self.folder = folder
        self.header, tensors = _read(folder)
        self.criteria = list(self.header.criteria)
        try:
            known = self.header.encoder
            pixels = len(fit_pixels.NAMES) if known.pixel_statistics else 0
            self.heads = [
                Heads.of(_below(tensors, f"{n}."), known.dimensions, pixels) for n in range(len(self.criteria))
            ]
            self.domain = {name: tensors[f"domain.{name}"] for name in ("mean", "whitening", "held_out")}
            self._probes = tensors["probe.image"], tensors["probe.text"]
        except (InputError, KeyError) as error:
            raise InputError(f"{folder / WEIGHTS} does not fit {HEADER}: {error}") from None
        lora = self.header.encoder.lora
        self._adapter = Adapter(_tensors(folder / LORA, lora.weights), lora.rank, lora.alpha) if lora else None
        self._clip = ClipReward(encoder or self.header.encoder.name, device=device)

    @cached_property
    def encoder(self) -> ClipReward:
        """The encoder; InputError where it does not see what the heads were fitted on."""
        for found, known, what in zip(probe(self._clip), self._probes, ("images", "texts"), strict=True):
            same = found.shape == known.shape and float((found * known).sum()) >= SAME
            if not same:
                raise InputError(
                    f"{self._clip.model} is not the encoder that {self.folder} was fitted on: it sees {what}"
                    f" differently; give that one as encoder=, or fit again (it was {self.header.encoder.name},"
                    f" {self.header.encoder.hash})"
                )
        return self._clip

    @cached_property
    def eyes(self) -> ClipReward:
        """What the heads look through: the encoder, or a copy of it that was tuned; InputError as for ``encoder``."""
        if self._adapter is None:
            return self.encoder
        made = AdaptedClip(self.encoder, self._adapter)
        try:
            made.tower  # noqa: B018 - the adapter is added when the tower is first asked for
        except InputError as error:
            raise InputError(f"{self.folder / LORA} does not fit {self._clip.model}: {error}") from None
        return made

    def calibration(self, criterion: str) -> Calibration:
        """From differences of scores to probabilities."""
        entry = self.header.criteria[criterion]
        return Calibration(entry.slope, entry.temperature, entry.tie_log_strength)

    def limit(self, quantile: float) -> float:
        """The distance that so large a share of held-out images stays within; infinite for a quantile of 1.

        Of fewer images than ``1 / (1 - quantile)`` it is the largest distance among them.
        """
        held = self.domain["held_out"].numpy()
        if quantile >= 1:
            return math.inf
        if len(held) == 0:
            raise ConfigError(
                f"{self.folder} knows no held-out image that is not also a training image, so it cannot tell what is"
                " far; set abstain=1 to judge everything"
            )
        return float(np.quantile(held, quantile, method="higher"))

    def judge(self, samples: Sequence[Sample]) -> Judgement:
        """Scores, doubt and distance of each sample, from that sample alone."""
        shape = len(self.criteria), len(samples)
        judged = Judgement(torch.full(shape, math.nan), torch.full(shape, math.nan), torch.full(shape[1:], math.nan))
        images = {i: s.image for i, s in enumerate(samples) if s.image is not None and 0 not in s.image.size}
        if not images:
            return judged
        places = list(images)
        image = look(self.eyes, list(images.values()), self.header.encoder.pixel_statistics)
        text = self.encoder.encode_texts([samples[i].prompt.text for i in places])
        found = features(image, text)
        for number, heads in enumerate(self.heads):
            scores = heads.standardised(found)
            judged.mean[number, places] = scores.mean(0)
            if heads.members > 1:
                judged.sd[number, places] = scores.std(0)
        embedding = image[:, : self.header.encoder.dimensions]
        if self._adapter is not None:
            embedding = self.encoder.encode_images(list(images.values()))
        judged.distance[places] = distances(embedding, self.domain["mean"], self.domain["whitening"])
        return judged

    def judge_with_gradient(self, images: Tensor, prompts: Sequence[Prompt]) -> Judgement:
        """The same of images ``(B, 3, H, W)`` in [0, 1], with gradient to the pixels but for the distance; on their
        device.
        """
        embedding = self.eyes.with_gradient(images).cpu()
        seen = [embedding, fit_pixels.with_gradient(images.float()).cpu()]
        text = self.encoder.encode_texts([prompt.text for prompt in prompts])
        found = features(torch.cat(seen if self.header.encoder.pixel_statistics else seen[:1], 1), text)
        scores = [heads.standardised(found) for heads in self.heads]
        sd = [each.std(0) if len(each) > 1 else each.new_full(each.shape[1:], math.nan) for each in scores]
        with torch.no_grad():
            known = embedding if self._adapter is None else self.encoder.with_gradient(images).cpu()
            away = distances(known, self.domain["mean"], self.domain["whitening"])
        mean = torch.stack([each.mean(0) for each in scores])
        return Judgement(mean.to(images.device), torch.stack(sd).to(images.device), away.to(images.device))


def _read(folder: Path) -> tuple[Header, dict[str, Tensor]]:
    header, weights = folder / HEADER, folder / WEIGHTS
    if not header.is_file() and (folder / "reward" / HEADER).is_file():
        raise NotFoundError(f"{folder} is the folder of a fit; the reward model is in {folder / 'reward'}")
    for path in (header, weights):
        if path is weights and not path.is_file() and (folder / "model.safetensors").is_file():
            raise ConfigError(f"{folder} holds a reward model of texts; name it language-reward?folder={folder}")
        if not path.is_file():
            raise NotFoundError(f"{folder} is no reward model: it has no {path.name}; `diffalign reward fit` makes one")
    try:
        known = Header.model_validate(json.loads(header.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{header} is not JSON: {error}") from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise InputError(f"{header}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return known, _tensors(weights, known.weights)


def _tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """A file's tensors, if it is the one with this hash."""
    if not path.is_file():
        raise NotFoundError(f"{path.parent} is not whole: it has no {path.name}; copy it again, or fit again")
    data = path.read_bytes()
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise InputError(f"{path} is not the file that {HEADER} describes: it is cut off, changed, or another fit's")
    try:
        return load(data)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
