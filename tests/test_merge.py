"""``diffalign merge``: the model of a run, without an adapter, and as good to go on from as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from apps import configured
from apps.evaluate import sampler
from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.types import Prompt, Rollout
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy
from pipelines.loading import load_policy
from pipelines.table_encoder import FOLDER
from tests import test_cli, tiny_pipelines
from tests.test_cli import diffalign
from tests.tiny_language import tiny_language_model

desk = test_cli.desk
PROMPTS, SEEDS = [Prompt("one red ball"), Prompt("two blue ball")], [3, 4]


def aligned(folder: Path, *overrides: str) -> Path:
    changes = [part for override in ("trainer.epochs=1", "trainer.learning_rate=3e-2", *overrides)
               for part in ("--set", override)]  # fmt: skip
    result = diffalign("align", "run.yaml", "--out", str(folder), *changes)
    assert result.exit_code == 0, result.output
    return folder


def pixels(rollout: Rollout) -> np.ndarray:
    return np.stack([np.asarray(sample.image, dtype=int) for sample in rollout.samples if sample.image is not None])


def test_a_merged_model_makes_what_the_run_makes_and_is_aligned_further(desk: Path, tiny_folder: Path) -> None:
    run = aligned(desk / "run")
    result = diffalign("merge", "run", "--out", "merged")
    assert result.exit_code == 0 and result.stdout == "model: merged\n", result.output
    settings = SamplerConfig(steps=3)
    config = configured.configuration(str(run / "config.yaml"))
    own = pixels(sampler("run", config).rollout(PROMPTS, SEEDS))
    base = load_policy(str(tiny_folder), sampler=settings)
    merged = load_policy("merged", sampler=settings)
    assert not [name for name in merged.family.denoiser.state_dict() if "lora" in name]  # type: ignore[union-attr]
    assert np.abs(pixels(merged.rollout(PROMPTS, SEEDS)) - own).max() <= 1
    assert np.abs(pixels(base.rollout(PROMPTS, SEEDS)) - own).max() > 3
    StableDiffusionPipeline.from_pretrained(desk / "merged")
    about = json.loads((desk / "merged" / "diffalign.json").read_text())
    assert about["run"]["rewards"] == [{"reward": "reward.py:brightness", "weight": 1.0}]
    assert about["base"] == tiny_folder.name and about["adapter_sha256"].startswith("sha256:")
    aligned(desk / "further", "model=merged")
    assert diffalign("merge", "further", "--out", "third").exit_code == 0


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "z-image"])
def test_adapters_of_every_family_are_merged(name: str, desk: Path) -> None:
    tiny_pipelines.save(name, desk).rename(desk / "base")
    settings = SamplerConfig(steps=2, size=tiny_pipelines.SIZE)
    policy = load_policy("base", adapter=AdapterConfig(rank=2), sampler=settings)
    base = pixels(policy.rollout(PROMPTS, SEEDS))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3)
    policy.save(desk)
    assert diffalign("merge", "base", "--adapter", "adapter", "--out", "merged").exit_code == 0
    own, merged = (pixels(each.rollout(PROMPTS, SEEDS)) for each in (policy, load_policy("merged", sampler=settings)))
    assert np.abs(merged - own).max() <= 1 < np.abs(base - own).max()


def test_a_bare_adapter_is_merged_and_what_its_base_has_comes_along(desk: Path, tiny_folder: Path) -> None:
    policy = load_policy(str(tiny_folder), adapter=AdapterConfig(rank=2))
    policy.save(desk)
    (desk / "base").symlink_to(tiny_folder)
    result = diffalign("merge", "base", "--adapter", "adapter", "--out", "merged")
    assert result.exit_code == 0, result.output
    assert not (desk / "merged" / FOLDER).exists()
    assert "run" not in json.loads((desk / "merged" / "diffalign.json").read_text())
    (desk / "merged" / FOLDER).mkdir()
    (desk / "merged" / FOLDER / "config.json").write_text("{}")
    (desk / "merged" / "LICENSE").write_text("free")
    assert diffalign("merge", "merged", "--adapter", "adapter", "--out", "again").exit_code == 0
    assert (desk / "again" / FOLDER / "config.json").read_text() == "{}"
    (desk / "again" / "LICENSES").mkdir()
    assert diffalign("merge", "again", "--adapter", "adapter", "--out", "third").exit_code == 0
    assert [(desk / name / "base-LICENSE").read_text() for name in ("again", "third")] == ["free", "free"]
    about = json.loads((desk / "third" / "diffalign.json").read_text())
    assert (about["base"], about["base_made_of"]["base_made_of"]["base"]) == ("again", "base")


def test_a_lora_of_a_text_encoder_is_merged_too(desk: Path, tiny_folder: Path) -> None:
    """Other tools make such adapters."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(
        desk / "adapter", unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )  # fmt: skip
    (desk / "base").symlink_to(tiny_folder)
    assert diffalign("merge", "base", "--adapter", "adapter", "--out", "merged").exit_code == 0
    for part in ("unet", "text_encoder"):
        before, after = (load_file(next((desk / one / part).glob("*.safetensors"))) for one in ("base", "merged"))
        moved = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
        assert moved and all("to_q" in name or "q_proj" in name for name in moved), part


def test_a_language_model_is_merged(desk: Path) -> None:
    model, tokenizer = tiny_language_model()
    model.save_pretrained(desk / "language")
    tokenizer.save_pretrained(desk / "language")
    policy = load_policy("language", adapter=AdapterConfig(rank=2))
    assert isinstance(policy, LanguagePolicy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    policy.save(desk)
    result = diffalign("merge", "language", "--adapter", "adapter", "--out", "merged")
    assert result.exit_code == 0, result.output
    merged, base = load_policy("merged"), load_policy("language")
    assert isinstance(merged, LanguagePolicy) and isinstance(base, LanguagePolicy)
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted, found, before = (each.model(tokens).logits for each in (policy, merged, base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-2)


def test_what_has_no_adapter_or_a_broken_one_is_refused(desk: Path, tiny_folder: Path) -> None:
    """In one sentence, with status 2, and nothing is written."""
    (desk / "base").symlink_to(tiny_folder)
    policy = load_policy(str(tiny_folder), adapter=AdapterConfig(rank=2))
    assert isinstance(policy, DiffusionPolicy)
    (file,) = policy.save(desk).glob("*.safetensors")
    (desk / "full").mkdir()
    aligned(desk / "whole", "adapter=null")
    for arguments, said in (
        (["base"], "base is no run, so it has no adapter to merge; name one by --adapter"),
        (["whole"], "run whole trained every weight: its model is whole/model, with nothing to merge"),
        (["base", "--adapter", "nowhere"], "there is no adapter folder nowhere"),
        (["nowhere", "--adapter", "adapter"], "nowhere"),
    ):
        result = diffalign("merge", *arguments, "--out", "merged")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        assert said in result.stderr and not (desk / "merged").exists()
    (desk / "full" / "file").write_text("")
    result = diffalign("merge", "base", "--adapter", "adapter", "--out", "full")
    assert result.exit_code == 2 and "output folder full is not empty: choose another --out" in result.stderr
    weights = load_file(file)
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}, file)
    result = diffalign("merge", "base", "--adapter", "adapter", "--out", "merged")
    assert result.exit_code == 2 and "the adapter cannot be merged" in result.stderr, result.output
    assert sorted(path.name for path in desk.iterdir() if "merged" in path.name) == []


@pytest.mark.parametrize("command", [[], ["run"], ["--out", "merged"]])
def test_a_run_and_a_folder_are_needed(command: list[str]) -> None:
    assert diffalign("merge", *command).exit_code == 2
