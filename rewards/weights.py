"""Weights files of others: found, pinned, and read as data.

Nothing here runs code from a file: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import ConfigError, InputError, NotFoundError

HUB = "hf-hub:"
_HUB_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[^/].*)")
_HEAD = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


def local(name: str, need: str) -> Path:
    """The file that ``name`` stands for: a path, or ``hf-hub:OWNER/NAME/FILE``, fetched unless it is cached.

    ``need`` says in the message of an error what the file is, such as ``the HPSv2 checkpoint``.
    """
    if not name.startswith(HUB):
        path = Path(name).expanduser()
        if not path.is_file():
            raise NotFoundError(
                f"there is no file {path} for {need}; give weights=PATH or weights={HUB}OWNER/NAME/FILE"
            )
        return path
    match = _HUB_FILE.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise ConfigError(f"weights={name!r} is not {HUB}OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match["repository"], match["file"]))
    # The hub client reports trouble by errors of many kinds, those of its network library among them.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise NotFoundError(
            f"{need} could not be had from {match['repository']} ({reason}); with no connection, give weights=PATH"
        ) from error


def pinned(path: Path, sha256: str, need: str) -> None:
    """An InputError unless the file has that SHA-256; an empty one pins nothing."""
    if not sha256:
        return
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ConfigError(f"sha256={sha256!r} is not 64 hexadecimal digits")
    found = digest(path)
    if found != sha256.lower():
        raise InputError(f"{path} is not {need}: its SHA-256 is {found}, and {sha256.lower()} was asked for")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, need: str) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU.

    A ``state_dict`` or ``model`` inside is opened, and a leading ``module.`` is taken off.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored: object = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler reports bytes that are not its own by errors of many kinds.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as {need}: {reason}") from error
    return tensors(stored, path, need)


def tensors(stored: object, path: Path, need: str) -> dict[str, Tensor]:
    """The tensors of what a file held; see ``read``."""
    for key in ("state_dict", "model"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping):
        raise InputError(f"{path} holds a {type(stored).__name__} and no table of tensors; it is not {need}")
    found = {str(name).removeprefix("module."): value for name, value in stored.items() if isinstance(value, Tensor)}
    if not found:
        raise InputError(f"{path} holds no tensors; it is not {need}")
    return found


def fill(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path, need: str) -> None:
    """Loads a state dict that must fit exactly, in float32, or raises one sentence that says what does not."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    other = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    for what, names in (("lacks", missing), ("also holds", extra), ("has another shape for", other)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path} is not {need}: it {what} {names[0]}{more}")
    module.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in state.items()})


class LinearHead(torch.nn.Module):
    """Five linear layers with nothing between them: ``(B, D)`` to ``(B,)``.

    Both the LAION aesthetic predictor and ImageReward end in it, as ``layers.0, .2, .4, .6, .7``: dropout stood
    between them in training, and activations never did. The widths are read from the weights (768-1024-128-64-16-1 in
    the released ones).
    """

    def __init__(self, state: Mapping[str, Tensor], path: Path, need: str) -> None:
        """``state`` holds the weights and biases under the released names."""
        super().__init__()
        names = sorted({name.rpartition(".")[0] for name in state})
        if tuple(names) != _HEAD or any(state[f"{name}.weight"].ndim != 2 for name in names):
            raise InputError(f"{path} is not {need}: its head has {', '.join(names[:6])} and not {', '.join(_HEAD)}")
        shapes = [tuple(state[f"{name}.weight"].shape) for name in names]
        if [width_out for width_out, _ in shapes] != [width_in for _, width_in in shapes[1:]] + [1]:
            raise InputError(f"{path} is not {need}: its layers do not follow each other down to one number: {shapes}")
        self.layers = torch.nn.ModuleDict()
        for name, (width_out, width_in) in zip(names, shapes, strict=True):
            self.layers[name.removeprefix("layers.")] = torch.nn.Linear(width_in, width_out)
        fill(self, state, path, need)

    @property
    def width(self) -> int:
        """Dimensions of the features that it takes."""
        return int(self.get_parameter("layers.0.weight").shape[1])

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, D)`` to scores ``(B,)``."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(1)
