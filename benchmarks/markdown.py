"""Pieces of a page in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def paragraph(text: str) -> str:
    """The text in lines of up to 120 characters."""
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, all others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def where(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What a comparison ran on, in two sentences."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}; threads of each"
        f" side: {machine['threads']}; no accelerator. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )


def filled(page: Path, tables: Mapping[str, str]) -> str:
    """The text of a page with each table between the marks that bear its name. Raises ValueError for one without."""
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(begin)
        if not mark or end not in rest:
            raise ValueError(f"{page} has no place for the table {name!r}")
        text = before + begin + table + "\n" + end + rest.partition(end)[2]
    return text
