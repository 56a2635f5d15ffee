"""``diffalign align`` in two real processes: the whole command, and what becomes of it when it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from diffalign.runs import Run
from tests import test_cli
from tests.test_cli import diffalign
from tests.test_processes import ROOT, launch

pytestmark = pytest.mark.slow
desk = test_cli.desk
ARGUMENTS = ("align", "run.yaml", "--out", "two")
SHARD = ("--set", "trainer.shard=true")
LONG = ("--set", "trainer.epochs=10000", "--set", "evaluation.every=0")


def long_run(desk: Path, more: Sequence[str] = ()) -> tuple[subprocess.Popen[str], dict[str, psutil.Process]]:
    """A launcher and by rank its two processes, which train for a long time, once the second checkpoint is there."""
    launcher = launch("-m", "apps.cli", "align", "run.yaml", "--out", "long", *LONG, *more, folder=desk)
    deadline = time.monotonic() + 180
    while len(Run(desk / "long").checkpoints()) < 2:  # not those of a name: older ones go
        assert time.monotonic() < deadline and launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)
    children = psutil.Process(launcher.pid).children(recursive=True)
    return launcher, {each.environ()["RANK"]: each for each in children if "apps.cli" in each.cmdline()}


def test_the_command_leaves_what_one_process_leaves(desk: Path) -> None:
    """The same files, numbers and words; the run of two says that it was one of two. ``--multi_gpu`` starts as many
    processes as are asked for, and where there is no GPU they compute on the CPU.
    """
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:], "-m", "apps.cli", *ARGUMENTS],
        env=environment, capture_output=True, text=True, cwd=desk, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: two/report.html") == 1 and done.stderr.count("epoch 2/2") == 1
    assert diffalign("align", "run.yaml", "--out", "one").exit_code == 0
    names = {run: {str(path.relative_to(desk / run)) for path in (desk / run).rglob("*")} for run in ("one", "two")}
    assert names["one"] == names["two"]
    for mine, theirs in zip(Run(desk / "one").metrics(), Run(desk / "two").metrics(), strict=True):
        compared = {name for name in mine if "time" not in name and name != "count/denoiser_calls"}
        assert {n: theirs[n] for n in compared} == pytest.approx({n: mine[n] for n in compared}, rel=1e-3, abs=1e-6)
    one, two = (json.loads((desk / run / "evaluation.json").read_text())["rewards"] for run in ("one", "two"))
    assert two["brightness"]["after"]["mean"] == pytest.approx(one["brightness"]["after"]["mean"], rel=1e-4)
    assert json.loads((desk / "two" / "environment.json").read_text())["hardware"]["processes"] == 2
    wrong = launch("-m", "apps.cli", "align", "run.yaml", "--set", "rewards.0=reward.py:constant", folder=desk)
    said, _ = wrong.communicate(timeout=300)
    assert said.count("error: the reward is constant") == 1 and "Traceback" not in said.partition("error: ")[0]
    assert not (desk / "runs").exists() or not list((desk / "runs").iterdir())


@pytest.mark.parametrize(("rank", "more"), [("0", ()), ("1", ()), ("1", SHARD)])
def test_a_killed_process_ends_the_other_within_a_minute(desk: Path, rank: str, more: Sequence[str]) -> None:
    """kill -9; and two new ones go on from the last checkpoint, to the same bytes as if nothing had happened. Whether
    weights are divided or not.
    """
    launcher, ranks = long_run(desk, more)
    began = time.monotonic()
    ranks[rank].kill()
    said, _ = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 60 and launcher.returncode != 0
    assert "error: another process of this run has ended" in said or "Signal 9 (SIGKILL)" in said
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks.values())
    if rank == "0":
        return
    total = int(Run(desk / "long").checkpoints()[-1].name[5:]) + 1
    epochs = ("--set", f"trainer.epochs={total}")
    for arguments in (("--resume", "--out", "long"), ("--out", "straight", "--set", "evaluation.every=0", *more)):
        again = launch("-m", "apps.cli", "align", "run.yaml", *arguments, *epochs, folder=desk)
        said, _ = again.communicate(timeout=300)
        assert again.returncode == 0, said
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert (desk / "long" / weights).read_bytes() == (desk / "straight" / weights).read_bytes()
    assert [row["step"] for row in Run(desk / "long").metrics()] == list(range(1, total + 1))


def test_ctrl_c_saves_in_two_processes_as_in_one(desk: Path) -> None:
    launcher, _ = long_run(desk)
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=120)
    found = re.search(r"interrupted: saved at epoch (\d+)", said)
    assert found and said.count("interrupted: ") == 1, said
    last = Run(desk / "long").metrics()[-1]["step"]
    assert found[1] == str(last) and Run(desk / "long").checkpoints()[-1].name == f"step-{last}"
    assert (desk / "long" / "report.html").is_file()
