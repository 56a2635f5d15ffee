"""The two sides of the race to an accuracy: this project's recipe, and TRL's DDPOTrainer on the same task.

``python -m benchmarks.level_sides SPECIFICATION THREADS`` (the specification is a ``RunSpec`` in JSON) answers each
line ``{"epochs": n, "limit_s": s}`` on standard input: it trains up to ``n`` epochs, starts none after ``s`` seconds
of training in all, measures on the held-out prompts, and says what it took since the start and what came out.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import CallCounter, Numbers, Stopwatch, describe, serve
from diffalign.config import AdapterConfig, RunConfig
from diffalign.types import Policy, Prompt, Sample


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run: a side and what it may choose for itself. The task comes from the recipe, for both sides alike."""

    side: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds_per_prompt: int = 0
    """Images of each held-out prompt in a measurement; 0 takes the recipe's number."""
    guidance_scale: float = 1.0
    """Of TRL, in training and in measurements; with 1 there is no guidance, and no training through it."""
    learning_rate: float = 1e-3
    """Of TRL."""
    batch_size: int = 0
    """Samples behind one update of TRL; 0 takes the recipe's number."""

    def configuration(self) -> RunConfig:
        """The recipe, on the processor."""
        from apps import configured

        config = configured.configuration(self.recipe, [*self.overrides, "device=cpu"])
        if config.adapter is None:
            raise ValueError(f"recipe {self.recipe} trains every weight; the comparison is one of adapters")
        return config


class Side(Protocol):
    """One contestant."""

    denoiser: nn.Module
    policy: Policy
    """What measurements sample from: the denoiser with the side's own guidance."""
    settings: Numbers
    """What it runs with, for the page."""
    epochs: int | None
    """After how many epochs it ends; None for no end of its own."""
    reward: float
    """Mean training reward of the last epoch."""

    def epoch(self) -> None:
        """Sampling, reward and updates of one epoch."""
        ...


class Diffalign:
    """Our side: the recipe as it is, in the loop of ``diffalign align``, without its checkpoints and logs."""

    def __init__(self, spec: RunSpec) -> None:
        from apps import build
        from diffalign import prompts
        from diffalign.experience import Rollouts
        from diffalign.trainer import Trainer

        config = spec.configuration()
        assert config.adapter
        policy = build.policy(config)
        self.policy: Policy = policy
        self.denoiser = policy.family.denoiser
        self.trainer = Trainer(
            policy, Rollouts(build.reward(config), prompts.load(config.prompts, config.seed)[0]),
            settings=config.trainer, objective=config.objective, credit=config.credit, seed=config.seed,
            precision=config.precision, on_epoch=self._remember,
        )  # fmt: skip
        self.epochs: int | None = config.trainer.epochs
        self.reward = float("nan")
        self.settings = _common(config) | {
            "guidance scale": config.sampler.guidance_scale,
            "learning rate": config.trainer.learning_rate,
            "schedule": config.trainer.schedule,
            "credit": f"{config.credit.rule}, {config.trainer.samples_per_prompt} samples of each prompt",
            "clip range": config.objective.clip_range,
            "KL coefficient": config.objective.kl_coefficient,
            "samples in an update": config.trainer.batch_size,
            "inner epochs": config.trainer.inner_epochs,
        }

    def _remember(self, trainer: object, epoch: int, metrics: Mapping[str, float]) -> None:
        self.reward = metrics["reward/total"]

    def epoch(self) -> None:
        """See Side."""
        self.trainer.train(self.trainer.epoch + 1)


class Trl:
    """The other side: TRL's DDPOTrainer as its documentation runs it. One epoch is one of its ``step``."""

    BUFFER, MIN_COUNT, CLIP_RANGE = 32, 16, 1e-4

    def __init__(self, spec: RunSpec) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)  # TRL's pipeline logs before its trainer makes one
        from trl import DDPOTrainer  # type: ignore[import-not-found,unused-ignore]  # in an environment of its own

        from apps import build
        from diffalign import prompts
        from pipelines.diffusion import DiffusionPolicy
        from pipelines.families import StableDiffusion
        from pipelines.loading import locate

        config = spec.configuration()
        assert config.adapter
        self.prompts, self.random = prompts.load(config.prompts, config.seed)[0], random.Random(config.seed)
        self.judge = build.reward(config)
        self.rewards: list[Tensor] = []
        pipeline = _trl_pipeline(str(locate(config.model)), config.adapter, guided=spec.guidance_scale > 1)
        sampler = config.sampler.model_copy(update={"guidance_scale": spec.guidance_scale})
        # Before the trainer is made, because a policy freezes what it finds.
        self.policy: Policy = DiffusionPolicy(StableDiffusion(pipeline.sd_pipeline), sampler=sampler)
        batch = spec.batch_size or config.trainer.batch_size
        settings = self._config(spec, config, batch)
        self.trainer = DDPOTrainer(settings, self._score, self._prompt, pipeline)
        pipeline.sd_pipeline.set_progress_bar_config(disable=True)
        self.denoiser: nn.Module = pipeline.unet
        self.epochs: int | None = None
        self.reward = float("nan")
        self.settings = _common(config) | {
            "guidance scale": spec.guidance_scale,
            "learning rate": spec.learning_rate,
            "schedule": "constant",
            "credit": f"per prompt, the last {self.BUFFER} from {self.MIN_COUNT} on, else the epoch's",
            "clip range": self.CLIP_RANGE,
            "KL coefficient": 0,
            "samples in an update": batch,
            "inner epochs": settings.train_num_inner_epochs,
        }

    def _config(self, spec: RunSpec, config: RunConfig, batch: int) -> Any:
        """TRL's settings: the task's from the recipe, the method's as TRL documents it."""
        from trl import DDPOConfig

        count = config.trainer.samples_per_epoch
        sampled = min(config.sampler.batch_size, count)
        if count % sampled or sampled % batch:
            raise ValueError(f"TRL samples batches of {sampled}: they must divide {count} and hold updates of {batch}")
        return DDPOConfig(
            seed=config.seed, sample_num_steps=config.sampler.steps, sample_eta=config.sampler.eta,
            sample_guidance_scale=spec.guidance_scale, train_cfg=spec.guidance_scale > 1, sample_batch_size=sampled,
            sample_num_batches_per_epoch=count // sampled, train_batch_size=batch, train_gradient_accumulation_steps=1,
            train_num_inner_epochs=1, train_timestep_fraction=1.0, train_learning_rate=spec.learning_rate,
            train_adam_weight_decay=config.trainer.weight_decay, train_max_grad_norm=config.trainer.max_grad_norm,
            train_clip_range=self.CLIP_RANGE, train_adv_clip_max=config.credit.clip, per_prompt_stat_tracking=True,
            per_prompt_stat_tracking_buffer_size=self.BUFFER, per_prompt_stat_tracking_min_count=self.MIN_COUNT,
            mixed_precision="no", accelerator_kwargs={"cpu": True},
        )  # fmt: skip

    def _prompt(self) -> tuple[str, Prompt]:
        prompt = self.random.choice(self.prompts)
        return prompt.text, prompt

    def _score(self, images: Tensor, texts: object, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, object]]:
        from diffalign.images import to_pil

        samples = [Sample(prompt, image=image) for prompt, image in zip(prompts, to_pil(images), strict=True)]
        self.rewards.append(self.judge(samples).total)
        return self.rewards[-1], {}

    def epoch(self) -> None:
        """See Side."""
        self.trainer.step(0, 0)
        self.reward = float(torch.cat(self.rewards).mean())
        self.rewards.clear()


def _trl_pipeline(folder: str, adapter: AdapterConfig, *, guided: bool) -> Any:
    """TRL's pipeline with the recipe's adapter, by the method that TRL's base class asks every pipeline for.

    As released, sampling without guidance fails: the negative text is joined to the prompt's whether it is wanted or
    not, which makes twice as many texts as latents. Here it gets what it meant to take.
    """
    from peft import LoraConfig
    from trl import DefaultDDPOStableDiffusionPipeline

    from pipelines.diffusion import ATTENTION, EVERYTHING

    class Pipeline(DefaultDDPOStableDiffusionPipeline):  # type: ignore[misc,unused-ignore]
        def get_trainable_layers(self) -> Any:
            targets = {"attention": ATTENTION, "all": EVERYTHING}.get(str(adapter.targets), adapter.targets)
            config = LoraConfig(
                r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets
            )
            self.sd_pipeline.unet.add_adapter(config)
            return self.sd_pipeline.unet

    pipeline = Pipeline(folder, use_lora=True)
    if not guided:
        pipeline.sd_pipeline._encode_prompt = lambda *given, prompt_embeds, **named: prompt_embeds
    return pipeline


def _common(config: RunConfig) -> Numbers:
    """What both sides take from the recipe."""
    adapter = config.adapter
    assert adapter
    return {
        "model": config.model,
        "prompts": f"{config.prompts.source}, task {config.prompts.task}, {config.prompts.train} to train on",
        "reward": ", ".join(entry.reward for entry in config.rewards),
        "steps, eta": f"{config.sampler.steps}, {config.sampler.eta:g}",
        "adapter": f"LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on {adapter.targets}",
        "optimiser": f"AdamW, weight decay {config.trainer.weight_decay:g}, norm {config.trainer.max_grad_norm:g}",
        "samples in an epoch": config.trainer.samples_per_epoch,
        "advantages clipped at": config.credit.clip,
        "seed": config.seed,
    }


class HeldOut:
    """Accuracy on held-out prompts: the same prompts, seeds, sampler and checker for both sides."""

    def __init__(self, spec: RunSpec) -> None:
        from diffalign import prompts
        from diffalign.seeds import derive
        from rewards.registry import load

        config = spec.configuration()
        _, self.prompts = prompts.load(config.prompts, config.seed)
        self.repeats = spec.seeds_per_prompt or config.evaluation.seeds_per_prompt
        # Without its arguments, so that a graded checker says right or wrong.
        self.checker = load(config.rewards[0].reward.partition("?")[0])
        self.seeds = [
            derive(config.seed, "evaluation", prompt.key, k) for prompt in self.prompts for k in range(self.repeats)
        ]

    def __call__(self, policy: Policy) -> Numbers:
        """Mean and its 95 % interval, by prompts."""
        from diffalign.evaluation import mean_interval

        asked = [prompt for prompt in self.prompts for _ in range(self.repeats)]
        samples: list[Sample] = []
        for i in range(0, len(asked), policy.batch_size):
            chunk = slice(i, i + policy.batch_size)
            samples += policy.rollout(asked[chunk], self.seeds[chunk]).samples
        scores = self.checker(samples).total.double().numpy()
        known = np.isfinite(scores)
        groups = np.repeat(np.arange(len(self.prompts)), self.repeats)
        interval = mean_interval(scores[known], groups[known])
        return {"accuracy": interval["mean"], "ci95": interval["ci95"]}


def build(spec: RunSpec) -> tuple[Numbers, Callable[[Numbers], Numbers]]:
    """A side: what it is, and its answer to a request."""
    sides: dict[str, Callable[[RunSpec], Side]] = {"diffalign": Diffalign, "trl": Trl}
    side, held_out = sides[spec.side](spec), HeldOut(spec)
    counter, rows, watch, done = CallCounter(side.denoiser), Counter[str](), Stopwatch(), 0
    watch.parts["training"] = {"wall": 0.0, "cpu": 0.0}

    def answer(request: Numbers) -> Numbers:
        nonlocal done
        counter.take()  # those of the last measurement
        clock, until = watch.parts["training"], done + request["epochs"]
        while done < until and clock["wall"] < request["limit_s"]:
            with watch("training"):
                side.epoch()
            done += 1
        rows.update(counter.take_rows())
        images = done * side.settings["samples in an epoch"]
        point = {"epoch": done, **clock, "images": images, "forward": rows["forward"]}
        point |= {"backward": rows["forward and backward"], "reward": side.reward if done else None}
        return point | held_out(side.policy)

    ready = describe(side.denoiser) | {"settings": side.settings, "epochs": side.epochs}
    ready |= {"held_out": {"prompts": len(held_out.prompts), "images": len(held_out.seeds)}}
    return ready | {"checker": held_out.checker.name, "specification": asdict(spec)}, answer


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    serve(int(sys.argv[2]), lambda: build(RunSpec(**given)))
