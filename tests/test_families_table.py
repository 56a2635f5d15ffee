"""Every family by every method, on tiny random pipelines of the real classes: a family or method is one more row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from safetensors import safe_open
from torch import Tensor

from diffalign import checks, images
from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig
from diffalign.experience import Recorded, RecordedPairs, Rollouts, Source
from diffalign.lessons import Steps
from diffalign.methods import BACKPROP
from diffalign.trainer import Trainer
from diffalign.types import Draw, Preference, Prompt, Rollout, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_adapter, load_family, load_policy
from tests import tiny_pipelines
from tests.bright import Bright
from tests.test_trainer import Brightness
from tests.tiny_pipelines import SIZE

FAMILIES = ["sd", "sdxl", "sd3", "flux", "z-image"]
VARIANTS = [*FAMILIES, "sd3-without-t5", "flux-schnell"]
METHODS = ["ppo-clip", "reinforce", "reward-weighted", "dpo", "kto", "sft", "elbo-ppo-clip", "nft", "draft", "refl"]
TABLE = list(itertools.product(FAMILIES, METHODS))
PROMPTS = [Prompt("a red ball"), Prompt("two blue cube")]
FLOWS = {"sd3", "flux", "z-image", "sd3-without-t5", "flux-schnell"}
Load = Callable[..., DiffusionPolicy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_pipelines.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def load(folder: Callable[[str], Path]) -> Load:
    """A policy over a fresh copy of a tiny pipeline, by the front door."""

    def load(name: str, sampler: dict[str, Any] | None = None, **options: Any) -> DiffusionPolicy:
        settings = SamplerConfig.model_validate({"steps": 3, "size": SIZE, **(sampler or {})})
        policy = load_policy(str(folder(name)), sampler=settings, **options)
        assert isinstance(policy, DiffusionPolicy)
        return policy

    return load


def perturb(policy: DiffusionPolicy, size: float = 0.1) -> None:
    """Moves the trained weights as an update would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def drawn(name: str, pipeline: DiffusionPipeline, latents: Tensor, steps: int, guidance: float) -> np.ndarray[Any, Any]:
    """The image that diffusers' own pipeline makes of latents, float ``(H, W, 3)``, by its deterministic sampler."""
    options: dict[str, Any] = {"guidance_scale": guidance}
    if name in ("sd", "sdxl"):
        config = dict(pipeline.scheduler.config) | {"clip_sample": False}
        pipeline.scheduler, options["eta"] = DDIMScheduler.from_config(config), 0.0
    if name.startswith("flux"):
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
        if name == "flux-schnell":
            options = {"true_cfg_scale": guidance, "negative_prompt": ""}
    if name == "z-image":
        options["guidance_scale"] = guidance - 1
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a red ball", latents=latents, num_inference_steps=steps, height=SIZE, width=SIZE, output_type="np", **options
    )
    found: np.ndarray[Any, Any] = made.images[0]
    return found


def fresh(path: Path) -> DiffusionPipeline:
    """The pipeline as diffusers loads it."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if path.name == "sd3-without-t5" else {}
    pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(path, **absent)
    return pipeline


def pixels(rollout: Rollout) -> np.ndarray[Any, Any]:
    """The first image, float in [0, 1]."""
    return np.asarray(rollout.samples[0].image) / 255


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_without_noise_sampling_equals_the_pipeline_of_diffusers(
    load: Load, folder: Callable[[str], Path], name: str, guidance: float
) -> None:
    """The whole pipeline, text encoders and decoder included: the same latents, the same pixels to one grey level."""
    policy = load(name, {"eta": 0.0, "guidance_scale": guidance})
    rollout = policy.rollout(PROMPTS[:1], [3])
    theirs = drawn(name, fresh(folder(name)), rollout.state["latents"][:, 0], 3, guidance)
    np.testing.assert_allclose(pixels(rollout), theirs, atol=1.01 / 255)
    assert theirs.std() > 0.01  # not a flat picture, which any latents would give


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_replay_of_a_rollout_has_ratio_exactly_one(load: Load, name: str, guidance: float) -> None:
    policy = load(name, {"guidance_scale": guidance}, adapter=AdapterConfig())
    perturb(policy)
    rollout = policy.rollout(PROMPTS, [1, 2])
    assert rollout.mask.any() and rollout.log_probs[rollout.mask].isfinite().all()
    assert bool(rollout.mask[:, -1].any()) == (name not in FLOWS and bool(policy.schedule.std[-1] > 0))
    assert checks.ratio_is_one(policy, rollout, "fp32") == 0


@pytest.mark.parametrize("noise", ["sde", "cps", "dance"])
def test_each_kind_of_noise_replays_and_has_a_reference(load: Load, noise: str) -> None:
    policy = load("sd3", {"noise": noise, "window": {"start": 1, "steps": 1}}, adapter=AdapterConfig())
    perturb(policy)
    rollout = policy.rollout(PROMPTS, [1, 2])
    assert rollout.mask.tolist() == [[False, True, False]] * 2
    assert checks.ratio_is_one(policy, rollout, "fp32") == 0
    found = policy.step_log_probs(rollout, torch.ones((2, 1), dtype=torch.int64), kl=True)
    assert found.kl is not None and (found.kl > 0).all() and found.kl.requires_grad


def test_training_keeps_to_the_window(load: Load) -> None:
    """Of 5 steps 2 have noise, and half of those is one step for each sample."""
    policy = load("flux", {"steps": 5, "window": {"start": 1, "steps": 2}}, adapter=AdapterConfig())
    rollout = policy.rollout(PROMPTS, [1, 2])
    lesson = Steps(policy, ObjectiveConfig(), 0, 0, rollout, torch.tensor([1.0, -1.0]), step_fraction=0.5)
    steps = [lesson.rows(torch.arange(2), inner).steps for inner in range(8)]
    asked = torch.cat([found for found in steps if found is not None])
    assert len(asked) == 16 and set(asked.flatten().tolist()) == {1, 2}


def shades(count: int) -> list[Preference]:
    """Pairs of a bright and a dark noisy picture; the bright one is preferred."""
    noise = torch.rand(count, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / 4
    pairs = []
    for i in range(count):
        shown = images.to_pil(noise[i] + torch.tensor([0.6, 0.1])[:, None, None, None])
        bright, dark = (Sample(PROMPTS[i % 2], image=image) for image in shown)
        pairs.append(Preference(PROMPTS[i % 2], bright, dark, 1.0))
    return pairs


class Light(Brightness):
    """Brightness with a gradient: the same weights of red, green and blue as PIL's greyscale."""

    def differentiable(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        return (pictures * weights).sum(1).mean((1, 2))


def source_of(method: str) -> Source:
    """Something that the method can learn from."""
    pairs = shades(4)
    if method == "dpo":
        return RecordedPairs(pairs, range(4))
    if method == "kto":
        samples: Sequence[Sample] = [sample for pair in pairs for sample in (pair.first, pair.second)]
        return Recorded(samples, [True, False] * 4)
    if method == "sft":
        return Recorded([pair.first for pair in pairs])
    reward = Bright() if method in BACKPROP else Brightness()
    return Rollouts(reward, PROMPTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "method"), TABLE)
def test_an_epoch_of_every_method_on_every_family(load: Load, name: str, method: str) -> None:
    """One epoch through the one training loop, whose own checks are on: ratio 1, a still reference, all gradients."""
    learn(load(name, {"steps": 2, "guidance_scale": 2.0}, adapter=AdapterConfig()), method)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_every_family_can_be_trained(load: Load, name: str) -> None:
    learn(load(name, {"steps": 2}, full=True), "ppo-clip")


def learn(policy: DiffusionPolicy, method: str) -> None:
    """One epoch, one update."""
    before = {key: parameter.detach().clone() for key, parameter in policy.trainable().items()}
    job = Trainer(
        policy,
        source_of(method),
        settings=TrainerConfig(epochs=1, samples_per_epoch=4, batch_size=4, samples_per_prompt=2, learning_rate=1e-2),
        objective=ObjectiveConfig(name=method),  # type: ignore[arg-type]
        credit=CreditConfig(rule="batch"),
    )
    job.train()
    assert job.updates == 1
    moved = [key for key, parameter in policy.trainable().items() if not torch.equal(parameter, before[key])]
    assert len(moved) >= len(before) / 2  # LoRA's A has no gradient before B has moved


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_loads_with_load_lora_weights_and_with_load_adapter(
    load: Load, folder: Callable[[str], Path], tmp_path: Path, name: str, targets: str
) -> None:
    """alpha differs from rank on purpose: a loader that ignores the stored alpha would scale the adapter wrongly."""
    settings = AdapterConfig(rank=2, alpha=6, targets=targets)  # type: ignore[arg-type]
    policy = load(name, {"eta": 0.0}, adapter=settings)
    plain = pixels(policy.rollout(PROMPTS[:1], [4]))
    perturb(policy, 0.3)
    ours = policy.rollout(PROMPTS[:1], [4])
    saved = policy.save(tmp_path / "run")
    with safe_open(saved / "pytorch_lora_weights.safetensors", "pt") as file:
        assert sorted(file.keys())[0].startswith(policy.family.part) and len(file.keys()) == len(policy.trainable())
    pipeline = fresh(folder(name))
    pipeline.load_lora_weights(saved)
    theirs = drawn(name, pipeline, ours.state["latents"][:, 0], 3, 1.0)
    np.testing.assert_allclose(pixels(ours), theirs, atol=1.01 / 255)
    assert np.abs(pixels(ours) - plain).max() > 3 / 255
    again = load(name, {"eta": 0.0}, adapter=settings)
    load_adapter(again, saved)
    assert torch.equal(again.rollout(PROMPTS[:1], [4]).state["latents"], ours.state["latents"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fully_trained_model_loads_with_from_pretrained(load: Load, tmp_path: Path, name: str) -> None:
    policy = load(name, full=True)
    perturb(policy, 0.02)
    ours = policy.rollout(PROMPTS, [1, 2])
    saved = policy.save(tmp_path / "run")
    denoiser = getattr(DiffusionPipeline.from_pretrained(saved), policy.family.part)
    for key, parameter in policy.trainable().items():
        assert torch.equal(denoiser.get_parameter(key), parameter)
    again = load_policy(str(saved), sampler=SamplerConfig(steps=3, size=SIZE))
    latents = ours.state["latents"]
    assert torch.equal(again.rollout(PROMPTS, [1, 2]).state["latents"], latents)
    with policy.reference():
        assert not torch.allclose(policy.rollout(PROMPTS, [1, 2]).state["latents"], latents, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sample_depends_on_its_own_prompt_and_seed_only(load: Load, name: str) -> None:
    """Prompts of other lengths beside it: where padding is left out, it must be left out whole."""
    policy = load(name, {"guidance_scale": 2.0})
    prompts = [PROMPTS[0], Prompt("two " * 9 + "blue cube")]
    both, alone = policy.rollout(prompts, [1, 2]), policy.rollout(prompts[:1], [1])
    torch.testing.assert_close(both.state["latents"][:1], alone.state["latents"], rtol=1e-4, atol=1e-4)
    other = policy.rollout([prompts[1]], [1])
    assert not torch.allclose(other.state["latents"][:, -1], alone.state["latents"][:, -1], atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image"])
def test_the_likelihood_of_a_flow_is_its_velocity_error(load: Load, name: str) -> None:
    """By hand: x = .9 x0 + .1 e at time .1, the family asked at timestep 100, and v compared with e - x0."""
    policy = load(name)
    pairs = shades(1)
    samples, draw = [pairs[0].first, pairs[0].second], Draw(torch.tensor([0.1, 0.7]), (11, 12))
    shown = images.to_tensor([sample.image for sample in samples if sample.image is not None])
    vae = policy.family.pipeline.vae
    with torch.no_grad():
        encoded = vae.encode(2 * shown - 1).latent_dist.mode()
        clean = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (11, 12)])
        time = draw.time[:, None, None, None]
        text = policy._embed([sample.prompt.text for sample in samples])
        velocity = policy.family.denoise((1 - time) * clean + time * noise, torch.tensor([100.0, 700.0]), text)
        found = policy.log_likelihood(samples, draw)
    torch.testing.assert_close(found, -((velocity - (noise - clean)) ** 2).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(load: Load, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load(name, {"steps": 2}, adapter=AdapterConfig(), gradient_checkpointing=checkpointing)
        perturb(policy)
        rollout = policy.rollout(PROMPTS, [1, 2])
        policy.step_log_probs(rollout, torch.zeros((2, 1), dtype=torch.int64)).log_probs.sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_in_half_precision_stays_within_the_stated_bound(load: Load, name: str) -> None:
    """A frozen transformer is kept in bfloat16, and its LoRA in float32; a U-Net in float32."""
    policy = load(name, adapter=AdapterConfig(), precision="bf16")
    kept = {p.dtype for p in policy.family.denoiser.parameters() if not p.requires_grad}
    assert kept == {torch.bfloat16 if name in FLOWS else torch.float32}
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert checks.ratio_is_one(policy, policy.rollout(PROMPTS, [1, 2]), "bf16") <= checks.RATIO_TOLERANCE["bf16"]


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_half_precision_says_nearly_the_same(load: Load, name: str) -> None:
    """bfloat16 has 8 bits: errors near 1 % of a velocity error of about 2."""
    samples, draw = [shades(1)[0].first], Draw(torch.tensor([0.4]), (11,))
    with torch.no_grad():
        exact, half = (load(name, precision=p).log_likelihood(samples, draw) for p in ("fp32", "bf16"))
    assert float(half) == pytest.approx(float(exact), rel=0.02)
    assert float(half) != float(exact)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_read_as_they_are_kept(folder: Callable[[str], Path], name: str, precision: torch.dtype) -> None:
    """The same bits as read in float32 and rounded then."""
    read, rounded = load_family(str(folder(name)), precision), load_family(str(folder(name)))
    rounded.freeze_in(precision)
    halves = 0
    for part, module in rounded.components().items():
        for wanted, found in zip(
            module.state_dict().items(), read.components()[part].state_dict().items(), strict=True
        ):
            assert wanted[0] == found[0] and wanted[1].dtype == found[1].dtype, (part, wanted[0])
            assert torch.equal(wanted[1], found[1]), (part, wanted[0])
            halves += wanted[1].dtype == precision
    assert (halves > 0) == (name in FLOWS)
