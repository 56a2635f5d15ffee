"""Runs of several stages: a supervised one, a reward model, then the loop; each goes on where it was interrupted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from apps import configured, warm_up_stage
from apps.catalogue import recipes
from apps.report_curves import against_distance
from diffalign import preferences
from diffalign.errors import ConfigError
from diffalign.runs import Run
from diffalign.trainer import Interrupted, Trainer
from diffalign.types import Preference, Prompt, Sample
from diffalign.worlds import brain_mr, emoji, findings
from diffalign.worlds.shown import DEMONSTRATIONS
from pipelines.loading import load_language_model
from rewards.findings_checker import FindingsChecker
from tests import test_cli
from tests.test_cli import diffalign

desk = test_cli.desk
SMALL = {"epochs": 2, "samples_per_epoch": 8, "batch_size": 8, "learning_rate": 1e-3}
CLASSIC = {
    "model": "embedded:findings-lm",
    "warm_up": {"demonstrations": "findings", "trainer": dict(SMALL)},
    "fit": {"preferences": "pairs.parquet", "epochs": 4, "learning_rate": 3e-3},
    "rewards": ["language-reward?folder=fitted"],
    "prompts": {"source": "findings", "train": 16, "held_out": 2},
    "generation": {"max_new_tokens": 24},
    "credit": {"rule": "gae"},
    "trainer": dict(SMALL),
    "evaluation": {"rewards": ["findings-gold"], "seeds_per_prompt": 1, "every": 1},
}


def plain_over_hard(count: int) -> list[Preference]:
    """Readers who always prefer the text in plain words, on the left or on the right."""
    asked, made = findings.prompts("train", 16), []
    for i in range(count):
        prompt, hard, plain = asked[i % 16], findings.Style(1, 1), findings.Style(0, 0)
        sides = [
            Sample(prompt, text=findings.realise(prompt.attributes, 2 * i + k, s)) for k, s in enumerate((plain, hard))
        ]
        first, second = sides if i % 2 else reversed(sides)
        made.append(Preference(prompt, first, second, float(i % 2)))
    return made


@pytest.fixture
def classic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "classic.yaml").write_text(yaml.safe_dump(CLASSIC, sort_keys=False))
    preferences.write(tmp_path / "pairs.parquet", plain_over_hard(120))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupted(place: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """A run that is interrupted after the first epoch of its warm-up (0) or of its loop (1)."""
    train, seen = Trainer.train, [0]

    def once(self: Trainer, epochs: int | None = None) -> None:
        if seen[0] == stage:
            train(self, 1)
            raise Interrupted
        seen[0] += 1
        train(self, epochs)

    monkeypatch.setattr(Trainer, "train", once)
    assert diffalign("align", "classic.yaml", "--out", place.name).exit_code == 130
    monkeypatch.setattr(Trainer, "train", train)


@pytest.mark.slow
def test_the_three_steps_in_one_command_and_their_resumption(classic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stage a run was interrupted in, it ends with the bytes of one that was not."""
    result = diffalign("align", "classic.yaml", "--out", "whole")
    assert result.exit_code == 0, result.output
    whole = classic / "whole"
    first = whole / "warm-up"
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "report.html", "model"} <= {
        p.name for p in first.iterdir()
    }
    sft = json.loads((first / "evaluation.json").read_text())["rewards"]
    assert not sft["findings-gold"]["trained_on"] and "language-reward" not in sft
    done = json.loads((whole / "evaluation.json").read_text())
    assert done["rewards"]["language-reward"]["trained_on"] and not done["rewards"]["findings-gold"]["trained_on"]
    # What the loop compares with is what the warm-up left: at the same seeds, the same gold reward.
    assert done["rewards"]["findings-gold"]["before"]["mean"] == pytest.approx(sft["findings-gold"]["after"]["mean"])
    assert done["distance"]["sample_kl"] > 0
    base = load_language_model("embedded:findings-lm")[0].state_dict()
    warm = load_language_model(str(first / "model"))[0].state_dict()
    judge = AutoModelForSequenceClassification.from_pretrained(whole / "reward").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((warm[name] - base[name]).abs().max()) > 0 and float((judge[name] - warm[name]).abs().max()) > 0
    page = (whole / "report.html").read_text()
    assert "language-reward against KL" in page and "findings-gold against KL" in page
    assert 'href="warm-up/report.html"' in page

    evaluated = diffalign("evaluate", "whole", "--out", "evaluated")
    assert evaluated.exit_code == 0, evaluated.output
    again = json.loads((classic / "evaluated" / "evaluation.json").read_text())["rewards"]["findings-gold"]
    assert again["after"]["mean"] == pytest.approx(done["rewards"]["findings-gold"]["after"]["mean"])
    assert again["before"]["mean"] == pytest.approx(done["rewards"]["findings-gold"]["before"]["mean"])

    kept = ["warm-up/model/model.safetensors", "reward/model.safetensors", "adapter/adapter_model.safetensors"]
    for stage in (0, 1):
        place = classic / f"stage-{stage}"
        interrupted(place, monkeypatch, stage)
        assert (place / "reward").is_dir() == bool(stage) and not (place / "adapter").exists()
        more = diffalign("align", "classic.yaml", "--resume", "--out", place.name)
        assert more.exit_code == 0, more.output
        for file in kept:
            assert (place / file).read_bytes() == (whole / file).read_bytes(), (stage, file)
    # Between the stages: the pairs are judged, and nothing is fitted yet.
    place = classic / "between"
    shutil.copytree(classic / "stage-0", place)
    for name in ("reward", "adapter", "checkpoints"):
        shutil.rmtree(place / name)
    assert diffalign("align", "classic.yaml", "--resume", "--out", place.name).exit_code == 0
    for file in kept[1:]:
        assert (place / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_warm_up_of_images(desk: Path) -> None:
    """The same section for a diffusion model: the world's own scenes are shown, then the loop starts from there."""
    data = yaml.safe_load((desk / "run.yaml").read_text())
    data |= {
        "warm_up": {"demonstrations": "emoji", "trainer": {**SMALL, "epochs": 1, "samples_per_epoch": 8}},
        "prompts": {"source": "emoji", "train": 4, "held_out": 2},
    }
    data["trainer"]["epochs"] = 1
    (desk / "warm.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    result = diffalign("align", "warm.yaml", "--out", "warm")
    assert result.exit_code == 0, result.output
    assert (desk / "warm" / "warm-up" / "model" / "model_index.json").is_file()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (desk / "warm" / "warm-up" / "model" / weights).read_bytes() != (Path(data["model"]) / weights).read_bytes()
    assert (desk / "warm" / "adapter").is_dir() and "warm-up:" in result.output


def test_the_plan_names_the_warm_up(classic: Path) -> None:
    result = diffalign("align", "classic.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "every weight, 16 demonstrations of findings; not counted below" in result.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warm_up.demonstrations=gone.jsonl", "warm_up.demonstrations: there is no file gone.jsonl, and no world of"),
        ("warm_up={}", "warm_up.demonstrations"),
        ("warm_up.trainer.epoch=3", "unknown field warm_up.trainer.epoch; did you mean warm_up.trainer.epochs"),
        ("evaluation.rewards=[]", "evaluation.rewards: name one at least"),
        ("fit.ensemble=3", "unknown field ensemble of a reward model of texts"),
        ("rewards=[clinician?folder=fitted]", "what is fitted judges texts; name it language-reward?folder=fitted"),
    ],
)
def test_mistakes_are_told_before_any_work(classic: Path, setting: str, message: str) -> None:
    result = diffalign("align", "classic.yaml", "--set", setting, "--out", "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert "Traceback" not in result.stderr and not (classic / "out").exists()


def test_demonstrations_of_a_world_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text states what its row says and nothing else; images are the worlds' own, the same for the same seed."""
    asked = findings.prompts("train", 20)
    shown = [DEMONSTRATIONS["findings"](prompt, i) for i, prompt in enumerate(asked)]
    assert FindingsChecker()(shown).total.tolist() == [1.0] * 20
    assert DEMONSTRATIONS["findings"](asked[0], 0).text == shown[0].text
    for name, world in (("emoji", emoji), ("brain-mr", brain_mr)):
        prompt = world.prompts("train", 1)[0]
        image = DEMONSTRATIONS[name](prompt, 3).image
        assert image is not None and image.tobytes() == world.render(prompt.attributes, 3).image.tobytes()
    with pytest.raises(ConfigError):
        DEMONSTRATIONS["findings"](Prompt("a cat"), 0)


def test_a_stage_that_is_done_is_left_alone(classic: Path) -> None:
    config = configured.configuration("classic.yaml")
    (classic / "run").mkdir()
    assert warm_up_stage.stage(classic / "run", config) is not None
    run = Run(classic / "run" / warm_up_stage.FOLDER)
    assert configured.configuration(str(run.path)).objective.name == "sft"
    (run.path / warm_up_stage.DONE).write_text("{}")
    assert warm_up_stage.stage(classic / "run", config) is None


def test_rewards_against_the_distance_are_drawn_in_the_order_of_training() -> None:
    """From 0 over what was measured on the way to the end; what was trained on first. Without a measure, no chart."""
    rows = [
        {"step": 2, "distance/sample_kl": 1.5, "held_out/gold": 0.6, "held_out/proxy": 1.0},
        {"step": 3, "reward/total": 1.0},
        {"step": 4, "distance/sample_kl": 1.2, "held_out/gold": 0.5, "held_out/proxy": 2.0},
    ]

    def measure(trained: bool, before: float, after: float) -> dict[str, object]:
        ends = {"before": before, "after": after}
        return {"trained_on": trained} | {k: {"mean": v, "ci95": [v - 0.1, v + 0.1]} for k, v in ends.items()}

    evaluation = {
        "distance": {"sample_kl": 2.0},
        "rewards": {"gold": measure(False, 0.4, 0.45), "proxy": measure(True, 0.0, 3.0), "late": measure(False, 0, 0)},
    }
    charts = against_distance(rows, evaluation)
    assert [chart.title for chart in charts] == ["proxy against KL", "gold against KL"]
    assert [float(x) for x in re.findall(r"gold, nats ([\d.]+):", charts[1].svg)] == [0, 1.5, 1.2, 2.0]
    assert charts[1].svg.count('class="mark"') == 2 and ">nats<" in charts[1].svg and ">epoch<" not in charts[1].svg
    assert against_distance(rows, {**evaluation, "distance": {}}) == [] == against_distance([], evaluation)


def test_the_recipe_names_all_three_steps() -> None:
    config = configured.configuration(str(recipes()["rlhf-classic"]))
    assert config.warm_up is not None and config.fit is not None and config.credit.rule == "gae"
