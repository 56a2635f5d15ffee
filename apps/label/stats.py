"""``diffalign label stats``: a study in numbers, on the terminal, as JSON, or as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.label import report
from apps.reported import printable
from diffalign.errors import ConfigError
from diffalign.runs import write_text
from diffalign.study import Study
from diffalign.study.report import Stats

WIDTH = 180
"""Characters of a line in a file or a pipe."""


def run(folder: Path, database: str | None, as_json: bool, html: Path | None) -> None:
    """Prints the numbers, and writes the page where one is wanted."""
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html is a page, so its name ends in .html; got {html}")
    if html is not None and html.exists():
        raise ConfigError(f"output {html} exists already: choose another name")
    study = Study.open(folder, database)
    try:
        if html is not None:
            write_text(html, report.html(study, served=False))
        if as_json:
            click.echo(json.dumps(study.stats().as_dict(), indent=2, allow_nan=False))
        else:
            show(study.stats(), study.protocol().rules.overlap, _console())
    finally:
        study.close()
    if html is not None and not as_json:
        click.echo(f"page: {html}")


def _console() -> Console:
    """The terminal; where there is none, lines as long as the tables are."""
    console = Console(soft_wrap=True, highlight=False)
    return console if console.is_terminal else Console(soft_wrap=True, highlight=False, width=WIDTH)


def show(found: Stats, overlap: int, console: Console) -> None:
    """Prints the tables."""
    for name, text in report.facts(found, overlap):
        console.print(f"{name:<10} {text}")
    _, title, text = report.agreement(found)
    console.print(f"\n[bold]{title}[/bold]\n{text}")
    _table(console, ("agreement", "value", "n"), report.agreement_rows(found))
    for group in report.rankings(found):
        if group["why"]:
            console.print(f"\nno ranking{printable(group['name'])}: {printable(group['why'])}", markup=False)
            continue
        if group["name"]:
            console.print(f"\nranking{printable(group['name'])}", markup=False)
        _table(console, ("rank", "arm", "strength", "ranks (95 %)", "n"), group["standings"])
    rows = [report.rater(row) for row in found.raters if row.votes]
    if rows:
        names = ("rater", "votes", "gold", "repeats", "A/A tied", "left", "reliability", "time", "too fast")
        _table(console, names, [_rater(row) for row in rows])
    if found.flags:
        _table(console, ("flagged pair", "by", "reason"), report.flagged(found.flags))
    for note in found.notes:
        console.print(note, markup=False)


def _rater(row: dict[str, object]) -> tuple[object, ...]:
    def share(name: str) -> str:
        cell = row[name]
        assert isinstance(cell, dict)
        return f"{cell['value']} ({cell['range']})" if cell["range"] else str(cell["value"])

    left = share("left") + (" !" if row["biased"] else "")
    name = f"{row['name']} (simulated)" if row["simulated"] else row["name"]
    shares = (share("gold"), share("repeats"), share("aa"), left, share("reliability"))
    return (name, row["votes"], *shares, row["seconds"], row["too_fast"])


def _table(console: Console, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name)
    for row in rows:
        # Arms may be called anything, also what rich would take for markup.
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print()
    console.print(table)
