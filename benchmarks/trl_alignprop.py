"""Reward backpropagation side by side: this project and TRL's AlignPropTrainer, on the models of ``trl_ddpo``.

``python -m benchmarks.trl_alignprop`` runs the sides in turn, in the environment of ``trl_ddpo``, and writes
``benchmarks/results/trl_alignprop.json`` and the page ``benchmarks/trl_alignprop.md``. ``--size sd15`` does so with
Stable Diffusion 1.5's configuration and random weights, and adds a section to the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ddpo_setup import SETUPS, Setup
from benchmarks.environment import ENVIRONMENT, ROOT, Answer, Worker, WorkerError, machine, prepare_environment
from benchmarks.markdown import grid, paragraph, where
from benchmarks.sizes_models import MODELS, made

SIDES = {"trl": "TRL", "diffalign": "diffalign", "checkpointed": "diffalign, checkpointed"}


@contextmanager
def workers(size: str, threads: int) -> Iterator[dict[str, Worker]]:
    """All sides, loaded and waiting."""
    folder = ENVIRONMENT / "model"
    with ExitStack() as stack:
        trl = str(prepare_environment())
        if size != "tiny":
            folder = stack.enter_context(made(size, SETUPS[size].pixels))
        running = {}
        for side in SIDES:
            command = ["benchmarks.alignprop_sides", side, str(folder), str(threads), size]
            running[side] = Worker(f"alignprop-{side}", trl if side == "trl" else sys.executable, command, threads)
            stack.callback(running[side].close)
        yield running


def measure(size: str, rounds: int, threads: int) -> dict[str, Any]:
    """Iterations of each side at each truncation, in turn, after a warm-up of each."""
    setup = SETUPS[size]
    lasts = (1, setup.steps)
    answers: dict[str, dict[str, list[Answer]]] = {str(last): {side: [] for side in SIDES} for last in lasts}
    with workers(size, threads) as running:
        warm = {side: [worker.ask({"last": last}) for last in lasts] for side, worker in running.items()}
        check_same_start([warm[side][0] for side in SIDES], setup)
        for last in lasts:
            for number in range(rounds):
                for side in SIDES if number % 2 else reversed(SIDES):
                    answers[str(last)][side].append(running[side].ask({"last": last}))
                    spent = _seconds(answers[str(last)][side])[-1]
                    print(f"last {last}, round {number + 1}/{rounds}, {side}: {spent:.2f} s", flush=True)
        ready = {side: worker.ready for side, worker in running.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(threads), "rounds": rounds,
        "setup": asdict(setup), "ready": ready, "warm_up": warm, "answers": answers,
    }  # fmt: skip


def check_same_start(first: Sequence[Answer], setup: Setup) -> None:
    """Raises WorkerError unless the untrained model's rewards have the same mean on all sides, to 4 standard errors."""
    for answer in first[1:]:
        error = ((first[0]["reward_std"] ** 2 + answer["reward_std"] ** 2) / setup.images) ** 0.5
        if not abs(first[0]["reward_mean"] - answer["reward_mean"]) <= 4 * error:
            raise WorkerError(f"the rewards of the same untrained model differ: {first[0]} and {answer}")


def _seconds(answers: Sequence[Answer]) -> list[float]:
    return [answer["parts"]["iteration"]["cpu"] for answer in answers]


def _tables(results: dict[str, Any], level: str) -> list[str]:
    """One for each number of steps that the gradient goes back through."""
    found, header = [], ["", "iteration", "TRL's time / this", "rows forward", "rows backward", "peak memory"]
    for last, answers in results["answers"].items():
        theirs, rows = _seconds(answers["trl"]), []
        for side, name in SIDES.items():
            own, calls = _seconds(answers[side]), answers[side][-1]["rows"]
            ratios = [a / b for a, b in zip(theirs, own, strict=True)]
            against = "" if side == "trl" else f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            peak = max(answer["peak_mb"] for answer in answers[side])
            counted = [str(calls["forward"]), str(calls["backward"])]
            rows.append([name, f"{median(own):.2f} s", against, *counted, f"{peak:.0f} MB"])
        what = "the last step" if last == "1" else f"all {last} steps"
        found += [f"{level} Back through {what}", grid(header, rows)]
    return found


def _conditions(results: dict[str, Any]) -> str:
    load = results["machine"]["load_average"][0]
    return (
        paragraph(where(results["machine"], results["ready"]["trl"]["versions"]))
        + "\n\n"
        + paragraph(
            f"Load average at the start: {load:g}. Processor seconds leave out the time in which others had the"
            " processor, though not the caches that others emptied."
        )
    )


def _task(results: dict[str, Any]) -> str:
    setup = results["setup"]
    return (
        f"sample {setup['images']} images of {setup['pixels']}×{setup['pixels']} pixels in {setup['steps']} steps with"
        f" guidance {setup['guidance_scale']:g} and noise, judge how red they are, go back through the last steps, and"
        f" make one AdamW update. Batches of {setup['micro_batch']} images on both sides."
    )


def _sized(size: str, results: dict[str, Any]) -> list[str]:
    """The same at a real size: a section of its own."""
    ready = results["ready"]["diffalign"]
    return [
        f"## At the size of {MODELS[size].title}",
        paragraph(
            f"Written by `python -m benchmarks.trl_alignprop --size {size} --iterations {results['rounds']} --threads"
            f" {results['machine']['threads']}` on {results['date']}. The real configuration of U-Net, text encoder and"
            f" autoencoder with random weights: a U-Net of {ready['parameters'] / 1e6:.0f} M parameters with a LoRA of"
            f" rank {results['setup']['rank']}: {_task(results)}"
        ),
        *_tables(results, "###"),
        paragraph(
            "So few steps of so small images show the second decoding at its dearest: decoding an image of 128 pixels"
            " is 155 GFLOP here and a row of the denoiser 46 (as torch counts them; at 512 pixels 2515 and 803)."
        ),
        "### Conditions",
        _conditions(results),
    ]


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    ready = results["ready"]["diffalign"]
    return "\n\n".join(
        [
            "# Reward backpropagation: diffalign and TRL side by side",
            paragraph(
                f"Written by `python -m benchmarks.trl_alignprop --iterations {results['rounds']}` on"
                f" {results['date']}; every number is in [results/trl_alignprop.json](results/trl_alignprop.json). TRL"
                " 0.23.1 is the last series with `AlignPropTrainer`."
            ),
            paragraph(
                "**The task.** The random Stable Diffusion of [trl_ddpo.md](trl_ddpo.md), a U-Net of"
                f" {ready['parameters'] / 1e6:.2f} M parameters with a LoRA of rank {results['setup']['rank']}:"
                f" {_task(results)} TRL is given a fixed truncation, which is DRaFT-K; ours is the objective `draft`."
            ),
            *_tables(results, "##"),
            paragraph(
                "Medians of processor seconds, and ratios round by round (lowest–highest); above 1, we are faster. Rows"
                " are counted by hooks on the denoiser, without what a checkpointed call makes again inside; guidance"
                " doubles them. Memory is the largest resident size of the process in these iterations, with its"
                " libraries and what its allocator kept."
            ),
            paragraph(
                "**What differs.** We sample first, without a graph, judge the 8-bit images as every reward does, and"
                " then make the last K steps and the decoding once more with gradient; TRL keeps the graph of its only"
                " pass. So the more steps the gradient goes through, the more of ours is done twice. TRL checkpoints"
                " every call, so it makes each differentiated call again on the way back; we do where"
                " `trainer.gradient_checkpointing` says so, and then inside of each call as well, for less memory."
                " TRL's own random truncation draws anew for each step whether it has a gradient; that of `align-prop`"
                " draws one K for an update, as the paper says. It is not compared here."
            ),
            "## Conditions",
            _conditions(results),
            *(part for size, found in results.get("sizes", {}).items() for part in _sized(size, found)),
        ]
    ) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes results and page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_alignprop", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--size", choices=list(SETUPS), default="tiny", help="the model (default: tiny)")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each side at each truncation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_alignprop.json")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    recorded = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if not recorded and (options.page_only or options.size != "tiny"):
        parser.error(f"{options.out} has no results yet: measure the tiny model first, without --size and --page-only")
    if not options.page_only:
        found = measure(options.size, options.iterations, options.threads)
        if options.size == "tiny":
            recorded |= found
        else:
            recorded.setdefault("sizes", {})[options.size] = found
        options.out.write_text(json.dumps(recorded, indent=1) + "\n")
    Path(__file__).with_suffix(".md").write_text(page(recorded))


if __name__ == "__main__":
    main()
