"""GRPO side by side: this project and TRL 1.16's GRPOTrainer, on the same small language model with the same settings.

``python -m benchmarks.trl_grpo`` (or ``make bench-grpo``) makes ``build/bench-trl-grpo``, an environment that adds TRL
to the packages of this one, runs both sides in turn, and writes ``benchmarks/results/trl_grpo.json`` and the page
``benchmarks/trl_grpo.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import trl_grpo_page
from benchmarks.environment import ENVIRONMENT, ROOT, Answer, Worker, WorkerError, machine, prepare_environment
from benchmarks.trl_grpo_sides import SAVINGS, SETUP
from diffalign.runs import write_text

OWN = ROOT / "build" / "bench-trl-grpo"
TRL = "trl==1.16.0"
SIDES = ("trl", "diffalign")
KLS = (0.02, 0.0)
"""KL coefficients: that of the recipe ``text-grpo``, and TRL's own, which needs no reference."""


def step(worker: Worker, without: str | None = None) -> Answer:
    """One step of a side, and its seconds in all."""
    answer = worker.ask({"without": without})
    parts = answer["parts"]
    parts["step"] = {clock: sum(part[clock] for part in parts.values()) for clock in ("wall", "cpu")}
    return answer


def alternating(running: dict[str, Worker], count: int) -> dict[str, list[Answer]]:
    """``count`` steps of each side, in turn, and every other time in reverse: A B B A."""
    answers: dict[str, list[Answer]] = {side: [] for side in running}
    for number in range(count):
        for side in running if number % 2 == 0 else reversed(running):
            answers[side].append(step(running[side]))
            seconds = answers[side][-1]["parts"]["step"]
            print(f"step {number + 1}/{count}  {side:9}  {seconds['cpu']:6.2f} s processor", flush=True)
    return answers


def savings(worker: Worker, count: int) -> dict[str, list[Answer]]:
    """Steps of our side with everything, and without each saving, in turn."""
    answers: dict[str, list[Answer]] = {name: [] for name in ("", *SAVINGS)}
    for number in range(count):
        for name in answers if number % 2 == 0 else reversed(answers):
            answers[name].append(step(worker, name or None))
    return answers


def check_same_task(running: Mapping[str, Worker], warm: Mapping[str, list[Answer]]) -> None:
    """Raises WorkerError unless both sides train as many weights, read the same tokens, and begin alike.

    Adapters start at zero, so the first step samples the same distribution on both sides: the means of the reward must
    agree within four standard errors.
    """
    for name in ("trainable", "parameters", "first_prompt"):
        said = [running[side].ready[name] for side in SIDES]
        if said[0] != said[1]:
            raise WorkerError(f"the sides differ in {name}: {said[0]} (TRL) and {said[1]}")
    trl, ours = (warm[side][0] for side in SIDES)
    error = float((trl["reward_std"] ** 2 + ours["reward_std"] ** 2) / SETUP.samples) ** 0.5
    if not abs(trl["reward_mean"] - ours["reward_mean"]) <= 4 * error:
        raise WorkerError(
            f"the rewards of the same untrained model differ: {trl['reward_mean']:.4f} (TRL) and"
            f" {ours['reward_mean']:.4f}, standard error {error:.4f}"
        )


def measure(kl: float, steps: int, threads: int) -> dict[str, object]:
    """Both sides with this KL coefficient, after a step to warm up."""
    python = str(prepare_environment(OWN, TRL))
    ENVIRONMENT.mkdir(parents=True, exist_ok=True)  # where workers log
    with ExitStack() as stack:
        running = {}
        for side in SIDES:
            print(f"loading {side}, KL coefficient {kl:g}", flush=True)
            command = ["benchmarks.trl_grpo_sides", side, str(kl), str(threads)]
            interpreter = python if side == "trl" else sys.executable
            running[side] = Worker(f"grpo-{side}", interpreter, command, threads)
            stack.callback(running[side].close)
        warm = alternating(running, 1)
        check_same_task(running, warm)
        found = alternating(running, steps)
        return {
            "kl": kl,
            "ready": {side: worker.ready for side, worker in running.items()},
            "warm_up": warm,
            "steps": found,
            "savings": savings(running["diffalign"], steps) if kl else {},
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, and writes results and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_grpo", description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_grpo.json")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if not options.page_only:
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(options.threads),
            "setup": asdict(SETUP),
            "settings": [measure(kl, options.steps, options.threads) for kl in KLS],
        }
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    write_text(options.page, trl_grpo_page.page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
