"""``make embedded`` from nothing, with a few steps each: every script runs, and leaves what is shipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.types import Prompt
from diffalign.worlds import brain_mr, emoji
from pipelines.loading import EMBEDDED, load_policy
from rewards import brain_mr_net
from rewards.clip import ClipReward

ROOT = Path(__file__).resolve().parent.parent
MADE = {
    "emoji": EMBEDDED / "emoji",
    "brain-mr": EMBEDDED / "brain-mr",
    "findings-lm": EMBEDDED / "findings-lm",
    "clip/model": ROOT / "rewards" / "embedded" / "clip",
    "brain-mr-checker": ROOT / "rewards" / "embedded" / "brain-mr-checker",
}
"""What each training writes, and what is shipped of it."""
BY_HAND = {"README.md", "LICENSE", "NOTICE"}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check(build: Path) -> None:
    """The same files as the shipped ones, and each is read by what reads those."""
    for name, shipped in MADE.items():
        assert files(build / name) == files(shipped) - BY_HAND, name
    atlas = "mni-icbm152/volumes.npz"
    assert (build / atlas).read_bytes() == (ROOT / "diffalign" / "worlds" / "assets" / atlas).read_bytes()
    asked = {"emoji": emoji.scene(1).prompt, "brain-mr": brain_mr.scene(1).prompt, "findings-lm": Prompt("Findings:")}
    drawn = {name: load_policy(str(build / name)).rollout([asked[name]], [0]).samples[0] for name in asked}
    assert drawn["emoji"].image is not None and drawn["emoji"].image.size == (64, 64)
    assert drawn["findings-lm"].text
    by_table = load_policy(str(build / "brain-mr"), condition="table").rollout([asked["brain-mr"]], [0]).samples
    assert by_table[0].image is not None and by_table[0].image.size == (64, 64)
    assert ClipReward(model=str(build / "clip" / "model"))([drawn["emoji"]]).total.isfinite().all()
    brain_mr_net.load(build / "brain-mr-checker")


@pytest.mark.slow
def test_every_training_script_runs_and_writes_what_is_shipped(tmp_path: Path) -> None:
    """Two minutes of CPU time; nothing is installed, and nothing outside the test's own folder is written."""
    pytest.importorskip("nilearn", reason="the atlas comes from the extra 'embedded'")
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    stamps = [tmp_path / name for name in ("installed", "installed-embedded")]
    for stamp in stamps:
        stamp.touch()
    given = {"TRY": tmp_path / "try", "PY": sys.executable, "INSTALLED": stamps[0], "INSTALLED_EMBEDDED": stamps[1]}
    result = subprocess.run(
        ["make", "embedded-try", *(f"{name}={value}" for name, value in given.items())],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    check(tmp_path / "try")
