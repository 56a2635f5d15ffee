"""DDPO side by side: this project and TRL's DDPOTrainer, on the same tiny model with the same settings.

``python -m benchmarks.trl_ddpo`` (or ``make bench``) makes ``build/bench-trl``, an environment that adds TRL to the
packages of this one, runs both sides in turn, and writes ``benchmarks/results/trl_ddpo.json`` and the page
``benchmarks/trl_ddpo.md``. ``--size sd15`` does so with Stable Diffusion 1.5's configuration and random weights, which
takes 18 GB of memory, and adds a section to the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks import trl_ddpo_page
from benchmarks.ddpo_setup import SETUPS, Setup
from benchmarks.environment import ENVIRONMENT, ROOT, Answer, Worker, WorkerError, machine, prepare_environment
from benchmarks.sizes_models import made

SIDES = ("trl", "diffalign", "bare")
CONTESTANTS = ("trl", "diffalign")
MICRO_BATCHES = (8, 32, 64, 160)
"""Tried once by each side that can take them, to find its best."""


@contextmanager
def workers(size: str, threads: int, keep_freed: bool) -> Iterator[dict[str, Worker]]:
    """All sides, loaded and waiting."""
    pythons, folder = {"trl": str(prepare_environment())}, ENVIRONMENT / "model"
    with ExitStack() as stack:
        if size != "tiny":
            folder = stack.enter_context(made(size, SETUPS[size].pixels))
        running = {}
        for side in SIDES:
            print(f"loading {side}", flush=True)
            command = ["benchmarks.ddpo_sides", side, str(folder), str(threads), size]
            worker = Worker(side, pythons.get(side, sys.executable), command, threads, keep_freed=keep_freed)
            stack.callback(worker.close)
            running[side] = worker
        yield running


def iteration(worker: Worker, micro_batch: int) -> Answer:
    """One iteration of a side at this micro-batch."""
    answer = worker.ask({"micro_batch": micro_batch}) | {"micro_batch": micro_batch}
    parts = answer["parts"]
    parts["iteration"] = {clock: sum(part[clock] for part in parts.values()) for clock in ("wall", "cpu")}
    return answer


def rounds(running: dict[str, Worker], micro_batches: dict[str, int], count: int) -> dict[str, list[Answer]]:
    """``count`` iterations of each side, in turn, and every other time in reverse: A B C C B A."""
    answers: dict[str, list[Answer]] = {side: [] for side in micro_batches}
    for number in range(count):
        order = list(micro_batches)
        for side in order if number % 2 == 0 else reversed(order):
            answer = iteration(running[side], micro_batches[side])
            answers[side].append(answer)
            seconds = answer["parts"]["iteration"]
            print(
                f"round {number + 1}/{count}  {side:9}  micro-batch {micro_batches[side]:3}"
                f"  {seconds['cpu']:7.2f} s processor  {seconds['wall']:7.2f} s wall",
                flush=True,
            )
    return answers


def best_micro_batches(running: dict[str, Worker], setup: Setup) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
    """The micro-batch whose update is fastest, for each contestant, and the seconds of each that was tried."""
    tried: dict[str, dict[int, float]] = {side: {} for side in CONTESTANTS}
    for micro_batch in sorted({*MICRO_BATCHES, setup.micro_batch}):
        for side in CONTESTANTS:
            if side == "trl" and setup.images % micro_batch:
                continue  # its batch holds one step of different images, so it cannot exceed or split their number
            answer = iteration(running[side], micro_batch)
            tried[side][micro_batch] = answer["parts"]["update"]["cpu"]
            print(f"trying {side} with micro-batch {micro_batch}: {tried[side][micro_batch]:.2f} s update", flush=True)
    return {side: min(seconds, key=lambda size: seconds[size]) for side, seconds in tried.items()}, tried


def check_same_work(setup: Setup, warm: dict[str, list[Answer]], equal: dict[str, list[Answer]]) -> None:
    """Raises WorkerError unless every measured iteration made the same denoiser calls and rewards are alike.

    The adapters start at zero, so the first iteration samples the same distribution on both sides: the means of the
    reward must agree within four standard errors.
    """
    expected = setup.calls(setup.micro_batch)
    for side, answers in equal.items():
        for answer in answers:
            if answer["calls"] != expected:
                raise WorkerError(f"{side} called the denoiser {answer['calls']} times, expected {expected}")
    trl, ours = (warm[side][0] for side in CONTESTANTS)
    error = ((trl["reward_std"] ** 2 + ours["reward_std"] ** 2) / setup.images) ** 0.5
    if not abs(trl["reward_mean"] - ours["reward_mean"]) <= 4 * error:
        raise WorkerError(
            f"the rewards of the same untrained model differ: {trl['reward_mean']:.4f} (TRL) and"
            f" {ours['reward_mean']:.4f} kB, standard error {error:.4f}"
        )


def measure(
    size: str, iterations: int, threads: int, keep_freed: bool, save: Callable[[dict[str, object]], None]
) -> None:
    """Everything that a table is made from; saved when the same work is done, and again at the end."""
    setup = SETUPS[size]
    results: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(threads),
        "setup": asdict(setup),
        "keep_freed": keep_freed,
    }
    with workers(size, threads, keep_freed) as running:
        warm = rounds(running, dict.fromkeys(SIDES, setup.micro_batch), 1)
        equal = rounds(running, dict.fromkeys(SIDES, setup.micro_batch), iterations)
        check_same_work(setup, warm, equal)
        results |= {"ready": {side: worker.ready for side, worker in running.items()}, "warm_up": warm, "equal": equal}
        save(results | {"tried": {}, "best": {}})
        if size == "tiny":
            best, tried = best_micro_batches(running, setup)
            save(results | {"tried": tried, "best": rounds(running, best, iterations)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, prints the table, and writes results and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_ddpo", description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=list(SETUPS), default="tiny", help="the model (default: tiny)")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--keep-freed", action="store_true", help="glibc keeps what is freed (with --size)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_ddpo.json")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if options.keep_freed and options.size == "tiny":
        parser.error("--keep-freed is for a real size: say which by --size")
    recorded = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if not recorded and (options.page_only or options.size != "tiny"):
        parser.error(f"{options.out} has no results yet: measure the tiny model first, without --size and --page-only")

    entry = options.size + ("-kept" if options.keep_freed else "")

    def save(results: dict[str, object]) -> None:
        if options.size == "tiny":
            recorded.update(results)
        else:
            recorded.setdefault("sizes", {})[entry] = results
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(recorded, indent=1) + "\n")

    if not options.page_only:
        measure(options.size, options.iterations, options.threads, options.keep_freed, save)
    options.page.write_text(trl_ddpo_page.page(recorded))
    print("\n".join(trl_ddpo_page.table(recorded if options.size == "tiny" else recorded["sizes"][entry])))


if __name__ == "__main__":
    main()
