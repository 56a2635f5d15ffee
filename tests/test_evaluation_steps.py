"""``evaluation.steps`` and ``evaluation.eta``: few steps to learn from, and others to be measured and looked at by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apps import build, configured
from apps.dry_run import calls
from diffalign.config import RunConfig, SamplerConfig, dump, parse
from diffalign.errors import ConfigError
from diffalign.runs import Run
from diffalign.sampling import WindowConfig
from diffalign.types import Prompt, Rollout
from pipelines.diffusion import DiffusionPolicy
from tests import test_cli
from tests.test_cli import diffalign
from tests.test_trainer import CONFIG

desk = test_cli.desk
PROMPTS, SEEDS = [Prompt("a red ball"), Prompt("one cube")], [3, 4]


def pixels(rollout: Rollout) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(sample.image) for sample in rollout.samples]))


def test_it_is_looked_at_as_it_is_trained_unless_said() -> None:
    config = parse(CONFIG | {"sampler": {"steps": 3, "eta": 0.5, "guidance_scale": 2.0}})
    assert config.looked_at == config.sampler
    assert "steps" not in dump(config).partition("evaluation:")[2]  # files are what they were
    own = parse(config.model_dump(mode="json") | {"evaluation": {"rewards": ["clip"], "steps": 9, "eta": 0.0}})
    assert own.looked_at == config.sampler.model_copy(update={"steps": 9, "eta": 0.0})
    assert own.sampler == config.sampler and "steps: 9" in dump(own).partition("evaluation:")[2]


def test_what_cannot_be_is_refused() -> None:
    text = {
        "model": "embedded:findings-lm",
        "modality": "text",
        "prompts": {"source": "findings"},
        "rewards": ["length"],
    }
    with pytest.raises(ConfigError, match=r"evaluation\.eta is for images, and embedded:findings-lm makes texts"):
        parse(text | {"objective": {"name": "ppo-clip"}, "evaluation": {"eta": 0.0}})
    window = CONFIG | {"sampler": {"steps": 6, "window": {"start": 2, "steps": 2}}, "evaluation": {"steps": 3}}
    with pytest.raises(ConfigError, match=r"sampler\.window ends at step 4, and evaluation\.steps is 3"):
        parse(window)


@pytest.mark.parametrize(
    "sampler", [SamplerConfig(steps=7), SamplerConfig(steps=5, eta=0.0), SamplerConfig(steps=4, window=WindowConfig())]
)
def test_a_policy_samples_as_one_of_that_sampler(make: Callable[..., DiffusionPolicy], sampler: SamplerConfig) -> None:
    """To the bit; and afterwards as before."""
    mine = SamplerConfig(steps=3)
    policy, other = make(sampler=mine), make(sampler=sampler)
    before = policy.rollout(PROMPTS, SEEDS)
    with policy.sampled_by(sampler):
        inside = policy.rollout(PROMPTS, SEEDS)
    wanted, after = other.rollout(PROMPTS, SEEDS), policy.rollout(PROMPTS, SEEDS)
    assert inside.log_probs.shape == (2, sampler.steps) and after.log_probs.shape == (2, 3)
    for one, same in ((inside, wanted), (after, before)):
        assert torch.equal(one.log_probs, same.log_probs) and torch.equal(pixels(one), pixels(same))
    assert not torch.equal(pixels(inside), pixels(before))


def test_a_run_is_measured_in_other_steps_than_it_is_trained_in(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way, before, after, by ``evaluate`` and in the report; training itself keeps its own, and its bits."""
    lengths: list[int] = []
    rollout = DiffusionPolicy.rollout

    def watched(self: DiffusionPolicy, *arguments: object) -> object:
        lengths.append(self.sampler.steps)
        return rollout(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionPolicy, "rollout", watched)
    assert diffalign("align", "run.yaml", "--out", "plain").exit_code == 0
    assert set(lengths) == {3}
    lengths.clear()
    other = ["--set", "evaluation.steps=5", "--set", "evaluation.eta=0"]
    result = diffalign("align", "run.yaml", *other, "--out", "run")
    assert result.exit_code == 0, result.output
    trained, measured = [2 * 8 // 4 * [3], 1 * [5]]  # two epochs of 8 in batches of 4; after the first, two prompts
    assert lengths[:5] == [*trained[:2], *measured, *trained[2:]] and set(lengths[5:]) == {5}
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert (desk / "run" / weights).read_bytes() == (desk / "plain" / weights).read_bytes()
    outcomes = [json.loads((desk / name / "evaluation.json").read_text()) for name in ("plain", "run")]
    assert outcomes[0]["rewards"]["brightness"]["before"] != outcomes[1]["rewards"]["brightness"]["before"]
    assert "step_kl" in outcomes[0]["distance"] and "step_kl" not in outcomes[1]["distance"]  # eta 0: no likelihood
    report = (desk / "run" / "report.html").read_text()
    assert "num_inference_steps=5, eta=0" in report and "num_inference_steps=3" not in report
    lengths.clear()
    assert diffalign("evaluate", "run", "--out", "again").exit_code == 0
    assert set(lengths) == {5}
    again = json.loads((desk / "again" / "evaluation.json").read_text())["rewards"]["brightness"]["after"]["mean"]
    assert again == pytest.approx(outcomes[1]["rewards"]["brightness"]["after"]["mean"], abs=0.1)


def test_a_dry_run_counts_the_steps_of_each() -> None:
    """24 more steps for each of 2 x 4 prompts x 2 seeds, before and after, and for 2 x 8 that the distance replays."""

    def counted(**evaluation: object) -> int:
        prompts = {"source": "emoji", "train": 4, "held_out": 4}
        given = CONFIG | {
            "prompts": prompts,
            "sampler": {"steps": 6},
            "evaluation": {"rewards": ["clip"], **evaluation},
        }
        return calls(parse(given), 4)

    assert counted(steps=30) - counted() == 24 * (2 * 4 * 2 + 2 * 4 * 2)


def test_samples_to_label_are_those_that_are_measured() -> None:
    config: RunConfig = parse(CONFIG | {"sampler": {"steps": 3}, "evaluation": {"rewards": ["clip"], "steps": 9}})
    assert build.sampling(config)["sampler"].steps == 9
    assert build.sampling(config, training=True)["sampler"].steps == 3


def test_an_override_that_would_change_training_alone_is_refused(desk: Path) -> None:
    """A finished run is only looked at, and it is looked at by ``evaluation``."""
    Run.create(desk / "run", configured.configuration("emoji-ddpo", ["evaluation.steps=9"]))
    for command in (["evaluate", "run"], ["label", "init", "study", "--from", "run", "--protocol", "general"]):
        result = diffalign(*command, "--set", "sampler.steps=7")
        assert result.exit_code == 2, result.output
        assert (
            "--set sampler.steps: run was trained with that, and is looked at with evaluation.steps 9" in result.stderr
        )
    both = ["--set", "sampler.steps=7", "--set", "evaluation.steps=8", "--set", "sampler.eta=0.5"]
    assert "has no adapter/ or model/" in diffalign("evaluate", "run", *both).stderr
