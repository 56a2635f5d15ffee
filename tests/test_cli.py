"""The real command on a tiny pipeline: the whole path, and every kind of bad input."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file

from apps import build, configured, dry_run
from apps.cli import main
from apps.evaluate import trained_on
from diffalign.runs import Run

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
import numpy as np
def brightness(samples):
    return [float(np.asarray(sample.image).mean()) for sample in samples]
def constant(samples):
    return [1.0 for _ in samples]
def broken(samples):
    return [float("nan") for _ in samples]
def pairs(images, prompts, metadata):
    return [0.5] * len(images), ({"pair": [1.0, 2.0]} if len(images) == 2 else {})
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
    assert brightness["before"]["n"] == 4
    assert brightness["difference"]["ci95"] is None  # two prompts are too few for an interval
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
    assert data["rewards"]["brightness"]["trained_on"] and not data["rewards"]["compressibility"]["trained_on"]
    other = ["--set", "rewards.0=compressibility", "--set", "evaluation.rewards=[reward.py:brightness]"]
    swapped = diffalign("evaluate", "1", "--against", "2", "--out", "swapped", *other)
    assert swapped.exit_code == 0, swapped.output
    found = json.loads((desk / "swapped" / "evaluation.json").read_text(), parse_constant=pytest.fail)["rewards"]
    assert found["brightness"]["trained_on"] and not found["compressibility"]["trained_on"]
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
    # 3 epochs of 8; after epochs 1 and 2 the 2 held-out prompts; 2 prompts x 2 seeds x before and after
    assert "24 in training, 4 measured on the way, 8 to evaluate" in result.output
    assert "memory estimate:" in result.output and "timestep_fraction: 1.0" in result.output
    assert "not counted:" in result.output
    null = "sampler.noise, sampler.window, evaluation.steps, evaluation.eta"
    assert f"# null, and then not written: {null}" in result.output.replace("sampler.size, ", "")
    assert not (desk / "runs").exists()


@pytest.mark.parametrize("what", ["recipes", "models", "objectives", "assets"])
def test_lists_import_no_model_library(what: str) -> None:
    code = f"import sys; from apps import listing; listing.show({what!r}); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers", "torch"} & set(done.stdout.splitlines()[-1].split())


def test_the_plan_counts_the_adapter_as_trained_and_not_as_the_model(desk: Path) -> None:
    """The U-Net of the checkpoint, counted from its file, is what the plan calls the model."""
    file = next((Path(configured.configuration("run.yaml", []).model) / "unet").glob("*.safetensors"))
    count = sum(tensor.size for tensor in load_file(file).values())
    for adapter in ("{rank: 64}", "null"):
        plan = diffalign("align", "run.yaml", "--set", f"adapter={adapter}", "--dry-run").output
        assert f", {count / 1e6:.2f} M parameters in the denoiser" in plan


def test_a_dry_run_of_a_resumed_run_plans_from_the_run_itself(desk: Path) -> None:
    """The recipe has changed since: the run goes on as it began, and what it may not change is refused here, too."""
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--out", "run").exit_code == 0
    changed = (desk / "run.yaml").read_text().replace("seed: 0", "seed: 5")
    (desk / "run.yaml").write_text(changed if "seed: 5" in changed else f"seed: 5\n{changed}")
    before = {path: path.stat().st_mtime_ns for path in (desk / "run").rglob("*")}
    again = ["align", "run.yaml", "--resume", "--dry-run"]
    plan = diffalign(*again, "--out", "run", "--set", "trainer.epochs=3")
    assert plan.exit_code == 0, plan.output
    assert "done already:        1 of 3 epochs, in run" in plan.output and "\nseed: 0\n" in plan.output
    refused = diffalign(*again, "--out", "run", "--set", "trainer.learning_rate=1")
    assert refused.exit_code == 2 and "--resume: trainer.learning_rate is" in refused.stderr
    homeless = diffalign(*again)
    assert homeless.exit_code == 2 and "--resume needs --out" in homeless.stderr
    assert {path: path.stat().st_mtime_ns for path in (desk / "run").rglob("*")} == before


def test_the_plan_counts_what_is_done_and_kept(desk: Path) -> None:
    """By hand: 3 epochs of 8 samples and 3 steps; a KL term asks the reference at each replay, too.

    Calls: (24 sampled + 24 replayed + 4 + 8 + 2 x 4 compared) x 3 = 204, and 24 x 3 more with KL. All weights instead
    of an adapter: the frozen copy. 4 more samples an epoch keep 4 x 4 latents of 4 x 8 x 8 float32 more.
    """
    three = ["trainer.epochs=3"]
    plain = configured.configuration("run.yaml", three)
    assert dry_run.calls(plain, 2) == 204
    assert dry_run.calls(configured.configuration("run.yaml", [*three, "objective.kl_coefficient=0.1"]), 2) == 276
    policy = build.policy(plain)
    more = configured.configuration("run.yaml", ["trainer.samples_per_epoch=12"])
    assert dry_run.memory(policy, more) - dry_run.memory(policy, plain) == 4 * 4 * (4 * 8 * 8) * 4
    full = configured.configuration("run.yaml", ["adapter=null"])
    weights = sum(p.numel() for p in policy.family.denoiser.parameters()) * 4
    assert dry_run.memory(policy, full) - dry_run.memory(policy, plain) == weights


def test_a_fault_of_a_configuration_is_told_before_any_library_is_loaded(desk: Path) -> None:
    code = (
        "import sys\nfrom apps.cli import main\n"
        "try: main(['align', 'run.yaml', '--set', 'trainer.epoch=3'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n" and "did you mean trainer.epochs" in done.stderr


def test_a_graded_checker_and_the_plain_one_are_the_same_judge() -> None:
    assert build.judges(configured.configuration("quickstart")).trained_on == {
        "brain-mr-checker-graded",
        "brain-mr-checker",
    }


def test_a_reward_that_is_trained_on_is_not_held_out(desk: Path) -> None:
    """Named again by the same words it is measured once; of a combination it gets a row of its own, as trained on."""
    listed = "evaluation.rewards=[reward.py:brightness, compressibility]"
    judges = build.judges(configured.configuration("run.yaml", [listed]))
    assert [reward.name for reward in judges.others] == ["compressibility"] and judges.trained_on == {"brightness"}
    weighted = ["rewards=[{reward: reward.py:brightness, weight: -1}, {reward: incompressibility, weight: 0}]", listed]
    judges = build.judges(configured.configuration("run.yaml", weighted))
    assert [reward.name for reward in judges.others] == ["brightness", "compressibility"]
    assert judges.trained_on == {"combined", "brightness"}
    assert judges.wanted["brightness"] is judges.wanted["combined/brightness"] is False
    assert trained_on("embedded:emoji", configured.configuration("run.yaml"), judges) == ()


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
        (_nothing, ["--set", "model=embedded:unicorn"], "there is no embedded model 'unicorn'"),
        (_nothing, ["--set", "model=."], "is no folder of a model"),
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
        (_nothing, ["--set", "rewards.0=brain-mr-checker?device=abacus"], "no device 'abacus'"),
        (
            _nothing,
            ["--set", "evaluation.rewards=[compressibility, compressibility]"],
            "are called compressibility: compressibility and compressibility",
        ),
        (
            _nothing,
            ["--set", "evaluation.rewards=[./reward.py:brightness]"],
            "are called brightness: reward.py:brightness and ./reward.py:brightness",
        ),
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
    assert result.exit_code == 2 and "did you mean quickstart? recipes: brain-mr-clinician," in result.stderr


def test_a_diverging_run_ends_in_one_sentence(desk: Path) -> None:
    """One epoch at a sane learning rate, then one at 1e30, written into the run's own configuration."""
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1").exit_code == 0
    run = Run(desk / "runs" / "run")
    wild = ("trainer.learning_rate=1e30", "trainer.epochs=5")
    run.write_config(configured.configuration("run.yaml", wild))
    result = diffalign("align", "run.yaml", "--resume", "--out", "runs/run")
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    assert "diverged" in result.stderr and "Lower trainer.learning_rate (now 1e+30)" in result.stderr
    assert [path.name for path in run.checkpoints()] == ["step-1"]
    state = run.load_checkpoint()
    assert state is not None and state["epoch"] == 1
    assert all(bool(weight.isfinite().all()) for weight in state["parameters"].values())
    fresh = diffalign("align", "run.yaml", "--out", "fresh", "--set", wild[0], "--set", wild[1])
    assert fresh.exit_code == 2 and "Lower trainer.learning_rate (now 1e+30)" in fresh.stderr
    assert Run(desk / "fresh").checkpoints() == []


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
    assert "  sd 102  min 51" in result.stdout  # half of 255 - 51
    (folder / "white.png").unlink()
    alone = diffalign("score", "--reward", "reward.py:brightness", "--images", "images")
    assert "mean 51  min 51  max 51  n 1" in alone.stdout, alone.output


def test_score_fills_up_a_column_that_only_some_batches_have(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.score.BATCH", 2)
    for name in "abc":
        Image.new("RGB", (16, 16)).save(desk / f"{name}.png")
    result = diffalign("score", "--reward", "reward.py:pairs", "--images", ".", "--out", "scores.parquet")
    assert result.exit_code == 0, result.output
    import pyarrow.parquet as pq

    found = pq.read_table("scores.parquet").to_pydict()
    assert found["score"] == [0.5] * 3 and found["pair"][:2] == [1.0, 2.0] and math.isnan(found["pair"][2])


def _foreign_caption(desk: Path) -> None:
    Image.new("RGB", (16, 16)).save(desk / "a.png")
    (desk / "a.txt").write_bytes("Bär".encode("latin-1"))


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (_nothing, ["--images", "nowhere"], "no image folder nowhere"),
        (_nothing, ["--images", "."], "has no image in it"),
        (_nothing, [], "either --images DIR or --dataset"),
        (_nothing, ["--dataset", "prompts.txt"], "not a Parquet file"),
        (_foreign_caption, ["--images", "."], "a.txt is not UTF-8 text"),
    ],
)
def test_score_refuses(desk: Path, prepare: Callable[[Path], None], arguments: list[str], message: str) -> None:
    prepare(desk)
    result = diffalign("score", "--reward", "compressibility", *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_score_of_nothing_says_why(desk: Path) -> None:
    """The checker judges by the prompt: without one it has no opinion, and with one that it does not know neither."""
    Image.new("RGB", (16, 16)).save(desk / "a.png")
    bare = diffalign("score", "--reward", "emoji-checker", "--images", ".", "--out", "scores.parquet")
    assert bare.exit_code == 2 and "1 of them have no prompt: write it into a text file" in bare.stderr
    (desk / "a.txt").write_text("a sonnet")
    strange = diffalign("score", "--reward", "emoji-checker", "--images", ".", "--out", "scores.parquet")
    assert strange.exit_code == 2 and "it may not know prompts like these" in strange.stderr
    assert not (desk / "scores.parquet").exists()


def test_a_score_of_some_says_which_lack_a_prompt(desk: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64)).save(desk / f"{name}.png")
    (desk / "a.txt").write_text("a cat on a blue background")
    some = diffalign("score", "--reward", "emoji-checker", "--images", ".")
    assert some.exit_code == 0 and "2 images got no score from emoji-checker" in some.output
    assert "2 images have no prompt, and emoji-checker may need one: write it into a text file" in some.output
    clip = diffalign("score", "--reward", "clip", "--images", ".")
    assert clip.exit_code == 0 and "n 1  cosine" in clip.output and "2 images got no score from clip" in clip.output
    without = diffalign("score", "--reward", "compressibility", "--images", ".")
    assert without.exit_code == 0 and "no prompt" not in without.output


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", ".", "--format", "typo"], "invalid value for '--format': 'typo' is not one of 'parquet', "),
        (["generate", "x.yaml", "--export", "typo"], "invalid value for '--export': 'typo' is not one of 'parquet', "),
        (["list", "typo"], "'typo' is not one of 'recipes', 'models', 'rewards', 'objectives', 'assets' (see '"),
        (["list"], "missing argument '{recipes|models|rewards|objectives|assets}'. Choose from: recipes, models, "),
        (["label", "export", "x", "--format", "typo"], "invalid value for '--format': 'typo' is not one of 'prefer"),
        (["align", "quickstart", "--rezume"], "no such option '--rezume'. Did you mean '--resume'? (see '"),
        (
            ["--set", "a=b", "align", "quickstart"],
            "no such option '--set': options stand behind their command, as in '",
        ),
        (["label", "--out", "x", "init"], "no such option '--out': options stand behind their command, as in '"),
        (["aling"], "no such command 'aling'. Did you mean 'align'? (see '"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_one_sentence(words: list[str], said: str) -> None:
    """As every other mistake: one line on stderr, and status 2."""
    result = diffalign(*words)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and said in result.stderr
