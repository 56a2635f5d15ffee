"""The workers of the AlignProp comparison: diffalign, with and without checkpointing, and TRL.

``python -m benchmarks.alignprop_sides SIDE MODEL_FOLDER THREADS SIZE`` answers each line ``{"last": k}`` on standard
input with one line about one iteration whose gradient goes back through the last ``k`` steps. The settings are those of
``ddpo_setup``; the reward is how red an image is.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.ddpo_setup import PROMPTS, SETUPS, Setup, ensure_model
from benchmarks.measuring import Memory, Numbers, Stopwatch, describe, serve


class Side(Protocol):
    """One contestant."""

    denoiser: nn.Module

    def iteration(self, last: int) -> Tensor:
        """Samples, judges and updates once; returns the rewards ``(N,)``."""
        ...


class Calls:
    """Rows that went forward and backward through a denoiser. What checkpointing makes again is forward, too."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.rows: Counter[str] = Counter()
        denoiser.register_forward_pre_hook(self._forward)
        denoiser.register_forward_hook(self._made)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows["forward"] += len(inputs[0])

    def _made(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        made = output[0]
        if made.requires_grad:
            made.register_hook(lambda gradient: self._reached(len(made), gradient))

    def _reached(self, count: int, gradient: Tensor) -> None:
        self.rows["backward"] += count

    def take(self) -> dict[str, int]:
        """The rows since the last time."""
        rows = dict(self.rows)
        self.rows.clear()
        return rows


class Red:
    """The mean of the red channel, in [0, 1], in both forms."""

    name, modality, unit, range, higher_is_better = "red", "image", "", (0.0, 1.0), True

    def __call__(self, samples: Sequence[Any]) -> Any:
        from diffalign.images import to_tensor
        from diffalign.types import Scores

        return Scores(to_tensor([sample.image for sample in samples])[:, 0].mean((1, 2)))

    def differentiable(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images[:, 0].mean((1, 2))


class Diffalign:
    """Our side: the trainer's own pieces, as in a run."""

    def __init__(self, folder: Path, setup: Setup, *, checkpointing: bool = False) -> None:
        from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig
        from diffalign.experience import Rollouts
        from diffalign.trainer import Trainer
        from diffalign.types import Prompt
        from pipelines.loading import load_policy

        self.policy = load_policy(
            str(folder), adapter=AdapterConfig(rank=setup.rank, alpha=setup.rank), gradient_checkpointing=checkpointing,
            sampler=SamplerConfig(
                steps=setup.steps, eta=setup.eta, guidance_scale=setup.guidance_scale, batch_size=setup.micro_batch
            ),
        )  # fmt: skip
        settings = TrainerConfig(
            samples_per_epoch=setup.images, batch_size=setup.images, micro_batch_size=setup.micro_batch,
            learning_rate=setup.learning_rate, weight_decay=setup.weight_decay, max_grad_norm=setup.max_grad_norm,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        source: Any = Rollouts(Red(), [Prompt(text) for text in PROMPTS])
        self.trainer = Trainer(
            self.policy, source, settings=settings, credit=CreditConfig(rule="batch"),
            objective=ObjectiveConfig(name="draft"),
        )  # fmt: skip
        self.denoiser: nn.Module = self.policy.family.denoiser  # type: ignore[union-attr]

    def iteration(self, last: int) -> Tensor:
        """See Side."""
        trainer = self.trainer
        objective = trainer.objective.model_copy(update={"backprop_steps": last})
        trainer.objective = trainer.teacher.objective = objective
        found = trainer.gather().experience
        trainer.update(trainer.lesson(found))
        trainer.epoch += 1
        total: Tensor = found.scores.total  # type: ignore[union-attr]
        return total


class Trl:
    """TRL's AlignPropTrainer with a fixed truncation. It checkpoints every call of the denoiser."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)  # its pipeline logs before its trainer makes one
        from trl import (  # type: ignore[import-not-found,unused-ignore]  # in an environment of its own
            AlignPropConfig,
            AlignPropTrainer,
            DefaultDDPOStableDiffusionPipeline,
        )

        self.steps, self.count, self.scores = setup.steps, 0, list[Tensor]()
        config = AlignPropConfig(
            sample_num_steps=setup.steps, sample_eta=setup.eta, sample_guidance_scale=setup.guidance_scale,
            train_batch_size=setup.micro_batch, train_learning_rate=setup.learning_rate,
            train_gradient_accumulation_steps=setup.images // setup.micro_batch,
            train_adam_weight_decay=setup.weight_decay, train_max_grad_norm=setup.max_grad_norm,
            truncated_backprop_rand=False, mixed_precision="no", accelerator_kwargs={"cpu": True},
        )  # fmt: skip
        pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=True)
        self.trainer = AlignPropTrainer(config, self._score, self._prompt, pipeline)
        pipeline.sd_pipeline.set_progress_bar_config(disable=True)
        self.denoiser: nn.Module = pipeline.unet

    def _prompt(self) -> tuple[str, dict[str, object]]:
        self.count += 1
        return PROMPTS[self.count % len(PROMPTS)], {}

    def _score(self, images: Tensor, prompts: Sequence[str], metadata: object) -> tuple[Tensor, dict[str, object]]:
        found = Red().differentiable(images, prompts)
        self.scores.append(found.detach())
        return found, {}

    def iteration(self, last: int) -> Tensor:
        """See Side."""
        self.scores.clear()
        self.trainer.config.truncated_backprop_timestep = self.steps - last
        self.trainer.step(0, 0)
        return torch.cat(self.scores)


def build(name: str, folder: Path, size: str) -> tuple[Numbers, Callable[[Numbers], Numbers]]:
    """A side: what it is, and its answer to a request. A model of a real size must be in the folder already."""
    if size == "tiny":
        ensure_model(folder)
    sides: dict[str, Callable[[Path, Setup], Side]] = {
        "diffalign": Diffalign, "trl": Trl, "checkpointed": partial(Diffalign, checkpointing=True)
    }  # fmt: skip
    side = sides[name](folder, SETUPS[size])
    counter, memory = Calls(side.denoiser), Memory(torch.device("cpu"))

    def answer(request: Numbers) -> Numbers:
        watch = Stopwatch()
        memory.forget()
        with watch("iteration"):
            rewards = side.iteration(request["last"])
        return {
            "parts": watch.parts, "rows": counter.take(), "peak_mb": memory.peak() / 1e6,
            "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()),
        }  # fmt: skip

    return describe(side.denoiser), answer


if __name__ == "__main__":
    serve(int(sys.argv[3]), lambda: build(sys.argv[1], Path(sys.argv[2]), sys.argv[4]))
