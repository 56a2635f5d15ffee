"""Forward-process policy gradients in the loop: what is asked, what is left out, what is refused, and resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError, RefusedError
from diffalign.experience import Rollouts
from diffalign.forward_lessons import Forward
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Draw, Prompt, Sample
from pipelines.diffusion import DiffusionPolicy
from tests.test_trainer import CONFIG, PROMPTS, Brightness, Target, WalkPolicy

Make = Callable[..., DiffusionPolicy]
OBJECTIVES = ["elbo-reinforce", "elbo-ppo-clip", "nft"]
PICTURES = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]


def walk(objective: str, policy: WalkPolicy | None = None, **own: Any) -> Trainer:
    return Trainer(
        policy or WalkPolicy(), Rollouts(Target(), PROMPTS),
        settings=TrainerConfig(
            samples_per_epoch=64, samples_per_prompt=4, batch_size=32, learning_rate=0.05, weight_decay=0.0
        ),
        objective=ObjectiveConfig(name=objective, **{"draws": 4, **own}), credit=CreditConfig(rule="group"),
    )  # type: ignore[arg-type]  # fmt: skip


def job(
    make: Make, objective: str, run: Run | None = None, sampler: SamplerConfig | None = None, **own: Any
) -> Trainer:
    settings = {"epochs": 4, "samples_per_epoch": 12, "batch_size": 6, "learning_rate": 1e-2, "samples_per_prompt": 2}
    trainer = {name: own.pop(name) for name in list(own) if name in TrainerConfig.model_fields}
    return Trainer(
        make(adapter=AdapterConfig(), sampler=sampler or SamplerConfig(steps=3, eta=0.0)),
        Rollouts(Brightness(), PICTURES), run=run,
        settings=TrainerConfig(**(settings | trainer)),
        objective=ObjectiveConfig(name=objective, **{"draws": 4, **own}), credit=CreditConfig(rule="batch"),
    )  # type: ignore[arg-type]  # fmt: skip


def lesson(trainer: Trainer) -> Forward:
    found = trainer.lesson(trainer.gather().experience)
    assert isinstance(found, Forward)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_diffusion_model_learns_brightness_from_samples_without_noise(make: Make, objective: str) -> None:
    """The identity task of the image path: a brighter picture. Sampled by DDIM without noise, which has no likelihood;
    mean of 32 samples before and after, in units of its standard error."""
    trainer = Trainer(
        make("v_prediction", full=True, sampler=SamplerConfig(steps=3, eta=0.0)),
        Rollouts(Brightness(), PICTURES[:2]),
        settings=TrainerConfig(samples_per_epoch=32, batch_size=16, learning_rate=1e-2, micro_batch_size=256),
        objective=ObjectiveConfig(name=objective, draws=4),  # type: ignore[arg-type]
        credit=CreditConfig(rule="batch"),
    )
    before = trainer.gather().experience.scores.total  # type: ignore[union-attr]
    trainer.train(5)
    after = trainer.gather().experience.scores.total  # type: ignore[union-attr]
    assert (after.mean() - before.mean()) / (before.var() / 32 + after.var() / 32).sqrt() > 5


def test_the_first_update_is_on_policy(make: Make) -> None:
    """Ratio exactly 1, and the loss minus the mean advantage; of the second, ratio is not 1."""
    trainer = job(make, "elbo-ppo-clip", batch_size=12)
    first = lesson(trainer)
    metrics = trainer.update(first)
    assert metrics["policy/ratio"] == 1 and metrics["policy/approx_kl"] == 0 and metrics["policy/clip_fraction"] == 0
    assert metrics["policy/loss"] == pytest.approx(-float(first.advantages.mean()), abs=1e-6)
    assert trainer.update(first)["policy/ratio"] != 1
    trainer.teacher.end_epoch(0)
    assert trainer.update(lesson(trainer))["policy/ratio"] == 1


def test_old_answers_are_those_of_the_weights_that_sampled(make: Make) -> None:
    """Asked after an update, the old weights answer bit for bit what the policy answered before it."""
    trainer = job(make, "elbo-ppo-clip")
    found = lesson(trainer)
    rows = found.rows(torch.arange(6), 0)
    before = found.inputs(rows)["log_likelihood"].detach()
    trainer.update(found)
    after = found.inputs(rows)
    assert torch.equal(after["old_log_likelihood"], before) and not torch.equal(after["log_likelihood"], before)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_samples_with_nothing_to_teach_are_left_out_exactly(objective: str) -> None:
    """Two of eight samples have an advantage: their rows alone go through the model, and the step is what asking about
    all of them would have made it. A term that holds to the reference needs them all."""
    trainer = walk(objective)
    found = lesson(trainer)
    found.advantages = torch.zeros(64)
    found.advantages[:2] = torch.tensor([1.0, -2.0])
    rows = found.rows(torch.arange(8), 0)
    assert set(rows.items.tolist()) == {0, 1} and len(rows) == 2 * 4 and rows.count == 8 * 4
    every = super(Forward, found).rows(torch.arange(8), 0)
    sums = []
    for asked in (rows, every):
        loss, _ = found.loss(found.inputs(asked))
        (gradient,) = torch.autograd.grad(loss.sum() / asked.count, trainer.policy.mean)  # type: ignore[attr-defined]
        sums.append(gradient)
    torch.testing.assert_close(sums[0], sums[1])
    held = replace(found, objective=ObjectiveConfig(name=objective, kl_coefficient=0.1, draws=4))  # type: ignore[arg-type]
    assert len(held.rows(torch.arange(8), 0)) == 32


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_change_nothing_but_memory(objective: str, size: int) -> None:
    results = []
    for micro_batch_size in (256, size):
        trainer = walk(objective, kl_coefficient=0.1)
        trainer.settings = trainer.settings.model_copy(update={"micro_batch_size": micro_batch_size})
        trainer.train(2)
        results.append(trainer.policy.mean.detach())  # type: ignore[attr-defined]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_distance_to_the_reference_holds_the_policy_back(objective: str) -> None:
    free, held = walk(objective), walk(objective, kl_coefficient=30.0)
    free.train(15)
    held.train(15)
    assert held.policy.mean.abs().max() < 0.5 * free.policy.mean.abs().max()  # type: ignore[attr-defined]


def test_the_samples_of_a_prompt_share_their_draws() -> None:
    """Of 2 prompts at 4 draws: 8 different draws, whatever batch a sample is in, one in each quarter of the times; in
    the next pass others."""
    found = lesson(walk("nft"))
    drawn: dict[tuple[str, int], set[tuple[float, int]]] = {}
    for items in torch.arange(64).split(24):
        rows = found.rows(items, 0)
        assert rows.time is not None and len(rows) == 4 * len(items)
        for i, item in enumerate(rows.items.tolist()):
            quarter = int(4 * rows.time[i])
            drawn.setdefault((found.samples[item].prompt.key, quarter), set()).add((float(rows.time[i]), rows.seeds[i]))
    assert len(drawn) == 8 and all(len(own) == 1 for own in drawn.values())
    assert len({seed for own in drawn.values() for _, seed in own}) == 8
    later = found.rows(torch.arange(4), 1)
    assert not set(later.seeds) & {seed for own in drawn.values() for _, seed in own}


class Grainy(WalkPolicy):
    """What its noise draws adds to every residual alike."""

    def denoising_residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        noise = [torch.randn((), generator=torch.Generator().manual_seed(seed)) for seed in draw.seeds]
        return super().denoising_residual(samples, draw) + torch.stack(noise)[:, None]


def test_what_a_draw_does_to_all_samples_of_a_prompt_cancels() -> None:
    """E = -(r + n)^2 with noise n: its gradient has -2 n dr/dw, which is the same for all samples of a prompt, whose
    advantages sum to 0. So with shared draws every pass has the gradient without noise, and with own draws it has not.
    """
    trainer = walk("elbo-reinforce", Grainy(), draws=1)
    found = lesson(trainer)
    quiet = replace(found, policy=WalkPolicy())
    for rows_of, same in ((found.rows, True), (super(Forward, found).rows, False)):
        for inner in range(3):
            rows, sums = rows_of(torch.arange(64), inner), []
            for one in (found, quiet):
                loss, _ = one.loss(one.inputs(rows))
                sums += torch.autograd.grad(loss.sum(), one.policy.mean)  # type: ignore[attr-defined]
            assert torch.allclose(sums[0], sums[1], rtol=1e-3, atol=1e-3) is same


def test_the_old_policy_of_nft_samples_and_follows_slowly(make: Make) -> None:
    """Rate 0.5: after epoch 0 it is the policy itself; after epoch 1 half of what it was and half of the policy. The
    samples are those of the old weights, and the policy keeps its own."""
    trainer = job(make, "nft", old_decay_rate=0.5, old_decay_limit=0.9)
    trainer.train(1)
    assert trainer.teacher.old is not None and trainer.teacher.old.matches()
    first = {name: weights.clone() for name, weights in trainer.teacher.old.weights.items()}
    trainer.train(2)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(trainer.teacher.old.weights[name], (first[name] + parameter.detach()) / 2)
    asked, seeds = PICTURES, [1, 2, 3]
    with trainer.teacher.old():
        expected = trainer.policy.rollout(asked, seeds)
    own = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    sampled = trainer._sampled(asked, seeds)
    assert [s.image.tobytes() for s in sampled.samples] == [s.image.tobytes() for s in expected.samples]  # type: ignore
    assert all(torch.equal(own[name], parameter) for name, parameter in trainer.parameters.items())


def test_no_trajectory_is_kept(make: Make) -> None:
    assert not job(make, "nft").sample(PICTURES).state
    assert job(make, "ppo-clip", sampler=SamplerConfig(steps=3), draws=None).sample(PICTURES).state


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_equals_uninterrupted_bit_for_bit(make: Make, objective: str, tmp_path: Path) -> None:
    """Old policy, average of the weights and count of denoiser calls included."""
    own = {"old_decay_rate": 0.3, "old_decay_limit": 0.9} if objective == "nft" else {}
    straight = job(make, objective, ema_decay=0.9, **own)
    straight.train()
    run = Run.create(tmp_path / "run", parse(CONFIG))
    job(make, objective, run, ema_decay=0.9, **own).train(2)
    resumed = job(make, objective, run, ema_decay=0.9, **own)
    assert resumed.resume() and resumed.epoch == 2
    resumed.train()
    assert straight.average is not None and resumed.average is not None
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        assert torch.equal(straight.average.weights[name], resumed.average.weights[name]), name
        if straight.teacher.old is not None:
            assert torch.equal(straight.teacher.old.weights[name], resumed.teacher.old.weights[name])  # type: ignore
    assert straight.denoiser_calls == resumed.denoiser_calls
    assert run.metrics()[-1]["count/denoiser_calls"] == straight.denoiser_calls


def test_denoiser_calls_by_hand(make: Make) -> None:
    """12 samples of 3 steps are 36, and at 4 draws in two updates 48; the second update asks the old weights, too: 24.
    The first epoch's checks ask about 8 samples: the old weights and the policy, then the reference three times and the
    policy once: 48. What comes after the updates, and is no part of training, does not count.
    """
    trainer = job(make, "elbo-ppo-clip")
    trainer.train(1)
    assert trainer.denoiser_calls == 36 + 48 + 24 + 48
    trainer.policy.rollout(PICTURES, [1, 2, 3])
    trainer.train(2)
    assert trainer.denoiser_calls == 2 * (36 + 48 + 24) + 48


def test_guidance_doubles_sampling_and_not_training(make: Make) -> None:
    trainer = job(make, "elbo-reinforce", sampler=SamplerConfig(steps=3, eta=0.0, guidance_scale=2.0))
    trainer.train(1)
    first = trainer.denoiser_calls
    trainer.train(2)
    assert trainer.denoiser_calls - first == 2 * 36 + 48


class Fickle(WalkPolicy):
    """Answers otherwise each time it is asked."""

    asked = 0

    def denoising_residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        self.asked += 1
        return super().denoising_residual(samples, draw) * (1 + 1e-3 * self.asked)

    def log_likelihood(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        return -(self.denoising_residual(samples, draw)[:, 0] ** 2)


@pytest.mark.parametrize("objective", ["elbo-ppo-clip", "nft"])
def test_a_policy_that_answers_otherwise_with_the_same_weights_is_refused(objective: str) -> None:
    with pytest.raises(RefusedError, match="asked twice with the same weights"):
        walk(objective, Fickle()).train(1)


class Exact(WalkPolicy):
    """Has a likelihood, and nothing that is denoised."""

    capabilities = WalkPolicy.capabilities - {"denoising_residual"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_cannot_denoise_is_refused(objective: str) -> None:
    with pytest.raises(ConfigError, match="needs denoising_residual, which walk does not offer"):
        walk(objective, Exact())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_texts_are_refused_with_what_to_take_instead(objective: str) -> None:
    text = {"model": "embedded:findings-lm", "modality": "text", "rewards": ["x"], "prompts": CONFIG["prompts"]}
    with pytest.raises(ConfigError, match=f"{objective} asks how well noised images are denoised.*ppo-clip"):
        parse({**text, "objective": {"name": objective}})


def test_sampling_without_noise_is_for_objectives_that_need_no_likelihood_of_steps() -> None:
    config = {**CONFIG, "sampler": {"eta": 0}}
    for objective in OBJECTIVES:
        assert parse({**config, "objective": {"name": objective}}).sampler.eta == 0
    with pytest.raises(ConfigError, match=r"sampler\.eta is 0"):
        parse({**config, "objective": {"name": "ppo-clip"}})


# -- the average of the weights ---------------------------------------------------------------------------------------


def test_the_average_follows_the_weights_by_its_decay() -> None:
    """Decay 0.5 from the start on, since 1 / 10, 2 / 11 and so on reach it at the ninth update only; so the second
    average is w1 / 11 * 2 + w2 * 9 / 11 with w1 = 0 / 10 + 9 / 10 of the first weights."""
    trainer = walk("elbo-reinforce")
    trainer.settings = trainer.settings.model_copy(update={"ema_decay": 0.5})
    trainer = Trainer(trainer.policy, trainer.source, settings=trainer.settings, objective=trainer.objective)
    assert trainer.average is not None
    expected, seen = trainer.average.weights["mean"].clone(), []
    step = trainer.optimiser.step
    trainer.optimiser.step = lambda: (step(), seen.append(trainer.parameters["mean"].detach().clone()))  # type: ignore
    trainer.train(8)
    for number, weights in enumerate(seen, 1):
        decay = min(0.5, number / (number + 9))
        expected = decay * expected + (1 - decay) * weights
    assert len(seen) == 16
    torch.testing.assert_close(trainer.average.weights["mean"], expected)


def test_the_average_is_what_is_measured_and_kept() -> None:
    trainer = walk("elbo-reinforce")
    settings = trainer.settings.model_copy(update={"ema_decay": 0.9})
    trainer = Trainer(trainer.policy, trainer.source, settings=settings, objective=trainer.objective)
    trainer.train(3)
    assert trainer.average is not None
    average, own = trainer.average.weights["mean"].clone(), trainer.parameters["mean"].detach().clone()
    with trainer.averaged():
        assert torch.equal(trainer.parameters["mean"], average)
    assert torch.equal(trainer.parameters["mean"], own) and not torch.equal(own, average)
    trainer.adopt_average()
    assert torch.equal(trainer.parameters["mean"], average)


@contextmanager
def unchanged(trainer: Trainer):  # type: ignore[no-untyped-def]
    before = trainer.parameters["mean"].detach().clone()
    yield
    assert torch.equal(before, trainer.parameters["mean"])


def test_without_an_average_the_policy_is_measured_as_it_is() -> None:
    trainer = walk("elbo-reinforce")
    with unchanged(trainer), trainer.averaged():
        trainer.adopt_average()
