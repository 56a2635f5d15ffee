"""A reward that waits for somebody else is asked about one batch of samples while the next is made."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

from diffalign.types import Reward, Sample, Scores

GRACE = 2.0
"""Seconds that a process which ends leaves to a reward: torch aborts one that ends while another thread computes."""


def waits(reward: Reward) -> bool:
    """Whether a reward says that it waits, for a server or a person, rather than computes (``waits = True``)."""
    return bool(getattr(reward, "waits", False))


class Overlap:
    """One thread that asks a reward about batches, one after the other, in the order in which they come.

    So the reward has never two requests at a time, and each answer is that of its own batch, whenever it comes.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self._waiting = SimpleQueue[tuple[Future[Scores], Sequence[Sample]] | None]()
        self._asked: dict[int, Future[Scores]] = {}
        # No ThreadPoolExecutor: Python does not exit before the threads of one are done, however long a request takes.
        self._thread = Thread(target=self._answer, name="reward", daemon=True)
        self._thread.start()

    def __enter__(self) -> Overlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was not asked yet is not asked any more, and a request that is under way is not waited for.

        Where the process ends meanwhile it gets GRACE, and no more.
        """
        for answer in self._asked.values():
            answer.cancel()
        self._waiting.put(None)
        if not all(answer.done() for answer in self._asked.values()):
            atexit.register(self._thread.join, GRACE)

    def ask(self, number: int, samples: Sequence[Sample]) -> None:
        """Has the batch of that number judged. Raises what the reward failed with meanwhile, if it did."""
        for earlier in self._asked.values():
            if earlier.done():
                earlier.result()
        self._asked[number] = answer = Future[Scores]()
        self._waiting.put((answer, samples))

    def scores(self) -> dict[int, Scores]:
        """The answers by number; waits for those that are not there yet. Raises what the reward failed with."""
        return {number: answer.result() for number, answer in self._asked.items()}

    def _answer(self) -> None:
        while (asked := self._waiting.get()) is not None:
            answer, samples = asked
            if answer.set_running_or_notify_cancel():
                try:
                    scores = self.reward(samples)
                except BaseException as error:  # whatever it is, who asks for the answer is told
                    answer.set_exception(error)
                else:
                    answer.set_result(scores)
