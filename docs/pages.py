"""Writing a generated page of docs/, or checking that it is fresh."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path


def publish(page: Path, made: Callable[[], str], about: str) -> int:
    """Writes the page, or with ``--check`` says what is stale in it; returns the exit status."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    wanted = made()
    present = page.read_text(encoding="utf-8") if page.exists() else ""
    if not arguments.check:
        page.write_text(wanted, encoding="utf-8")
        return 0
    name = f"docs/{page.name}"
    print("\n".join(difflib.unified_diff(present.splitlines(), wanted.splitlines(), name, "now", lineterm="")))
    return int(present != wanted)
