"""A run on disk: configuration, environment, metrics, checkpoints. Nothing is ever half-written.

Files are written beside their place, flushed to the disk, and renamed; a checkpoint counts only once its folder has
its final name. A process killed at any moment leaves the last complete checkpoint. A folder that takes the place of
another waits beside it: the old one is moved aside under a hidden name, and removed last.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from diffalign.config import RunConfig, dump
from diffalign.errors import ConfigError, DiffalignError, NotFoundError, RefusedError

PACKAGES = (
    "diffalign",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "pillow",
    "numpy",
)


@contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turns what the system says against writing at ``path`` into one sentence: a full disk, a place without rights.

    An error about a file elsewhere, such as one that was to be read, passes as it is.
    """
    try:
        yield
    except DiffalignError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _OF_DISKS or (number is not None and _concerns(error, path)):
            reason = os.strerror(number).lower()
        # torch and safetensors report a full disk as an error of their own, so the disk itself is asked.
        elif number is None and _full(path):
            reason = "the disk is full"
        else:
            raise
        raise RefusedError(f"{doing}: {reason}; what was written before is intact") from error


def check_writable(folder: Path) -> None:
    """Raises RefusedError where nothing can be written into a folder, or where it cannot be made: before long work."""
    place = Path(os.path.abspath(folder))
    with disk_errors(f"cannot write into {folder}", place):
        there = next(one for one in (place, *place.parents) if one.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _concerns(error: BaseException, path: Path) -> bool:
    """Whether an error names ``path``, something beside or below it, or a folder that it lies in."""
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name is not None]
    found = [Path(os.path.abspath(os.fsdecode(name))) for name in names if not isinstance(name, int)]
    place = Path(os.path.abspath(path))
    return any(one.is_relative_to(place.parent) or place.is_relative_to(one) for one in found)


def _full(path: Path) -> bool:
    """Whether hardly anything is free where ``path`` lies; a file system without any size, such as /proc, is not full.

    A place that cannot even be looked at is not known to be full.
    """
    try:
        while not path.exists():
            path = path.parent
        usage = shutil.disk_usage(path)
    except OSError:
        return False
    return usage.total > 0 and usage.free < 2**20


def flush_folder(path: Path) -> None:
    """Brings the names in a folder to the disk: without it a file that was renamed may be gone after a power cut."""
    if os.name != "posix":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such request
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name ``path`` only once it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(f"cannot write {path}", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # where nothing can be removed either, that is not what went wrong
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` only once it is complete; an older one stays whole until then."""
    recover(path)
    temporary, aside = path.with_name(f".{path.name}.tmp"), _aside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(f"cannot write {path}", path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                os.replace(path, aside)
            os.replace(temporary, path)
            flush_folder(path.parent)
    except BaseException:
        recover(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(path: Path) -> None:
    """Brings back a folder that was set aside by a process killed while it was being replaced."""
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def unused_folder(base: Path) -> Path:
    """``base``, or ``base-2``, ``base-3``, … : the first that does not exist."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def require_empty(path: Path, advice: str = "choose another --out, or continue it with --resume") -> None:
    """Refuses an output folder that holds anything, with the advice."""
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"output folder {path} is not empty: {advice}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path} is a file, not a folder")


class Run:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began: Literal["", "folder", "files"] = ""

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> Run:
        """Starts a run in a new or empty folder."""
        run = cls(path)
        run.begin(config)
        return run

    def begin(self, config: RunConfig) -> None:
        """Starts this run; its folder must be new or empty."""
        require_empty(self.path)
        self._began = "files" if self.path.exists() else "folder"
        self.write_config(config)

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run."""
        if not (path / "config.yaml").is_file():
            raise NotFoundError(f"{path} is not a run directory: it has no config.yaml")
        for name in ("adapter", "model"):
            recover(path / name)
        return cls(path)

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration, which repeats the run."""
        write_text(self.path / "config.yaml", dump(config))

    def discard_unused(self) -> None:
        """Removes a run that this object created and that ended before its first epoch: the next one gets its name.

        What else is in the folder stays, and so does a folder that was there before, or a run that was opened.
        """
        own = {self.path / "config.yaml", self.path / "environment.json"}
        if not self._began or not self.path.is_dir() or not set(self.path.iterdir()) <= own:
            return
        for file in own:
            file.unlink(missing_ok=True)
        if self._began == "folder":
            self.path.rmdir()

    def write_environment(self, seed: int, hashes: Mapping[str, str], **more: Any) -> None:
        """Versions, git revision, hardware, seed, the hashes of base model and rewards, and ``more`` of the model."""
        write_text(self.path / "environment.json", json.dumps(environment(seed, hashes) | more, indent=2) + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line to ``metrics.jsonl``. A number that is not finite has no place in JSON and is left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        path = self.path / "metrics.jsonl"
        with disk_errors(f"cannot write {path}", path), path.open("a") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of ``metrics.jsonl``; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Drops the metrics after ``step``, so that a resumed run does not report them twice."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        whole = (p for p in found if p.name[5:].isdigit() and (p / "state.pt").is_file())
        return sorted(whole, key=lambda p: int(p.name[5:]))

    def save_checkpoint(self, step: int, state: Mapping[str, Any], keep: int) -> Path:
        """Writes everything that a bit-exact resume needs, then removes all but the last ``keep`` checkpoints.

        A step whose checkpoint is complete is not written again: a run has one state per step.
        """
        import torch

        path = self.path / "checkpoints" / f"step-{step}"
        if path not in self.checkpoints():
            with new_folder(path) as folder:
                torch.save(dict(state), folder / "state.pt")
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return path

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last complete checkpoint's state on the CPU, or None."""
        import torch

        paths = self.checkpoints()
        if not paths:
            return None
        state: dict[str, Any] = torch.load(paths[-1] / "state.pt", map_location="cpu", weights_only=True)
        return state


def environment(seed: int, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a run ran on."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": _git_revision(),
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "accelerator": torch.cuda.get_device_name() if cuda else None,
        },
        "seed": seed,
        "hashes": dict(hashes),
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
