"""DDPO side by side: this project and TRL's DDPOTrainer, on the same tiny model with the same settings.

``python -m benchmarks.trl_ddpo`` (or ``make bench``) makes ``build/bench-trl``, an environment that adds TRL to the
packages of this one, runs both sides in turn, and writes ``benchmarks/results/trl_ddpo.json`` and the page
``benchmarks/trl_ddpo.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks import trl_ddpo_page
from benchmarks.ddpo_setup import SETUP

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "bench-trl"
TRL = "trl==0.23.1"
SIDES = ("trl", "diffalign", "bare")
CONTESTANTS = ("trl", "diffalign")
MICRO_BATCHES = (8, 32, 64, 160)
"""Tried once by each side that can take them, to find its best."""

Answer = dict[str, Any]


class WorkerError(Exception):
    """A side ended before it answered."""


class Worker:
    """One side in its own process: a JSON line in, a JSON line out."""

    def __init__(self, side: str, python: str, threads: int, log: Path) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        command = [python, "-m", "benchmarks.ddpo_sides", side, str(ENVIRONMENT / "model"), str(threads)]
        self.side, self.log = side, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | quiet, text=True, bufsize=1, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.ready = self._answer()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"side {self.side} ended early; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
        answer: Answer = json.loads(line)
        return answer

    def iteration(self, micro_batch: int) -> Answer:
        """One iteration at this micro-batch."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"micro_batch": micro_batch}) + "\n")
        answer = self._answer() | {"micro_batch": micro_batch}
        parts = answer["parts"]
        parts["iteration"] = {clock: sum(part[clock] for part in parts.values()) for clock in ("wall", "cpu")}
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def prepare_environment() -> Path:
    """The interpreter of an environment with TRL; everything else comes from this interpreter's own packages."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=False, symlinks=os.name != "nt")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)}))
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not list(packages.glob(f"{TRL.replace('==', '-')}.dist-info")):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "--no-deps", TRL], check=True)
    return python


@contextmanager
def workers(threads: int) -> Iterator[dict[str, Worker]]:
    """All sides, loaded and waiting."""
    pythons = {"trl": str(prepare_environment())}
    with ExitStack() as stack:
        running = {}
        for side in SIDES:
            print(f"loading {side}", flush=True)
            worker = Worker(side, pythons.get(side, sys.executable), threads, ENVIRONMENT / f"{side}.log")
            stack.callback(worker.close)
            running[side] = worker
        yield running


def rounds(running: dict[str, Worker], micro_batches: dict[str, int], count: int) -> dict[str, list[Answer]]:
    """``count`` iterations of each side, in turn, and every other time in reverse: A B C C B A."""
    answers: dict[str, list[Answer]] = {side: [] for side in micro_batches}
    for number in range(count):
        order = list(micro_batches)
        for side in order if number % 2 == 0 else reversed(order):
            answer = running[side].iteration(micro_batches[side])
            answers[side].append(answer)
            seconds = answer["parts"]["iteration"]
            print(
                f"round {number + 1}/{count}  {side:9}  micro-batch {micro_batches[side]:3}"
                f"  {seconds['cpu']:7.2f} s processor  {seconds['wall']:7.2f} s wall",
                flush=True,
            )
    return answers


def best_micro_batches(running: dict[str, Worker]) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
    """The micro-batch whose update is fastest, for each contestant, and the seconds of each that was tried."""
    tried: dict[str, dict[int, float]] = {side: {} for side in CONTESTANTS}
    for micro_batch in sorted({*MICRO_BATCHES, SETUP.micro_batch}):
        for side in CONTESTANTS:
            if side == "trl" and SETUP.images % micro_batch:
                continue  # its batch holds one step of different images, so it cannot exceed or split their number
            answer = running[side].iteration(micro_batch)
            tried[side][micro_batch] = answer["parts"]["update"]["cpu"]
            print(f"trying {side} with micro-batch {micro_batch}: {tried[side][micro_batch]:.2f} s update", flush=True)
    return {side: min(seconds, key=lambda size: seconds[size]) for side, seconds in tried.items()}, tried


def check_same_work(warm: dict[str, list[Answer]], equal: dict[str, list[Answer]]) -> None:
    """Raises WorkerError unless every measured iteration made the same denoiser calls and rewards are alike.

    The adapters start at zero, so the first iteration samples the same distribution on both sides: the means of the
    reward must agree within four standard errors.
    """
    expected = SETUP.calls(SETUP.micro_batch)
    for side, answers in equal.items():
        for answer in answers:
            if answer["calls"] != expected:
                raise WorkerError(f"{side} called the denoiser {answer['calls']} times, expected {expected}")
    trl, ours = (warm[side][0] for side in CONTESTANTS)
    error = ((trl["reward_std"] ** 2 + ours["reward_std"] ** 2) / SETUP.images) ** 0.5
    if not abs(trl["reward_mean"] - ours["reward_mean"]) <= 4 * error:
        raise WorkerError(
            f"the rewards of the same untrained model differ: {trl['reward_mean']:.4f} (TRL) and"
            f" {ours['reward_mean']:.4f} kB, standard error {error:.4f}"
        )


def machine(threads: int) -> dict[str, object]:
    """What the run ran on, without names of machine or user."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def measure(iterations: int, threads: int, save: Callable[[dict[str, object]], None]) -> None:
    """Everything that the page is made from; saved when the same work is done, and again at the end."""
    results: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(threads),
        "setup": asdict(SETUP),
    }
    with workers(threads) as running:
        warm = rounds(running, dict.fromkeys(SIDES, SETUP.micro_batch), 1)
        equal = rounds(running, dict.fromkeys(SIDES, SETUP.micro_batch), iterations)
        check_same_work(warm, equal)
        results |= {"ready": {side: worker.ready for side, worker in running.items()}, "warm_up": warm, "equal": equal}
        save(results | {"tried": {}, "best": {}})
        best, tried = best_micro_batches(running)
        save(results | {"tried": tried, "best": rounds(running, best, iterations)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, prints the table, and writes results and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_ddpo", description=str(__doc__).splitlines()[0])
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trl_ddpo.json")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    page = Path(__file__).with_suffix(".md")

    def save(results: dict[str, object]) -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    if not options.page_only:
        measure(options.iterations, options.threads, save)
    recorded = json.loads(options.out.read_text())
    page.write_text(trl_ddpo_page.page(recorded))
    print("\n".join(trl_ddpo_page.table(recorded)))


if __name__ == "__main__":
    main()
