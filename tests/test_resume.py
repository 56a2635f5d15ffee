"""Runs that are interrupted, killed or refused, and how they go on: nothing is lost, nothing becomes another run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps import configured, generate_origin, report
from apps.label import generated
from diffalign.runs import Run
from tests import test_cli
from tests.test_cli import diffalign

desk = test_cli.desk


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "apps.cli", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def _started(desk: Path, *arguments: str) -> subprocess.Popen[str]:
    """A real process that trains for a long time, once its second checkpoint is on disk."""
    process = subprocess.Popen(
        command("align", "run.yaml", "--out", "long", "--set", "trainer.epochs=10000", *arguments),
        env=environment(), stderr=subprocess.PIPE, text=True, cwd=desk,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(Run(desk / "long").checkpoints()) < 2:  # not those of a name: older ones go
        assert time.monotonic() < deadline and process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    return process


def test_ctrl_c_saves_and_exits_130(desk: Path) -> None:
    process = _started(desk, "--set", "trainer.checkpoint_every=1")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume --out long" in errors, errors
    last = Run(desk / "long").metrics()[-1]["step"]
    assert Run(desk / "long").checkpoints()[-1].name == f"step-{last}"
    assert (desk / "long" / "report.html").is_file()


@pytest.fixture
def begun(desk: Path) -> Path:
    """A run that has begun and has no checkpoint yet, in a folder that holds a file of the user's."""
    run = Run.create(desk / "mine", configured.configuration("run.yaml", ["trainer.checkpoint_every=5"]))
    (run.path / "thesis.txt").write_text("precious")
    (desk / "other.yaml").write_text("name: other\n" + (desk / "run.yaml").read_text())
    return run.path


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("run.yaml", "seed=5", "--resume: seed is 0 in mine/config.yaml, and --set asks for 5"),
        ("run.yaml", "model=embedded:emoji", "--resume: model is"),
        ("run.yaml", "sampler.steps=4", "--resume: sampler.steps is 3 in mine/config.yaml, and --set asks for 4"),
        ("run.yaml", "rewards.0=compressibility", "must equal an uninterrupted one, so only trainer.epochs, "),
        ("run.yaml", "adapter=null", "--resume: adapter"),
        ("other.yaml", "trainer.epochs=3", "other.yaml is named 'other', but the run in mine is named 'run'"),
        ("quickstart", "trainer.epochs=3", "quickstart is named 'quickstart'"),
        ("missing.yaml", "trainer.epochs=3", "missing.yaml"),
        ("mine/config.yaml", "evaluation.rewards=[nothing]", "there is no reward 'nothing'"),
    ],
)
def test_resume_refuses_what_would_be_another_run(begun: Path, recipe: str, setting: str, message: str) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*")}
    result = diffalign("align", recipe, "--resume", "--out", "mine", "--set", setting)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("error: ") == 1, result.output
    assert {path: path.read_bytes() for path in begun.rglob("*")} == before


def test_resume_goes_by_the_configuration_of_the_run(begun: Path) -> None:
    """What the recipe says by now does not matter; the fields that may change are written down once it goes on."""
    recipe = begun.parent / "run.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 3", "steps: 9"))
    free = ("trainer.epochs=1", "trainer.checkpoint_every=1", "evaluation.seeds_per_prompt=1", "device=cpu")
    result = diffalign("align", "run.yaml", "--resume", "--out", "mine", *(w for f in free for w in ("--set", f)))
    assert result.exit_code == 0, result.output
    config = configured.configuration("mine")
    assert (config.sampler.steps, config.trainer.epochs, config.device) == (3, 1, "cpu")
    assert json.loads((begun / "evaluation.json").read_text(), parse_constant=pytest.fail)["diversity"]["after"] is None


def test_a_checkpoint_that_does_not_fit_leaves_the_configuration(begun: Path) -> None:
    Run(begun).save_checkpoint(1, {"epoch": 1, "seed": 0, "parameters": {}}, keep=1)
    before = (begun / "config.yaml").read_text()
    result = diffalign("align", "run.yaml", "--resume", "--out", "mine", "--set", "trainer.epochs=9")
    assert result.exit_code == 2 and "checkpoint" in result.stderr, result.output
    assert (begun / "config.yaml").read_text() == before


def test_a_linear_schedule_fixes_the_number_of_epochs(begun: Path) -> None:
    run = Run(begun)
    run.write_config(configured.configuration("run.yaml", ["trainer.schedule=linear"]))
    result = diffalign("align", "run.yaml", "--resume", "--out", "mine", "--set", "trainer.epochs=9")
    assert result.exit_code == 2 and "trainer.epochs is 2" in result.stderr
    assert "so only trainer.checkpoint_every, " in result.stderr


def test_a_refused_run_takes_nothing_that_was_there(begun: Path) -> None:
    """A resumed run whose reward is constant is refused in its first epoch; a new one leaves its empty folder."""
    Run(begun).write_config(configured.configuration("run.yaml", ["rewards.0=reward.py:constant"]))
    result = diffalign("align", "run.yaml", "--resume", "--out", "mine")
    assert result.exit_code == 2 and "the reward is constant" in result.stderr
    assert (begun / "thesis.txt").read_text() == "precious" and (begun / "config.yaml").is_file()
    (begun.parent / "empty").mkdir()
    diffalign("align", "run.yaml", "--out", "empty", "--set", "rewards.0=reward.py:constant")
    assert list((begun.parent / "empty").iterdir()) == []


def test_evaluate_does_not_write_into_what_is_there(begun: Path) -> None:
    for out, message in (("run.yaml", "run.yaml is a file, not a folder"), ("mine", "not empty: choose another --out")):
        result = diffalign("evaluate", "mine", "--out", out)
        assert result.exit_code == 2 and message in result.stderr and "--resume" not in result.stderr


def test_kill_at_any_moment_leaves_a_run_that_resumes_bit_for_bit(desk: Path) -> None:
    """kill -9 while checkpoints are being written all the time; the resumed run equals one that was never killed."""
    process = _started(desk)
    process.kill()
    process.wait()
    reached = int(Run(desk / "long").checkpoints()[-1].name[5:])
    total = reached + 2
    resumed = diffalign("align", "run.yaml", "--resume", "--out", "long", "--set", f"trainer.epochs={total}")
    assert resumed.exit_code == 0, resumed.output
    straight = diffalign("align", "run.yaml", "--out", "straight", "--set", f"trainer.epochs={total}")
    assert straight.exit_code == 0, straight.output
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert (desk / "long" / weights).read_bytes() == (desk / "straight" / weights).read_bytes()
    logged = [row["step"] for row in Run(desk / "long").metrics() if "reward/total" in row]
    assert logged == list(range(1, total + 1))


def test_a_run_begun_with_a_field_that_is_refused_today_stays_usable(desk: Path) -> None:
    """Its own ``config.yaml`` has a field without effect: it is read by all that look at runs, and not begun again."""
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1").exit_code == 0
    run = Run.open(desk / "runs" / "run")
    text = (run.path / "config.yaml").read_text()
    assert "min_count: 16" in text
    (run.path / "config.yaml").write_text(text.replace("min_count: 16", "min_count: 8"))
    evaluated = diffalign("evaluate", "runs/run", "--set", "evaluation.seeds_per_prompt=1")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert report.write(run).is_file()
    assert generate_origin.Origin.of("runs/run", None).model == str(configured.configuration("run.yaml").model)
    assert generated.plan(["runs/run"], None, [], None, None, None, 0).config.credit.min_count == 8
    resumed = diffalign("align", "runs/run", "--resume", "--out", "runs/run", "--set", "trainer.epochs=2")
    assert resumed.exit_code == 0, resumed.stderr
    (desk / "old.yaml").write_text((desk / "run.yaml").read_text() + "credit: {rule: batch, min_count: 8}\n")
    resumed = diffalign("align", "old.yaml", "--resume", "--out", "runs/run", "--set", "trainer.epochs=3")
    assert resumed.exit_code == 0, resumed.stderr
    for dry in ([], ["--dry-run"]):
        again = diffalign("align", "runs/run/config.yaml", *dry)
        assert again.exit_code == 2 and "credit.min_count is 8, but credit.rule batch remembers" in again.stderr
