"""``diffalign preferences``: look at preference data of any known format, and bring it into the native form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import click

from apps import preferences_page
from apps.progress import Status
from diffalign.errors import ConfigError, InputError
from diffalign.preferences import Defects, Pairs, Summary, read, write
from diffalign.types import Preference


def inspect(path: Path, page: Path | None, as_json: bool) -> None:
    """Prints the summary, and writes the page where one was asked for."""
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--page is a page, so its name ends in .html; got {page}")
    pairs = read(path)
    summary, sheet = Summary(), preferences_page.Sheet()
    with Status() as status:
        for number, item in enumerate(pairs, 1):
            status("reading", number, None)
            summary.add(item)
            if page is not None and isinstance(item, Preference):
                sheet.offer(item)
    _tell(summary.broken)
    if not summary.pairs:
        raise _nothing(path, summary.broken)
    if page is not None:
        preferences_page.write(page, path.absolute().name, pairs.format, summary, sheet)
    if as_json:
        click.echo(json.dumps({"format": pairs.format, **summary.to_json()}, indent=2))
        return
    for name, text in preferences_page.facts(pairs.format, summary):
        click.echo(f"{name:<18} {text}")
    for sentence in summary.warnings():
        click.echo(f"warning: {sentence}")
    click.echo(f"example pairs: {page}" if page else "to see example pairs, write a page: --page PAGE.html")


def convert(path: Path, out: Path) -> None:
    """Writes every good row in the native form, and says which rows are broken and why."""
    if out.suffix.lower() != ".parquet":
        raise ConfigError(f"the native form is Parquet, so the name ends in .parquet; got {out}")
    if out.exists():
        raise ConfigError(f"output {out} exists already: choose another name")
    pairs, broken = read(path), Defects()
    with Status() as status:
        good = _good(pairs, broken, status)
        first = next(good, None)
        count = 0 if first is None else write(out, chain([first], good))
    _tell(broken)
    if not count:
        raise _nothing(path, broken)
    click.echo(f"{count} preferences ({pairs.format}) in {out}; {len(broken)} broken rows are left out")


def _good(pairs: Pairs, broken: Defects, status: Status) -> Iterator[Preference]:
    for number, item in enumerate(pairs, 1):
        status("converting", number, None)
        if isinstance(item, Preference):
            yield item
        else:
            broken.add(item)


def _tell(broken: Defects) -> None:
    for line in broken.lines():
        click.echo(f"broken: {line}", err=True)


def _nothing(path: Path, broken: Defects) -> InputError:
    reasons = ", ".join(f"{kind} ({count})" for kind, count in broken.kinds.most_common()) or "it has no rows"
    return InputError(f"no row of {path} is a preference: {reasons}")
