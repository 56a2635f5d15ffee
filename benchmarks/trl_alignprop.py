"""Reward backpropagation side by side: this project and TRL's AlignPropTrainer, on the tiny model of ``trl_ddpo``.

``python -m benchmarks.trl_alignprop`` runs the sides in turn, in the environment of ``trl_ddpo``, and writes
``benchmarks/results/trl_alignprop.json`` and the page ``benchmarks/trl_alignprop.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ddpo_setup import SETUP
from benchmarks.environment import ENVIRONMENT, ROOT, Answer, Worker, WorkerError, machine, prepare_environment
from benchmarks.markdown import grid, paragraph, where

SIDES = {"trl": "TRL", "diffalign": "diffalign", "checkpointed": "diffalign, checkpointed"}
LASTS = (1, SETUP.steps)
"""Last steps that the gradient goes back through."""


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Iterations of each side at each truncation, in turn, after a warm-up of each."""
    answers: dict[str, dict[str, list[Answer]]] = {str(last): {side: [] for side in SIDES} for last in LASTS}
    with ExitStack() as stack:
        running = {}
        for side in SIDES:
            python = str(prepare_environment()) if side == "trl" else sys.executable
            command = ["benchmarks.alignprop_sides", side, str(ENVIRONMENT / "model"), str(threads)]
            running[side] = Worker(f"alignprop-{side}", python, command, threads)
            stack.callback(running[side].close)
        warm = {side: [worker.ask({"last": last}) for last in LASTS] for side, worker in running.items()}
        check_same_start([warm[side][0] for side in SIDES])
        for last in LASTS:
            for number in range(rounds):
                for side in SIDES if number % 2 else reversed(SIDES):
                    answers[str(last)][side].append(running[side].ask({"last": last}))
                    print(
                        f"last {last}, round {number + 1}/{rounds}, {side}: {_seconds(answers, last, side)[-1]:.2f} s"
                    )
        ready = {side: worker.ready for side, worker in running.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(threads), "rounds": rounds,
        "ready": ready, "warm_up": warm, "answers": answers,
    }  # fmt: skip


def check_same_start(first: Sequence[Answer]) -> None:
    """Raises WorkerError unless the untrained model's rewards have the same mean on all sides, to 4 standard errors."""
    for answer in first[1:]:
        error = ((first[0]["reward_std"] ** 2 + answer["reward_std"] ** 2) / SETUP.images) ** 0.5
        if not abs(first[0]["reward_mean"] - answer["reward_mean"]) <= 4 * error:
            raise WorkerError(f"the rewards of the same untrained model differ: {first[0]} and {answer}")


def _seconds(answers: dict[str, dict[str, list[Answer]]], last: int, side: str) -> list[float]:
    return [answer["parts"]["iteration"]["cpu"] for answer in answers[str(last)][side]]


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    answers, tables, peaks = results["answers"], [], dict.fromkeys(SIDES, 0.0)
    for last in LASTS:
        rows = []
        for side, name in SIDES.items():
            own, theirs = _seconds(answers, last, side), _seconds(answers, last, "trl")
            ratios = [a / b for a, b in zip(theirs, own, strict=True)]
            calls = answers[str(last)][side][-1]["rows"]
            peaks[side] = max(peaks[side], *(answer["peak_mb"] for answer in answers[str(last)][side]))
            against = "" if side == "trl" else f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            rows.append([name, f"{median(own):.2f} s", against, str(calls["forward"]), str(calls["backward"])])
        what = "the last step" if last == 1 else f"all {last} steps"
        header = ["", "iteration", "TRL's time / this", "rows forward", "rows backward"]
        tables += [f"## Back through {what}", grid(header, rows)]
    told = ", ".join(f"{name} {peaks[side]:.0f} MB" for side, name in SIDES.items())
    ready = results["ready"]["diffalign"]
    return "\n\n".join(
        [
            "# Reward backpropagation: diffalign and TRL side by side",
            paragraph(
                f"Written by `python -m benchmarks.trl_alignprop --rounds {results['rounds']}` on {results['date']};"
                " every number is in [results/trl_alignprop.json](results/trl_alignprop.json). TRL 0.23.1 is the last"
                " series with `AlignPropTrainer`."
            ),
            paragraph(
                "**The task.** The random Stable Diffusion of [trl_ddpo.md](trl_ddpo.md), a U-Net of"
                f" {ready['parameters'] / 1e6:.2f} M parameters with a LoRA of rank {SETUP.rank}: sample {SETUP.images}"
                f" images in {SETUP.steps} steps with guidance {SETUP.guidance_scale:g} and noise, judge how red they"
                " are, go back through the last steps, and make one AdamW update. Batches of"
                f" {SETUP.micro_batch} images on both sides. TRL is given a fixed truncation, which is DRaFT-K; ours is"
                " the objective `draft`."
            ),
            *tables,
            paragraph(
                "Medians of processor seconds, and ratios round by round (lowest–highest); above 1, we are faster. Rows"
                " are counted by hooks on the denoiser, without what a checkpointed call makes again inside; guidance"
                " doubles them. The largest resident size of each"
                f" process over both tables, with its libraries and what its allocator kept: {told}."
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
            paragraph(where(results["machine"], results["ready"]["trl"]["versions"])),
            paragraph(
                f"Load average at the start: {results['machine']['load_average'][0]:g}. Processor seconds leave out the"
                " time in which others had the processor, though not the caches that others emptied."
            ),
        ]
    ) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes results and page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_alignprop", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_alignprop.json")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if not options.page_only:
        options.out.write_text(json.dumps(measure(options.rounds, options.threads), indent=1) + "\n")
    Path(__file__).with_suffix(".md").write_text(page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
