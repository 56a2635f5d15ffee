"""The weights file of torchxrayvision read as data, and the DenseNet that it fits.

The published files hold a whole module, which ``torch.load`` would rebuild by running what the file says. Here the file
is read without that: ``module_tensors`` walks through its instructions and carries out those that make plain data. A
class or function that the file names becomes an empty shell, and nothing is imported or called.

Shape legend: ``B`` images, ``F`` findings.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from diffalign.errors import InputError
from rewards import weights as files

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Shell:
    """What stands in for a class, a function or an object that a file names: a name, arguments and a state."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: dict[str, Any] = {}
        self.items: list[tuple[Any, Any]] = []


def load(path: Path, sha256: str, need: str) -> dict[str, Tensor]:
    """The tensors of the file: a state dict (safetensors, or torch's format), or a whole module that is pinned."""
    files.pinned(path, sha256, need)
    if path.suffix == ".safetensors":
        return files.read(path, need)
    try:
        return files.read(path, need)
    except InputError as error:
        with path.open("rb") as file:
            made = file.read(4)
        if not made.startswith((b"PK", b"\x80")):
            raise
        if not sha256:
            raise InputError(
                f"{path} holds a whole module and not only weights; if it is the file that you mean, pin it with "
                f"sha256={files.digest(path)}"
            ) from error
    return module_tensors(path, need)


def module_tensors(path: Path, need: str) -> dict[str, Tensor]:
    """Parameters and buffers, by name, of the module in a file that ``torch.save(module)`` wrote, old format or new."""
    try:
        with path.open("rb") as file:
            root, tensor = _open_zip(file) if zipfile.is_zipfile(path) else _open_stream(file)
            found = dict(_walk(root, "", tensor))
    except (
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f"{path} cannot be read as {need}: {type(error).__name__} {error}") from error
    if not found:
        raise InputError(f"{path} holds no tensors; it is not {need}")
    return found


_Read = Callable[[_Shell], Tensor]


def _open_zip(file: BinaryIO) -> tuple[Any, _Read]:
    """torch 1.6 and later: a zip with ``data.pkl`` and one file per storage."""
    archive = zipfile.ZipFile(file)
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    root = _interpret(io.BytesIO(archive.read(names["data.pkl"])))
    storages: dict[str, bytes] = {name[5:]: archive.read(names[name]) for name in names if name.startswith("data/")}
    return root, lambda shell: _tensor(shell, storages)


def _open_stream(file: BinaryIO) -> tuple[Any, _Read]:
    """Before torch 1.6: three headers, the object, the keys of the storages, and then the storages themselves."""
    magic, _protocol, _system, root, keys = (_interpret(file) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it does not begin as torch's files do")
    sizes = {str(s.arguments[2]): _DTYPES[s.arguments[1].name.rpartition(".")[2]].itemsize for s in _storages(root)}
    storages: dict[str, bytes] = {}
    for key in keys:
        elements = int.from_bytes(file.read(8), "little")
        storages[str(key)] = file.read(elements * sizes[str(key)])
    return root, lambda shell: _tensor(shell, storages)


def _interpret(file: BinaryIO) -> Any:
    """The data that the next pickle in the file describes, with shells for all that is not data."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for opcode, value, _position in pickletools.genops(file):
        name, argument = opcode.name, cast(Any, value)
        if name == "STOP":
            break
        if name == "MARK":
            marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Shell(argument.replace(" ", ".")))
        elif name in _BUILDERS:
            _BUILDERS[name](stack, since_mark() if name in _MARKED else [])
        elif name != "PROTO":
            raise ValueError(f"its instruction {name} is none that makes data")
    return stack.pop()


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "SHORT_BINUNICODE"}
_MARKED = {"APPENDS", "SETITEMS", "TUPLE"}


def _append(stack: list[Any], _items: list[Any]) -> None:
    value = stack.pop()
    stack[-1].append(value)


def _append_all(stack: list[Any], items: list[Any]) -> None:
    stack[-1].extend(items)


def _set(stack: list[Any], _items: list[Any]) -> None:
    pair = stack[-2:]
    del stack[-2:]
    _set_all(stack, pair)


def _set_all(stack: list[Any], items: list[Any]) -> None:
    pairs = list(zip(items[::2], items[1::2], strict=True))
    target = stack[-1]
    if isinstance(target, _Shell):
        target.items.extend(pairs)
    else:
        target.update(pairs)


def _tuple(size: int) -> Callable[[list[Any], list[Any]], None]:
    def collect(stack: list[Any], _items: list[Any]) -> None:
        stack[-size:] = [tuple(stack[-size:])]

    return collect


def _call(stack: list[Any], _items: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_Shell(function.name, arguments))


def _build(stack: list[Any], _items: list[Any]) -> None:
    state = stack.pop()
    if isinstance(state, dict) and isinstance(stack[-1], _Shell):
        stack[-1].state.update(state)


def _persistent(stack: list[Any], _items: list[Any]) -> None:
    """A class with its source text, of which only the class is kept, or a storage."""
    what = stack.pop()
    stack.append(what[1] if what[0] == "module" else _Shell("storage", what))


_BUILDERS: dict[str, Callable[[list[Any], list[Any]], None]] = {
    "APPEND": _append,
    "APPENDS": _append_all,
    "SETITEM": _set,
    "SETITEMS": _set_all,
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def _pairs(table: Any) -> list[tuple[str, Any]]:
    """The entries of a dict, or of the shell of an ordered one."""
    if isinstance(table, _Shell):
        return [(str(key), value) for key, value in table.items]
    return [(str(key), value) for key, value in (table or {}).items()]


def _walk(module: Any, prefix: str, tensor: _Read) -> Iterator[tuple[str, Tensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, value in _pairs(module.state.get(kind)):
            if value is not None:
                yield prefix + name, tensor(value)
    for name, child in _pairs(module.state.get("_modules")):
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", tensor)


def _storages(module: Any) -> Iterator[_Shell]:
    for kind in ("_parameters", "_buffers"):
        yield from (_storage(value) for _, value in _pairs(module.state.get(kind)) if value is not None)
    for _, child in _pairs(module.state.get("_modules")):
        if child is not None:
            yield from _storages(child)


def _storage(value: _Shell) -> _Shell:
    while value.name != "storage":
        value = value.arguments[0]
    return value


def _tensor(shell: _Shell, storages: Mapping[str, bytes]) -> Tensor:
    """A parameter or tensor from its description: storage, offset, shape and strides in elements."""
    while shell.name.endswith(("_rebuild_parameter", "Parameter")):
        shell = shell.arguments[0]
    if not shell.name.endswith("_rebuild_tensor_v2"):
        raise ValueError(f"it describes a tensor by {shell.name}")
    storage, offset, shape, stride = shell.arguments[:4]
    if any(part is not None for part in storage.arguments[5:]):
        raise ValueError("one of its tensors is a view of another, in a way that only very old versions wrote")
    dtype = _DTYPES[storage.arguments[1].name.rpartition(".")[2]]
    flat = torch.frombuffer(bytearray(storages[str(storage.arguments[2])]), dtype=dtype)
    return torch.as_strided(flat, shape, stride, offset).clone()


def densenet(state: Mapping[str, Tensor], path: Path, need: str) -> torch.nn.Module:
    """torchvision's DenseNet with one input channel and the given weights; all sizes are read from their shapes."""
    from torchvision.models import DenseNet

    try:
        first = state["features.conv0.weight"]
        grown, bottleneck = (state[f"features.denseblock1.denselayer1.conv{i}.weight"].shape[0] for i in (2, 1))
        outputs = state["classifier.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"{path} is not {need}: it lacks {error.args[0]}") from error
    layers: dict[int, int] = {}
    for name in state:
        match = re.match(r"features\.denseblock(\d+)\.denselayer(\d+)\.", name)
        if match:
            layers[int(match[1])] = max(layers.get(int(match[1]), 0), int(match[2]))
    network = DenseNet(
        growth_rate=grown,
        block_config=tuple(layers[block] for block in sorted(layers)),
        num_init_features=first.shape[0],
        bn_size=bottleneck // grown,
        num_classes=outputs,
    )
    network.features.conv0 = torch.nn.Conv2d(first.shape[1], first.shape[0], 7, stride=2, padding=3, bias=False)
    counted = {name: tensor for name, tensor in state.items() if name != "op_threshs"}
    # The oldest files do not count the batches of a batch norm; reading does not need the count.
    counted |= {n: t for n, t in network.state_dict().items() if n.endswith("num_batches_tracked") and n not in counted}
    files.fill(network, counted, path, need)
    return cast(torch.nn.Module, network.eval().requires_grad_(False))
