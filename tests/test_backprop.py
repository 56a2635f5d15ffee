"""Reward backpropagation: the gradient through the last steps, the three objectives, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from apps import build
from apps.dry_run import learning_calls
from apps.listing import OBJECTIVES
from diffalign.backprop import Backprop, form_of
from diffalign.config import AdapterConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.experience import Rollouts, Scored
from diffalign.methods import BACKPROP, FIELDS
from diffalign.objectives.reward_backprop import reward_backprop
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Rollout, Sample
from pipelines import backprop
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import StableDiffusion
from pipelines.schedules import Ddim, Flow
from rewards.combine import Combined
from rewards.jpeg import Compressibility
from tests import test_families_table
from tests.bright import Bright
from tests.conftest import build_pipeline
from tests.test_families_table import FAMILIES, Load
from tests.test_trainer import WalkPolicy

PROMPTS = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one green ball"), Prompt("three red cube")]
STEPS = 4
MakePolicy = Callable[..., DiffusionPolicy]

RUN = {"model": "embedded:emoji", "prompts": {"source": "emoji"}, "rewards": ["clip"], "objective": {"name": "draft"}}

folder, load = test_families_table.folder, test_families_table.load


class Dark(Bright):
    """The same, of which less is better."""

    name, higher_is_better = "dark", False


def perturbed(policy: DiffusionPolicy, seed: int = 5) -> DiffusionPolicy:
    """The policy with trained weights as an update would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def gradients(policy: DiffusionPolicy, images: torch.Tensor) -> list[torch.Tensor]:
    """Of the images' mean, by every trained parameter; 0 where it plays no part."""
    parameters = list(policy.trainable().values())
    found = torch.autograd.grad(images.mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_reward_and_a_failed_judgement_teaches_nothing() -> None:
    """-2 + 0.5 * 4 = 0, 0 (NaN) + 0.5 * 1 = 0.5, 3 + 0.5 * 0 = 3; the mean reward of the two judged is (2 - 3) / 2."""
    reward = torch.tensor([2.0, math.nan, -3.0], requires_grad=True)
    drift = torch.tensor([4.0, 1.0, 0.0], requires_grad=True)
    loss, metrics = reward_backprop(reward, drift, kl_coefficient=0.5)
    assert loss.tolist() == [0.0, 0.5, 3.0]
    by_reward, by_drift = torch.autograd.grad(loss.sum(), (reward, drift))
    assert by_reward.tolist() == [-1.0, 0.0, -1.0] and by_drift.tolist() == [0.5] * 3
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"reward": -0.5, "failed": 1 / 3, "kl": 5 / 3}
    )
    alone, metrics = reward_backprop(torch.tensor([math.nan]))
    assert alone.tolist() == [0.0] and float(metrics["reward"]) == 0


# -- the gradient -----------------------------------------------------------------------------------------------------


class Linear:
    """A denoiser that says ``weight * latents + bias``, in float64, with the real schedules and the real walk."""

    def __init__(self, schedule: Ddim | Flow, weight: torch.Tensor) -> None:
        self.schedule, self.weight = schedule, weight
        self.device, self.gradient_checkpointing, self.shard = torch.device("cpu"), False, False
        self.sampler = SimpleNamespace(steps=STEPS)
        self.family = SimpleNamespace(decode=lambda latents: latents.tanh())
        self.noise = torch.randn((2, STEPS + 1, 1, 2, 2), generator=torch.Generator().manual_seed(1)).double()

    def _noise(self, seeds: Sequence[int], count: int) -> torch.Tensor:
        return self.noise

    def _encode(self, prompts: Sequence[Prompt]) -> float:
        return 0.3

    def _output(self, latents: torch.Tensor, steps: torch.Tensor, text: float) -> torch.Tensor:
        return self.weight[steps][:, None, None, None] * latents + text


def schedule(kind: str, eta: float) -> Ddim | Flow:
    device, sampler = torch.device("cpu"), SamplerConfig(steps=STEPS, eta=eta)
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(STEPS)
        return Flow(scheduler, sampler, device)
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    return Ddim(scheduler, kind, sampler, device)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_gradient_is_that_of_finite_differences(kind: str, jump: bool, eta: float) -> None:
    """``gradcheck`` compares with central differences in float64, for every number of steps that is differentiated.

    Each step has a weight of its own, so what is before ``start``, or after a jump, must have none.
    """
    recorded = torch.randn((2, STEPS + 1, 1, 2, 2), generator=torch.Generator().manual_seed(2)).double()
    blank = torch.zeros(2, STEPS)
    rollout = Rollout((Sample(PROMPTS[0]), Sample(PROMPTS[1])), blank, blank.bool(), {"latents": recorded})
    weight = torch.linspace(0.2, 0.8, STEPS, dtype=torch.float64, requires_grad=True)
    for start in range(STEPS):

        def images(weight: torch.Tensor, start: int = start) -> torch.Tensor:
            policy = Linear(schedule(kind, eta), weight)
            return backprop.redraw(policy, rollout, start, jump=jump, drift=False).images  # type: ignore[arg-type]

        assert torch.autograd.gradcheck(images, (weight,), eps=1e-6, atol=1e-6)
        (found,) = torch.autograd.grad(images(weight).sum(), weight)
        own = [start] if jump else list(range(start, STEPS))
        assert (found != 0).nonzero()[:, 0].tolist() == own


class Exact(DiffusionPolicy):
    """The policy in float64, where finite differences are exact enough to compare with."""

    def _denoise(self, latents, timesteps, text):  # type: ignore[no-untyped-def]
        return self.family.denoise(latents, timesteps, text)


def exact(folder: Path, **options: object) -> Exact:
    """A tiny pipeline of the real classes, all of it in float64, its decoder without the clamp."""
    pipeline = build_pipeline(folder, "v_prediction")
    pipeline.vae.double(), pipeline.text_encoder.double(), pipeline.unet.double()
    family = StableDiffusion(pipeline)
    encode = family.encode_text
    family.encode_text = lambda texts: _double(encode(texts))  # type: ignore[method-assign]
    family.decode = lambda z: pipeline.vae.decode(z, return_dict=False)[0] / 2 + 0.5  # type: ignore[method-assign]
    policy = Exact(family, **options)  # type: ignore[arg-type]
    for parameter in policy.trainable().values():
        parameter.data = parameter.data.double()
    return policy


def _double(text):  # type: ignore[no-untyped-def]
    text.tokens.data = text.tokens.double()
    return text


@pytest.mark.parametrize(("steps", "guidance"), [(1, 3.0), (3, 1.0)])
def test_the_real_classes_have_the_gradient_of_finite_differences(tmp_path: Path, steps: int, guidance: float) -> None:
    """Of a real UNet and decoder: along a random direction in the weights, central differences in float64 agree."""
    policy = exact(tmp_path, adapter=AdapterConfig(), sampler=SamplerConfig(steps=STEPS, guidance_scale=guidance))
    perturbed(policy)
    path = torch.randn((2, STEPS + 1, 4, 8, 8), generator=torch.Generator().manual_seed(3)).double()
    samples = (Sample(PROMPTS[0], seed=1), Sample(PROMPTS[1], seed=2))
    rollout = Rollout(samples, torch.zeros(2, STEPS), torch.ones(2, STEPS).bool(), {"latents": path})

    def value() -> torch.Tensor:
        return policy.redraw(rollout, STEPS - steps).images.square().mean()

    parameters = list(policy.trainable().values())
    generator = torch.Generator().manual_seed(4)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(torch.autograd.grad(value(), parameters), along, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, along, alpha=sign * 1e-5)
            ends.append(float(value()))
            torch._foreach_add_(parameters, along, alpha=-sign * 1e-5)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)
    assert abs(slope) > 1e-6


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_images_are_the_rollouts(make: MakePolicy, eta: float, guidance: float) -> None:
    """To one grey level, wherever the walk is taken up again, and with more images than the rollout had."""
    sampler = SamplerConfig(steps=STEPS, eta=eta, guidance_scale=guidance)
    policy = perturbed(make("v_prediction", adapter=AdapterConfig(), sampler=sampler))
    rollout = policy.rollout(PROMPTS[:3], [1, 2, 3])
    expected = np.stack([np.asarray(sample.image) for sample in rollout.samples]) / 255
    for start in range(STEPS):
        made = policy.redraw(rollout, start).images
        assert made.requires_grad and made.shape == (3, 3, 16, 16)
        np.testing.assert_allclose(made.detach().permute(0, 2, 3, 1).numpy(), expected, atol=1.01 / 255)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_images_are_the_rollouts_of_every_family(load: Load, name: str) -> None:
    """U-Nets and flows, with guidance of their own kind; the gradient reaches the weights, of which B starts at 0."""
    policy = load(name, {"steps": 3, "guidance_scale": 2.0}, adapter=AdapterConfig())
    rollout = policy.rollout(PROMPTS[:2], [1, 2])
    expected = np.stack([np.asarray(sample.image) for sample in rollout.samples]) / 255
    made = policy.redraw(rollout, 1).images
    np.testing.assert_allclose(made.detach().permute(0, 2, 3, 1).numpy(), expected, atol=1.01 / 255)
    found = zip(policy.trainable(), gradients(policy, made), strict=True)
    silent = {key for key, gradient in found if "lora_B" in key and not gradient.any()}
    # SD3's last block makes no text any more, so the text's queries there play no part.
    assert silent <= {"transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"}


def ending_at_an_image(folder: Path, **options: object) -> DiffusionPolicy:
    """A policy whose last step leads to the clean image: the signal after it is 1."""
    pipeline: StableDiffusionPipeline = build_pipeline(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    return DiffusionPolicy(StableDiffusion(pipeline), **options)  # type: ignore[arg-type]


def test_one_step_of_draft_is_the_jump_of_refl_from_the_last_step(tmp_path: Path) -> None:
    """Where the schedule ends at an image, the last step goes to what the denoiser believes the image to be."""
    policy = ending_at_an_image(tmp_path, adapter=AdapterConfig(), sampler=SamplerConfig(steps=STEPS))
    perturbed(policy)
    rollout = policy.rollout(PROMPTS, range(4))
    step, jump = (policy.redraw(rollout, STEPS - 1, jump=jump).images for jump in (False, True))
    torch.testing.assert_close(step, jump, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(policy, step), gradients(policy, jump), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    earlier = policy.redraw(rollout, 1, jump=True).images
    assert not torch.allclose(earlier, step, atol=1e-2)


def test_making_it_again_changes_no_value(tmp_path: Path) -> None:
    """With checkpointing the same images and gradients; the denoiser is called once more for each step it goes through,
    in the backward pass."""
    found, calls = [], []
    for checkpointing in (False, True):
        policy = DiffusionPolicy(
            StableDiffusion(build_pipeline(tmp_path)), adapter=AdapterConfig(),
            sampler=SamplerConfig(steps=STEPS, guidance_scale=2.0), gradient_checkpointing=checkpointing,
        )  # fmt: skip
        perturbed(policy)
        rollout = policy.rollout(PROMPTS, range(4))
        counted, denoise = [0], policy.family.denoise

        def counting(*given, counted=counted, denoise=denoise):  # type: ignore[no-untyped-def]
            counted[0] += 1
            return denoise(*given)

        policy.family.denoise = counting  # type: ignore[method-assign]
        redrawn = policy.redraw(rollout, 1, drift=True)
        assert redrawn.drift is not None
        found.append([redrawn.images, redrawn.drift, *gradients(policy, redrawn.images + redrawn.drift.mean())])
        calls.append(counted[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert calls == [6, 9]  # three steps, each by the policy and by its reference; three of the policy's again


def test_drift_is_how_far_the_output_moved_from_the_references(make: MakePolicy) -> None:
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=STEPS, guidance_scale=3.0))
    rollout = policy.rollout(PROMPTS[:2], [1, 2])
    start = policy.redraw(rollout, 2, drift=True).drift
    assert start is not None and not start.any()
    perturbed(policy)
    rollout = policy.rollout(PROMPTS[:2], [1, 2])
    drift = policy.redraw(rollout, 2, drift=True).drift
    text, expected = policy._encode(PROMPTS[:2]), []
    for step in (2, 3):
        latents, steps = rollout.state["latents"][:, step], torch.full((2,), step)
        ours = policy._output(latents, steps, text)
        with policy.reference():
            theirs = policy._output(latents, steps, text)
        expected.append(((ours - theirs) ** 2).mean((1, 2, 3)))
    assert drift is not None and drift.requires_grad
    torch.testing.assert_close(drift, (expected[0] + expected[1]) / 2, rtol=1e-4, atol=1e-8)


# -- the objectives ---------------------------------------------------------------------------------------------------


def lesson(objective: str, steps: int = 10, most: int | None = None) -> Backprop:
    blank = torch.zeros(64, steps)
    rollout = Rollout(tuple(Sample(p) for p in PROMPTS * 16), blank, blank.bool(), {})
    config = ObjectiveConfig(name=objective, backprop_steps=most)  # type: ignore[arg-type]
    return Backprop(WalkPolicy(), config, 0, 0, rollout, form_of(Bright()))  # type: ignore[arg-type]


def starts(found: Backprop) -> list[int]:
    """Of each of the updates of two passes over 64 samples, two at a time; an update has one start."""
    every = []
    for inner in (0, 1):
        for first in range(0, 64, 2):
            rows = found.rows(torch.tensor([first, first + 1]), inner)
            assert rows.steps is not None and len(set(rows.steps[:, 0].tolist())) == 1 and rows.count == 2
            every.append(int(rows.steps[0, 0]))
    return every


def test_where_the_gradient_begins() -> None:
    """draft at S - K always; the others uniformly among the last K. Of 64 draws from 4 numbers each comes 16 times,
    with a standard deviation of 3.5: within 4 to 28 by far; of 10 numbers all but surely each comes (64 draws)."""
    assert set(starts(lesson("draft"))) == {9}
    assert set(starts(lesson("draft", most=4))) == {6}
    for objective in ("align-prop", "refl"):
        found = starts(lesson(objective, most=4))
        assert {start: 4 <= found.count(start) <= 28 for start in found} == dict.fromkeys(range(6, 10), True)
        assert found == starts(lesson(objective, most=4))
    assert set(starts(lesson("align-prop"))) == set(range(10))
    assert set(starts(lesson("refl"))) == {7, 8, 9}


def trainer(make: MakePolicy, objective: str = "draft", reward: object = None, **changes: object) -> Trainer:
    own = {name: value for name, value in changes.items() if name in FIELDS[objective]}
    settings = {"epochs": 4, "samples_per_epoch": 8, "batch_size": 8, "learning_rate": 2e-2, "weight_decay": 0.0}
    rest = {name: value for name, value in changes.items() if name not in own and name != "eta"}
    policy = make(
        adapter=AdapterConfig(targets="all"),
        sampler=SamplerConfig(steps=STEPS, eta=changes.get("eta", 1.0)),  # type: ignore[arg-type]
    )  # fmt: skip
    # A random decoder makes grey of everything; this one shows the latents.
    policy.family.decode = lambda latents: latents[:, :3].sigmoid()  # type: ignore[method-assign]
    return Trainer(
        policy,
        Rollouts(reward or Bright(), PROMPTS),  # type: ignore[arg-type]
        settings=TrainerConfig(**(settings | rest)),  # type: ignore[arg-type]
        objective=ObjectiveConfig(name=objective, **own),  # type: ignore[arg-type]
    )


def brightness(policy: DiffusionPolicy) -> float:
    return float(Bright()(policy.rollout(PROMPTS * 4, range(100, 116)).samples).total.mean())


@pytest.mark.parametrize("objective", BACKPROP)
@pytest.mark.parametrize("reward", [Bright(), Dark()])
def test_each_of_them_makes_images_bright_or_dark(make: MakePolicy, objective: str, reward: Bright) -> None:
    """The identity task: the mean brightness, 0.5 at first, moves by 0.04 at least the way that the reward wants, on
    seeds that were not trained on. Four updates move it by 0.06."""
    made = trainer(make, objective, reward)
    policy = made.policy
    assert isinstance(policy, DiffusionPolicy)
    before = brightness(policy)
    made.train()
    gain = brightness(policy) - before
    assert (gain if reward.higher_is_better else -gain) > 0.04, gain


def test_without_noise_it_learns_as_well(make: MakePolicy) -> None:
    made = trainer(make, eta=0.0)
    assert isinstance(made.policy, DiffusionPolicy)
    before = brightness(made.policy)
    made.train()
    assert brightness(made.policy) - before > 0.04


def weights(made: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.policy.trainable().values()])


def test_micro_batches_change_nothing(make: MakePolicy) -> None:
    one, other = (trainer(make, "align-prop", micro_batch_size=size, epochs=1) for size in (8, 3))
    one.train(), other.train()
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)


def test_an_epoch_of_one_image_teaches_something(make: MakePolicy) -> None:
    """One score has no spread, and nothing to be compared with; the gradient needs neither."""
    made = trainer(make, samples_per_epoch=1, batch_size=1, epochs=2)
    made.train()
    assert made.updates == 2


def test_the_term_of_drift_holds_it_back(make: MakePolicy) -> None:
    """How far the output is from the reference's at the end, on one rollout: with the term it is under a half."""
    drifts = []
    for coefficient in (0.0, 30.0):
        made = trainer(make, kl_coefficient=coefficient, epochs=6)
        made.train()
        assert isinstance(made.policy, DiffusionPolicy)
        drift = made.policy.redraw(made.policy.rollout(PROMPTS, range(4)), STEPS - 1, drift=True).drift
        assert drift is not None
        drifts.append(float(drift.detach().mean()))
    assert drifts[1] < 0.5 * drifts[0]


@pytest.mark.parametrize("objective", ["align-prop", "refl"])
def test_a_resumed_run_is_the_same_to_the_bit(make: MakePolicy, objective: str) -> None:
    whole, begun, resumed = (trainer(make, objective, batch_size=4) for _ in range(3))
    whole.train()
    begun.train(2)
    state = begun.state_dict()
    resumed.load_state_dict(state)
    resumed.train()
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(begun), weights(whole))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_calls_of_an_update_are_those_of_the_dry_run(tmp_path: Path, checkpointing: bool) -> None:
    """8 images by 2 steps by 2 branches of guidance: by the policy, by its reference, and again under checkpointing."""
    sampler = SamplerConfig(steps=STEPS, guidance_scale=2.0)
    policy = DiffusionPolicy(
        StableDiffusion(build_pipeline(tmp_path)), adapter=AdapterConfig(), sampler=sampler,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    config = parse({
        **RUN, "objective": {"name": "draft", "backprop_steps": 2, "kl_coefficient": 0.1},
        "sampler": sampler.model_dump(),
        "trainer": {"samples_per_epoch": 8, "batch_size": 8, "gradient_checkpointing": checkpointing},
    })  # fmt: skip
    made = Trainer(policy, Rollouts(Bright(), PROMPTS), settings=config.trainer, objective=config.objective)
    made.train(1)  # the checks of the first update ask as well
    scored = made.gather().experience
    before = policy.denoiser_calls
    made.update(made.lesson(scored))
    assert policy.denoiser_calls - before == learning_calls(config) == (96 if checkpointing else 64)


def test_every_objective_is_listed() -> None:
    assert OBJECTIVES.keys() == FIELDS.keys()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": ["compressibility"]},
            "objective draft follows the reward's own gradient, and compressibility has none; clip, preference,",
        ),
        (
            {"rewards": ["clip", "emoji-checker", "compressibility"]},
            "emoji-checker and compressibility have none; clip",
        ),
        ({"objective": {"name": "draft", "backprop_steps": 11}}, "backprop_steps is 11, but sampling takes 10 steps"),
        ({"objective": {"name": "refl", "clip_range": 0.1}}, "refl has no clip_range; it has backprop_steps"),
        ({"experience": {"source": "best-of-n"}}, "objective draft learns from rollouts, not from best-of-n"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.check(parse({**RUN, **change}))


def test_a_reward_that_does_not_count_needs_no_gradient() -> None:
    build.check(parse({**RUN, "rewards": ["clip", {"reward": "compressibility", "weight": 0}]}))


def test_the_library_refuses_before_any_work_too(make: MakePolicy) -> None:
    with pytest.raises(ConfigError, match="reward compressibility has no gradient"):
        trainer(make, reward=Compressibility())
    both = Combined([(Bright(), 1.0, None), (Compressibility(), 1.0, None)])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="reward combined has no gradient because of compressibility"):
        trainer(make, reward=both)
    with pytest.raises(ConfigError, match="draft needs differentiable_sampling, which walk does not offer"):
        Trainer(WalkPolicy(), Rollouts(TextBright(), PROMPTS), objective=ObjectiveConfig(name="draft"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="backprop_steps is 5, but sampling takes 4 steps"):
        trainer(make, backprop_steps=5).train()


class TextBright(Bright):
    modality = "text"


class Wrong(Bright):
    """A reward whose differentiable form is another function of the images."""

    def __init__(self, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.form = form

    def differentiable(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return self.form(images)


def test_a_form_that_is_not_the_reward_is_refused(make: MakePolicy) -> None:
    with pytest.raises(RefusedError, match=r"is up to 0\.1 off its scores"):
        trainer(make, reward=Wrong(lambda x: x.mean((1, 2, 3)) + 0.1)).train()
    with pytest.raises(InputError, match=r"returned scores of shape \(8, 3\) for 8 images"):
        trainer(make, reward=Wrong(lambda x: x.mean((2, 3)))).train()
    with pytest.raises(InputError, match="without a gradient to the images"):
        trainer(make, reward=Wrong(lambda x: x.detach().mean((1, 2, 3)))).train()


def test_the_first_scores_are_those_of_the_recorded_images(make: MakePolicy) -> None:
    """Before any update the score with gradient is the reward's own of the 8-bit image, to half a grey level."""
    made = trainer(make)
    scored = made.gather().experience
    assert isinstance(scored, Scored)
    found = made.lesson(scored)
    again = found.inputs(found.rows(found.items(0), 0))["reward"].detach()
    torch.testing.assert_close(again, scored.scores.total, rtol=0, atol=0.51 / 255)
    flat = Image.new("RGB", (16, 16), (51, 51, 51))
    assert float(Bright()([Sample(PROMPTS[0], flat)]).total) == pytest.approx(0.2)
