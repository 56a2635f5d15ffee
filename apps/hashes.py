"""What a run was made with, as hashes: the base model's files, and the code and weights of every reward."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from diffalign.config import RunConfig
from diffalign.worlds.shown import DEMONSTRATIONS
from pipelines.loading import locate
from rewards.arguments import split
from rewards.registry import REWARDS

NOT_HASHED = "not hashed"
WEIGHTS = ("model", "pretrained", "folder")
"""Arguments of a reward that name weights; one that is no local path is looked up among the hub's snapshots."""


def of(config: RunConfig) -> dict[str, str]:
    """Of the base model as ``model`` and of each reward as ``reward SPEC``; what cannot be hashed is said to be."""
    where = locate(config.model)
    found = {"model": snapshot(where) if isinstance(where, str) else of_folder(where)}
    for spec in [*(entry.reward for entry in config.rewards), *config.evaluation.rewards]:
        found[f"reward {spec}"] = of_reward(spec)
    if config.experience.path is not None and config.experience.path not in DEMONSTRATIONS:
        path = Path(config.experience.path).expanduser()
        found["experience"] = of_folder(path) if path.is_dir() else of_files([path], path.parent)
    return found


def of_reward(spec: str) -> str:
    """The version or file that the code of a reward comes from, and every local file or folder in its arguments."""
    name, arguments = split(spec)
    parts = [_code(name)]
    for argument, text in arguments.items():
        path = Path(text.removeprefix("local-dir:")).expanduser()
        if path.exists():
            parts.append(f"{argument} {of_folder(path) if path.is_dir() else of_files([path], path.parent)}")
        elif argument in WEIGHTS and not text.startswith("embedded:"):
            parts.append(f"{argument} {snapshot(text.removeprefix('hf-hub:'))}")
    return ", ".join(parts)


def _code(name: str) -> str:
    if name.startswith(("http://", "https://")):
        return NOT_HASHED
    if name in REWARDS:
        return f"diffalign {version('diffalign')}"
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        file = Path(place).expanduser()
    else:
        found = importlib.util.find_spec(place) if place else None
        file = Path(found.origin if found and found.origin else "")
    return of_files([file], file.parent) if file.is_file() else NOT_HASHED


def of_folder(folder: Path) -> str:
    """Hash of every file of a folder, but for hidden ones and those in hidden folders."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return of_files((p for p in files if not any(part[0] == "." for part in p.relative_to(folder).parts)), folder)


def of_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over the files' paths below ``root`` and their bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(name.encode() + b"\0" + content.digest())
    return f"sha256:{digest.hexdigest()}"


def snapshot(repository: str) -> str:
    """The commit of a hub repository's snapshot on this machine: the name alone does not say which weights."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    main = cached / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    return f"commit:{commit}" if commit and (cached / "snapshots" / commit).is_dir() else NOT_HASHED
