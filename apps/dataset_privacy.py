"""The privacy report of a dataset: its images against training and held-out ones, and the model behind it, asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps import hashes
from apps.dataset_features import Looks, Made, Pictures, World, small_pixels
from apps.generate_models import Origin, attach
from apps.progress import Status
from diffalign.errors import ConfigError, InputError, UserError
from diffalign.sampling import SamplerConfig
from diffalign.seeds import derive
from diffalign.synthesis import privacy
from diffalign.synthesis.estimates import Floats
from diffalign.synthesis.extraction import extraction
from diffalign.synthesis.privacy import Measure
from diffalign.types import Draw, Prompt, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy, locate

PROMPTS = 16
"""Training prompts that the model is asked for again and again."""
SEEDS = 32
"""Images of each of them."""
ASKED = 400
"""Training and held-out images whose denoising error is compared."""
NOISE = (0.1, 0.3, 0.5, 0.7)
"""Noise levels at which it is taken; an image's loss is the mean."""
BATCH = 64


def report(
    made: Made,
    own: Looks,
    real: Pictures,
    held_out: Looks,
    training: Pictures,
    known: Looks,
    model: str | None,
    status: Status,
) -> dict[str, Any]:
    """The content of ``privacy.json``. Raises InputError where held-out images are training images."""
    if shared := set(held_out.digests) & set(known.digests):
        raise InputError(
            f"{len(shared)} of the {len(held_out)} images of {real.name} are training images too; --against needs"
            " images that no model was trained on, or privacy would be measured against the wrong thing"
        )
    spaces: dict[str, tuple[Floats, Floats, Floats]] = {
        "features": (own.features, held_out.features, known.features),
        "pixels": (own.pixels, held_out.pixels, known.pixels),
    }
    distances = {
        space: (privacy.nearest(mine, all_)[0][:, 0], privacy.nearest(other, all_)[0][:, 0])
        for space, (mine, other, all_) in spaces.items()
    }
    names = [made.cases[i].id for i in own.index]
    measures: dict[str, Measure] = {
        f"nearest_{space}": privacy.closer(mine, other, "images") for space, (mine, other) in distances.items()
    }
    measures["copies"] = privacy.copies(distances, names)
    measures["authenticity"] = privacy.authenticity(own.features, known.features, held_out.features)
    if any(known.rows) and any(held_out.rows):
        measures["closest_records"] = privacy.closest_records(own.rows, known.rows, held_out.rows, made.kinds)
    measures |= _asked(made, real, held_out, training, known, model, distances["pixels"][1], status)
    about = {
        "synthetic": len(own), "training": {"name": training.name, "n": len(known)},
        "held_out": {"name": real.name, "n": len(held_out)},
    }  # fmt: skip
    return privacy.report(measures, about, index=_gap(training, known))


def _gap(training: Pictures, known: Looks) -> str:
    """Why the training index is not the whole of what a model was trained on; empty where nothing says so."""
    if isinstance(training, World) and not training.whole:
        return f"the training index holds {len(known)} images of {training.name}, which is not all of them"
    return ""


def _asked(
    made: Made,
    real: Pictures,
    held_out: Looks,
    training: Pictures,
    known: Looks,
    model: str | None,
    far: Floats,
    status: Status,
) -> dict[str, Measure]:
    """What only the model itself can tell."""
    try:
        policy = image_model(made, model)
    except UserError as error:
        if model is not None:
            raise
        missing = privacy.unmeasured(f"the model could not be asked: {error}")
        return {"extraction": missing, "membership": missing}
    prompts = _prompts(training, known)

    def again(prompt: str) -> Floats:
        seeds = [derive(0, "extraction", prompt, k) for k in range(SEEDS)]
        samples = policy.rollout([Prompt(prompt)] * SEEDS, seeds).samples
        status("asking for training prompts", prompts.index(prompt) + 1, len(prompts))
        return np.stack([small_pixels(sample.image) for sample in samples if sample.image is not None])

    return {
        "extraction": extraction(again, prompts, known.pixels, far),
        "membership": privacy.membership(
            losses(policy, training, known.index, status), losses(policy, real, held_out.index, status)
        ),
    }


def _prompts(training: Pictures, known: Looks) -> list[str]:
    """Different captions of training images, in their order."""
    found: dict[str, None] = {}
    for i in known.index:
        if caption := training.caption(i):
            found[caption] = None
        if len(found) == PROMPTS:
            break
    return list(found)


def image_model(made: Made, name: str | None) -> DiffusionPolicy:
    """The model that made the images, with the settings that they were made with.

    ``name`` says where it lies, for one that the manifest's name does not lead to. Raises ConfigError for a model, or
    an adapter, whose hash is not the manifest's.
    """
    facts = made.generated.manifest.models.get("image") or {}
    origin = Origin.of(name or str(facts.get("name")), None)
    adapter, where = facts.get("adapter"), locate(origin.model)
    if adapter and origin.adapter is None:
        raise ConfigError("the images were made with an adapter; name the run that it comes from by --model")
    own = hashes.of_folder(origin.adapter) if origin.adapter else None
    if not _same(facts, where) or own != (adapter or {}).get("sha256"):
        raise ConfigError(f"{name or facts.get('name')} is not the model that made these images: its hash is another")
    sampler = SamplerConfig(
        steps=facts["steps"], eta=facts["eta"], guidance_scale=facts["guidance_scale"], batch_size=BATCH
    )
    policy = load_policy(origin.model, modality="image", sampler=sampler, name=str(facts.get("name")))
    assert isinstance(policy, DiffusionPolicy)
    if origin.adapter is not None:
        attach(policy, origin.adapter)
    return policy


def _same(facts: Mapping[str, Any], where: str | Path) -> bool:
    """Whether the parts of a model (or, of a hub's, its commit) are those of the manifest; a card may have changed."""
    if isinstance(where, str):
        return hashes.snapshot(where) == facts.get("sha256")
    parts = facts.get("parts") or {}
    if not parts:
        return hashes.of_folder(where) == facts.get("sha256")
    return all(hashes.of_folder(where / part) == sha256 for part, sha256 in parts.items())


@torch.no_grad()
def losses(policy: DiffusionPolicy, pictures: Pictures, index: Sequence[int], status: Status) -> Floats:
    """Denoising error ``(N,)`` of the first ``ASKED`` images, each at the same noise levels; lower is better known."""
    found = []
    for start in range(0, min(len(index), ASKED), BATCH):
        some = list(index[start : start + BATCH])[: ASKED - start]
        samples = [Sample(Prompt(pictures.caption(i)), pictures.picture(i)) for i in some]
        total = torch.zeros(len(some))
        for level in NOISE:
            seeds = tuple(derive(0, "membership", level, start + k) for k in range(len(some)))
            total -= policy.log_likelihood(samples, Draw(torch.full((len(some),), level), seeds)).cpu()
        found.append((total / len(NOISE)).double().numpy())
        status(f"denoising {pictures.name}", start + len(some), min(len(index), ASKED))
    return np.concatenate(found) if found else np.empty(0)
