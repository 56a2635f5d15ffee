"""What is generated into docs/ is what would be generated now."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.prompts import LISTS, WORLDS
from tests import test_cli
from tests.test_cli import diffalign

desk = test_cli.desk
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["cli", "configuration"])
def test_pages_are_fresh(page: str) -> None:
    done = subprocess.run(
        [sys.executable, f"docs/make_{page}.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"docs/{page}.md is stale: run `make docs`\n{done.stdout}{done.stderr}"


def test_the_configuration_page_has_every_field_and_says_what_it_is() -> None:
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|(.*)\|$", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    known = {name for name, _ in rows}
    assert {
        "seed",
        "rewards[].weight",
        "sampler.window.every",
        "objective.beta",
        "credit.critic.trace",
        "trainer.epochs",
    } <= known
    assert all(f"`{name}`" in dict(rows)["prompts.source"] for name in (*WORLDS, *LISTS))
    assert [name for name, cells in rows if not cells.rpartition("|")[2].strip()] == []


def test_the_file_for_a_model_of_your_own_runs(desk: Path, tiny_folder: Path) -> None:
    """As it stands on the page, with a tiny model in its place, and fewer epochs and prompts."""
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    (desk / "own.yaml").write_text(example)
    (desk / "my-model").symlink_to(tiny_folder)
    (desk / "my_reward.py").write_text((desk / "reward.py").read_text() + "\nscore = brightness\n")
    (desk / "prompts.txt").write_text("".join(f"{n} ball\n" for n in range(96)))
    plan = diffalign("align", "own.yaml", "--dry-run")
    assert plan.exit_code == 0 and "memory" in plan.output, plan.output
    less = ["trainer.epochs=1", "trainer.samples_per_epoch=16", "trainer.batch_size=16", "sampler.steps=2",
            "prompts.held_out=2"]  # fmt: skip
    result = diffalign("align", "own.yaml", "--out", "own", *(part for one in less for part in ("--set", one)))
    assert result.exit_code == 0 and (desk / "own" / "report.html").is_file(), result.output
