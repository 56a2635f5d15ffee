"""``diffalign evaluate``: what it refuses to compare, and what it says of measures without a value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apps import build, configured
from diffalign.prompts import WORLDS
from diffalign.runs import Run
from pipelines.naming import embedded_models
from tests import test_cli
from tests.test_cli import diffalign

desk = test_cli.desk


def test_prompts_of_a_world_that_a_model_has_no_words_for_are_refused(desk: Path) -> None:
    """Told before the model, which this run has not got, is looked for."""
    Run.create(desk / "run", configured.configuration("emoji-ddpo"))
    for model, more in (("run", []), ("embedded:emoji", ["--against", "run"])):
        result = diffalign("evaluate", model, *more, "--set", "prompts.source=brain-mr", "--out", "out")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        said = f"prompts.source: brain-mr, but embedded:emoji knows the words of emoji alone, so nothing that {model}"
        assert said in result.stderr and not (desk / "out").exists()
        assert "; take emoji, or a file of your own" in result.stderr
    against = diffalign("evaluate", "embedded:brain-mr", "--against", "embedded:emoji", "--out", "out")
    assert against.exit_code == 2 and "so nothing that embedded:emoji makes" in against.stderr
    assert "; compare it with a model of emoji, or by a file of your own" in against.stderr, against.stderr


@pytest.mark.parametrize("source", ["emoji", "prompts.txt", "brain-mr"])
def test_prompts_that_a_run_may_know_are_not_refused(desk: Path, source: str) -> None:
    """Its world's, a file's, and those that it was trained on whatever they are."""
    trained = ["prompts.source=brain-mr"] if source == "brain-mr" else []
    Run.create(desk / "run", configured.configuration("emoji-ddpo", [*trained, "rewards=[compressibility]"]))
    result = diffalign(
        "evaluate", "run", "--set", f"prompts.source={source}", "--set", "prompts.train=2", "--set",
        "prompts.held_out=2", "--out", "out",
    )  # fmt: skip
    assert "run run has no adapter/ or model/" in result.stderr, result.output


def test_every_embedded_model_has_a_world() -> None:
    assert set(build.WORLD_OF) == {f"embedded:{name}" for name in embedded_models()}
    assert set(build.WORLD_OF.values()) == set(WORLDS)


def test_measures_without_a_value_are_named_and_alone_refused(desk: Path) -> None:
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--out", "run").exit_code == 0
    some = diffalign("evaluate", "run", "--set", "evaluation.rewards=[reward.py:broken]", "--out", "some")
    assert some.exit_code == 0 and "broken could judge none of these samples" in some.stdout, some.output
    none = ["--set", "rewards=[reward.py:broken]", "--set", "evaluation.rewards=[emoji-checker]"]
    result = diffalign("evaluate", "run", *none, "--out", "none")
    assert result.exit_code == 2 and not (desk / "none").exists(), result.output
    assert "error: broken and emoji-checker can judge none of the samples, so there is nothing" in result.stderr
    assert "that knows the prompts of prompts.txt" in result.stderr


def test_rewards_that_know_another_worlds_prompts_are_refused_before_anything_is_sampled(desk: Path) -> None:
    """This run's rewards know the prompts of emoji alone; its model is not even looked for."""
    own = ["prompts.source=brain-mr", "rewards=[compressibility]"]
    Run.create(desk / "run", configured.configuration("emoji-ddpo", own))
    rewards = ["--set", "rewards=[emoji-checker]", "--set", "evaluation.rewards=['hidden-utility?rater=emoji']"]
    result = diffalign("evaluate", "run", *rewards, "--out", "out")
    assert result.exit_code == 2 and not (desk / "out").exists(), result.output
    said = "error: emoji-checker and hidden-utility?rater=emoji can judge none of the samples, so there is nothing"
    assert said in result.stderr and "that knows the prompts of brain-mr" in result.stderr


def test_a_run_of_divided_weights_is_loaded_whole_and_that_is_said(
    desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made by one process, and marked as what several made: the files are the same."""
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--out", "run").exit_code == 0
    spec = {
        "cases": 1, "axes": {"colour": ["red"]},
        "image": {"model": "run", "template": "one {colour} ball", "sampler": {"steps": 2}},
    }  # fmt: skip
    (desk / "spec.yaml").write_text(yaml.safe_dump(spec))
    config, told = (
        desk / "run" / "config.yaml",
        "run run was trained with trainer.shard; here its model is loaded whole",
    )
    for shard in (False, True):
        config.write_text(config.read_text().replace("shard: false", f"shard: {str(shard).lower()}"))
        for name, more in (("evaluate", ["run"]), ("generate", ["spec.yaml"])):
            caplog.clear()
            made = diffalign(name, *more, "--out", f"{name}-{shard}")
            assert made.exit_code == 0 and (told in caplog.text) == shard, made.output
