"""The closed loop by commands alone: align, label, learn from the labels, evaluate.

``python -m benchmarks.closed_loop`` (or ``make bench-loop``) runs what docs/tutorial-closed-loop.md says, one command
after the other, with simulated raters that vote over HTTP. It writes ``benchmarks/results/closed_loop.json`` and the
page ``benchmarks/closed_loop.md``. What is done already in ``--folder`` is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, machine
from benchmarks.markdown import grid, paragraph, where
from benchmarks.measuring import versions

RESULTS = ROOT / "benchmarks" / "results" / "closed_loop.json"
PAGE = ROOT / "benchmarks" / "closed_loop.md"
RATERS = 4
COLUMNS = ("first", "second", "checked", "third")
MEASURES = ("hidden-utility", "brain-mr-checker", "clip")


def commands(folder: str, url: str, pairs: int, epochs: int) -> dict[str, list[str]]:
    """Every ``diffalign`` command of the loop but the server's, by the file or folder that it makes."""
    measured = "evaluation.rewards=[hidden-utility?rater=brain-mr, brain-mr-checker, clip]"
    learn = [
        "model=embedded:brain-mr", "prompts={source: brain-mr, task: lesion, train: 82, held_out: 26}",
        "experience.rater=null", f"experience.path={folder}/overall.parquet", measured,
    ]  # fmt: skip
    study = f"{folder}/study"
    return {
        "first": ["align", "quickstart", "--set", f"trainer.epochs={epochs}", "--out", f"{folder}/first"],
        "study": [
            "label", "init", study, "--from", f"{folder}/first", "--split", "train", "--pairs", str(pairs),
            "--protocol", "brain_mr_plausibility",
        ],
        "votes": [
            "label", "simulate", study, "--url", url, "--rater", "brain-mr", "--raters", str(RATERS),
        ],
        "votes.parquet": ["label", "export", study, "--out", f"{folder}/votes.parquet"],
        "overall.parquet": [
            "label", "export", study, "--out", f"{folder}/overall.parquet", "--criterion", "overall",
        ],
        "second": [
            "align", "emoji-dpo", *(word for field in learn for word in ("--set", field)), "--out", f"{folder}/second",
        ],
        "reward": [
            "reward", "fit", "clinician", "--set", f"preferences={folder}/votes.parquet", "--out", f"{folder}/reward",
        ],
        "third": [
            "align", "brain-mr-clinician", "--set", "fit.rater=null", "--set",
            f"fit.preferences={folder}/votes.parquet", "--set", "trainer.epochs=8", "--out", f"{folder}/third",
        ],
        "checked": [
            "evaluate", f"{folder}/second", "--against", "embedded:brain-mr", "--set", "seed=1", "--out",
            f"{folder}/checked",
        ],
    }  # fmt: skip


def run(folder: Path, pairs: int, epochs: int, threads: int) -> dict[str, Any]:
    """Everything in order; returns what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    seconds = _read(folder / "seconds.json")
    for name in commands(str(folder), "", pairs, epochs):
        if name in seconds:
            continue
        began = time.monotonic()
        if name == "votes":
            with served(folder, environment) as url:
                _command(folder, name, commands(str(folder), url, pairs, epochs)[name], environment)
        else:
            _command(folder, name, commands(str(folder), "", pairs, epochs)[name], environment)
        seconds[name] = round(time.monotonic() - began, 1)
        (folder / "seconds.json").write_text(json.dumps(seconds))
    stats = subprocess.run(
        [*DIFFALIGN, "label", "stats", str(folder / "study"), "--json"],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return {
        "pairs": pairs,
        "epochs": epochs,
        "seconds": seconds,
        "first": _read(folder / "first" / "evaluation.json"),
        "study": json.loads(stats),
        "second": _read(folder / "second" / "evaluation.json"),
        "checked": _read(folder / "checked" / "evaluation.json"),
        "third": _read(folder / "third" / "evaluation.json"),
        "reward": _read(next((folder / "reward").glob("*card.json"))),
    }


DIFFALIGN = (sys.executable, "-m", "apps.cli")


def _command(folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    print(f"diffalign {shlex.join(command)}", flush=True)
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run([*DIFFALIGN, *command], cwd=ROOT, check=True, stdout=log, stderr=log, env=environment)


@contextmanager
def served(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """``label serve`` with one account, for as long as the raters work; gives its address."""
    users = [*DIFFALIGN, "label", "users", "add", str(folder / "study"), "admin", "--role", "admin"]
    subprocess.run(
        [*users, "--password-stdin"], cwd=ROOT, env=environment, check=True, input=f"{os.urandom(12).hex()}\n",
        text=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*DIFFALIGN, "label", "serve", str(folder / "study"), "--port", "0"],
            cwd=ROOT, env=environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        while not (found := re.search(r"http://\S+:\d+", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()}")
            time.sleep(0.5)
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def page(results: Mapping[str, Any]) -> str:
    """The page of recorded results."""
    study, seconds = results["study"], results["seconds"]
    listed = commands("LOOP", "http://127.0.0.1:8000", results["pairs"], results["epochs"])
    steps = "\n".join(f"diffalign {shlex.join(command)}" for command in listed.values())
    rows = [[name, *(_shown(results[run]["rewards"].get(name)) for run in COLUMNS)] for name in MEASURES]
    judged = [
        [name, _share(found["accuracy"]), _share(found["agreement"])]
        for name, found in results["reward"]["criteria"].items()
    ]
    took = grid(["step", "seconds"], [[name, f"{value:,.0f}"] for name, value in seconds.items()])
    return "\n".join([
        "# The closed loop by commands alone",
        "",
        f"Written by `make bench-loop` on {results['date']}; every number is in"
        " [results/closed_loop.json](results/closed_loop.json).",
        "",
        paragraph(
            "A run is begun by a checker's reward, its pictures and those of the base model are judged by simulated"
            f" raters over HTTP ({study['votes']} votes on {study['pairs']} pairs), and the base model learns from"
            " those votes alone, by DPO. The checker is not among what it learns from. *first* is the run that was"
            " labelled, *second* the one that learned from the labels, *checked* the same by other seeds. *third*"
            " learned from the same votes by a clinician reward that was fitted to them, and DDPO on its lower bound."
            " One run of each, on a machine that was shared with other work."
        ),
        "",
        "Difference to the base model on held-out prompts, the same prompts and seeds, 95 % intervals that resample"
        " prompts:",
        "",
        grid(["", *COLUMNS], rows),
        "",
        paragraph(
            "The reward model of the same votes, by its card, on prompts that it was not fitted to: how many pairs it"
            " orders as raters did, and how often a second rater agrees with the first."
        ),
        "",
        grid(["question", "reward model", "second rater"], judged),
        "",
        *_coins(results["reward"]["criteria"]),
        *(line for run in COLUMNS[1:] for line in _verdict(run, results[run])),
        paragraph(where(results["machine"], results["versions"])),
        "",
        "```sh",
        steps,
        "```",
        "",
        took,
        "",
    ])  # fmt: skip


def _coins(criteria: Mapping[str, Any]) -> list[str]:
    """What has to be said of questions whose reward model may be no better than a coin."""
    names = [name for name, found in criteria.items() if (found["accuracy"].get("ci95") or [0])[0] <= 0.5]
    if not names:
        return []
    said = (
        f"Of {' and of '.join(names)} the reward model cannot be told from a coin: pairs of a model and its own base at"
        " the same seed are hard, and these are few prompts."
    )
    return [paragraph(said), ""]


def _verdict(run: str, evaluation: Mapping[str, Any]) -> list[str]:
    text = (evaluation.get("verdict") or {}).get("text")
    return [paragraph(f"Verdict on *{run}*, as its report says: {text}"), ""] if text else []


def _share(found: Mapping[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return "–"
    low, high = found["ci95"] or (None, None)
    return f"{found['value']:.0%}" + ("" if low is None else f" ({low:.0%} to {high:.0%})")


def _shown(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry.get("difference") is None:
        return "–"
    found = entry["difference"]
    low, high = found["ci95"] or (None, None)
    return f"{found['mean']:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")


def main() -> None:
    """Runs the loop and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=Path("runs/closed-loop"))
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--epochs", type=int, default=10, help="of the run whose pictures are judged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page-only", action="store_true", help="the page anew from the recorded results")
    given = parser.parse_args()
    if not given.page_only:
        found = run(given.folder.resolve(), given.pairs, given.epochs, given.threads)
        found |= {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(given.threads),
            "versions": versions(),
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
