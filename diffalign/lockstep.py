"""Work that takes all processes of a run at once, such as a pass through a model whose weights are divided among them.

Each kind of such work has a number and a stand-in: the same work, whose result is thrown away. Before it, and before
every exchange, the processes agree on what comes next: the lowest number that any of them wants, and the exchange when
nobody wants work any more. A process that wants something else does the stand-in, and asks again. So each does as much
of this work as its share needs, in any order and at any place, or none, and nobody waits for one that does not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from diffalign.errors import DiffalignError

NOTHING = 1 << 30
"""What a process wants that has come to an exchange."""
T = TypeVar("T")


class LostError(DiffalignError):
    """Another process of the run is gone."""


@contextmanager
def connected() -> Iterator[None]:
    """Around what needs the other processes, and nothing else: an error of it means that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(
            "another process of this run has ended; its own output, or that of the launcher, says why. Continue"
            " from the last checkpoint with --resume"
        ) from error


class Lockstep:
    """The work that all processes do at once, seen from one of them."""

    def __init__(self, group: Any) -> None:
        """``group`` is how they agree: a process group of gloo."""
        self._group = group
        self._stand_ins: list[Callable[[], object]] = []
        self.broken = False
        """Whether such work failed here: the others are in the middle of it, and cannot be told of anything."""

    def add(self, *stand_ins: Callable[[], object]) -> int:
        """Makes kinds of work known by what stands in for them; the number of the first. All must add the same."""
        self._stand_ins += stand_ins
        return len(self._stand_ins) - len(stand_ins)

    def work(self, number: int, own: Callable[[], T]) -> T:
        """What ``own`` gives, made when all are at work of this kind."""
        self._until(number)
        return self._done(own)

    def rest(self) -> None:
        """Helps with the work of the others, until none has any."""
        if self._stand_ins:
            self._until(NOTHING)

    def _until(self, wanted: int) -> None:
        while (found := self._next(wanted)) != wanted:
            self._done(self._stand_ins[found])

    def _next(self, wanted: int) -> int:
        lowest = torch.tensor(wanted)
        with connected():
            distributed.all_reduce(lowest, distributed.ReduceOp.MIN, group=self._group)
        return int(lowest)

    def _done(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except BaseException as error:
            self.broken = True
            if isinstance(error, RuntimeError) and _of_connections(error):
                with connected():
                    raise
            raise


def _of_connections(error: RuntimeError) -> bool:
    """Whether an error in the middle of work comes from another process that is gone; gloo says so in words alone."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
