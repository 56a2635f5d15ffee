"""What is generated into docs/ is what would be generated now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_command_line_page_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"docs/cli.md is stale: run `make docs`\n{done.stdout}{done.stderr}"
