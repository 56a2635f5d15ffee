"""A window of steps with noise that moves on as training goes (MixGRPO)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apps.dry_run import learning_calls
from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError
from diffalign.experience import Rollouts
from diffalign.runs import Run
from diffalign.sampling import WindowConfig
from diffalign.trainer import Trainer
from diffalign.types import Prompt
from pipelines.diffusion import DiffusionPolicy
from tests.bright import Bright
from tests.test_families import Build, build  # noqa: F401 - a fixture
from tests.test_trainer import CONFIG

PROMPTS = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]
Make = Callable[..., DiffusionPolicy]


def noisy(policy: DiffusionPolicy, epoch: int) -> list[int]:
    """The steps that have noise in that epoch."""
    with policy.at_epoch(epoch):
        return (policy.schedule.std > 0).nonzero()[:, 0].tolist()


def test_the_window_of_the_paper() -> None:
    """25 steps, of which the last has no noise; windows of 4, moved by 1 every 25 epochs: at 20 after 500, and there
    it stays. By hand: min(floor(epoch / 25), 24 - 4)."""
    window = WindowConfig(steps=4, every=25)
    assert [window.at(epoch, 24).start for epoch in (0, 24, 25, 49, 50, 499, 500, 524, 525, 9999)] == [
        0, 0, 1, 1, 2, 19, 20, 20, 20, 20
    ]  # fmt: skip
    assert {window.at(epoch, 24).steps for epoch in range(600)} == {4}


def test_start_and_stride() -> None:
    """From 1, by 2 every 3 epochs, among 8 steps: 1, 3, 5, and 5 is the last place of a window of 3."""
    window = WindowConfig(start=1, steps=3, every=3, stride=2)
    assert [window.at(epoch, 8).start for epoch in range(13)] == [1, 1, 1, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5]
    assert [WindowConfig(start=2, steps=2).at(epoch, 8).start for epoch in (0, 100)] == [2, 2]


def test_a_stride_without_an_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the epochs after which it does, is missing: set window\.every"):
        WindowConfig(stride=2)
    data = CONFIG | {"sampler": {"steps": 5, "window": {"steps": 2, "evry": 3}}}
    with pytest.raises(ConfigError, match=r"unknown field sampler\.window\.evry; did you mean sampler\.window\.every"):
        parse(data)


def test_a_file_says_of_a_window_what_it_was_given() -> None:
    """Specifications from before windows moved keep their hash."""
    for given in ({"start": 1, "steps": 2}, {"start": 0, "steps": 2, "every": 3, "stride": 2}):
        assert SamplerConfig.model_validate({"window": given}).model_dump()["window"] == given


@pytest.mark.parametrize(("family", "last"), [("sd", [3, 4]), ("sdxl", [2, 3]), ("sd3", [2, 3]), ("z-image", [2, 3])])
def test_it_ends_on_the_last_steps_that_have_noise(build: Build, family: str, last: list[int]) -> None:  # noqa: F811
    """Of 5 steps a flow's last has none; nor has SDXL's, whose schedule here ends at an image."""
    sampler = SamplerConfig(steps=5, size=16, window=WindowConfig(steps=2, every=1))
    policy = build(family, sampler)
    assert [noisy(policy, epoch) for epoch in (0, 1)] == [[0, 1], [1, 2]]
    assert noisy(policy, 3) == noisy(policy, 50) == last
    assert (policy.schedule.std > 0).nonzero()[:, 0].tolist() == [0, 1]  # outside of training


def test_a_window_that_stays_is_left_alone(make: Make) -> None:
    policy = make(sampler=SamplerConfig(steps=4, window=WindowConfig(start=1, steps=2)))
    own = policy.schedule
    with policy.at_epoch(7):
        assert policy.schedule is own


def trainer(make: Make, run: Run | None = None, epochs: int = 4) -> Trainer:
    """The checks before the first update include that the ratio is exactly 1."""
    sampler = SamplerConfig(steps=5, batch_size=4, window=WindowConfig(steps=2, every=1))
    return Trainer(
        make(adapter=AdapterConfig(), sampler=sampler), Rollouts(Bright(), PROMPTS), run=run,
        settings=TrainerConfig(epochs=epochs, samples_per_epoch=6, batch_size=6, learning_rate=1e-2),
        objective=ObjectiveConfig(name="ppo-clip"), credit=CreditConfig(rule="batch"),
    )  # fmt: skip


def test_training_samples_and_learns_inside_the_window_of_its_epoch(make: Make) -> None:
    job, asked = trainer(make), []
    original = job.policy.step_log_probs

    def spy(rollout: object, steps: torch.Tensor, **options: bool) -> object:
        if torch.is_grad_enabled():
            asked.append(
                (job.epoch, rollout.mask.any(0).nonzero()[:, 0].tolist(), sorted(set(steps.flatten().tolist())))
            )  # type: ignore[attr-defined]
        return original(rollout, steps, **options)  # type: ignore[arg-type]

    job.policy.step_log_probs = spy  # type: ignore[method-assign,assignment]
    ratios = []
    job.on_epoch = lambda trainer, epoch, metrics: ratios.append(metrics["policy/ratio"])
    job.train()
    assert asked == [(epoch, [epoch, epoch + 1], [epoch, epoch + 1]) for epoch in range(4)]
    assert ratios == pytest.approx([1.0] * 4, abs=1e-6)  # one update an epoch, so each is on policy


def test_a_resumed_run_goes_on_with_the_window_of_its_epoch(make: Make, tmp_path: Path) -> None:
    """2 epochs, new objects, 2 more: the same bits as 4 epochs."""
    straight = trainer(make)
    straight.train()
    run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer(make, run, epochs=2).train()
    resumed = trainer(make, run)
    assert resumed.resume() and resumed.epoch == 2
    resumed.train()
    assert all(torch.equal(parameter, resumed.parameters[name]) for name, parameter in straight.parameters.items())


def test_the_calls_of_an_update_are_those_of_the_dry_run(build: Build) -> None:  # noqa: F811
    """8 images by the 2 steps of the window, of 5, by the 2 branches of guidance."""
    sampler = SamplerConfig(steps=5, size=16, guidance_scale=2.0, window=WindowConfig(steps=2))
    config = parse(CONFIG | {"sampler": sampler.model_dump(), "trainer": {"samples_per_epoch": 8, "batch_size": 8}})
    policy = build("sd", sampler, adapter=AdapterConfig())
    made = Trainer(
        policy, Rollouts(Bright(), PROMPTS), settings=config.trainer, objective=config.objective, credit=config.credit
    )
    made.train(1)  # the checks of the first update ask as well
    scored = made.gather().experience
    before = policy.denoiser_calls
    made.update(made.lesson(scored))
    assert policy.denoiser_calls - before == learning_calls(config) == 8 * 2 * 2
