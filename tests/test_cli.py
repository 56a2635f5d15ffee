"""The real command on a tiny pipeline: the whole path, and every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image

from apps.cli import main
from diffalign.runs import Run

REWARD = """
import numpy as np
def brightness(samples):
    return [float(np.asarray(sample.image).mean()) for sample in samples]
def constant(samples):
    return [1.0 for _ in samples]
def broken(samples):
    return [float("nan") for _ in samples]
"""


@pytest.fixture
def desk(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a reward, prompts and a configuration, which is also the working directory."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("".join(f"{n} {c} ball\n" for n in ("one", "two") for c in ("red", "blue")))
    config = {
        "model": str(tiny_folder),
        "rewards": ["reward.py:brightness"],
        "prompts": {"source": "prompts.txt", "train": 2, "held_out": 2},
        "sampler": {"steps": 3, "batch_size": 4},
        "credit": {"rule": "batch"},
        "trainer": {"epochs": 2, "samples_per_epoch": 8, "batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"rewards": ["compressibility"], "seeds_per_prompt": 2, "every": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def diffalign(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "apps.cli", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def test_align_evaluate_and_repeat(desk: Path) -> None:
    """One run leaves all that the contract names; its config.yaml repeats it to the same bytes."""
    result = diffalign("align", "run.yaml")
    assert result.exit_code == 0, result.output
    assert "brightness" in result.output and "report.html" in result.output
    run = desk / "runs" / "run"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in (run / "samples").iterdir()} >= {"before.png", "after.png", "epoch-1.png"}
    assert [path.name for path in Run(run).checkpoints()] == ["step-1", "step-2"]
    assert json.loads((run / "environment.json").read_text())["hashes"]["model"].startswith("sha256:")
    evaluation = json.loads((run / "evaluation.json").read_text())
    brightness, size = evaluation["rewards"]["brightness"], evaluation["rewards"]["compressibility"]
    assert brightness["trained_on"] and not size["trained_on"]
    assert brightness["before"]["n"] == 4 and len(brightness["difference"]["ci95"]) == 2
    assert evaluation["prompts"] == "held-out" and evaluation["distance"]["step_kl"] > 0
    pipeline = StableDiffusionPipeline.from_pretrained(yaml.safe_load((run / "config.yaml").read_text())["model"])
    pipeline.load_lora_weights(run / "adapter")

    again = diffalign("align", str(run / "config.yaml"), "--out", "again")
    assert again.exit_code == 0, again.output
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert (run / weights).read_bytes() == (desk / "again" / weights).read_bytes()

    evaluated = diffalign("evaluate", str(run), "--out", "evaluated")
    assert evaluated.exit_code == 0, evaluated.output
    same = json.loads((desk / "evaluated" / "evaluation.json").read_text())["rewards"]["brightness"]
    assert same["after"]["mean"] == pytest.approx(brightness["after"]["mean"], abs=0.1)
    assert same["before"]["mean"] == pytest.approx(brightness["before"]["mean"], abs=0.1)


def test_evaluate_one_run_against_another(desk: Path) -> None:
    """Two runs from different seeds: neither was trained on what they are compared by, unless it is the run's own."""
    for seed in ("1", "2"):
        assert diffalign("align", "run.yaml", "--out", seed, "--set", f"seed={seed}").exit_code == 0
    result = diffalign("evaluate", "1", "--against", "2", "--out", "compared", "--set", "evaluation.seeds_per_prompt=3")
    assert result.exit_code == 0, result.output
    data = json.loads((desk / "compared" / "evaluation.json").read_text())
    assert data["rewards"]["brightness"]["before"]["n"] == 6 and data["distance"]["pixel_rms"] > 0
    assert "step_kl" not in data["distance"]  # two different models have no shared steps to compare

    nothing = diffalign("evaluate", yaml.safe_load((desk / "run.yaml").read_text())["model"])
    assert nothing.exit_code == 2 and "is not a run" in nothing.stderr


def test_a_long_prompt_is_cut_with_a_warning(desk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tiny encoder takes 16 tokens; 21 words and two markers are 23."""
    (desk / "prompts.txt").write_text("".join("red " * 20 + f"{word}\n" for word in ("ball", "cube", "one", "two")))
    result = diffalign("align", "run.yaml", "--set", "trainer.epochs=1")
    assert result.exit_code == 0, result.output
    assert "is 23 tokens long and the text encoder takes 16: its last 7 tokens are cut" in caplog.text


def test_dry_run_prints_the_plan_and_writes_nothing(desk: Path) -> None:
    result = diffalign("align", "run.yaml", "--set", "trainer.epochs=3", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "updates per epoch:   2" in result.output
    assert "24 in training, 8 to evaluate" in result.output  # 3 epochs of 8; 2 prompts x 2 seeds x before and after
    assert "memory estimate:" in result.output and "timestep_fraction: 1.0" in result.output
    assert not (desk / "runs").exists()


def _wrong_yaml(desk: Path) -> None:
    (desk / "run.yaml").write_text("model: [unclosed")


def _long_list(desk: Path) -> None:
    (desk / "run.yaml").write_text("- model\n- rewards\n")


def _no_prompts(desk: Path) -> None:
    (desk / "prompts.txt").write_text("\n  \n")


def _corrupt(desk: Path) -> None:
    model = Path(yaml.safe_load((desk / "run.yaml").read_text())["model"])
    shutil.copytree(model, desk / "corrupt")
    weights = desk / "corrupt" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _missing_part(desk: Path) -> None:
    _corrupt(desk)
    shutil.rmtree(desk / "corrupt" / "unet")


def _syntax_error(desk: Path) -> None:
    (desk / "reward.py").write_text("def brightness(samples:\n    return 1\n")


def _full_folder(desk: Path) -> None:
    (desk / "out").mkdir()
    (desk / "out" / "thesis.txt").write_text("precious")


def _nothing(desk: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (_nothing, ["--set", "trainer.epoch=3"], "unknown field trainer.epoch; did you mean trainer.epochs (run.yaml:"),
        (_nothing, ["--set", "trainer.epochs=many"], "trainer.epochs: input should be a valid integer"),
        (_nothing, ["--set", "nonsense"], "write it as field=value"),
        (_nothing, ["--set", "model=no/such/folder"], "no model folder no/such/folder"),
        (_nothing, ["--set", "model=embedded:unicorn"], "there is no embedded image model 'unicorn'"),
        (_nothing, ["--set", "model=."], "not a diffusers pipeline folder"),
        (_corrupt, ["--set", "model=corrupt"], "incomplete or corrupt"),
        (_missing_part, ["--set", "model=corrupt"], "incomplete or corrupt"),
        (_nothing, ["--set", "trainer.batch_size=5"], "nearest batch sizes that do: 2, 4, 8"),
        (_nothing, ["--set", "sampler.eta=0"], "has no likelihood"),
        (_nothing, ["--set", "device=abacus"], "device 'abacus' cannot be used here"),
        (_nothing, ["--set", "prompts.source=missing.txt"], "no prompt file missing.txt"),
        (_nothing, ["--set", "prompts.train=400"], "has 4 different prompts"),
        (_no_prompts, [], "prompts.txt has no prompt in it"),
        (_wrong_yaml, [], "not valid YAML"),
        (_long_list, [], "a configuration is a mapping"),
        (_syntax_error, [], "reward.py"),
        (_nothing, ["--set", "rewards.0=reward.py:dimness"], "dimness"),
        (_nothing, ["--set", "rewards.0=compresibility"], "did you mean compressibility"),
        (_nothing, ["--set", "rewards.0=reward.py:constant"], "the reward is constant: 1"),
        (_nothing, ["--set", "rewards.0=reward.py:broken"], "the reward is NaN or infinite"),
        (_nothing, ["--set", "adapter.targets=[nothing]"], "adapter.targets"),
        (_full_folder, ["--out", "out"], "output folder out is not empty"),
        (_nothing, ["--resume"], "--resume needs --out"),
        (_nothing, ["--resume", "--out", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    desk: Path, prepare: Callable[[Path], None], arguments: list[str], message: str
) -> None:
    prepare(desk)
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    result = diffalign("align", "run.yaml", *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


def test_an_unknown_recipe_names_those_that_exist(desk: Path) -> None:
    result = diffalign("align", "quikstart")
    assert result.exit_code == 2 and "quickstart" in result.stderr


def test_a_diverging_run_ends_in_one_sentence(desk: Path) -> None:
    result = diffalign("align", "run.yaml", "--set", "trainer.learning_rate=1e30", "--set", "trainer.epochs=5")
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    for checkpoint in Run(desk / "runs" / "run").checkpoints():
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        assert state["epoch"] >= 1


def test_score_a_folder(desk: Path) -> None:
    """A grey and a white image; a truncated one is named, counted and left out."""
    folder = desk / "images"
    folder.mkdir()
    Image.new("RGB", (16, 16), (51, 51, 51)).save(folder / "grey.png")
    Image.new("RGB", (16, 16), (255, 255, 255)).save(folder / "white.png")
    (folder / "cut.png").write_bytes((folder / "white.png").read_bytes()[:40])
    result = diffalign("score", "--reward", "reward.py:brightness", "--images", "images", "--out", "scores.parquet")
    assert result.exit_code == 0, result.output
    assert "mean 153" in result.stdout and "n 2" in result.stdout and "cut.png" in result.stderr
    import pyarrow.parquet as pq

    assert pq.read_table("scores.parquet").to_pydict() == {"image": ["grey.png", "white.png"], "score": [51.0, 255.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "no image folder nowhere"),
        (["--images", "."], "has no image in it"),
        ([], "either --images DIR or --dataset"),
        (["--dataset", "prompts.txt"], "not a Parquet file"),
    ],
)
def test_score_refuses(desk: Path, arguments: list[str], message: str) -> None:
    result = diffalign("score", "--reward", "compressibility", *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_reward_check_says_whether_a_reward_is_fit(desk: Path) -> None:
    good, bad = diffalign("reward", "check", "compressibility"), diffalign("reward", "check", "reward.py:constant")
    assert good.exit_code == 0, good.output
    assert bad.exit_code == 1 and "constant" in bad.output.lower()


@pytest.mark.parametrize("what", ["recipes", "models", "rewards", "objectives", "assets"])
def test_list(what: str) -> None:
    result = diffalign("list", what)
    assert result.exit_code == 0 and result.output.strip()


def test_doctor() -> None:
    result = diffalign("doctor")
    assert "torch" in result.output and "memory" in result.output


def _started(desk: Path, *arguments: str) -> subprocess.Popen[str]:
    """A real process that trains for a long time, once its second checkpoint is on disk."""
    process = subprocess.Popen(
        command("align", "run.yaml", "--out", "long", "--set", "trainer.epochs=10000", *arguments),
        env=environment(), stderr=subprocess.PIPE, text=True, cwd=desk,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (desk / "long" / "checkpoints" / "step-2").is_dir():
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
