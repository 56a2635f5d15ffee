"""What tests/test_sharding.py trains with divided weights: ``torchrun -m tests.sharding_cases FOLDER``.

Every process leaves FOLDER/rank-R.pt: of each case its weights and metrics, and what only several can show.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import InputError
from diffalign.evaluation import evaluate
from diffalign.experience import OnlinePairs, Recorded, Rollouts
from diffalign.processes import start
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Sample, Scores
from pipelines import sharding
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import FAMILIES
from tests import tiny_pipelines
from tests.processes_cases import (
    ONE,
    SCENES,
    SEVEN,
    Bright,
    bright,
    labelled,
    raised,
    shared_run,
    shown,
    trained,
    trainer,
)

SHORT = {"epochs": 1, "samples_per_epoch": 6}


def policy(folder: Path, shard: bool, family: str = "stable_diffusion", **options: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    pipeline = getattr(tiny_pipelines, family)(folder)
    return DiffusionPolicy(
        FAMILIES[type(pipeline).__name__](pipeline), adapter=AdapterConfig(rank=2),
        sampler=SamplerConfig(steps=3, batch_size=2, size=tiny_pipelines.SIZE), shard=shard, **options,
    )  # fmt: skip


def ppo(folder: Path, shard: bool) -> Trainer:
    """6 samples in 3 batches, so one process makes two and the other one. Of an update's 3 rows, a step of each sample,
    too: the one with a single row is at the supervised term while the other still has a row to do.
    """
    return trainer(
        policy(folder, shard), Rollouts(bright(), SCENES), "ppo-clip", beside=shown(folder), shard=shard,
        timestep_fraction=0.3, own={"kl_coefficient": 0.1, "ptx_coefficient": 0.5, "clip_range": 0.5},
        **(SHORT | {"micro_batch_size": 1}),
    )  # fmt: skip


def short(folder: Path, shard: bool, run: Run | None = None, epochs: int = 2) -> Trainer:
    """Of 3 rows one process has 2 and the other 1."""
    return trainer(
        policy(folder, shard), Recorded(shown(folder).samples[:3]), "sft", run=run, epochs=epochs, samples_per_epoch=3,
        samples_per_prompt=1, shard=shard,
    )  # fmt: skip


def text_blocks(folder: Path, shard: bool) -> Trainer:
    """Z-Image has blocks that see the text alone."""
    source = Rollouts(bright(), [Prompt("a"), Prompt("b")])
    return trainer(policy(folder, shard, "z_image"), source, "elbo-ppo-clip", shard=shard, **SHORT)


CASES: dict[str, Callable[[Path, bool], Trainer]] = {
    "ppo-clip": ppo,
    "online dpo of a flow model": lambda folder, shard: trainer(
        policy(folder, shard, "stable_diffusion_3", gradient_checkpointing=True), OnlinePairs(bright(), SCENES), "dpo",
        gradient_checkpointing=True, shard=shard, **SHORT,
    ),
    "elbo-ppo-clip of z-image": text_blocks,
    "nft of flux under an average": lambda folder, shard: trainer(
        policy(folder, shard, "flux"), Rollouts(bright(), SCENES), "nft", shard=shard, ema_decay=0.5,
        **(SHORT | {"epochs": 2}),
    ),
    "nft of sdxl with a reference": lambda folder, shard: trainer(
        policy(folder, shard, "stable_diffusion_xl"), Rollouts(bright(), SCENES), "nft", shard=shard,
        own={"kl_coefficient": 0.1}, **SHORT,
    ),
    "kto of 7, one at a time": lambda folder, shard: trainer(
        policy(folder, shard), labelled(folder), "kto", shard=shard, micro_batch_size=1, **(SEVEN | {"epochs": 1})
    ),
    "sft of 1": lambda folder, shard: trainer(
        policy(folder, shard), Recorded(shown(folder).samples[:1]), "sft", shard=shard, **ONE
    ),
    "draft": lambda folder, shard: trainer(
        policy(folder, shard, gradient_checkpointing=True), Rollouts(bright(), SCENES), "draft", shard=shard,
        own={"backprop_steps": 2}, gradient_checkpointing=True, **SHORT,
    ),
}  # fmt: skip


class BrokenElsewhere(Bright):
    """Fails in the second process alone."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        if start().rank == 1:
            raise InputError("the judge does not answer")
        return super().__call__(samples)


def broken() -> Any:
    return BrokenElsewhere()


def undivided(own: Path) -> list[str]:
    """The second process alone has no room for its part; no weights are divided yet, so the first can be told."""
    crew = start()
    short_of = patch.object(sharding, "divide", side_effect=InputError("no room for its part"))

    def work() -> None:
        with crew.telling(), short_of if crew.rank == 1 else nullcontext():
            policy(own, True)

    return raised(work)


def of_two_processes(folder: Path, own: Path) -> dict[str, Any]:
    """What only several processes can show."""
    crew, found = start(), dict[str, Any]()
    one = policy(own, True)
    frozen = [parameter for parameter in one.family.denoiser.parameters() if not parameter.requires_grad]
    found["divided"] = all(isinstance(parameter, DTensor) for parameter in frozen)
    found["kept"] = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
    found["whole"] = sum(p.numel() for p in frozen)
    found["latents"] = crew.first_says("first alone", lambda: sampled(moved(one))), sampled(moved(policy(own, False)))
    found["broken"] = raised(trainer(policy(own, True), Rollouts(broken(), SCENES), "ppo-clip", shard=True).train)
    run = shared_run(folder / "resumed")
    short(own, True, run, epochs=1).train()
    again = short(own, True, run)
    again.resume()
    found["resumed"], found["straight"] = trained(again), trained(short(own, True))
    if crew.first:
        again.policy.save(run.path)
    found["evaluation"] = evaluated(own, True)
    return found


def moved(some: DiffusionPolicy) -> DiffusionPolicy:
    """The policy, made to differ from its reference."""
    with torch.no_grad():
        for parameter in some.trainable().values():
            parameter.add_(0.05)
    return some


def sampled(some: DiffusionPolicy) -> Tensor:
    """The latents of a sample of the policy, and of one of its reference."""
    with some.reference():
        reference = some.rollout(SCENES[:1], [7])
    return torch.cat([some.rollout(SCENES[:1], [7]).state["latents"], reference.state["latents"]])


def evaluated(folder: Path, shard: bool) -> dict[str, Any]:
    """The evaluation of a policy that differs from its reference."""
    outcome = evaluate(moved(policy(folder, shard)), SCENES, bright(), seeds_per_prompt=1, processes=start())
    return {key: value for key, value in outcome.to_json().items() if key != "seconds"}


def lost(folder: Path, how: str) -> None:
    """The second process ends in the middle of a pass; both leave what they said, and when."""
    crew = start()
    some = policy(folder / f"pipeline-{crew.rank}", True)
    blocks = [module for module in some.family.denoiser.modules() if isinstance(module, ResnetBlock2D)]

    def end(*_: object) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this block is broken")

    if crew.rank == 1:
        blocks[1].register_forward_pre_hook(end)

    def work() -> None:
        with crew.telling():
            sampled(some)

    said = raised(work)
    (folder / f"said-{crew.rank}").write_text(": ".join(said))
    crew.wait_for_first()


def main(folder: Path, how: str = "") -> None:
    torch.set_num_threads(1)
    rank = start().rank
    own = folder / f"pipeline-{rank}"
    own.mkdir()
    if how:
        lost(folder, how)
        return
    found: dict[str, Any] = {"undivided": undivided(own)}
    found |= {name: trained(case(own, True)) for name, case in CASES.items()} | of_two_processes(folder, own)
    torch.save(found, folder / f"rank-{rank}.pt")
    start().leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
