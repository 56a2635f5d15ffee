"""What the clinician reward is worth: the hidden utility of simulated clinicians against the distance from the base.

``python -m benchmarks.clinician`` (or ``make bench-clinician``) runs the recipe ``brain-mr-clinician`` twice on the
same judgements, once with the reward's lower confidence bound and once without (kappa 0), measures on the way, and
writes ``benchmarks/results/clinician.json`` and the page ``benchmarks/clinician.md``.
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


def run(kappa: float, folder: Path, every: int, first: Path | None, threads: int) -> Path:
    """One run by the command line; a second one takes the judgements of the first."""
    out = folder / f"kappa-{kappa:g}"
    if not (out / "report.html").is_file():
        command = [
            sys.executable, "-m", "apps.cli", "align", "brain-mr-clinician", "--out", str(out), "--set",
            f"rewards.0=clinician?folder=fitted&kappa={kappa:g}", "--set", f"evaluation.every={every}", "--set",
            "device=cpu",
        ]  # fmt: skip
        if first is not None:
            command += ["--set", "fit.rater=null", "--set", f"fit.preferences={first / 'reward-preferences.parquet'}"]
        with (folder / f"kappa-{kappa:g}.log").open("w") as log:
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
        "## Before and after, on held-out prompts",
        grid(
            ("", "clinician reward", "hidden utility", "checker", "CLIP", "distance (step KL)", "diversity kept"),
            [_summary(name, found["evaluation"]) for name, found in results["runs"].items()],
        ),
        paragraph("Differences with 95 % intervals that resample prompts. CLIP saw neither labels nor raters."),
        "## On the way, one seed a prompt",
    ]
    for name, found in results["runs"].items():
        rows = [
            (f"{point['epoch']:g}", f"{point['distance/step_kl']:.1e}", *(_shown(point[key]) for key in COLUMNS[1:]))
            for point in found["points"]
        ]
        parts += [
            f"**{name}**",
            grid(("epoch", "distance (step KL)", "clinician reward", "hidden utility", "checker", "CLIP"), rows),
        ]
    parts += ["## Conditions", paragraph(where(results["machine"], results["versions"]) + " One seed.")]
    return "\n\n".join(parts) + "\n"


def _summary(name: str, evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    rewards, diversity = evaluation["rewards"], evaluation["diversity"]
    return (
        name, *(_difference(rewards[key]) for key in ("clinician", "hidden-utility", "brain-mr-checker", "clip")),
        f"{evaluation['distance']['step_kl']:.1e}", f"{diversity['after'] / diversity['before']:.0%}",
    )  # fmt: skip


def _difference(entry: Mapping[str, Any]) -> str:
    found = entry["difference"]
    return f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both, and writes the results and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clinician", description=str(__doc__).splitlines()[0])
    parser.add_argument("--every", type=int, default=2, help="epochs between measurements")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clinician", help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "clinician.json")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the results in --out")
    options = parser.parse_args(arguments)
    if not options.page_only:
        options.folder.mkdir(parents=True, exist_ok=True)
        found, first = {}, None
        for name, kappa in KAPPAS.items():
            out = run(kappa, options.folder, options.every, first, options.threads)
            found[name], first = record(out), first or out
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(options.threads),
            "versions": versions(),
            "runs": found,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
