"""The models that ship with diffalign: present, small, standard, and as good as their cards say at the least."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign.config import SamplerConfig
from diffalign.prompts import WORLDS
from diffalign.seeds import derive
from pipelines.loading import EMBEDDED, embedded_models, load_policy
from rewards.registry import load as load_reward

ROOT = Path(__file__).parent.parent
FLOORS = {"emoji": 0.75, "brain-mr": 0.8}
"""Accuracy that 24 samples at guidance 2 must reach; the cards report about 500 samples and intervals."""


def test_the_names() -> None:
    assert embedded_models() == ["brain-mr", "emoji", "findings-lm"]
    assert embedded_models("image") == ["brain-mr", "emoji"]
    assert embedded_models("text") == ["findings-lm"]


def test_the_whole_set_is_small_and_safe() -> None:
    """DESIGN: under about 60 MB, safetensors only, each with a card."""
    folders = [*(EMBEDDED / name for name in embedded_models()), *(ROOT / "rewards" / "embedded").glob("*")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert all((folder / "README.md").is_file() for folder in folders)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_an_embedded_model_is_a_plain_diffusers_folder(name: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_an_embedded_model_draws_what_it_is_asked_for(name: str) -> None:
    world = import_module(WORLDS[name])
    prompts = [world.scene(derive(3, "test", i)).prompt for i in range(24)]
    policy = load_policy(f"embedded:{name}", sampler=SamplerConfig(guidance_scale=2.0))
    samples = policy.rollout(prompts, range(24)).samples
    assert float(load_reward(f"{name}-checker")(samples).total.mean()) > FLOORS[name]


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_diffusers_alone_computes_in_one_precision(name: str) -> None:
    """As a user loads it, without a dtype: no part may stay in the half precision of its file."""
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / name)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
