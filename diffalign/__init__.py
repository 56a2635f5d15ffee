"""diffalign: align generators of images and texts to what people prefer.

The engine. Policies come from ``pipelines``, rewards from ``rewards``; ``diffalign.types`` is the vocabulary.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.config import (
        AdapterConfig,
        CreditConfig,
        ExperienceConfig,
        GenerationConfig,
        ObjectiveConfig,
        PromptsConfig,
        RunConfig,
        SamplerConfig,
        TrainerConfig,
    )
    from diffalign.errors import DiffalignError, UserError
    from diffalign.evaluation import Evaluation, evaluate
    from diffalign.experience import BestOfN, JudgedPairs, OnlinePairs, Recorded, RecordedPairs, Rollouts
    from diffalign.prompts import load as load_prompts
    from diffalign.trainer import Trainer
    from diffalign.types import Draw, Policy, Preference, Prompt, Reward, Rollout, Sample, Scores

_HOMES = {
    "AdapterConfig": "config",
    "BestOfN": "experience",
    "CreditConfig": "config",
    "DiffalignError": "errors",
    "Draw": "types",
    "Evaluation": "evaluation",
    "ExperienceConfig": "config",
    "GenerationConfig": "config",
    "JudgedPairs": "experience",
    "ObjectiveConfig": "config",
    "OnlinePairs": "experience",
    "Policy": "types",
    "Preference": "types",
    "Prompt": "types",
    "PromptsConfig": "config",
    "Recorded": "experience",
    "RecordedPairs": "experience",
    "Reward": "types",
    "Rollout": "types",
    "Rollouts": "experience",
    "RunConfig": "config",
    "Sample": "types",
    "SamplerConfig": "config",
    "Scores": "types",
    "Trainer": "trainer",
    "TrainerConfig": "config",
    "UserError": "errors",
    "evaluate": "evaluation",
    "load_prompts": "prompts",
}

__all__ = [
    "AdapterConfig",
    "BestOfN",
    "CreditConfig",
    "DiffalignError",
    "Draw",
    "Evaluation",
    "ExperienceConfig",
    "GenerationConfig",
    "JudgedPairs",
    "ObjectiveConfig",
    "OnlinePairs",
    "Policy",
    "Preference",
    "Prompt",
    "PromptsConfig",
    "Recorded",
    "RecordedPairs",
    "Reward",
    "Rollout",
    "Rollouts",
    "RunConfig",
    "Sample",
    "SamplerConfig",
    "Scores",
    "Trainer",
    "TrainerConfig",
    "UserError",
    "evaluate",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that ``import diffalign`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    module = import_module(f"diffalign.{_HOMES[name]}")
    return getattr(module, "load" if name == "load_prompts" else name)
