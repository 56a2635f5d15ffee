"""Where an iteration of DDPO spends its time outside the denoiser, and what would make it shorter.

``python -m benchmarks.profile`` measures the quickstart's model and the tiny pipeline of ``trl_ddpo``, and writes
``benchmarks/results/profile.json`` and the page ``benchmarks/profile.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import profile_page
from benchmarks.ddpo_setup import PROMPTS, SETUP, ensure_model
from benchmarks.environment import ENVIRONMENT, ROOT, machine
from benchmarks.measuring import describe
from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig
from diffalign.experience import Rollouts, Scored
from diffalign.methods import ObjectiveName
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Reward, Rollout, Sample, Scores
from pipelines import compiling
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy


class Parts:
    """Processor seconds by part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.phase = ""
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What happens inside belongs to ``part``."""
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[f"{self.phase}: {self._open[-1]}"] += now - self._last
        self._last = now

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a part."""

        def timed(*given: Any, **named: Any) -> Any:
            with self(part):
                return function(*given, **named)

        return timed


@dataclass(frozen=True)
class Job:
    """A trainer that is ready to make iterations."""

    name: str
    trainer: Trainer
    policy: DiffusionPolicy
    source: Rollouts


def quickstart() -> Job:
    """The recipe of the quickstart, as it is."""
    from apps import build, configured
    from diffalign import prompts

    config = configured.configuration("quickstart")
    policy, source = build.policy(config), Rollouts(build.reward(config), prompts.load(config.prompts, config.seed)[0])
    assert isinstance(policy, DiffusionPolicy)
    trainer = Trainer(
        policy, source, settings=config.trainer, objective=config.objective, credit=config.credit, seed=config.seed
    )
    return Job("quickstart", trainer, policy, source)


def tiny(batch_size: int = SETUP.images, reward: Reward | None = None, objective: ObjectiveName = "ppo-clip") -> Job:
    """Our side of ``trl_ddpo``; with batches, reward or objective of one's own."""
    from rewards.jpeg import Compressibility

    policy = load_policy(
        str(ensure_model(ENVIRONMENT / "model")),
        adapter=AdapterConfig(rank=SETUP.rank, alpha=SETUP.rank),
        sampler=SamplerConfig(
            steps=SETUP.steps, eta=SETUP.eta, guidance_scale=SETUP.guidance_scale, batch_size=batch_size
        ),
    )
    assert isinstance(policy, DiffusionPolicy)
    source = Rollouts(reward or Compressibility(), [Prompt(text) for text in PROMPTS])
    settings = TrainerConfig(
        samples_per_epoch=SETUP.images, batch_size=SETUP.images, micro_batch_size=SETUP.micro_batch,
        learning_rate=SETUP.learning_rate, weight_decay=SETUP.weight_decay, max_grad_norm=SETUP.max_grad_norm,
    )  # fmt: skip
    trainer = Trainer(
        policy, source, settings=settings, objective=ObjectiveConfig(name=objective), credit=CreditConfig(rule="batch")
    )
    return Job("tiny", trainer, policy, source)


JOBS: dict[str, Callable[[], Job]] = {"quickstart": quickstart, "tiny": tiny}


def iteration(job: Job, parts: Parts) -> None:
    """Samples, scores and updates once."""
    trainer = job.trainer
    parts.phase = "rollout"
    with parts("rest"):
        rollout = job.source.sampled(trainer.moment())
    parts.phase = "reward"
    with parts("reward"):
        scores = job.source.reward(rollout.samples)
    parts.phase = "update"
    with parts("rest"):
        trainer.update(trainer.lesson(Scored(rollout, scores)))
    trainer.epoch += 1


@contextmanager
def watched(job: Job, parts: Parts) -> Iterator[None]:
    """Inside it the pieces of an iteration are parts."""
    from diffalign import denoising, images

    policy, trainer = job.policy, job.trainer
    pieces: list[tuple[Any, str, str]] = [
        (policy.family, "denoise", "denoiser, forward"),
        (trainer.accelerator, "backward", "backward"),
        (policy.family, "encode_text", "text encoder"),
        (policy, "_encode", "embeddings put together"),
        (policy.family, "decode", "decoder"),
        (images, "to_pil", "8-bit images"),
        (policy, "_noise", "noise"),
        (policy.schedule, "mean", "mean of a step"),
        (denoising, "log_density", "log-density"),
        (Rollout, "take", "rows put together"),
        (trainer.optimiser, "step", "optimiser"),
        (trainer.accelerator, "clip_grad_norm_", "gradient norm"),
    ]
    with ExitStack() as stack:
        for owner, name, part in pieces:
            original = getattr(owner, name)
            timed = parts.of(part, original)
            if isinstance(owner, type):
                stack.enter_context(patch.object(owner, name, lambda self, *given, f=timed: f(self, *given)))
            else:
                stack.enter_context(patch.object(owner, name, timed))
        yield


def profiled(job: Job, rounds: int) -> dict[str, float]:
    """Median processor seconds of the parts of an iteration, after one that does not count."""
    found: list[Counter[str]] = []
    for number in range(rounds + 1):
        parts = Parts()
        with watched(job, parts):
            iteration(job, parts)
        if number:
            found.append(parts.seconds)
        print(f"{job.name} {number}/{rounds}: {sum(parts.seconds.values()):.2f} s processor", flush=True)
    names = dict.fromkeys(name for each in found for name in each)
    return {name: median(each[name] for each in found) for name in names}


def compared(job: Job, rounds: int) -> dict[str, Any]:
    """A rollout with adapters beside the weights, merged into them, and with the denoiser's weights channels-last."""
    trainer, policy = job.trainer, job.policy
    prompts, seeds = list(job.source.prompts[: policy.batch_size]), list(range(policy.batch_size))
    prompts = [prompts[i % len(prompts)] for i in seeds]

    @contextmanager
    def channels_last() -> Iterator[None]:
        policy.family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
        policy.family.denoiser.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "beside": nullcontext, "merged": policy.merged, "channels-last": channels_last
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[Sample]] = {}
    for number in range(rounds + 1):
        for name, way in ways.items() if number % 2 else reversed(ways.items()):
            with way():
                started = time.process_time()
                made[name] = list(policy.rollout(prompts, seeds).samples)
                took = time.process_time() - started
            if number:
                seconds[name].append(took)
    started = time.process_time()
    for _ in range(rounds):
        with policy.merged():
            pass
    merging = (time.process_time() - started) / rounds
    pixels = {name: np.stack([np.asarray(s.image, dtype=np.int64) for s in some]) for name, some in made.items()}
    return {
        "images": len(prompts), "updates": trainer.updates, "seconds": seconds, "merging": merging,
        "grey_levels": {name: int(np.abs(pixels[name] - pixels["beside"]).max()) for name in ways},
    }  # fmt: skip


class Elsewhere:
    """A reward that somebody else computes: it takes its time, and no processor here."""

    name, modality, unit, range, higher_is_better = "elsewhere", "image", "", (0.0, 1.0), True

    def __init__(self, waits: bool) -> None:
        self.waits, self.pause = waits, 0.0

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        time.sleep(self.pause * len(samples))
        return Scores(torch.tensor([float(np.asarray(sample.image).mean()) / 255 for sample in samples]))


def overlapped(rounds: int, batch_size: int = 8) -> dict[str, Any]:
    """Wall seconds of sampling and scoring, where the reward takes as long for an image as sampling does."""
    rewards = {name: Elsewhere(name == "beside") for name in ("afterwards", "beside")}
    jobs = {name: tiny(batch_size, reward, "elbo-reinforce") for name, reward in rewards.items()}  # type: ignore[arg-type]
    for job in jobs.values():
        job.trainer.gather()
    started = time.perf_counter()
    jobs["afterwards"].trainer.gather()
    pause = (time.perf_counter() - started) / SETUP.images
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    scores: dict[str, list[float]] = {}
    for reward in rewards.values():
        reward.pause = pause
    for number in range(rounds):
        for name in jobs if number % 2 else reversed(jobs):
            started = time.perf_counter()
            experience = jobs[name].trainer.gather().experience
            seconds[name].append(time.perf_counter() - started)
            assert isinstance(experience, Scored)
            scores[name] = experience.scores.total.tolist()
    return {
        "seconds": seconds,
        "pause": pause,
        "batch_size": batch_size,
        "equal": scores["afterwards"] == scores["beside"],
    }


def attention(job: Job) -> dict[str, int]:
    """How often a rollout of one image calls torch's fused attention, and softmax by itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        job.policy.rollout(list(job.source.prompts[:1]), [0])
    counts = {event.key: event.count for event in found.key_averages()}
    return {name: counts.get(f"aten::{name}", 0) for name in ("scaled_dot_product_attention", "_softmax", "bmm")}


def compiled(rounds: int) -> dict[str, Any]:
    """torch.compile of the quickstart's denoiser: what it costs at first, and what it gives then."""
    job = quickstart()
    policy, trainer = job.policy, job.trainer
    prompts, seeds = list(job.source.prompts[: policy.batch_size]), list(range(policy.batch_size))
    seconds: dict[str, dict[str, list[float]]] = {}
    first: dict[str, float] = {}
    for way in ("as it is", "compiled"):
        if way == "compiled":
            policy.family.denoiser.compile()
        started = time.perf_counter()
        rollout = policy.rollout(prompts, seeds)
        rows, steps = torch.arange(len(prompts)), torch.full((len(prompts), 1), 3)
        policy.step_log_probs(rollout, steps).log_probs.sum().backward()
        first[way] = time.perf_counter() - started
        again = policy.step_log_probs(rollout, steps)
        apart = float((again.log_probs[:, 0] - rollout.log_probs[rows, 3]).detach().abs().max())
        taken: dict[str, list[float]] = {"rollout": [], "update": []}
        for _ in range(rounds):
            before = time.process_time()
            policy.rollout(prompts, seeds)
            between = time.process_time()
            policy.step_log_probs(rollout, steps).log_probs.sum().backward()
            taken["rollout"].append(between - before)
            taken["update"].append(time.process_time() - between)
        seconds[way] = taken
        print(f"{way}: first {first[way]:.0f} s, then {median(taken['rollout']):.2f} s a rollout", flush=True)
    trainer.optimiser.zero_grad()
    return {"images": len(prompts), "seconds": seconds, "first": first, "replay_apart": apart}


def blocks(job: Job, rounds: int) -> dict[str, Any]:
    """The blocks compiled, as ``compile: true`` does it: what it costs at first, and what it gives then.

    Seconds are those of the processor, the C++ compiler's among them, which runs in one process at a time. The first
    rollout and update are with an empty cache on the disk, then as after a new start of Python, with what that left.
    """
    policy, before = job.policy, int(counters["stats"]["unique_graphs"])
    prompts = [job.source.prompts[i % len(job.source.prompts)] for i in range(policy.batch_size)]

    def rolled() -> Rollout:
        return policy.rollout(prompts, list(range(len(prompts))))

    def updated(rollout: Rollout) -> torch.Tensor:
        likely = policy.step_log_probs(rollout, torch.full((len(prompts), 1), 3)).log_probs
        likely.sum().backward()
        return (likely.detach()[:, 0] - rollout.log_probs[:, 3]).abs().max()

    def first() -> float:
        started = _processor()
        updated(rolled())
        return _processor() - started

    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict("os.environ", {"TORCHINDUCTOR_CACHE_DIR": cache}),
        inductor.patch(compile_threads=1),
    ):
        warm = {"as it is": first()}
        policy.compiled = compiling.compile_blocks([policy.family.denoiser], policy.device)
        warm["compiled"] = first()
        versions = int(counters["stats"]["unique_graphs"]) - before - 1  # all but the probe
        torch.compiler.reset()
        warm["compiled, from disk"] = first()
        print(f"{job.name}: {warm}, {versions} versions", flush=True)
        seconds: dict[str, dict[str, list[float]]] = {way: {"rollout": [], "update": []} for way in list(warm)[:2]}
        apart: dict[str, float] = {}
        for number in range(rounds + 1):
            for way in seconds if number % 2 else reversed(seconds):
                with torch.compiler.set_stance("default" if way == "compiled" else "force_eager"):
                    times = [time.process_time()]
                    rollout = rolled()
                    times.append(time.process_time())
                    apart[way] = float(updated(rollout))
                    times.append(time.process_time())
                for part, took in zip(seconds[way], np.diff(times), strict=True):
                    if number:  # the first round does not count, as elsewhere: it ran longer
                        seconds[way][part].append(float(took))
            print(f"{job.name} {number}/{rounds}: {seconds}", flush=True)
    return {
        "date": today(), "load_average": os.getloadavg()[0], "blocks": dict(policy.compiled), "versions": versions,
        "images": len(prompts), "first": warm, "seconds": seconds, "replay_apart": apart,
    }  # fmt: skip


def _processor() -> float:
    """Processor seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def text_shares() -> dict[str, float]:
    """Operations that turn the text into keys and values, the same at every step, as a share of those of a step.

    Counted on a U-Net of Stable Diffusion 1.5's size without weights, for images of 512 and of 256 pixels.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
        inputs = {pixels: torch.zeros(1, 4, pixels // 8, pixels // 8) for pixels in (512, 256)}
        time, text = torch.zeros(1), torch.zeros(1, 77, 768)
    both = [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    found = {}
    for pixels, latents in inputs.items():
        with FlopCounterMode(display=False) as step:
            unet(latents, time, text)
        with FlopCounterMode(display=False) as projections:
            for module in both:
                module(text)
        found[str(pixels)] = projections.get_total_flops() / step.get_total_flops()
    return found


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Everything that the page is made from."""
    torch.set_num_threads(threads)
    results: dict[str, Any] = {
        "date": today(), "machine": machine(threads), "rounds": rounds,
        "jobs": {},
    }  # fmt: skip
    for job in (make() for make in JOBS.values()):
        settings = job.trainer.settings
        results["jobs"][job.name] = {
            "ready": describe(job.policy.family.denoiser),
            "samples": settings.samples_per_epoch, "updates": settings.samples_per_epoch // settings.batch_size,
            "steps": job.policy.sampler.steps, "guidance": job.policy.sampler.guidance_scale,
            "attention": attention(job), "parts": profiled(job, rounds), "ways": compared(job, rounds),
        }  # fmt: skip
    results["overlap"], results["text"] = overlapped(rounds), text_shares()
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes results and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "profile.json")
    parser.add_argument("--compile", choices=["blocks", "whole"], help="measure torch.compile alone, add it to --out")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if not options.page_only:
        results = (
            measure(options.rounds, options.threads) if not options.compile else json.loads(options.out.read_text())
        )
        if options.compile:
            torch.set_num_threads(options.threads)
            if options.compile == "whole":
                results["compile"] = compiled(options.rounds)
            else:
                for make in JOBS.values():
                    job = make()
                    results.setdefault("blocks", {})[job.name] = blocks(job, options.rounds)
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    Path(__file__).with_suffix(".md").write_text(profile_page.page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
