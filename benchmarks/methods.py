"""Every method on one task, with one budget of judgements and about one budget of compute.

``python -m benchmarks.methods`` (or ``make bench-methods``) lets simulated raters judge pairs of the base model's
samples, aligns by each method from those judgements alone, and writes ``benchmarks/results/methods.json`` and the page
``benchmarks/methods.md``. A run that is complete is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apps import build, dry_run
from apps.sources import judge_pairs
from benchmarks import methods_page
from benchmarks.environment import ROOT, machine
from benchmarks.measuring import versions
from diffalign import prompts
from diffalign.config import RunConfig, parse
from diffalign.methods import POLICY_GRADIENT

JUDGEMENTS = 512
PAIRS = "PAIRS"
"""Stands for the file of judgements."""

BASE: dict[str, Any] = {
    "model": "embedded:brain-mr",
    "prompts": {"source": "brain-mr", "task": "lesion", "train": 82, "held_out": 26},
    "adapter": {"rank": 16, "alpha": 16, "targets": "all"},
    "sampler": {"steps": 10, "eta": 1.0, "guidance_scale": 1.0},
    "device": "cpu",
    "evaluation": {
        "rewards": ["hidden-utility?rater=brain-mr", "brain-mr-checker", "clip"],
        "seeds_per_prompt": 8,
    },
}  # fmt: skip


def trainer(epochs: int, samples: int, batch: int, rate: float, **rest: object) -> dict[str, object]:
    """The section of that name."""
    return {
        "epochs": epochs, "samples_per_epoch": samples, "batch_size": batch, "learning_rate": rate,
        "schedule": "linear", **rest,
    }  # fmt: skip


FITTED = {
    "fit": {"preferences": PAIRS, "criteria": ["overall"]},
    "rewards": ["preference?folder=fitted"],
}
METHODS: dict[str, dict[str, Any]] = {
    "DDPO on a fitted reward": FITTED | {
        "objective": {"name": "ppo-clip", "clip_range": 1e-3},
        "credit": {"rule": "group"},
        "trainer": trainer(20, 64, 16, 2e-3, samples_per_prompt=4),
    },
    "ReST on a fitted reward": FITTED | {
        "experience": {"source": "best-of-n", "keep": [0.5, 0.25]},
        "objective": {"name": "ppo-clip", "clip_range": 1e-3},
        "trainer": trainer(20, 64, 16, 2e-3, samples_per_prompt=8, inner_epochs=2),
    },
    "DPO": {
        "experience": {"source": "pairs", "path": PAIRS},
        "objective": {"name": "dpo", "beta": 200, "draws": 4},
        "trainer": trainer(24, 64, 16, 1e-3),
    },
    "KTO on both sides": {
        "experience": {"source": "pairs", "path": PAIRS},
        "objective": {"name": "kto", "beta": 200, "draws": 4, "undesirable_weight": 0.9},
        "trainer": trainer(16, 64, 16, 1e-3),
    },
    "SFT on winners": {
        "experience": {"source": "pairs", "path": PAIRS},
        "objective": {"name": "sft", "draws": 4},
        "trainer": trainer(64, 64, 16, 3e-4),
    },
    "online DPO": {
        "experience": {"source": "online-pairs", "rater": "brain-mr"},
        "objective": {"name": "dpo", "beta": 200, "draws": 8},
        "trainer": trainer(16, 64, 8, 1e-3, samples_per_prompt=2),
    },
}  # fmt: skip


def configuration(name: str, pairs: Path) -> RunConfig:
    """The configuration of a method, with the file of judgements in its place."""
    data = json.loads(json.dumps(BASE | METHODS[name]).replace(PAIRS, str(pairs)))
    return parse(data | {"name": slug(name)})


def slug(name: str) -> str:
    """The name of a method's folder."""
    return name.lower().replace(" ", "-")


def judgements(config: RunConfig) -> int:
    """Judgements that a run learns from."""
    wanted = config.experience
    if wanted.source == "online-pairs":
        return config.trainer.epochs * dry_run.items(config)
    return JUDGEMENTS


def work(config: RunConfig) -> int:
    """Denoiser calls on one image in training, a backward pass counted as two; without the evaluation."""
    settings, objective = config.trainer, config.objective
    sampled, _, _ = dry_run.generated(config, 0)
    shown = sum(dry_run.items(config, inner) for inner in range(settings.inner_epochs))
    if objective.name in POLICY_GRADIENT:
        trained: float = shown * config.sampler.steps
    else:
        both = config.experience.source.endswith("pairs") and objective.name != "sft"
        trained = shown * (objective.draws or 1) * (2 if both else 1)
    return int(sampled * config.sampler.steps + settings.epochs * (dry_run.learning_calls(config) + 2 * trained))


def collect(path: Path, seed: int) -> None:
    """The file of judgements, made once."""
    config = parse(BASE | {"rewards": ["compressibility"], "seed": seed})
    train, _ = prompts.load(config.prompts, seed)
    policy = build.policy(config)
    judge_pairs(path, "brain-mr", JUDGEMENTS, ["overall"], seed, policy, train, lambda *_: None)


def run(name: str, folder: Path, pairs: Path, threads: int) -> dict[str, Any]:
    """One method by the command line, and what came out of it."""
    config, out = configuration(name, pairs), folder / slug(name)
    record = out / "benchmark.json"
    if not record.is_file():
        shutil.rmtree(out, ignore_errors=True)
        file = folder / f"{slug(name)}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        print(f"{name}: {work(config):,} denoiser calls", flush=True)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with (folder / f"{slug(name)}.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "apps.cli", "align", str(file), "--out", str(out)], cwd=ROOT, check=True,
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record.write_text(json.dumps({"wall": time.perf_counter() - started, "processor": spent}))
    return {
        "name": name,
        "judgements": judgements(config),
        "work": work(config),
        "seconds": json.loads(record.read_text()),
        "evaluation": json.loads((out / "evaluation.json").read_text()),
        "configuration": METHODS[name],
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(METHODS), metavar="METHOD", default=list(METHODS), help="run only these")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--folder", type=Path, default=ROOT / "build" / "methods", help="where the runs go")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    add("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    add("--page-only", action="store_true", help="write the page anew from the results in --out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for, and writes the results and the page."""
    options = parse_arguments(arguments)
    if not options.page_only:
        options.folder.mkdir(parents=True, exist_ok=True)
        pairs = options.folder / "pairs.parquet"
        collect(pairs, options.seed)
        found = [run(name, options.folder, pairs, options.threads) for name in options.only]
        results: Mapping[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(options.threads),
            "versions": versions(),
            "judgements": JUDGEMENTS,
            "base": BASE,
            "methods": found,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(methods_page.page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
