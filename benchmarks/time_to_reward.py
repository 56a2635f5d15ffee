"""How soon each method is better: held-out accuracy against generated images, denoiser calls and seconds.

``python -m benchmarks.time_to_reward`` (or ``make bench-time``) trains every method of ``METHODS`` on each of ``TASKS``
with three seeds, measures it along its run, and writes ``benchmarks/results/time_to_reward.json``, the picture
``docs/images/time-to-reward.png`` and the tables of ``benchmarks/time_to_reward.md``. A run that the results have with
its settings is not done again, so it can be done in pieces: ``--tasks emoji --only "DDPO" "DiffusionNFT" --seeds 0``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from apps import build
from benchmarks import time_to_reward_page
from benchmarks.environment import ROOT, machine
from benchmarks.measuring import versions
from diffalign import prompts
from diffalign.config import RunConfig, parse
from diffalign.experience import BestOfN, OnlinePairs, Rollouts
from diffalign.runs import write_text
from diffalign.seeds import derive
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Sample
from pipelines.diffusion import DiffusionPolicy
from rewards.registry import load as load_reward

SEEDS = (0, 1, 2)

COMMON: dict[str, Any] = {
    "name": "time-to-reward",
    "adapter": {"rank": 16, "alpha": 16, "targets": "all"},
    "device": "cpu",
}
TASKS: dict[str, dict[str, Any]] = {
    "emoji": {
        "model": "embedded:emoji",
        "rewards": ["emoji-checker?graded=true"],
        "prompts": {"source": "emoji", "train": 256, "held_out": 96},
        "sampler": {"steps": 2, "eta": 0.0, "guidance_scale": 1.0},
    },
    "brain-mr": {
        "model": "embedded:brain-mr",
        "rewards": ["brain-mr-checker?graded=true"],
        "prompts": {"source": "brain-mr", "task": "lesion", "train": 82, "held_out": 26},
        "sampler": {"steps": 10, "eta": 0.0, "guidance_scale": 1.0},
    },
}
"""What the base model does not do well: draw scenes in two steps, and the lesion that the prompt asks for."""
PER_PROMPT = {"emoji": 2, "brain-mr": 4}
"""Images of each held-out prompt in a measurement."""


def trainer(epochs: int, rate: float, **rest: object) -> dict[str, object]:
    """The section of that name: 64 images an epoch, four updates from 16 each."""
    return {
        "epochs": epochs, "samples_per_epoch": 64, "samples_per_prompt": 4, "batch_size": 16, "learning_rate": rate,
        "schedule": "linear", **rest,
    }  # fmt: skip


NOISY = ("DDPO", "GRPO", "ReST")
"""Methods that need the likelihood of steps, so they sample with DDPM noise. The others sample without any."""
METHODS: dict[str, dict[str, Any]] = {
    "DDPO": {
        "objective": {"name": "ppo-clip", "clip_range": 1e-3},
        "credit": {"rule": "group"},
        "trainer": trainer(24, 3e-3),
    },
    "GRPO": {
        "objective": {"name": "ppo-clip", "clip_range": 1e-3, "kl_coefficient": 0.01},
        "credit": {"rule": "group"},
        "trainer": trainer(24, 3e-3),
    },
    "ELBO-PG": {
        "objective": {"name": "elbo-ppo-clip", "draws": 2},
        "credit": {"rule": "group"},
        "trainer": trainer(8, 4e-3),
    },
    "DiffusionNFT": {
        "objective": {"name": "nft", "beta": 0.1, "draws": 2},
        "credit": {"rule": "group"},
        "trainer": trainer(8, 3e-3),
    },
    "DRaFT": {
        "rewards": ["clip"],
        "objective": {"name": "draft"},
        "trainer": trainer(8, 1e-3),
    },
    "online DPO": {
        "experience": {"source": "online-pairs"},
        "objective": {"name": "dpo", "beta": 200, "draws": 4},
        "trainer": trainer(24, 2e-3, batch_size=8),
    },
    "ReST": {
        "experience": {"source": "best-of-n", "keep": [0.5, 0.25]},
        "objective": {"name": "ppo-clip", "clip_range": 1e-3},
        "trainer": trainer(24, 3e-3, inner_epochs=2),
    },
}  # fmt: skip
"""DRaFT follows the gradient of a reward that has one, which the checker is not: it trains on CLIP."""
NOISE_RANGES = {"emoji": [0.45, 1.0], "brain-mr": [0.45, 0.9]}
"""Where the draws of the methods lie that have draws: where a scene is decided, and on up to where two-step sampling
begins."""
RATES = {("emoji", "ELBO-PG"): 3e-3}
"""Learning rates of a task's own."""
SOURCES = {"rollouts": Rollouts, "best-of-n": BestOfN, "online-pairs": OnlinePairs}


def configuration(task: str, name: str, seed: int) -> RunConfig:
    """The configuration of a method; the seed is that of everything but the prompts, which all runs share."""
    return parse(COMMON | TASKS[task] | settings(task, name) | {"seed": seed})


def settings(task: str, name: str) -> dict[str, Any]:
    """What a method has of its own on a task."""
    given = dict(METHODS[name])
    if rate := RATES.get((task, name)):
        given["trainer"] = {**given["trainer"], "learning_rate": rate}
    if "draws" in given["objective"]:
        given["objective"] = {**given["objective"], "noise_range": NOISE_RANGES[task]}
    if name in NOISY:
        given["sampler"] = {**TASKS[task]["sampler"], "eta": 1.0}
    return given


def moments(epochs: int) -> list[int]:
    """Epochs after which a run is measured: 2, 4, 6, 8, then every eighth, and the last."""
    return sorted({at for at in (0, 2, 4, 6, *range(8, epochs, 8), epochs) if at <= epochs})


def measure(policy: DiffusionPolicy, held_out: Sequence[Prompt], task: str) -> dict[str, list[float]]:
    """Of each held-out prompt: share of attributes that are right, and of images right in all of them."""
    asked = [(prompt, derive(0, "evaluation", prompt.key, k)) for prompt in held_out for k in range(PER_PROMPT[task])]
    drawn: list[Sample] = []
    for i in range(0, len(asked), policy.batch_size):
        given, seeds = zip(*asked[i : i + policy.batch_size], strict=True)
        drawn += policy.rollout(given, seeds).samples
    scores = load_reward(f"{task}-checker")(drawn)
    both = {"accuracy": scores.total, "everything": scores.parts["everything"]}
    return {name: values.reshape(-1, PER_PROMPT[task]).mean(1).tolist() for name, values in both.items()}


def run(task: str, name: str, seed: int) -> list[dict[str, Any]]:
    """One method with one seed: what it took, and how good it was, at each moment. No clock runs in a measurement."""
    config = configuration(task, name, seed)
    train, held_out = prompts.load(config.prompts, 0)
    policy = cast(DiffusionPolicy, build.policy(config))
    job = Trainer(
        policy, SOURCES[config.experience.source](build.reward(config), train), settings=config.trainer,
        objective=config.objective, credit=config.credit, seed=seed,
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    wall = processor = 0.0
    for at in moments(config.trainer.epochs):
        started, busy = time.perf_counter(), time.process_time()
        job.train(at)
        wall, processor = wall + time.perf_counter() - started, processor + time.process_time() - busy
        with job.averaged():
            measured = measure(policy, held_out, task)
        found.append(
            {
                "epoch": at, "images": at * config.trainer.samples_per_epoch, "denoiser calls": job.denoiser_calls,
                "seconds": {"wall": wall, "processor": processor}, **measured,
            }
        )  # fmt: skip
        share = sum(measured["everything"]) / len(held_out)
        took = f"{found[-1]['denoiser calls']:,} calls, {processor:.0f} s"
        print(f"{task}, {name}, seed {seed}: {took}, {share:.3f}", flush=True)
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_reward", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--only", nargs="+", choices=list(METHODS), metavar="METHOD", default=list(METHODS), help="run only these")
    add("--seeds", nargs="+", type=int, default=list(SEEDS))
    add("--threads", type=int, default=1)
    add("--again", action="store_true", help="run what is asked for although the results have it")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "time_to_reward.json")
    add("--picture", type=Path, default=ROOT / "docs" / "images" / "time-to-reward.png")
    add("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    add("--page-only", action="store_true", help="write page and picture anew from the results in --out")
    return parser.parse_args(arguments)


def collect(options: argparse.Namespace) -> None:
    """Runs what is asked for and is not in ``--out`` with these settings; writes it there after each run."""
    torch.set_num_threads(options.threads)
    for seed, task, name in product(options.seeds, options.tasks, options.only):
        if options.again or str(seed) not in recorded(options.out, task, name):
            found = {"settings": settings(task, name), "points": run(task, name, seed)}
            record(options, (task, name, seed), found)


def recorded(path: Path, task: str, name: str) -> dict[str, dict[str, Any]]:
    """The runs of a method in the results, by seed: those that were done with today's settings."""
    if not path.is_file():
        return {}
    results = json.loads(path.read_text())
    if results["common"] != COMMON or results["tasks"][task]["settings"] != TASKS[task]:
        return {}
    runs = results["tasks"][task]["runs"].get(name, {})
    return {seed: found for seed, found in runs.items() if found["settings"] == settings(task, name)}


def record(options: argparse.Namespace, done: tuple[str, str, int], found: dict[str, Any]) -> None:
    """Writes the results with this run beside what they had; what was run with other settings falls out."""
    tasks: dict[str, Any] = {}
    for task, own in TASKS.items():
        runs = {name: recorded(options.out, task, name) for name in METHODS}
        if task == done[0]:
            runs[done[1]][str(done[2])] = found
        ordered = {name: {seed: each[seed] for seed in sorted(each, key=int)} for name, each in runs.items() if each}
        tasks[task] = {"settings": own, "runs": ordered}
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(options.threads),
        "versions": versions(), "common": COMMON, "tasks": tasks,
    }  # fmt: skip
    write_text(options.out, json.dumps(results, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for, and writes results, picture and page."""
    options = parse_arguments(arguments)
    if not options.page_only:
        collect(options)
    time_to_reward_page.write(json.loads(options.out.read_text()), options.page, options.picture)


if __name__ == "__main__":
    main()
