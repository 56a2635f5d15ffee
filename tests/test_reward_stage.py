"""A run that fits its own reward, and what is left of it where that cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apps import reward_stage
from apps.resumption import configuration
from diffalign import preferences
from diffalign.errors import RefusedError
from diffalign.runs import Run
from rewards.fit_config import FitConfig
from tests import test_cli
from tests.test_cli import diffalign
from tests.test_sources import pairs

desk = test_cli.desk


@pytest.fixture
def loop(desk: Path) -> Path:
    """A run whose raters judge sixty pairs, and whose heads diverge at so high a rate."""
    data = yaml.safe_load((desk / "run.yaml").read_text())
    data |= {
        "rewards": ["preference?folder=fitted"],
        "fit": {"rater": "emoji", "collect": 60, "criteria": ["overall"], "ensemble": 2, "learning_rate": 1e3},
        "prompts": {"source": "emoji", "train": 20, "held_out": 5},
    }
    data["trainer"]["epochs"] = 1
    data["evaluation"] = {"rewards": ["hidden-utility?rater=emoji"], "seeds_per_prompt": 1}
    (desk / "loop.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return desk


def test_judgements_that_no_field_of_the_fit_mends_are_kept_without_that_advice(loop: Path) -> None:
    result = diffalign("align", "loop.yaml", "--set", "prompts.train=2", "--out", "run")
    assert result.exit_code == 2 and "--resume" not in result.stderr, result.output
    kept = "what was judged is kept in run/reward-preferences.parquet; for other judgements choose another --out"
    assert kept in result.stderr and (loop / "run" / "reward-preferences.parquet").is_file()


def test_judgements_are_kept_where_the_fit_diverged_and_fitted_to_again(loop: Path) -> None:
    """With another learning rate the run ends with the bytes of one that had it from the start."""
    failed = diffalign("align", "loop.yaml", "--out", "run")
    assert failed.exit_code == 2, failed.output
    advice = "'diffalign align run/config.yaml --resume --out run' fits to it again, by --set with another"
    assert (
        "error: overall: the loss is no number any more; give a lower learning_rate (1000 was given); what was judged"
        f" is kept: {advice} fit.ensemble, fit.encoder, fit.epochs or fit.learning_rate; for other changes"
    ) in failed.stderr
    judged = (loop / "run" / "reward-preferences.parquet").stat().st_mtime_ns

    refused = diffalign("align", "run/config.yaml", "--resume", "--out", "run", "--set", "fit.collect=80")
    assert refused.exit_code == 2 and "evaluation, device, fit.ensemble, fit.encoder, fit.length" in refused.stderr

    again = diffalign("align", "run/config.yaml", "--resume", "--out", "run", "--set", "fit.learning_rate=1e-3")
    assert again.exit_code == 0, again.output
    assert (loop / "run" / "reward-preferences.parquet").stat().st_mtime_ns == judged
    assert diffalign("align", "loop.yaml", "--set", "fit.learning_rate=1e-3", "--out", "whole").exit_code == 0
    for name in ("config.yaml", "reward/heads.safetensors", "adapter/pytorch_lora_weights.safetensors"):
        assert (loop / "run" / name).read_bytes() == (loop / "whole" / name).read_bytes(), name

    late = diffalign("align", "run/config.yaml", "--resume", "--out", "run", "--set", "fit.learning_rate=1e-2")
    assert late.exit_code == 2 and "only trainer.epochs" in late.stderr and "fit.ensemble" not in late.stderr


def test_a_fit_that_is_interrupted_goes_on_by_what_was_asked_last(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffalign("align", "loop.yaml", "--out", "run").exit_code == 2

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_stage.reward_fit, "fit_into", stopped)
    change = ["--set", "fit.learning_rate=1e-3"]
    assert diffalign("align", "loop.yaml", "--resume", "--out", "run", *change).exit_code == 130
    begun = configuration("run", [], Run(loop / "run"))
    assert begun.fit is not None and begun.fit.learning_rate == 1e-3


def test_given_pairs_that_nothing_can_be_fitted_to_leave_no_run(desk: Path) -> None:
    preferences.write(desk / "recorded", pairs(label=0.5))
    data = yaml.safe_load((desk / "run.yaml").read_text())
    data |= {"rewards": ["preference?folder=fitted"], "fit": {"preferences": "recorded"}}
    (desk / "loop.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    for _ in range(2):
        result = diffalign("align", "loop.yaml", "--out", "run")
        assert result.exit_code == 2 and "kept" not in result.stderr, result.output
        assert "not empty" not in result.stderr and not (desk / "run").exists()


def test_a_reward_model_sees_no_pair_of_a_held_out_prompt(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def fit_into(config: FitConfig, *_: object) -> None:
        seen.update(pair.prompt.text for pair in preferences.Table(Path(config.preferences)))
        raise RefusedError("seen enough")

    monkeypatch.setattr(reward_stage.reward_fit, "fit_into", fit_into)
    preferences.write(desk / "recorded", pairs(120))
    data = yaml.safe_load((desk / "run.yaml").read_text())
    data |= {
        "rewards": ["preference?folder=fitted"],
        "fit": {"preferences": "recorded", "ensemble": 2},
        "prompts": {"source": "prompts.txt", "train": 3, "held_out": 1},
    }
    (desk / "loop.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    result = diffalign("align", "loop.yaml", "--set", "trainer.epochs=0")
    assert "30 pairs are of held-out prompts, and left out of the reward model" in result.output, result.output
    assert "seen enough" in result.stderr and len(seen) == 3
