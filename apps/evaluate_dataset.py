"""``diffalign evaluate DATASET --against REAL``: fidelity, use, table and privacy of a synthetic dataset."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from apps import dataset_report
from apps.dataset_features import Encoder, Looks, Made, chosen, encoder, look, source, tensor
from apps.dataset_privacy import report
from apps.progress import Status
from diffalign.errors import ConfigError, InputError
from diffalign.runs import check_writable, write_text
from diffalign.synthesis import estimates, fidelity, privacy, release, sums, tabular, utility
from diffalign.synthesis.cases import Value
from diffalign.synthesis.estimates import Estimate

NAME = "evaluation.json"
MOST_LABELS = 12
"""A category with more values is no group to be measured by."""
NO_INDEX = "no training images were given (--training), and without them nothing can be said"


class Stages(Status):
    """Says of each stage that is done how much there was, and how long it took: an evaluation has many, and is long."""

    def __init__(self) -> None:
        super().__init__()
        self.since = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """See Status; a stage is over when all of it is done."""
        super().__call__(stage, done, total)
        if done == total:
            now = time.monotonic()
            self.say(f"{stage}: {total:,} in {now - self.since:.0f} s")
            self.since = now


@dataclass(frozen=True)
class Found:
    """What was measured of one dataset."""

    whole: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Estimate]]
    too_few: Sequence[str]
    use: Mapping[str, Mapping[str, Estimate]]
    table: Mapping[str, Any] | None
    n: int

    def to_json(self, encode: Encoder) -> dict[str, Any]:
        """The part of ``evaluation.json`` that is about one dataset."""
        return {
            "fidelity": {
                "encoder": encode.to_json(),
                "nearest": fidelity.NEAREST,
                "all": estimates.to_json(self.whole),
                "groups": {name: estimates.to_json(group) for name, group in self.groups.items()},
                "too_few": list(self.too_few),
            },
            "utility": {name: estimates.to_json(by) for name, by in self.use.items()},
            "table": self.table,
            "n": self.n,
        }


def begin(
    dataset: str, against: str | None, overrides: Sequence[str], out: Path | None, about: Mapping[str, str | None]
) -> None:
    """Checks what the command line asks of a dataset, and does it."""
    if overrides:
        raise ConfigError(f"{dataset} is a dataset, and --set is for models and runs")
    if against is None:
        raise ConfigError(f"{dataset} is a dataset: say with which real images to compare it, --against IMAGES")
    encoder_name = about.get("encoder") or "embedded:clip"
    run(Path(dataset), against, about.get("baseline"), about.get("training"), about.get("maker"), encoder_name, out,
        whole=about.get("training_is_whole") is not None)  # fmt: skip


def run(
    folder: Path,
    against: str,
    baseline: str | None,
    training: str | None,
    model: str | None,
    encoder_name: str,
    out: Path | None,
    *,
    whole: bool = False,
) -> None:
    """Measures, writes the two files and the report beside the dataset (or to ``out``), and prints the table."""
    made, real = Made(folder.expanduser()), source(against)
    base = source(baseline) if baseline else None
    if base is not None and not isinstance(base, Made):
        raise ConfigError(f"--baseline {baseline} is no dataset that `diffalign generate` made")
    if model is not None and training is None:
        raise ConfigError("--model is asked about training images; name them by --training")
    if whole and training is None:
        raise ConfigError("--training-is-whole is about training images; name them by --training")
    index = source(training, training=True) if training else None
    encode = encoder(encoder_name)
    place = out or made.generated.folder
    check_writable(place)
    with Stages() as status:
        known = look(real, encode, status, "real images")
        if len(known) <= fidelity.NEAREST:
            raise InputError(f"{against} has {len(known)} images; it needs more than {fidelity.NEAREST}")
        pixels = tensor(real, known.index)
        safe = privacy.unassessed(NO_INDEX)
        if index is None:
            own = look(made, encode, status, "synthetic images")
        else:
            every = look(made, encode, status, "synthetic images", most=None)
            trained = look(index, encode, status, "training images", most=None)
            safe = report(made, every, real, known, index, trained, model, status, whole=whole)
            own = every.only(chosen(made))
        found = measure(made, own, real.name, known, pixels, encode, status)
        other = None
        if base is not None:
            seen = look(base, encode, status, "images of the baseline")
            other = measure(base, seen, real.name, known, pixels, encode, status)
    facts: dict[str, Any] = {
        "dataset": made.name,
        "spec_sha256": made.generated.manifest.spec_sha256,
        **release.about(made.generated.folder),
        "against": {"name": real.name, "n": len(known)},
        **found.to_json(encode),
        "privacy": {"verdict": safe["verdict"], "why": safe["why"]},
        "notes": [*fidelity.notes(len(own), len(known)), *_left_out(made, known, found)],
    }
    if base is not None and other is not None:
        facts["baseline"] = {
            "dataset": base.name, "spec_sha256": base.generated.manifest.spec_sha256, **other.to_json(encode),
            "difference": compared(found, other),
        }  # fmt: skip
    write_text(place / NAME, _dumps(facts))
    write_text(place / release.NAME, _dumps(safe | release.about(made.generated.folder)))
    dataset_report.write(made.generated.folder, place)
    if (place / sums.NAME).is_file():
        sums.add(place, NAME, release.NAME, dataset_report.NAME)
    show(facts, found, other, safe)
    click.echo(f"written to {place}: {NAME}, {release.NAME}, {dataset_report.NAME}")


def _left_out(made: Made, real: Looks, found: Found) -> list[str]:
    """The categories of both tables that no classifier was trained for."""
    there = {name for row in real.rows for name, value in row.items() if value is not None}
    names = [
        name
        for name, kind in made.kinds.items()
        if kind in ("category", "boolean") and name in there and name not in found.use
    ]
    few = f"fewer than two values with {utility.FEWEST_OF_CLASS} synthetic cases each, more than {utility.MOST_CLASSES}"
    return [f"No classifier for {', '.join(names)}: {few} values, or too few real images."] if names else []


def _dumps(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def measure(
    made: Made, own: Looks, against: str, real: Looks, pixels: torch.Tensor, encode: Encoder, status: Status
) -> Found:
    """Everything that one dataset is measured by against real images, which ``against`` names."""
    own, real = own.typed(made.kinds, made.name), real.typed(made.kinds, against)
    strata = made.strata
    labels = (
        [groups_of(row, made.kinds, strata) for row in own.rows],
        [groups_of(row, made.kinds, strata) for row in real.rows],
    )
    groups, few = fidelity.by_group(own.features, real.features, *labels, clip=encode.clip)
    whole = fidelity.fidelity(own.features, real.features, clip=encode.clip)
    status(f"fidelity of the whole and of groups ({made.name})", 1 + len(groups), 1 + len(groups))
    use: dict[str, dict[str, Estimate]] = {}
    tasks = utility.tasks(own.rows, real.rows, made.kinds)
    seen = tensor(made, own.index) if tasks else torch.empty(0)
    if tasks:
        status.say(
            f"a probe and {utility.NETWORKS} small networks ({utility.steps(len(own))} steps at most) are trained for"
            f" each of {', '.join(tasks)}: where cases are few, nothing takes longer"
        )
    for number, (name, task) in enumerate(tasks.items()):
        use[name] = {
            "probe": utility.accuracy(utility.probe(task, own.features, real.features)),
            "network": utility.accuracy(utility.network(task, seen, pixels)),
            "guessing": utility.by_guessing(task),
        }
        status(f"classifiers trained on synthetic cases ({made.name})", number + 1, len(tasks))
    table = tabular.fidelity(own.rows, real.rows, made.kinds) if any(real.rows) else None
    return Found(whole, groups, few, use, table, len(own))


def groups_of(row: Mapping[str, Value], kinds: Mapping[str, str], strata: Sequence[str]) -> dict[str, str]:
    """The groups that a case is in: its stratum, and by each category its value."""
    found = {
        name: str(row[name])
        for name, kind in kinds.items()
        if kind in ("category", "boolean") and row.get(name) is not None
    }
    if len(strata) > 1:
        found["stratum"] = " / ".join(str(row[name]) for name in strata if row.get(name) is not None)
    return found


def compared(found: Found, other: Found) -> dict[str, Any]:
    """Dataset minus baseline, of every number that both have."""
    return {
        "fidelity": {
            name: estimates.difference(found.whole[name], other.whole[name])
            for name in found.whole
            if name != "vendi_real"
        },
        "utility": {
            name: {by: estimates.difference(values[by], other.use[name][by]) for by in ("probe", "network")}
            for name, values in found.use.items()
            if name in other.use
        },
    }


def show(facts: Mapping[str, Any], found: Found, other: Found | None, safe: Mapping[str, Any]) -> None:
    """Prints what was measured; groups stand in evaluation.json alone."""
    against, encode = facts["against"], facts["fidelity"]["encoder"]
    by = f"{encode['name']} ({encode['sha256'][:19]})"
    title = f"{found.n} synthetic images against {against['n']} of {against['name']}, by {by}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    headings = ["measure", "dataset (95 % interval)"]
    headings += [] if other is None else ["baseline", "difference (95 % interval)"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    gaps = facts.get("baseline", {}).get("difference", {"fidelity": {}, "utility": {}})
    for name, estimate in found.whole.items():
        better = " (less is better)" if name in fidelity.LESS_IS_BETTER else ""
        last = other.whole.get(name) if other else None
        table.add_row(*_row(name.replace("_", " of ") + better, estimate, last, gaps["fidelity"].get(name)))
    for attribute, values in found.use.items():
        for way, words in (("probe", "linear probe"), ("network", "small network"), ("guessing", "by guessing")):
            last = other.use.get(attribute, {}).get(way) if other else None
            gap = gaps["utility"].get(attribute, {}).get(way)
            table.add_row(*_row(f"{attribute}, {words} on real", values[way], last, gap))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    if found.table and found.table["column_shapes"] is not None:
        pairs = found.table["pair_trends"]
        console.print(
            f"table: column shapes {found.table['column_shapes']:.3f}"
            + ("" if pairs is None else f", pair trends {pairs:.3f}"), highlight=False,
        )  # fmt: skip
    for note in facts["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"privacy: {safe['verdict']}: {safe['why']}", highlight=False, soft_wrap=True, markup=False)
    for name, one in safe["measures"].items():
        line = f"  {privacy.shown(name)}: {one['verdict']}: {one['why']}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _row(name: str, own: Estimate, last: Estimate | None, gap: Mapping[str, Any] | None) -> list[str]:
    cells = [name, f"{own.value:.3f}{_ends(own.ends)}"]
    if last is not None:
        cells.append(f"{last.value:.3f}")
        if gap and gap["value"] is not None:
            cells.append(f"{gap['value']:+.3f}{_ends(gap['ci95'], '+.3f')}")
    return cells


def _ends(ends: Sequence[float] | None, form: str = ".3f") -> str:
    return "" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})"
