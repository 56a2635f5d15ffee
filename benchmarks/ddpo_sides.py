"""The three workers of the DDPO comparison: diffalign, TRL, and the bare denoiser.

``python -m benchmarks.ddpo_sides SIDE MODEL_FOLDER THREADS SIZE`` answers each line ``{"micro_batch": n}`` on standard
input with one line about one iteration on standard output. Each side is a process of its own, so that its memory is its
own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.ddpo_setup import PROMPTS, SETUPS, Setup, ensure_model
from benchmarks.measuring import CallCounter, Memory, Numbers, Stopwatch, describe, serve


class Side(Protocol):
    """One contestant."""

    denoiser: nn.Module

    def iteration(self, micro_batch: int, watch: Stopwatch) -> Numbers:
        """Runs one iteration in timed parts; returns what else there is to say about it."""
        ...


class Diffalign:
    """Our side: the public pieces of the trainer over a diffusion policy."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig
        from diffalign.experience import Rollouts
        from diffalign.trainer import Trainer
        from diffalign.types import Prompt
        from pipelines.loading import load_policy
        from rewards.jpeg import Compressibility

        policy = load_policy(
            str(folder),
            adapter=AdapterConfig(rank=setup.rank, alpha=setup.rank),
            sampler=SamplerConfig(
                steps=setup.steps, eta=setup.eta, guidance_scale=setup.guidance_scale, batch_size=setup.images
            ),
        )
        settings = TrainerConfig(
            samples_per_epoch=setup.images, batch_size=setup.images, micro_batch_size=setup.micro_batch,
            learning_rate=setup.learning_rate, weight_decay=setup.weight_decay, max_grad_norm=setup.max_grad_norm,
        )  # fmt: skip
        self.setup, self.denoiser = setup, policy.family.denoiser
        self.source = Rollouts(Compressibility(), [Prompt(text) for text in PROMPTS])
        self.trainer = Trainer(
            policy,
            self.source,
            settings=settings,
            objective=ObjectiveConfig(clip_range=setup.clip_range),
            credit=CreditConfig(rule="batch", clip=setup.advantage_clip),
        )

    def iteration(self, micro_batch: int, watch: Stopwatch) -> Numbers:
        """See Side."""
        from diffalign.experience import Scored

        trainer = self.trainer
        trainer.settings = trainer.settings.model_copy(update={"micro_batch_size": micro_batch})
        with watch("rollout"):
            rollout = self.source.sampled(trainer.moment())
        with watch("reward"):
            scores = self.source.reward(rollout.samples)
        with watch("update"):
            trainer.update(trainer.lesson(Scored(rollout, scores)))
        trainer.epoch += 1
        return _reward(scores.total)


class Trl:
    """The other side: TRL's DDPOTrainer. Its iteration is one ``step``; what is not rollout or reward is update."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)  # TRL's pipeline logs before its trainer makes one
        from trl import (  # type: ignore[import-not-found,unused-ignore]  # in an environment of its own
            DDPOConfig,
            DDPOTrainer,
            DefaultDDPOStableDiffusionPipeline,
        )

        from rewards.jpeg import Compressibility

        self.setup, self.reward, self.count, self.last = setup, Compressibility(), 0, torch.zeros(0)
        config = DDPOConfig(
            sample_num_steps=setup.steps, sample_eta=setup.eta, sample_guidance_scale=setup.guidance_scale,
            sample_batch_size=setup.images, sample_num_batches_per_epoch=1, train_batch_size=setup.micro_batch,
            train_gradient_accumulation_steps=setup.images // setup.micro_batch, train_num_inner_epochs=1,
            train_timestep_fraction=1.0, train_cfg=True, train_learning_rate=setup.learning_rate,
            train_adam_weight_decay=setup.weight_decay, train_max_grad_norm=setup.max_grad_norm,
            train_clip_range=setup.clip_range, train_adv_clip_max=setup.advantage_clip,
            per_prompt_stat_tracking=False, mixed_precision="no", accelerator_kwargs={"cpu": True},
        )  # fmt: skip
        pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=True)
        self.trainer = DDPOTrainer(config, self._score, self._prompt, pipeline)
        pipeline.sd_pipeline.set_progress_bar_config(disable=True)
        self.denoiser: nn.Module = pipeline.unet

    def _prompt(self) -> tuple[str, dict[str, object]]:
        self.count += 1
        return PROMPTS[self.count % len(PROMPTS)], {}

    def _score(self, images: Tensor, prompts: Sequence[str], metadata: object) -> tuple[Tensor, dict[str, object]]:
        from diffalign.images import to_pil
        from diffalign.types import Prompt, Sample

        samples = [Sample(Prompt(text), image=image) for text, image in zip(prompts, to_pil(images), strict=True)]
        self.last = self.reward(samples).total
        return self.last, {}

    def iteration(self, micro_batch: int, watch: Stopwatch) -> Numbers:
        """See Side."""
        trainer, accumulated = self.trainer, self.setup.images // micro_batch
        trainer.config.train_batch_size = micro_batch
        trainer.config.train_gradient_accumulation_steps = accumulated
        trainer.accelerator.gradient_accumulation_steps = accumulated * self.setup.steps
        trainer.accelerator.step = 0  # it counts on across iterations, and another micro-batch would update halfway
        generate, score = type(trainer)._generate_samples, type(trainer).compute_rewards
        inner = Stopwatch()

        def timed_generate(**arguments: object) -> object:
            with inner("rollout"):
                return generate(trainer, **arguments)

        def timed_score(*arguments: object, **named: object) -> object:
            with inner("reward"):
                return list(score(trainer, *arguments, **named))

        trainer._generate_samples, trainer.compute_rewards = timed_generate, timed_score
        with watch("update"):
            trainer.step(0, 0)
        for part, seconds in inner.parts.items():
            watch.parts[part] = seconds
            for clock, value in seconds.items():
                watch.parts["update"][clock] -= value
        return _reward(self.last)


class Bare:
    """The least that any implementation must do: the same denoiser calls on random numbers, and nothing else."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from diffalign.config import AdapterConfig
        from pipelines.loading import load_policy

        policy = load_policy(str(folder), adapter=AdapterConfig(rank=setup.rank, alpha=setup.rank))
        self.setup, self.denoiser = setup, policy.family.denoiser
        policy.family.resize(setup.pixels)
        self.shape = policy.family.latent_shape
        self.text_shape = policy.family.encode_text(PROMPTS[:1]).tokens.shape[1:]
        self.square = torch.randn(setup.matmul, setup.matmul)

    def prepared(self, batch: int) -> Callable[[], Tensor]:
        """A call of the denoiser that can be repeated."""
        latents, text = torch.randn(batch, *self.shape), torch.randn(batch, *self.text_shape)
        timesteps = torch.full((batch,), 500)

        def call() -> Tensor:
            output: Tensor = self.denoiser(latents, timesteps, text, return_dict=False)[0]
            return output

        return call

    def iteration(self, micro_batch: int, watch: Stopwatch) -> Numbers:
        """See Side."""
        forward, both = self.prepared(2 * self.setup.images), self.prepared(2 * micro_batch)
        gradient = torch.randn(2 * micro_batch, *self.shape)
        with watch("rollout"), torch.no_grad():
            for _ in range(self.setup.steps):
                forward()
        with watch("update"):
            for _ in range(self.setup.images * self.setup.steps // micro_batch):
                both().backward(gradient)
        products, ceiling = max(2, 8 * 1024**3 // self.setup.matmul**3), Stopwatch()
        with ceiling("matmul"):
            for _ in range(products):
                self.square @ self.square
        flops = products * 2 * self.setup.matmul**3
        return {"matmul_gflops": {clock: flops / value / 1e9 for clock, value in ceiling.parts["matmul"].items()}}

    def gflop(self, micro_batch: int) -> dict[str, float]:
        """Floating-point operations of the two parts of an iteration, counted by torch, in units of 1e9."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as sampling, torch.no_grad():
            self.prepared(2 * self.setup.images)()
        with FlopCounterMode(display=False) as training:
            self.prepared(2 * micro_batch)().sum().backward()
        calls = self.setup.images * self.setup.steps // micro_batch
        return {
            "rollout": self.setup.steps * sampling.get_total_flops() / 1e9,
            "update": calls * training.get_total_flops() / 1e9,
        }


def _reward(scores: Tensor) -> Numbers:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return {"reward_mean": float(scores.mean()), "reward_std": float(scores.std())}


def build(name: str, folder: Path, size: str) -> tuple[Numbers, Callable[[Numbers], Numbers]]:
    """A side: what it is, and its answer to a request. A model of a real size must be in the folder already."""
    setup = SETUPS[size]
    if size == "tiny":
        ensure_model(folder)
    sides: dict[str, Callable[[Path, Setup], Side]] = {"diffalign": Diffalign, "trl": Trl, "bare": Bare}
    side = sides[name](folder, setup)
    ready = describe(side.denoiser)
    if isinstance(side, Bare):
        ready["gflop"] = side.gflop(setup.micro_batch)
    counter, memory = CallCounter(side.denoiser), Memory(torch.device("cpu"))

    def answer(request: Numbers) -> Numbers:
        watch = Stopwatch()
        memory.forget()
        said = side.iteration(request["micro_batch"], watch)
        return {"parts": watch.parts, "calls": counter.take(), "peak_mb": memory.peak() / 1e6, **said}

    return ready, answer


if __name__ == "__main__":
    serve(int(sys.argv[3]), lambda: build(sys.argv[1], Path(sys.argv[2]), sys.argv[4]))
