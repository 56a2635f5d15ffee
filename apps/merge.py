"""``diffalign merge``: an adapter added into the weights of its base, as the folder of a model of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from apps import hashes
from apps.generate_models import attach
from apps.generate_origin import CONFIG, Origin, aligned
from diffalign import config
from diffalign.errors import ConfigError, InputError
from diffalign.runs import new_folder, require_empty
from diffalign.synthesis.naming import without_places
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy
from pipelines.loading import load_policy, locate
from pipelines.table_encoder import FOLDER as TABLE

ORIGIN = "diffalign.json"
"""What was merged: base, adapter, and what a run says of itself. In the folder of the model."""
MARK = "base-"
"""What the names of a base's card and licence begin with, however often it is merged."""


def run(model: str, adapter: str | None, out: Path) -> None:
    """Writes the model, in float32, whole or not at all."""
    origin = Origin.of(model, adapter)
    if origin.adapter is None:
        if origin.run is not None:
            raise ConfigError(f"run {model} trained every weight: its model is {origin.model}, with nothing to merge")
        raise ConfigError(f"{model} is no run, so it has no adapter to merge; name one by --adapter")
    require_empty(out, "choose another --out")
    begun = config.load(origin.run / CONFIG, made=True) if origin.run else None
    policy = load_policy(origin.model, modality=begun.modality if begun else None)
    attach(policy, origin.adapter)
    where = locate(origin.model)
    about: dict[str, Any] = {
        "base": without_places(origin.model),
        "base_sha256": hashes.snapshot(where) if isinstance(where, str) else hashes.of_folder(where),
        "adapter_sha256": hashes.of_folder(origin.adapter), **({"run": aligned(origin.run)} if origin.run else {}),
    }  # fmt: skip
    if isinstance(where, Path) and (where / ORIGIN).is_file():
        about["base_made_of"] = json.loads((where / ORIGIN).read_text(encoding="utf-8"))
    with new_folder(out) as folder:
        _save(policy, folder)
        if isinstance(where, Path):
            _bring(where, folder)
        (folder / ORIGIN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if isinstance(where, Path) and (where / "safety_checker").is_dir():
        click.echo("the base's safety checker is not in it: diffalign loads none", err=True)
    click.echo(f"model: {out}")


def _save(policy: DiffusionPolicy | LanguagePolicy, folder: Path) -> None:
    try:
        if isinstance(policy, LanguagePolicy):
            policy.model.merge_and_unload(safe_merge=True).save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            return
        pipeline = policy.family.pipeline
        pipeline.fuse_lora(components=list(pipeline.get_list_adapters()), safe_fusing=True)
    except ValueError as error:  # what is not finite
        raise InputError(f"the adapter cannot be merged: {str(error).splitlines()[0]}") from error
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)


def _bring(base: Path, folder: Path) -> None:
    """What a base has beside its pipeline: a table encoder, and its card and licence, which hold of this model too."""
    if (base / TABLE).is_dir():
        shutil.copytree(base / TABLE, folder / TABLE)
    for file in base.iterdir():
        if file.is_file() and file.name.startswith(("README", "LICENSE", "LICENCE", "NOTICE", MARK)):
            shutil.copy(file, folder / (MARK + file.name.removeprefix(MARK)))
