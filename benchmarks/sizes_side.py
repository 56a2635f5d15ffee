"""The worker that measures one model of ``sizes``: ``python -m benchmarks.sizes_side FOLDER THREADS SETTINGS``.

It loads the model as ``diffalign align`` does, and answers each line on standard input with one line about one
iteration of DDPO (``{"count": true}``: with its operations counted, and so not timed), or about the memory that
``--dry-run`` estimates (``{"estimate": true}``). All tensors are the trainer's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Memory, Numbers, Stopwatch, describe, serve
from benchmarks.sizes_models import Settings

MB = 1e6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Side:
    """A trainer that is ready to make iterations, and what is measured of them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from apps import build, dry_run
        from diffalign import prompts
        from diffalign.config import parse
        from diffalign.experience import Rollouts
        from diffalign.trainer import Trainer
        from pipelines.diffusion import DiffusionPolicy

        self.settings, self.plan = settings, dry_run.parts
        self.config = parse(
            {
                "model": str(folder), "rewards": ["compressibility"], "device": settings.device,
                "precision": settings.precision,
                # As many prompts as images: the warm-up encodes them all, and no other iteration any.
                "prompts": {"source": "animals", "train": settings.images, "held_out": 8},
                "adapter": {"rank": settings.rank, "alpha": settings.rank},
                "sampler": {
                    "steps": settings.steps, "guidance_scale": settings.guidance_scale, "size": settings.pixels,
                    "batch_size": settings.images,
                },
                "trainer": {
                    "epochs": 1, "samples_per_epoch": settings.images, "batch_size": settings.images,
                    "micro_batch_size": settings.micro_batch, "gradient_checkpointing": settings.gradient_checkpointing,
                },
                "credit": {"rule": "batch"},
            },
            "benchmarks.sizes",
        )  # fmt: skip
        self.device = build.device(settings.device)
        self.memory = Memory(self.device)
        if self.device.type == "cuda":
            torch.empty(0, device=self.device)  # else there would be nothing to ask about yet
        self.ready: Numbers = {"start_mb": self.memory.now() / MB, "start_live_mb": self.memory.live() / MB}
        started = time.perf_counter()
        policy = build.policy(self.config)
        assert isinstance(policy, DiffusionPolicy)
        self.policy = policy
        self.ready["loading_s"] = time.perf_counter() - started
        self.ready["loading_peak_mb"], self.ready["loaded_mb"] = self.memory.peak() / MB, self.memory.now() / MB
        self.ready["loaded_live_mb"] = self.memory.live() / MB
        self.ready["parts"] = {
            name: {"parameters": sum(p.numel() for p in part.parameters()), "dtypes": _dtypes(part)}
            for name, part in policy.family.components().items()
        }
        noisy = int((policy.schedule.std > 0).sum())
        self.ready["trained_steps"] = noisy
        self.ready["latents"] = (1 + policy.guided) * settings.images * (settings.steps + noisy)
        self.source = Rollouts(build.reward(self.config), prompts.load(self.config.prompts, self.config.seed)[0])
        self.trainer = Trainer(
            policy, self.source, settings=self.config.trainer, objective=self.config.objective,
            credit=self.config.credit, seed=self.config.seed, precision=self.config.precision,
        )  # fmt: skip
        self.held = 0
        self.trainer.accelerator = _Watched(self.trainer.accelerator, self._hold)

    def _hold(self) -> None:
        self.held = max(self.held, self.memory.live())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def iteration(self, *, count: bool) -> Numbers:
        """Samples, scores and updates once."""
        from torch.utils.flop_counter import FlopCounterMode

        from diffalign.experience import Scored

        watch, peaks, operations = Stopwatch(), dict[str, float](), dict[str, int]()
        before, self.held = self.policy.denoiser_calls, 0

        @contextmanager
        def part(name: str) -> Iterator[None]:
            self.memory.forget()
            with FlopCounterMode(display=False) if count else nullcontext() as counter, watch(name):
                yield
                self._wait()
            peaks[name] = self.memory.peak() / MB
            if counter is not None:
                operations[name] = counter.get_total_flops()

        trainer = self.trainer
        with part("rollout"):
            rollout = self.source.sampled(trainer.moment())
        with part("reward"):
            scores = self.source.reward(rollout.samples)
        with part("update"):
            made = trainer.update(trainer.lesson(Scored(rollout, scores)))
        trainer.epoch += 1
        calls = self.policy.denoiser_calls - before
        found: Numbers = {"parts": watch.parts, "peak_mb": peaks, "live_mb": self.held / MB, "latents": calls}
        found |= {"updates": trainer.updates, "grad_norm": made.get("policy/grad_norm", 0.0)}
        return found | ({"flop": operations} if count else {"matmul": self.ceiling()})

    def ceiling(self, least_s: float = 1.0) -> dict[str, float]:
        """Floating-point operations of a large matrix product, in the precision that the denoiser computes in, for each
        second on the wall and of the processor.
        """
        size, watch, products = self.settings.matmul, Stopwatch(), 0
        one, other = torch.randn(2, size, size, device=self.device).to(DTYPES[self.settings.precision])
        one @ other
        self._wait()
        while products < 3 or watch.parts["matmul"]["wall"] < least_s:
            with watch("matmul"):
                one @ other
                self._wait()
            products += 1
        return {clock: products * 2 * size**3 / seconds for clock, seconds in watch.parts["matmul"].items()}

    def estimate(self) -> Numbers:
        """What ``--dry-run`` says, by its own function, in units of 1e6 bytes."""
        return {"estimate_mb": {name: size / MB for name, size in self.plan(self.policy, self.config).items()}}


class _Watched:
    """An accelerator that tells when a backward pass begins."""

    def __init__(self, accelerator: Any, tell: Callable[[], None]) -> None:
        self._accelerator, self._tell = accelerator, tell

    def backward(self, loss: torch.Tensor) -> None:
        self._tell()
        self._accelerator.backward(loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def _dtypes(part: torch.nn.Module) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in part.parameters() if not p.requires_grad})


def build(folder: Path, settings: Settings) -> tuple[Numbers, Callable[[Numbers], Numbers]]:
    """The model, and its answer to a request."""
    side = Side(folder, settings)
    name = torch.cuda.get_device_name(side.device) if side.device.type == "cuda" else ""
    ready = describe(side.policy.family.denoiser) | side.ready | {"settings": asdict(settings), "accelerator": name}

    def answer(request: Numbers) -> Numbers:
        if request.get("estimate"):
            return side.estimate()
        return side.iteration(count=bool(request.get("count"))) | {"load_average": os.getloadavg()[0]}

    return ready, answer


if __name__ == "__main__":
    serve(int(sys.argv[2]), lambda: build(Path(sys.argv[1]), Settings(**json.loads(sys.argv[3]))))
