"""What the name of a model stands for: ``embedded:NAME``, ``fetched:NAME``, a local diffusers or transformers folder,
or a hub id.
"""

from __future__ import annotations

from pathlib import Path

from diffalign import assets
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Modality

EMBEDDED = Path(__file__).parent / "embedded"
FETCHED = "fetched:"
MARKS: dict[str, Modality] = {"model_index.json": "image", "config.json": "text"}
"""The file by which the folder of a model is known: of a diffusers pipeline, or of a transformers model."""


def embedded_models(modality: Modality | None = None) -> list[str]:
    """Names of the models that ship with diffalign."""
    folders = (path for path in EMBEDDED.iterdir() if path.is_dir())
    found = {path.name: kind for path in folders if (kind := _kind(path)) is not None}
    return sorted(name for name, kind in found.items() if modality in (None, kind))


def fetchable_models() -> list[str]:
    """Names of the models that ``diffalign fetch`` gets, whether they are here or not."""
    known = assets.CATALOGUE.values()
    return [f"{FETCHED}{asset.name}" for asset in known if asset.form in assets.LANGUAGE_MODELS]


def modality_of(model: str) -> Modality:
    """What a model makes; of a hub id, which nobody has looked at yet, images."""
    if model.startswith(FETCHED):
        _fetched(model)
        return "text"
    where = Path(locate(model))
    return (_kind(where) if where.is_dir() else None) or "image"


def locate(model: str) -> str | Path:
    """The folder of an embedded, fetched or local model, or the hub id as it is."""
    if model.startswith(FETCHED):
        return assets.file(_fetched(model), "config.json").parent
    if model.startswith("embedded:"):
        name = model.removeprefix("embedded:")
        if name not in embedded_models():
            known = ", ".join(f"embedded:{known}" for known in embedded_models())
            raise NotFoundError(f"there is no embedded model {name!r}; there is {known}")
        return EMBEDDED / name
    path = Path(model).expanduser()
    if _kind(path) is not None:
        return path
    if path.exists():
        raise InputError(
            f"{model} is no folder of a model: it has no model_index.json (diffusers) and no config.json (transformers)"
        )
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    raise NotFoundError(
        f"no model folder {model}; give embedded:NAME, fetched:NAME, a local model folder, or a hub id ORG/NAME"
    )


def _fetched(model: str) -> str:
    """The name of the asset that a model is, whether it is here or not."""
    asset = assets.find(model.removeprefix(FETCHED))
    if asset.form not in assets.LANGUAGE_MODELS:
        raise ConfigError(f"the asset {asset.name} is no model; there is {', '.join(fetchable_models())}")
    return asset.name


def _kind(folder: Path) -> Modality | None:
    return next((kind for mark, kind in MARKS.items() if (folder / mark).is_file()), None)
