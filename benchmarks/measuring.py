"""What the workers of a comparison share: stopwatch, memory, counter of denoiser calls, versions, and the loop of
answers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "trl", "diffalign")

Numbers = dict[str, Any]


class Stopwatch:
    """Wall and processor seconds of named parts. Processor seconds are those of all threads of this process."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time spent inside to ``part``."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        total = self.parts.setdefault(part, {"wall": 0.0, "cpu": 0.0})
        total["wall"] += time.perf_counter() - wall
        total["cpu"] += time.process_time() - cpu


class CallCounter:
    """Counts the calls of a denoiser: without gradient, and those whose output a gradient reached."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.calls: Counter[tuple[str, int]] = Counter()
        denoiser.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Sequence[Tensor]) -> None:
        first, batch = output[0], len(output[0])
        if first.requires_grad:
            first.register_hook(lambda gradient: self._count("forward and backward", batch))
        else:
            self._count("forward", batch)

    def _count(self, kind: str, batch: int) -> None:
        self.calls[kind, batch] += 1

    def take(self) -> dict[str, int]:
        """The calls since the last time, by kind and batch."""
        calls = {f"{kind}, batch {batch}": count for (kind, batch), count in self.calls.items()}
        self.calls.clear()
        return dict(sorted(calls.items()))

    def take_rows(self) -> Counter[str]:
        """The rows of all batches since the last time, by kind."""
        rows: Counter[str] = Counter()
        for (kind, batch), count in self.calls.items():
            rows[kind] += batch * count
        self.calls.clear()
        return rows


def peak_mb() -> float:
    """Largest resident size of this process so far, in units of 1e6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


LIBC = ctypes.CDLL(None)


class _Mallinfo(ctypes.Structure):
    """What glibc says of its allocator: ``uordblks`` and ``hblkhd`` are the bytes in use, in its heaps and beside."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


class Memory:
    """What this process has of the device's memory, in bytes: on a CPU all that is resident, libraries too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """At this moment."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return int(psutil.Process().memory_info().rss)

    def live(self) -> int:
        """What is in use at this moment, without what the allocator keeps of what was freed, where it can tell."""
        if self.device.type == "cuda" or not hasattr(LIBC, "mallinfo2"):
            return self.now()
        LIBC.mallinfo2.restype = _Mallinfo
        told = LIBC.mallinfo2()
        return int(told.uordblks + told.hblkhd)

    def forget(self) -> None:
        """Begins a new peak. Of resident memory that is possible on Linux only: elsewhere a peak is since the start."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most since ``forget``."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if sys.platform != "linux":
            return int(peak_mb() * 1e6)
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def versions() -> dict[str, str]:
    """Of the libraries that are here."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(denoiser: nn.Module) -> Numbers:
    """What a side says when it is ready."""
    parameters = list(denoiser.parameters())
    return {
        "versions": versions(),
        "loaded_mb": peak_mb(),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def serve(threads: int, build: Callable[[], tuple[Numbers, Callable[[Numbers], Numbers]]]) -> None:
    """Builds a side, says that it is ready, and answers requests until standard input ends.

    ``build`` gives what to say first and the function from a request to its answer.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    torch.set_num_threads(threads)
    ready, answer = build()
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
