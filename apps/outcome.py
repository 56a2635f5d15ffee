"""An evaluation on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from apps.report_measures import decimals, unchanged
from diffalign.evaluation import FEWEST_PROMPTS, Evaluation


def show(outcome: Evaluation) -> None:
    """Prints the table of before and after; the parts of the trained reward itself stand in evaluation.json."""
    data = outcome.to_json()
    table = Table(title="On held-out prompts, same seeds before and after", title_justify="left", box=box.SIMPLE)
    for heading in ("measure", "before", "after", "difference (95 % interval)", "n", "trained on"):
        words = heading in ("measure", "trained on")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    rows = {name: row for name, row in data["rewards"].items() if not name.startswith(f"{outcome.main}/")}
    known = {name: row for name, row in rows.items() if row["difference"]["mean"] is not None}
    for name, row in known.items():
        table.add_row(
            name, *(f"{row[side]['mean']:.{_places(row)}f}" for side in ("before", "after")),
            _difference(row["difference"], _places(row)), str(row["before"]["n"]),
            "yes" if row["trained_on"] else "no",
        )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    if any(row["difference"]["ci95"] is None and not unchanged(row["difference"]) for row in known.values()):
        console.print(f"–: too few prompts for an interval (fewer than {FEWEST_PROMPTS})", highlight=False)
    for name in (name for name in rows if name not in known and name != outcome.main and "/" not in name):
        console.print(f"{name} could judge none of these samples", highlight=False)
    win, (before, after) = data["win_rate"], outcome.diversity
    if win["value"] is None:
        console.print(f"win rate  unknown: no pair could be judged by {outcome.main}", highlight=False)
    else:
        console.print(f"win rate  {win['value']:.1%} (95 % {_ends(win, '.1%')})", highlight=False)
    if before > 0:
        console.print(f"diversity {after / before:.0%} of the base model's", highlight=False)
    console.print(data["verdict"]["text"], highlight=False)


def _places(row: Mapping[str, Any]) -> int:
    """Three decimals, and more where what is measured is small."""
    return max(3, decimals([row["before"]["mean"], row["after"]["mean"]]))


def _difference(found: Mapping[str, Any], places: int) -> str:
    """Mean and interval; where no sample scored differently, that in words."""
    if unchanged(found):
        return "unchanged in every sample"
    return f"{found['mean']:+.{places}f} ({_ends(found, f'+.{places}f')})"


def _ends(found: Mapping[str, Any], form: str) -> str:
    if found["ci95"] is None:
        return "–"
    low, high = found["ci95"]
    return f"{low:{form}} to {high:{form}}"
