"""The processes that train one model together: each does its share of the work, and all of them end up the same.

``accelerate launch`` or ``torchrun`` starts them, and ``accelerate`` is the engine. Between two exchanges each works by
itself; an exchange brings every process what each of them has. An error travels in the next exchange, so no process
waits for one that has failed; one that was killed closes its connections, and the others end with ``LostError``.

What travels is written by ``torch.save`` and read with ``weights_only``: tensors, numbers, texts, lists and mappings.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce
from torch import Tensor, distributed
from torch.nn import Parameter

from diffalign import errors
from diffalign.errors import ConfigError, DiffalignError, InputError
from diffalign.lockstep import Lockstep, LostError, connected

__all__ = ["LostError", "Processes", "checksum", "launched", "own_device", "start"]

PATIENCE = timedelta(days=7)
"""So long processes wait for each other: one may be asking a slow reward, or evaluating."""
BUCKET = 1 << 24
"""Numbers that are summed over the processes at a time: 64 MB of float32."""
T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> Processes:
    """Joins the processes that were launched together with this one, if any were."""
    if not launched():
        return Processes()
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return Processes(PartialState(cpu=wanted or not torch.cuda.is_available(), timeout=PATIENCE))


class Processes:
    """All processes of a run, seen from one of them."""

    def __init__(self, state: PartialState | Accelerator | None = None) -> None:
        """Without a state this process is alone."""
        self.rank = 0 if state is None else int(state.process_index)
        self.count = 1 if state is None else int(state.num_processes)
        self.device: torch.device | None = None
        """What the launcher gave this process to compute on; None where it is alone."""
        if state is not None and self.count > 1:
            self.device = state.device
            self._group, self.lockstep = _group(), _lockstep()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def own(self, count: int) -> Tensor:
        """int64: the numbers below ``count`` that this process works on, every ``self.count``-th."""
        return torch.arange(self.rank, count, self.count)

    # -- exchanges --------------------------------------------------------------------------------------------------

    def exchange(self, what: str, payload: Any = None) -> list[Any]:
        """The payloads of all processes, by rank. Raises what another process has failed with, or LostError.

        All must call it for the same ``what``.
        """
        if self.count == 1:
            return [payload]
        found = self._gathered({"what": what, "payload": payload})
        failures = [(rank, each["error"]) for rank, each in enumerate(found) if "error" in each]
        if failures:
            raise _agreed(_rebuilt(*failures[0]))
        if any(each["what"] != what for each in found):
            raise RuntimeError(f"the processes of the run do different things: {[each['what'] for each in found]}")
        return [each["payload"] for each in found]

    def summed(self, what: str, own: Tensor) -> Tensor:
        """The sum of what all processes have, on the CPU where there are several."""
        return own if self.count == 1 else torch.stack(self.exchange(what, own.cpu())).sum(0)

    def first_says(self, what: str, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, the only one that does it."""
        found: T = self.exchange(what, work() if self.first else None)[0]
        return found

    def first_then_all(self, what: str, work: Callable[[], T]) -> T:
        """``work`` in the first process, and then, when its files are there, in all others."""
        if self.first:
            found = work()
            self.exchange(what)
            return found
        self.exchange(what)
        return work()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside it is told to the other processes, which raise it in their next exchange."""
        try:
            yield
        except LostError:
            raise
        except Exception as error:
            if self.count > 1 and not self.lockstep.broken and not getattr(error, "agreed", False):
                with suppress(LostError):
                    self._gathered({"error": _described(error)})
                _agreed(error)
            raise

    def leave(self) -> None:
        """After the last exchange: waits for all others, and parts from them."""
        self.exchange("end")
        if self.count > 1:
            self.count = 1  # alone from here on
            del self._group, self.lockstep
            _part()

    def wait_for_first(self) -> None:
        """Waits until the first process has ended: a launcher ends all of them as soon as one has."""
        if self.count > 1 and not self.first and not self.lockstep.broken:
            with suppress(RuntimeError):
                distributed.recv(torch.zeros(1), src=0, group=self._group)

    def _gathered(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        written = io.BytesIO()
        torch.save(message, written)
        own = torch.frombuffer(written.getbuffer(), dtype=torch.uint8)
        self.lockstep.rest()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with connected():
            distributed.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            longest = max(int(size) for size in sizes)
            padded = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.uint8)])
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            distributed.all_gather(parts, padded, group=self._group)
        return [
            message if rank == self.rank else _read(rank, part[: int(size)])
            for rank, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]

    # -- gradients --------------------------------------------------------------------------------------------------

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replaces each gradient by its sum over the processes; one that is missing counts as 0.

        Not by ``DistributedDataParallel``: the policy asks its model in several ways and numbers of times, with and
        without adapters, and a process may have no row of an update at all.
        """
        if self.count == 1:
            return
        for some in _buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            with connected():
                total = reduce(torch.cat([each.reshape(-1) for each in gradients]), "sum")
            for parameter, part in zip(some, total.split([p.numel() for p in some]), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)


def checksum(parameters: Iterable[Parameter]) -> int:
    """A number that differs where a bit of the weights does (but for the rarest accidents)."""
    parts = [p.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64).cpu() for p in parameters]
    return hash(tuple(int(part) for part in parts))


@cache
def _group() -> Any:
    """For what is exchanged on the CPU, whatever the device that trains."""
    found = distributed.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(_part)
    return found


@cache
def _lockstep() -> Lockstep:
    return Lockstep(_group())


def _part() -> None:
    """Ends the connections, and gloo's threads with them: torch aborts a process that ends while one of them still
    holds a tensor of the last exchange (pytorch/pytorch#190489). A group ends when nothing refers to it any more.
    """
    if distributed.is_initialized() and not _lockstep().broken:  # else one may be at work that will never be done
        _lockstep.cache_clear()
        _group.cache_clear()
        gc.collect()
        distributed.destroy_process_group()


def _buckets(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    some: list[Parameter] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > BUCKET:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def _read(rank: int, part: Tensor) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(part.numpy().tobytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"process {rank} made something that cannot be sent to the others; the evidence of a sample must be of"
            " numbers, texts, lists and mappings"
        ) from error
    return found


def _described(error: Exception) -> list[str]:
    """The nearest class of ``diffalign.errors``, empty if there is none, and the message."""
    own = next((c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__), "")
    return [own, str(error) if own else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]


def _rebuilt(rank: int, described: list[str]) -> DiffalignError:
    kind: type[DiffalignError] = getattr(errors, described[0] or "DiffalignError")
    return kind(f"process {rank}: {described[1]}")


E = TypeVar("E", bound=Exception)


def _agreed(error: E) -> E:
    """Marks an error that every process knows of."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def own_device(name: str, given: torch.device) -> torch.device:
    """The device of this one of several processes. Raises ConfigError where the configuration names another kind."""
    if name not in ("auto", given.type):
        raise ConfigError(
            f"device is {name!r}, but the processes of this run were started on {given.type}: set device to auto or"
            f" {given.type}, or start them with ACCELERATE_USE_CPU=true for cpu"
        )
    return given
