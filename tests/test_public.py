"""The public names, pinned: other people's scripts rely on them."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

import diffalign
import pipelines
import rewards

PUBLIC = {
    diffalign: [
        "AdapterConfig", "BestOfN", "CreditConfig", "DiffalignError", "Draw", "Evaluation", "ExperienceConfig",
        "GenerationConfig", "JudgedPairs", "ObjectiveConfig", "OnlinePairs", "Policy", "Preference", "Prompt",
        "PromptsConfig", "Recorded", "RecordedPairs", "Reward", "Rollout", "Rollouts", "RunConfig", "Sample",
        "SamplerConfig", "Scores", "Trainer", "TrainerConfig", "UserError", "evaluate", "load_prompts",
    ],
    pipelines: ["load_policy"],
    rewards: ["load_reward"],
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_public_names(package: object) -> None:
    assert sorted(package.__all__) == sorted(PUBLIC[package])  # type: ignore[attr-defined, index]
    assert all(getattr(package, name).__doc__ for name in package.__all__)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        package.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_of_the_other_modality_is_refused_when_a_policy_is_loaded() -> None:
    with pytest.raises(diffalign.UserError, match=r"sampler: embedded:findings-lm makes texts; say by generation="):
        pipelines.load_policy("embedded:findings-lm", sampler=diffalign.SamplerConfig())
    with pytest.raises(diffalign.UserError, match=r"generation: embedded:emoji makes images; say by sampler="):
        pipelines.load_policy("embedded:emoji", generation=diffalign.GenerationConfig())


@pytest.mark.parametrize(("reduction", "beta", "clip"), [("mean", 2500.0, 1e-4), ("sum", 0.1, 0.2)])
def test_an_objective_takes_the_defaults_of_the_model(
    reduction: Literal["mean", "sum"], beta: float, clip: float
) -> None:
    """What was given stays, even where it equals a default of the other scale."""
    objective = diffalign.ObjectiveConfig
    assert objective(name="dpo").suited_to(reduction).beta == beta
    assert objective().suited_to(reduction).clip_range == clip
    assert objective(clip_range=1e-4).suited_to(reduction).clip_range == 1e-4
    assert objective(reduction="mean").suited_to(reduction).reduction == "mean"


def test_an_objective_refuses_what_the_model_has_no_use_for() -> None:
    with pytest.raises(diffalign.UserError, match=r"dpo of sums over tokens has no draws"):
        diffalign.ObjectiveConfig(name="dpo", draws=1).suited_to("sum")


def test_importing_the_packages_is_light() -> None:
    code = "import diffalign, rewards, pipelines, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
