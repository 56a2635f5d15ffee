"""torch.compile of the blocks that a denoiser is made of: less time a step, after a warm-up.

Block by block, for equal blocks share what was compiled: the warm-up is a fraction of that of a whole denoiser
(``benchmarks/profile.md``). A block is compiled in place, so weights, their names and what is saved stay as they are.

Adapters on, off or merged, with gradient or without, and each shape are versions of their own, compiled when they first
come up. Shapes are never made symbolic: which version answers then depends on the call alone, never on what was asked
before, so a resumed run has the bits of an uninterrupted one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from diffalign.errors import ConfigError

BACKEND = "inductor"
OPTIONS: Mapping[str, Mapping[str, bool]] = {"inductor": {"emulate_precision_casts": True}}
"""Of a backend. Half precisions are rounded where they are without compiling: else versions with gradient and without
round in other places, and ratios were up to 0.028 from 1 before any update (a tiny U-Net in bfloat16 on a CPU)."""
VERSIONS = 128
"""Most versions of one kind of block; torch's own limit is 8. A U-Net of 4 shapes with 5 kinds of calls (with gradient
twice: the first block of all gets an input without one) needs 20 for each batch size. Beyond, torch warns and goes on
without compiling."""


def compile_blocks(models: Sequence[nn.Module], device: torch.device) -> Mapping[str, int]:
    """Compiles in place the blocks that diffusers says these models, of one class, repeat; returns how many of each
    class one model has.

    Where it says nothing of repetition (Stable Diffusion 3), what it says must not be split over devices. Raises
    ConfigError for a model without either, and where torch cannot compile on this machine.
    """
    kind = type(models[0])
    names = getattr(kind, "_repeated_blocks", None) or getattr(kind, "_no_split_modules", None) or ()
    blocks = [[block for block in model.modules() if type(block).__name__ in names] for model in models]
    if not all(blocks):
        raise ConfigError(
            f"compile: diffusers names no blocks of a {kind.__name__} that could be compiled one by one; leave compile"
            " out"
        )
    _require_compiler(device)
    torch.compiler.config.recompile_limit = max(VERSIONS, torch.compiler.config.recompile_limit)
    for block in (block for some in blocks for block in some):
        block.compile(backend=BACKEND, dynamic=False, options=dict(OPTIONS.get(BACKEND, {})) or None)
    return Counter(type(block).__name__ for block in blocks[0])


def _require_compiler(device: torch.device) -> None:
    """Compiles something small: whatever a machine lacks (a compiler, headers, a driver) is found before any work."""
    try:
        with _quiet_about_cuda():
            torch.compile(_small, backend=BACKEND, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        found = str(error).strip()
        reason = found.splitlines()[0] if found else type(error).__name__
        raise ConfigError(
            f"compile: torch.compile does not work for device {device.type} here: {reason}; install what is missing"
            " (for a CPU a C++ compiler such as g++), or leave compile out"
        ) from error


@contextmanager
def _quiet_about_cuda() -> Iterator[None]:
    """Inside it torch does not warn that it found the CUDA toolkit and no GPU, which is nothing to a CPU.

    It says so once, when what compiles for a CPU is first imported.
    """
    source, message = logging.getLogger("torch.utils.cpp_extension"), "No CUDA runtime is found, using CUDA_HOME"

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(message)

    source.addFilter(other)
    try:
        yield
    finally:
        source.removeFilter(other)


def _small(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers + 1).cos()
