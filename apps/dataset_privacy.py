"""The privacy report of a dataset: its images against training and held-out ones, and the model behind it, asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apps import build, hashes
from apps.dataset_features import Looks, Made, Pictures, World, small_pixels
from apps.generate_models import attach
from apps.generate_origin import Origin
from apps.progress import Status
from diffalign.errors import ConfigError, InputError, UserError
from diffalign.sampling import OPTIONAL, SamplerConfig
from diffalign.seeds import derive
from diffalign.synthesis import privacy
from diffalign.synthesis.estimates import Floats
from diffalign.synthesis.extraction import extraction
from diffalign.synthesis.privacy import Measure
from diffalign.types import Draw, Prompt, Sample
from pipelines.diffusion import DTYPES, DiffusionPolicy
from pipelines.loading import load_policy, locate

Rows = NDArray[np.floating[Any]]

PROMPTS = 16
"""Training prompts that the model is asked for again and again."""
SEEDS = 32
"""Images of each of them."""
ASKED = 400
"""Training and held-out images whose denoising error is compared."""
NOISE = (0.1, 0.3, 0.5, 0.7)
"""Noise levels at which it is taken; an image's loss is the mean."""
BATCH = 64
ASKED_AS = ("steps", "eta", "guidance_scale", "condition", "negative", "precision")
"""Facts of the manifest without which a model cannot be asked as it was when the images were made."""
PRECISIONS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
GIVEN = {
    "axes": "",
    "table": "the rows come from a table that was given; whether they are those of people cannot be measured here",
    "unknown": "the manifest does not say where the rows come from, so they may be those of people",
}
"""Why rows are not assessed, by ``Manifest.rows_from``."""


def report(
    made: Made,
    own: Looks,
    real: Pictures,
    held_out: Looks,
    training: Pictures,
    known: Looks,
    model: str | None,
    status: Status,
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """The content of ``privacy.json``. ``own`` are all images of the dataset: one copy is enough.

    ``whole`` is the user's word that the training images are all that the model was trained on. Raises InputError where
    the images cannot be what they are given as.
    """
    _refuse(made, own, real, held_out, training, known)
    own, held_out, known = (
        looks.typed(made.kinds, name)
        for looks, name in ((own, made.name), (held_out, real.name), (known, training.name))
    )
    spaces: dict[str, tuple[Rows, Rows, Rows]] = {
        "features": (own.features, held_out.features, known.features),
        "pixels": (own.pixels, held_out.pixels, known.pixels),
    }
    distances = {
        space: (privacy.nearest(mine, all_)[0][:, 0], privacy.nearest(other, all_)[0][:, 0])
        for space, (mine, other, all_) in spaces.items()
    }
    status("distances to training images", len(own) + len(held_out), len(own) + len(held_out))
    names = [made.cases[i].id for i in own.index]
    measures: dict[str, Measure] = {
        f"nearest_{space}": privacy.closer(mine, other, "images") for space, (mine, other) in distances.items()
    }
    digests = set(known.digests)
    measures["copies"] = privacy.copies(distances, names, [one in digests for one in own.digests])
    measures["authenticity"] = privacy.authenticity(own.features, known.features, held_out.features)
    if any(known.rows) and any(held_out.rows):
        measures["closest_records"] = privacy.closest_records(own.rows, known.rows, held_out.rows, made.kinds)
    if why := GIVEN.get(made.generated.manifest.rows_from, GIVEN["unknown"]):
        measures["given_rows"] = privacy.unmeasured(why)
    measures |= _asked(made, real, held_out, training, known, model, distances["pixels"][1], status)
    about = {
        "synthetic": len(own), "training": {"name": training.name, "n": len(known), "said_to_be_whole": whole},
        "held_out": {"name": real.name, "n": len(held_out)},
    }  # fmt: skip
    return privacy.report(
        measures, about, index=_gap(made, training, whole), scope=_scope(made, "closest_records" in measures, whole)
    )


def _refuse(made: Made, own: Looks, real: Pictures, held_out: Looks, training: Pictures, known: Looks) -> None:
    """Raises InputError where one set is not what it has to be for anything to follow from a comparison."""
    if isinstance(real, Made):
        raise InputError(
            f"{real.name} is a synthetic dataset; privacy is measured against real images that no model was trained on"
        )
    for others, what in ((known, "training images"), (own, "images of the dataset")):
        if shared := set(held_out.digests) & set(others.digests):
            raise InputError(
                f"{len(shared)} of the {len(held_out)} images of {real.name} are {what} too; --against needs images"
                " that no model was trained on or made, or privacy would be measured against the wrong thing"
            )
    base = _base(made)
    if isinstance(training, World) and base.startswith("embedded:") and base != f"embedded:{training.world}":
        raise InputError(f"the images were made by {base}, and {training.name} is not what that was trained on")


def _base(made: Made) -> str:
    return str(made.facts.get("base", made.facts.get("name")))


def _gap(made: Made, training: Pictures, whole: bool) -> str:
    """Why the training index may not be the whole of what a model was trained on; empty where it is.

    It is for all scenes of a world and the embedded model that was trained on them; else it takes somebody's word.
    """
    if isinstance(training, World) and not training.whole:
        return f"the training index holds {len(training)} images of {training.name}, which is not all of them"
    if whole:
        return ""
    if not isinstance(training, World) or _base(made) != f"embedded:{training.world}":
        return (
            f"nothing shows that the images of {training.name} are all that the model was trained on; if you know that"
            " they are, say so by --training-is-whole"
        )
    if made.facts.get("adapter"):
        return (
            f"the images were made with an adapter, and nothing shows that it was trained on no other images than those"
            f" of {training.name}; if you know that it was not, say so by --training-is-whole"
        )
    return ""


def _scope(made: Made, rows: bool, whole: bool) -> str:
    """What a pass does not cover, and what it rests on."""
    said = ["images and rows were assessed" if rows else "images were assessed, and rows not"]
    if "text" in made.generated.manifest.models:
        said.append("texts were not assessed")
    if whole:
        said.append("that the training images are all there are is the word of the one who assessed it")
    return "; ".join(said)


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
    negative = str(made.facts["negative"])
    prompts = _prompts(policy, training, known, negative)

    def again(key: str) -> Floats:
        seeds = [derive(0, "extraction", key, k) for k in range(SEEDS)]
        samples = policy.rollout([prompts[key]] * SEEDS, seeds).samples
        status("training prompts asked again and again", list(prompts).index(key) + 1, len(prompts))
        return np.stack([small_pixels(sample.image) for sample in samples if sample.image is not None])

    return {
        "extraction": extraction(again, list(prompts), known.pixels, far),
        "membership": privacy.membership(
            losses(policy, training, known, status, "training"), losses(policy, real, held_out, status, "real")
        ),
    }


def _drawn(looks: Looks) -> list[int]:
    """Places of all images of a set, in an order that a fixed seed draws: files are often named by patient or class."""
    return [int(k) for k in np.random.default_rng(0).permutation(len(looks))]


def _prompt(policy: DiffusionPolicy, pictures: Pictures, looks: Looks, k: int, negative: str = "") -> Prompt | None:
    """What the model was, or would be, asked for an image: its caption, or the row for one that is conditioned on rows.

    None where neither is known.
    """
    caption, row = pictures.caption(looks.index[k]), looks.rows[k]
    if policy.table is None:
        return Prompt(caption, negative=negative) if caption else None
    there = {name: row[name] for name in policy.table.columns if row.get(name) is not None}
    return Prompt(caption, json.dumps(there, sort_keys=True), there, negative) if there else None


def _prompts(policy: DiffusionPolicy, training: Pictures, known: Looks, negative: str) -> dict[str, Prompt]:
    """Different prompts of training images, by what tells them apart."""
    found: dict[str, Prompt] = {}
    for k in _drawn(known):
        if prompt := _prompt(policy, training, known, k, negative):
            found.setdefault(prompt.key, prompt)
        if len(found) == PROMPTS:
            break
    return found


def image_model(made: Made, name: str | None) -> DiffusionPolicy:
    """The model that made the images, with the settings that they were made with.

    ``name`` says where it lies, for one that the manifest's name does not lead to. Raises ConfigError for a model, or
    an adapter, whose hash is not the manifest's.
    """
    facts = made.facts
    if missing := [name for name in ASKED_AS if name not in facts]:
        raise ConfigError(f"the manifest does not say with which {', '.join(missing)} the images were made")
    origin = Origin.of(name or str(facts.get("name")), None)
    adapter, where = facts.get("adapter"), locate(origin.model)
    if adapter and origin.adapter is None:
        raise ConfigError("the images were made with an adapter; name the run that it comes from by --model")
    own = hashes.of_folder(origin.adapter) if origin.adapter else None
    if not _same(facts, where) or own != (adapter or {}).get("sha256"):
        raise ConfigError(f"{name or facts.get('name')} is not the model that made these images: its hash is another")
    sampler = SamplerConfig(
        steps=facts["steps"], eta=facts["eta"], guidance_scale=facts["guidance_scale"], batch_size=BATCH,
        **{name: facts[name] for name in OPTIONAL if name in facts},
    )  # fmt: skip
    policy = load_policy(
        origin.model, modality="image", sampler=sampler, name=str(facts.get("name")), device=build.device("auto"),
        precision=PRECISIONS[facts["precision"]], condition="table" if facts["condition"] == "table" else "text",
    )  # fmt: skip
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
def losses(policy: DiffusionPolicy, pictures: Pictures, looks: Looks, status: Status, what: str) -> Floats:
    """Denoising error ``(N,)`` of ``ASKED`` images at most, which a fixed seed draws; lower is better known.

    Each is asked at the same noise levels. Images without a row are left out where the model is conditioned on rows.
    """
    asked = [(k, _prompt(policy, pictures, looks, k)) for k in _drawn(looks)[:ASKED]]
    some = [(k, prompt or Prompt("")) for k, prompt in asked if prompt or policy.table is None]
    found = []
    for start in range(0, len(some), BATCH):
        batch = some[start : start + BATCH]
        samples = [Sample(prompt, pictures.picture(looks.index[k])) for k, prompt in batch]
        total = torch.zeros(len(batch))
        for level in NOISE:
            seeds = tuple(derive(0, "membership", level, start + k) for k in range(len(batch)))
            total -= policy.log_likelihood(samples, Draw(torch.full((len(batch),), level), seeds)).cpu()
        found.append((total / len(NOISE)).double().numpy())
        status(f"denoising of {what} images", start + len(batch), len(some))
    return np.concatenate(found) if found else np.empty(0)
