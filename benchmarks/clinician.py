"""What the clinician reward is worth: the hidden utility of simulated clinicians against the distance from the base.

``python -m benchmarks.clinician`` (or ``make bench-clinician``) runs the recipe ``brain-mr-clinician`` with the lower
confidence bound of its reward and without (kappa 0), on the same judgements: as the recipe is, and far, where an eighth
of the judgements is followed three times as long at twice the rate. It measures on the way, and writes
``benchmarks/results/clinician.json``, the picture and the page ``benchmarks/clinician.md``. What is finished is not run
again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import clinician_plot
from benchmarks.environment import ROOT, machine
from benchmarks.markdown import grid, paragraph, where
from benchmarks.measuring import versions
from diffalign.runs import Run

KAPPAS = {"with the lower bound (kappa 1)": 1.0, "without it (kappa 0)": 0.0}
COLUMNS = (
    "distance/step_kl",
    "held_out/clinician",
    "held_out/hidden-utility",
    "held_out/brain-mr-checker",
    "held_out/clip",
)


SETTINGS: dict[str, dict[str, Any]] = {
    "the recipe": {"seeds": (0,), "every": 2, "set": {}},
    "far": {
        "seeds": (0,),
        "every": 6,
        "set": {
            "fit.collect": 128, "trainer.epochs": 48, "trainer.schedule": "constant", "trainer.learning_rate": 2e-3,
            "evaluation.seeds_per_prompt": 2,
        },
    },
}  # fmt: skip


def run(setting: str, kappa: float, seed: int, folder: Path, first: Path | None, threads: int) -> Path:
    """One run by the command line; a second one takes the judgements of the first."""
    name = f"{setting.replace(' ', '-')}-kappa-{kappa:g}-seed-{seed}"
    out, given = folder / name, SETTINGS[setting]
    changes = given["set"] | {
        "seed": seed, "rewards.0": f"clinician?folder=fitted&kappa={kappa:g}", "evaluation.every": given["every"],
        "device": "cpu",
    }  # fmt: skip
    if first is not None:
        changes |= {"fit.rater": "null", "fit.preferences": first / "reward-preferences.parquet"}
    if not (out / "evaluation.json").is_file():
        print(name, flush=True)
        command = [sys.executable, "-m", "apps.cli", "align", "brain-mr-clinician", "--out", str(out)]
        if (out / "config.yaml").is_file():
            command.append("--resume")
        for field, value in changes.items():
            command += ["--set", f"{field}={value}"]
        with (folder / f"{name}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return out


def record(out: Path) -> dict[str, Any]:
    """What a run measured on the way and at the end."""
    rows = [row for row in Run(out).metrics() if "distance/step_kl" in row]
    return {
        "points": [{"epoch": row["step"], **{name: row.get(name) for name in COLUMNS}} for row in rows],
        "evaluation": json.loads((out / "evaluation.json").read_text()),
    }


def collect(setting: str, folder: Path, threads: int) -> list[dict[str, Any]]:
    """All runs of a setting, and what came of them."""
    found = []
    for seed in SETTINGS[setting]["seeds"]:
        first: Path | None = None
        for name, kappa in KAPPAS.items():
            out = run(setting, kappa, seed, folder, first, threads)
            found.append({"kappa": name, "seed": seed, **record(out)})
            first = first or out
    return found


def page(results: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    parts = [
        "# The clinician reward against what its clinicians want",
        paragraph(
            "Written by `make bench-clinician` on"
            f" {results['date']}; every number is in [results/clinician.json](results/clinician.json)."
        ),
        paragraph(
            "Simulated clinicians judge pairs by three criteria; a clinician reward is fitted to their choices; DDPO"
            " follows it. What they go by, the *hidden utility*, is never shown to training. A reward that is followed"
            " too far goes on rising while the utility falls behind: that is read off at equal distance from the base"
            " model, not at equal epochs. The lower bound pays less where the reward's heads disagree."
        ),
        "![hidden utility, checker and CLIP against the distance](../docs/images/clinician.png)",
    ]
    for setting, runs in results["settings"].items():
        changed = ", ".join(f"`{field}={value}`" for field, value in SETTINGS[setting]["set"].items())
        parts += [
            f"## {setting[0].upper()}{setting[1:]}",
            paragraph(
                f"`brain-mr-clinician`{' with ' + changed if changed else ' as it is'}. Before and after, on held-out"
                " prompts:"
            ),
            grid(
                (
                    "",
                    "seed",
                    "clinician reward",
                    "hidden utility",
                    "checker",
                    "CLIP",
                    "distance (step KL)",
                    "diversity kept",
                ),
                [_summary(found) for found in runs],
            ),
            paragraph("On the way, one seed a prompt, the mean over the runs:"),
            grid(
                ("epoch", *(f"{what}, {name}" for name in KAPPAS for what in ("distance", "utility", "CLIP"))),
                _way(runs),
            ),
        ]
    parts += [
        paragraph("Differences with 95 % intervals that resample prompts. CLIP saw neither labels nor raters."),
        "## Conditions",
        paragraph(where(results["machine"], results["versions"])),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(found: Mapping[str, Any]) -> tuple[str, ...]:
    rewards, diversity = found["evaluation"]["rewards"], found["evaluation"]["diversity"]
    return (
        found["kappa"], str(found["seed"]),
        *(_difference(rewards[key]) for key in ("clinician", "hidden-utility", "brain-mr-checker", "clip")),
        f"{found['evaluation']['distance']['step_kl']:.1e}", f"{diversity['after'] / diversity['before']:.0%}",
    )  # fmt: skip


def _way(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each epoch of a measurement: distance, utility and CLIP with and without the bound."""
    found: dict[float, list[str]] = {}
    for name in KAPPAS:
        own = [run["points"] for run in runs if run["kappa"] == name]
        for points in zip(*own, strict=True):
            means = {
                key: sum(point[key] for point in points) / len(points) for key in (COLUMNS[0], COLUMNS[2], COLUMNS[4])
            }
            row = found.setdefault(points[0]["epoch"], [])
            row += [f"{means[COLUMNS[0]]:.1e}", f"{means[COLUMNS[2]]:.3f}", f"{means[COLUMNS[4]]:.3f}"]
    return [(f"{epoch:g}", *row) for epoch, row in found.items()]


def _difference(entry: Mapping[str, Any]) -> str:
    found = entry["difference"]
    return f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and writes the results, the picture and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clinician", description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clinician", help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "clinician.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "clinician.png")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if not options.page_only:
        options.folder.mkdir(parents=True, exist_ok=True)
        found = {setting: collect(setting, options.folder, options.threads) for setting in SETTINGS}
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(options.threads),
            "versions": versions(),
            "settings": found,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(options.out.read_text())
    clinician_plot.draw(results["settings"], options.picture)
    options.page.write_text(page(results))


if __name__ == "__main__":
    main()
