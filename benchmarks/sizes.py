"""What an iteration of DDPO takes at the sizes that people use: seconds, memory, and the share of the device's ceiling.

``python -m benchmarks.sizes`` (or ``make bench-sizes``) makes each model with random weights in ``build/bench-sizes``,
measures it in a process of its own, removes it, and writes ``benchmarks/results/sizes.json`` and the page
``benchmarks/sizes.md``. On a GPU: ``--device cuda --precision bf16 --pixels 1024 --matmul 8192``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import sizes_page
from benchmarks.environment import ROOT, Answer, Worker, WorkerError, machine
from benchmarks.sizes_models import DEFAULT, MODELS, Settings, made
from diffalign.runs import write_text


def measured(name: str, folder: Path, settings: Settings, iterations: int, threads: int) -> dict[str, Any]:
    """One model in one precision: a warm-up, an iteration that is counted, some that are timed, and the estimate."""
    before = machine(threads)
    command = ["benchmarks.sizes_side", str(folder), str(threads), json.dumps(asdict(settings))]
    worker = Worker(f"{name}-{settings.precision}", sys.executable, command, threads, folder.parent)
    try:
        found: dict[str, Any] = {
            "model": name, "title": MODELS[name].title, "note": MODELS[name].note,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": before, "ready": worker.ready,
        }  # fmt: skip
        found["warm_up"] = _asked(worker, {}, "warm-up")
        found["counted"] = _asked(worker, {"count": True}, "counted")
        found["timed"] = [_asked(worker, {}, f"{number + 1}/{iterations}") for number in range(iterations)]
        found |= worker.ask({"estimate": True})
    finally:
        worker.close()
    check(found)
    return found


def _asked(worker: Worker, request: Answer, what: str) -> Answer:
    answer = worker.ask(request)
    seconds = {part: round(taken["wall"], 1) for part, taken in answer["parts"].items()}
    print(f"{worker.name}, {what}: {seconds} s, peak {max(answer['peak_mb'].values()):.0f} MB", flush=True)
    return answer


def check(found: dict[str, Any]) -> None:
    """Raises WorkerError unless every iteration after the warm-up did the work that the settings ask for."""
    wanted = found["ready"]["latents"]
    for answer in [found["counted"], *found["timed"]]:
        if answer["latents"] != wanted:
            raise WorkerError(f"{found['model']}: {answer['latents']} latents went through the denoiser, not {wanted}")
    if [answer["updates"] for answer in found["timed"]] != list(range(3, 3 + len(found["timed"]))):
        raise WorkerError(f"{found['model']}: an iteration made no update")


def merged(before: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The recorded models with this one in place of an earlier one of the same settings, but for the ceiling's."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        settings = one["ready"]["settings"]
        return one["model"], *(value for name, value in sorted(settings.items()) if name != "matmul")

    order = list(MODELS)
    kept = [one for one in before if key(one) != key(found)]
    return sorted([*kept, found], key=lambda one: (order.index(one["model"]), *map(str, key(one)[1:])))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Exits with status 2 for numbers that do not fit together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(DEFAULT))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], help="default: by the model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or a numbered one")
    parser.add_argument("--pixels", type=int, default=128, help="side of the images")
    parser.add_argument("--images", type=int, default=2, help="images of an iteration")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of an image")
    parser.add_argument("--guidance-scale", type=float, help="default: by the model")
    parser.add_argument("--micro-batch", type=int, default=2, help="denoising steps in a backward pass")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA on attention")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--matmul", type=int, default=4096, help="side of the matrices of the ceiling")
    parser.add_argument("--iterations", type=int, default=2, help="timed iterations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the weights in build/bench-sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sizes.json")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    for name in ("pixels", "images", "steps", "micro_batch", "rank", "matmul", "iterations", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1; got {getattr(options, name)}")
    if options.images < 2:
        parser.error("--images is at least 2: credit compares the images of an iteration; got 1")
    return options


def planned(options: argparse.Namespace) -> list[tuple[str, Settings]]:
    """What is measured, in order."""
    given = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name != "precision"}
    runs = []
    for name in options.models:
        model = MODELS[name]
        scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
        for precision in options.precision or model.precisions:
            runs.append((name, Settings(**given | {"precision": precision, "guidance_scale": scale})))
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes results and page after each model: those of other models are kept."""
    options = parse(arguments)
    results = json.loads(options.out.read_text()) if options.out.is_file() else []
    if not options.page_only:
        runs = planned(options)
        for name in options.models:
            with made(name, keep=options.keep) as folder:
                for settings in (settings for model, settings in runs if model == name):
                    found = measured(name, folder, settings, options.iterations, options.threads)
                    results = merged(results, found)
                    write_text(options.out, json.dumps(results, indent=1) + "\n")
                    write_text(options.page, sizes_page.page(results))
    write_text(options.page, sizes_page.page(results))


if __name__ == "__main__":
    main()
