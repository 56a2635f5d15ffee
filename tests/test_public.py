"""The public names, pinned: other people's scripts rely on them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import diffalign
import pipelines
import rewards

PUBLIC = {
    diffalign: [
        "AdapterConfig", "BestOfN", "CreditConfig", "DiffalignError", "Draw", "Evaluation", "ExperienceConfig",
        "JudgedPairs", "ObjectiveConfig", "OnlinePairs", "Policy", "Preference", "Prompt", "PromptsConfig", "Recorded",
        "RecordedPairs", "Reward", "Rollout", "Rollouts", "RunConfig", "Sample", "SamplerConfig", "Scores", "Trainer",
        "TrainerConfig", "UserError", "evaluate", "load_prompts",
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


def test_importing_the_packages_is_light() -> None:
    code = "import diffalign, rewards, pipelines, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
