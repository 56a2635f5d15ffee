"""The policy over a tiny random Stable Diffusion of the real classes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError
from diffalign.types import Prompt, Rollout
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import Conditioning, StableDiffusion
from tests.conftest import build_pipeline

PROMPTS = [Prompt("a red ball"), Prompt("two blue cube", negative="green")]
MakePolicy = Callable[..., DiffusionPolicy]


def every_step(rollout: Rollout) -> torch.Tensor:
    return torch.arange(rollout.log_probs.shape[1]).expand(len(rollout), -1)


def perturb(policy: DiffusionPolicy) -> None:
    """Moves the trained weights as an update would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_noise_sampling_equals_the_diffusers_pipeline(tmp_path: Path, guidance: float) -> None:
    """The whole pipeline at eta 0: same prompt, same initial latents, same pixels (to one grey level)."""
    pipeline = build_pipeline(tmp_path)
    sampler = SamplerConfig(steps=5, eta=0.0, guidance_scale=guidance)
    rollout = DiffusionPolicy(StableDiffusion(pipeline), sampler=sampler).rollout(PROMPTS[:1], [3])
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red ball", latents=rollout.state["latents"][:, 0], num_inference_steps=5, guidance_scale=guidance, eta=0.0,
        output_type="np",
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(np.asarray(rollout.samples[0].image) / 255, expected, atol=1.01 / 255)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replay_of_a_rollout_has_ratio_exactly_one(make: MakePolicy, prediction: str, guidance: float) -> None:
    policy = make(prediction, adapter=AdapterConfig(), sampler=SamplerConfig(steps=4, guidance_scale=guidance))
    perturb(policy)
    rollout = policy.rollout(PROMPTS, [1, 2])
    for step in range(4):
        replayed = policy.step_log_probs(rollout, torch.full((2, 1), step)).log_probs[:, 0]
        assert torch.equal(replayed.detach(), rollout.log_probs[:, step])


def test_one_step_at_a_time_equals_all_steps_at_once(make: MakePolicy) -> None:
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=4, guidance_scale=3.0))
    perturb(policy)
    rollout = policy.rollout(PROMPTS, [1, 2])
    together = policy.step_log_probs(rollout, every_step(rollout)).log_probs
    torch.testing.assert_close(together.detach(), rollout.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_replay_in_half_precision_stays_within_the_stated_bound(make: MakePolicy, precision: str) -> None:
    from diffalign.checks import RATIO_TOLERANCE, ratio_is_one

    policy = make(adapter=AdapterConfig(), precision=precision, sampler=SamplerConfig(steps=4, guidance_scale=3.0))
    assert ratio_is_one(policy, policy.rollout(PROMPTS, [1, 2]), precision) <= RATIO_TOLERANCE[precision]


def test_a_sample_depends_on_its_own_prompt_and_seed_only(make: MakePolicy) -> None:
    policy = make(sampler=SamplerConfig(steps=3, guidance_scale=2.0))
    both = policy.rollout(PROMPTS, [1, 2])
    swapped = policy.rollout(PROMPTS[::-1], [2, 1])
    alone = policy.rollout(PROMPTS[1:], [2])
    torch.testing.assert_close(both.state["latents"][1:], alone.state["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.state["latents"], swapped.state["latents"].flip(0), rtol=1e-5, atol=1e-5)
    other = policy.rollout(PROMPTS, [1, 3])
    assert not torch.allclose(both.state["latents"][1], other.state["latents"][1])


def test_guidance_has_gradient_through_both_branches(make: MakePolicy) -> None:
    """The gradient under guidance g is that of (1 - g) u + g c, so it differs from the conditional branch's alone."""
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=2, guidance_scale=3.0))
    perturb(policy)
    rollout = policy.rollout(PROMPTS[:1], [1])
    seen = []
    original = policy.family.denoise

    def spy(latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning) -> torch.Tensor:
        output = original(latents, timesteps, text)
        output.retain_grad()
        seen.append(output)
        return output

    policy.family.denoise = spy  # type: ignore[method-assign]
    policy.step_log_probs(rollout, torch.zeros((1, 1), dtype=torch.int64)).log_probs.sum().backward()
    unconditional, conditional = seen[0].grad.chunk(2)  # type: ignore[union-attr]
    torch.testing.assert_close(unconditional * 3, conditional * -2)
    assert conditional.abs().sum() > 0


@pytest.mark.parametrize("options", [{"adapter": AdapterConfig()}, {"full": True}], ids=["lora", "full"])
def test_reference_is_where_training_started_and_stays_there(make: MakePolicy, options: dict[str, object]) -> None:
    policy = make(**options, sampler=SamplerConfig(steps=2))
    rollout = policy.rollout(PROMPTS, [1, 2])
    start = policy.step_log_probs(rollout, every_step(rollout), kl=True)
    assert start.kl is not None and not start.kl.any()
    perturb(policy)
    moved = policy.step_log_probs(rollout, every_step(rollout), kl=True)
    assert moved.kl is not None and (moved.kl > 0).all() and moved.kl.requires_grad
    with policy.reference():
        again = policy.step_log_probs(rollout, every_step(rollout)).log_probs
    assert torch.equal(again, start.log_probs)
    assert not torch.allclose(moved.log_probs, start.log_probs)
    assert all(parameter.requires_grad for parameter in policy.trainable().values())


def test_the_adapter_loads_with_diffusers_load_lora_weights(make: MakePolicy, tmp_path: Path) -> None:
    """alpha differs from rank on purpose: a loader that ignores the stored alpha would scale the adapter wrongly."""
    policy = make(adapter=AdapterConfig(rank=2, alpha=6, targets="all"), sampler=SamplerConfig(steps=3, eta=0.0))
    perturb(policy)
    ours = policy.rollout(PROMPTS[:1], [4])
    folder = policy.save(tmp_path / "run")
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(policy.trainable())
    pipeline: StableDiffusionPipeline = build_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    theirs = pipeline(
        "a red ball", latents=ours.state["latents"][:, 0], num_inference_steps=3, guidance_scale=1.0, output_type="np"
    ).images[0]
    np.testing.assert_allclose(np.asarray(ours.samples[0].image) / 255, theirs, atol=1.01 / 255)


def test_a_fully_trained_model_loads_with_from_pretrained(make: MakePolicy, tmp_path: Path) -> None:
    policy = make(full=True, sampler=SamplerConfig(steps=3, eta=0.0))
    perturb(policy)
    loaded = StableDiffusionPipeline.from_pretrained(policy.save(tmp_path / "run"))
    for name, parameter in loaded.unet.named_parameters():
        assert torch.equal(parameter, policy.family.denoiser.get_parameter(name))


def test_gradient_checkpointing_changes_memory_and_nothing_else(make: MakePolicy) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = make(adapter=AdapterConfig(), gradient_checkpointing=checkpointing, sampler=SamplerConfig(steps=2))
        perturb(policy)
        rollout = policy.rollout(PROMPTS, [1, 2])
        policy.step_log_probs(rollout, every_step(rollout)).log_probs.sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_prompt_longer_than_the_encoder_is_cut_with_a_warning(
    make: MakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny encoder takes 16 tokens: 20 words and two markers are 22, so 6 are cut. Said once, not at every call."""
    policy = make(sampler=SamplerConfig(steps=1))
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            policy.rollout([Prompt("red " * 20)], [seed])
    (message,) = [record.message for record in caplog.records if "tokens" in record.message]
    assert "is 22 tokens long and the text encoder takes 16: its last 6 tokens are cut" in message


def test_a_checkpoint_saved_with_another_scheduler_does_not_clip(tmp_path: Path) -> None:
    """PNDM's configuration has no clip_sample, and DDIM's default is to clip to [-1, 1]: wrong for latents."""
    pipeline = build_pipeline(tmp_path)
    pipeline.scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert not StableDiffusion(pipeline).scheduler.config.clip_sample


def test_a_broken_schedule_is_refused(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path)
    pipeline.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ConfigError, match="zero terminal signal"):
        DiffusionPolicy(StableDiffusion(pipeline))


def test_unknown_adapter_targets_are_refused(make: MakePolicy) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets"):
        make(adapter=AdapterConfig(targets=["no_such_layer"]))
