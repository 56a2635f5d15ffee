"""A reward that waits for somebody else is asked about one batch of samples while the next is made."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from diffalign.types import Reward, Sample, Scores


def waits(reward: Reward) -> bool:
    """Whether a reward says that it waits, for a server or a person, rather than computes (``waits = True``)."""
    return bool(getattr(reward, "waits", False))


class Overlap:
    """One thread that asks a reward about batches, one after the other, in the order in which they come.

    So the reward has never two requests at a time, and each answer is that of its own batch, whenever it comes.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self._thread = ThreadPoolExecutor(1, "reward")
        self._asked: dict[int, Future[Scores]] = {}

    def __enter__(self) -> Overlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was not asked yet is not asked any more, and a request that is under way is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ask(self, number: int, samples: Sequence[Sample]) -> None:
        """Has the batch of that number judged. Raises what the reward failed with meanwhile, if it did."""
        for earlier in self._asked.values():
            if earlier.done():
                earlier.result()
        self._asked[number] = self._thread.submit(self.reward, samples)

    def scores(self) -> dict[int, Scores]:
        """The answers by number; waits for those that are not there yet. Raises what the reward failed with."""
        return {number: answer.result() for number, answer in self._asked.items()}
