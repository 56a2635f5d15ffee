"""A reward that waits for a server is asked while the next samples are made: sooner, and to the bit the same."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from diffalign.config import CreditConfig, ObjectiveConfig, TrainerConfig
from diffalign.experience import Rollouts, Scored
from diffalign.interruption import Interrupted
from diffalign.overlap import Overlap
from diffalign.trainer import Trainer
from diffalign.types import Rollout, Sample, Scores
from rewards.combine import Combined
from rewards.remote import RemoteReward
from tests.test_remote_reward import served
from tests.test_trainer import PROMPTS, Target, WalkPolicy

PAUSE = 0.25


class Slow(Target):
    """The target's reward, after a while, with a part that only some batches have."""

    def __init__(self, waits: bool = True, pause: float = 0.0) -> None:
        self.waits, self.pause = waits, pause
        self.asked: list[tuple[int, str]] = []

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        time.sleep(self.pause)
        self.asked.append((len(samples), threading.current_thread().name))
        total = super().__call__(samples).total
        return Scores(total, {"own": total * 2} | ({"rare": total} if samples[0].seed % 2 else {}))


class SlowWalk(WalkPolicy):
    """Takes a while for a batch, and does not hold the interpreter meanwhile, as a GPU."""

    batch_size = 16
    pause = 0.0

    def rollout(self, prompts: Any, seeds: Any) -> Rollout:
        time.sleep(self.pause)
        return super().rollout(prompts, seeds)


def job(reward: Any, pause: float = 0.0) -> Trainer:
    policy = SlowWalk()
    policy.pause = pause
    return Trainer(
        policy, Rollouts(reward, PROMPTS), objective=ObjectiveConfig(), credit=CreditConfig(rule="batch"),
        settings=TrainerConfig(samples_per_epoch=64, batch_size=32, learning_rate=0.05, epochs=2),
    )  # fmt: skip


def gathered(trainer: Trainer) -> Scored:
    found = trainer.gather().experience
    assert isinstance(found, Scored)
    return found


def test_scores_are_those_of_a_reward_that_is_asked_afterwards() -> None:
    one, other = Slow(waits=True), Slow(waits=False)
    first, second = gathered(job(one)), gathered(job(other))
    assert torch.equal(first.scores.total, second.scores.total)
    assert torch.equal(first.scores.parts["own"], second.scores.parts["own"])
    assert [size for size, _ in one.asked] == [16] * 4 and [size for size, _ in other.asked] == [64]
    assert {name for _, name in one.asked} == {"reward"} and {name for _, name in other.asked} == {"MainThread"}


def test_a_part_that_only_some_batches_have_is_nan_elsewhere() -> None:
    trainer = job(Slow())
    scored = gathered(trainer)
    starts = [scored.rollout.samples[i].seed % 2 for i in range(0, 64, 16)]
    assert set(starts) == {0, 1}, "the seeds of this test have both kinds of batch"
    known = scored.scores.parts["rare"].isfinite().view(4, 16)
    assert known.all(1).tolist() == [bool(start) for start in starts] == known.any(1).tolist()


def test_training_is_the_same_to_the_bit() -> None:
    trained = []
    for waits in (True, False):
        trainer = job(Slow(waits))
        trainer.train()
        trained.append(trainer.policy.mean.detach().clone())  # type: ignore[attr-defined]
    assert torch.equal(*trained)


def test_the_reward_of_a_batch_is_asked_while_the_next_is_made() -> None:
    """The reward of each of 4 batches but the last, and the batch after it, go on only when both have begun: in turn
    neither would. What is made takes 4 times PAUSE, and the last reward, which nothing goes on beside, PAUSE.
    """
    together, begun = threading.Barrier(2), list[str]()

    class Meeting(Slow):
        def __call__(self, samples: Sequence[Sample]) -> Scores:
            begun.append("judged")
            if begun.count("judged") < 4:
                together.wait(60)
            return super().__call__(samples)

    trainer = job(Meeting(pause=PAUSE), PAUSE)
    original = trainer.policy.rollout

    def rollout(prompts: Any, seeds: Any) -> Rollout:
        begun.append("made")
        if begun.count("made") > 1:
            together.wait(60)
        return original(prompts, seeds)

    trainer.policy.rollout = rollout  # type: ignore[method-assign]
    metrics = trainer.gather().metrics
    assert begun.count("made") == begun.count("judged") == 4
    assert metrics["time/sample"] >= 4 * PAUSE and metrics["time/reward"] > 0


def test_a_reward_that_computes_is_asked_when_all_batches_are_made() -> None:
    """4 batches of PAUSE each, and then as long for the reward of all of them: 8 in turn."""
    started = time.perf_counter()
    metrics = job(Slow(waits=False, pause=4 * PAUSE), PAUSE).gather().metrics
    assert time.perf_counter() - started >= 8 * PAUSE
    assert metrics["time/sample"] >= 4 * PAUSE and metrics["time/reward"] >= 4 * PAUSE


class Failing(Slow):
    """Fails on its second batch."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        if len(self.asked) == 1:
            raise OSError("the server is gone")
        return super().__call__(samples)


def test_a_reward_that_fails_stops_sampling() -> None:
    """It fails while the third of four batches is made; the fourth is not made any more."""
    trainer = job(Failing(), pause=0.1)
    made, original = [], trainer.policy.rollout
    trainer.policy.rollout = lambda *given: made.append(1) or original(*given)  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the server is gone"):
        trainer.gather()
    assert len(made) == 3


def test_ctrl_c_asks_no_further_batch() -> None:
    reward = Slow(pause=0.05)
    trainer = job(reward)
    trainer.on_progress = lambda stage, done, total: trainer._interrupted.set()
    with pytest.raises(Interrupted):
        trainer.gather()
    time.sleep(0.2)
    assert len(reward.asked) <= 1


LEAVES = """
import sys, threading, time
import torch
from diffalign.overlap import Overlap
begun = threading.Event()

def waits(samples):
    begun.set()
    time.sleep(60)

def computes(samples):
    begun.set()
    square, until = torch.ones(400, 400), time.monotonic() + 0.3
    while time.monotonic() < until:
        square @ square

torch.set_num_threads(1)
with Overlap({"waits": waits, "computes": computes}[sys.argv[1]]) as asking:
    asking.ask(0, [])
    asking.ask(1, [])
    begun.wait()
    sys.exit(7)
"""


@pytest.mark.parametrize("reward", ["waits", "computes"])
def test_a_process_leaves_while_a_request_is_under_way(reward: str) -> None:
    """It does not sit out a request of 60 s, and is not aborted by torch while a part of the reward computes."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, reward], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert time.monotonic() - started < 30


class Exits(Slow):
    def __call__(self, samples: Sequence[Sample]) -> Scores:
        raise SystemExit("gone")


def test_whatever_the_reward_fails_with_is_told() -> None:
    """An answer that nobody gives any more would be waited for without end."""
    with Overlap(Exits()) as asking:
        asking.ask(0, [])
        with pytest.raises(SystemExit, match="gone"):
            asking.scores()


def test_who_waits() -> None:
    """Servers do, and a combination with one; what computes does not."""
    assert RemoteReward.waits and not getattr(Target(), "waits", False)
    assert Combined([(Slow(), 1.0, None), (Named(), 1.0, None)]).waits
    assert not Combined([(Named(), 1.0, None)]).waits


class Named(Target):
    name = "named"


@contextmanager
def remote(reward: Any) -> Iterator[RemoteReward]:
    with served(reward) as server:
        yield RemoteReward(server.url)


def test_over_http() -> None:
    """A real server that takes its time: the same scores as asking the reward itself, batch by batch."""
    slow = Slow(waits=False, pause=0.02)
    with remote(slow) as reward:
        found = gathered(job(reward))
    expected = gathered(job(Target()))
    assert torch.equal(found.scores.total, expected.scores.total)
    assert [size for size, _ in slow.asked] == [16] * 4
