"""The training loop: identity tasks, equivalences, refusals, resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError
from diffalign.experience import Rollouts, Scored
from diffalign.lessons import Steps
from diffalign.runs import Run
from diffalign.trainer import Interrupted, Trainer
from diffalign.types import Draw, Prompt, Rollout, Sample, Scores, StepLikelihood
from pipelines.diffusion import DiffusionPolicy

PROMPTS = [Prompt("a"), Prompt("b")]


class WalkPolicy:
    """A scripted generator with a known optimum: S Gaussian steps of learned mean per prompt; the text is their sum.

    It speaks the same protocol as a diffusion model, and a run of it takes milliseconds.
    """

    name, modality, device, batch_size = "walk", "text", torch.device("cpu"), 8
    capabilities = frozenset({"step_log_probs", "step_kl", "log_likelihood", "denoising_residual", "reference"})
    steps, std = 3, 0.5
    steps_at_once: int | None = 1
    reduction: Literal["mean", "sum"] = "mean"

    def __init__(self) -> None:
        self.mean = nn.Parameter(torch.zeros(2, self.steps))
        self.start = torch.zeros(2, self.steps)
        self.off = False

    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        which = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        noise = torch.stack([torch.randn(self.steps, generator=torch.Generator().manual_seed(s)) for s in seeds])
        actions = (self._mean(which) + self.std * noise).detach()
        samples = tuple(
            Sample(p, text=f"{float(a.sum())}", seed=s) for p, a, s in zip(prompts, actions, seeds, strict=True)
        )
        state = {"which": which, "actions": actions}
        mask = torch.ones(len(prompts), self.steps, dtype=torch.bool)
        rollout = Rollout(samples, torch.zeros(len(prompts), self.steps), mask, state)
        every = torch.arange(self.steps).expand(len(prompts), -1)
        return Rollout(samples, self.step_log_probs(rollout, every).log_probs.detach(), mask, state)

    def _mean(self, which: Tensor) -> Tensor:
        return (self.start if self.off else self.mean)[which]

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        which = rollout.state["which"]
        mean = self._mean(which).gather(1, steps)
        action = rollout.state["actions"].gather(1, steps)
        log_probs = torch.distributions.Normal(mean, self.std).log_prob(action)
        return StepLikelihood(
            log_probs, (mean - self.start[which].gather(1, steps)) ** 2 / (2 * self.std**2) if kl else None
        )

    def denoising_residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """How far the text is from the mean of the walk's end, in deviations times sqrt 2: the density is exact."""
        which = torch.tensor([PROMPTS.index(sample.prompt) for sample in samples])
        ends = torch.tensor([float(sample.text or 0) for sample in samples])
        return ((ends - self._mean(which).sum(1)) / (2 * self.steps * self.std**2) ** 0.5)[:, None]

    def log_likelihood(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        return -(self.denoising_residual(samples, draw)[:, 0] ** 2)

    def clean_error(self, residual: Tensor, draw: Draw) -> Tensor:
        return residual

    @contextmanager
    def reference(self):  # type: ignore[no-untyped-def]
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return {"mean": self.mean}

    def save(self, run: Path) -> Path:
        return run


class Target:
    """Best where the walk of prompt a ends at 3 and that of prompt b at -3."""

    name, modality, unit, range, higher_is_better = "target", "text", "", (-100.0, 0.0), True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        aims = [3.0 if sample.prompt.text == "a" else -3.0 for sample in samples]
        return Scores(torch.tensor([-abs(float(s.text or 0) - aim) for s, aim in zip(samples, aims, strict=True)]))


class Constant(Target):
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.full((len(samples),), self.value))


class Brightness(Target):
    """Mean brightness of an image in [0, 1]."""

    modality = "image"

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.tensor([sum(s.image.convert("L").tobytes()) / 255 / 256 for s in samples]))  # type: ignore[union-attr]


def walk(objective: str = "ppo-clip", rule: str = "batch", kl_coefficient: float = 0.0, **settings: Any) -> Trainer:
    options = {
        "epochs": 40, "samples_per_epoch": 64, "samples_per_prompt": 4, "batch_size": 32, "learning_rate": 0.05,
        "weight_decay": 0.0,
    }  # fmt: skip
    return Trainer(
        WalkPolicy(),
        Rollouts(Target(), PROMPTS),
        settings=TrainerConfig(**(options | settings)),
        objective=ObjectiveConfig(
            name=objective,  # type: ignore[arg-type]
            clip_range=0.2 if objective == "ppo-clip" else None,
            kl_coefficient=kl_coefficient,
        ),
        credit=CreditConfig(rule=rule),  # type: ignore[arg-type]
    )


def gathered(trainer: Trainer) -> Scored:
    found = trainer.gather().experience
    assert isinstance(found, Scored)
    return found


@pytest.mark.parametrize("objective", ["ppo-clip", "reinforce"])
@pytest.mark.parametrize("rule", ["batch", "per-prompt", "group", "leave-one-out"])
def test_every_algorithm_solves_the_walk(objective: str, rule: str) -> None:
    """The sum of three steps has deviation 0.5 sqrt(3) = 0.87, so the best mean score is -0.87 * 0.8 = -0.69; untrained
    it is about -3. Seeded, so the threshold -1 is reached or not on every machine alike."""
    trainer = walk(objective, rule)
    assert gathered(trainer).scores.total.mean() < -2.5
    trainer.train()
    assert gathered(trainer).scores.total.mean() > -1.0


def test_a_diffusion_model_learns_brightness(make: Callable[..., DiffusionPolicy]) -> None:
    """The identity task of the image path: a brighter picture. Seconds; mean of 64 samples before and after."""
    policy = make("v_prediction", full=True, sampler=SamplerConfig(steps=4))
    trainer = Trainer(
        policy,
        Rollouts(Brightness(), [Prompt("a red ball"), Prompt("two blue cube")]),
        settings=TrainerConfig(
            epochs=12, samples_per_epoch=64, batch_size=64, learning_rate=3e-3, micro_batch_size=256
        ),
        objective=ObjectiveConfig(clip_range=1e-2),
        credit=CreditConfig(rule="batch"),
    )
    before = gathered(trainer).scores.total
    trainer.train()
    after = gathered(trainer).scores.total
    error = (before.var() / 64 + after.var() / 64).sqrt()
    assert (after.mean() - before.mean()) / error > 5


def test_kl_to_the_reference_holds_the_policy_back() -> None:
    free, held = walk(epochs=20), walk(epochs=20, kl_coefficient=10.0)
    free.train()
    held.train()
    assert held.policy.mean.abs().max() < 0.2 * free.policy.mean.abs().max()  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 7}, {"micro_batch_size": 96}])
def test_micro_batches_change_memory_and_nothing_else(change: dict[str, int]) -> None:
    """A batch is 32 samples of 3 steps, 96 rows: one pass, 14 uneven ones or 96 give the same weights."""
    whole, cut = walk(epochs=3, micro_batch_size=96), walk(epochs=3, **change)
    whole.train()
    cut.train()
    torch.testing.assert_close(whole.policy.mean, cut.policy.mean, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_rollout_batches_change_nothing() -> None:
    small, large = walk(epochs=3), walk(epochs=3)
    large.policy.batch_size = 64
    small.train()
    large.train()
    assert torch.equal(small.policy.mean, large.policy.mean)  # type: ignore[attr-defined]


def test_the_first_update_is_on_policy() -> None:
    """Ratio 1, nothing clipped, and loss = -mean advantage per step."""
    trainer = walk(batch_size=64, epochs=1)
    scored = gathered(trainer)
    metrics = trainer.update(trainer.lesson(scored))
    assert metrics["policy/ratio"] == 1 and metrics["policy/clip_fraction"] == 0 and metrics["policy/approx_kl"] == 0
    assert metrics["policy/loss"] == pytest.approx(-float(trainer.advantages(scored).mean()), abs=1e-6)


def test_a_linear_schedule_falls_to_zero_after_the_last_epoch() -> None:
    """4 epochs at 0.08: 0.08, 0.06, 0.04, 0.02."""
    trainer, seen = walk(epochs=4, learning_rate=0.08, schedule="linear"), []
    original = trainer.optimiser.step
    trainer.optimiser.step = lambda: (seen.append(trainer.optimiser.param_groups[0]["lr"]), original())  # type: ignore
    trainer.train()
    assert seen[::2] == pytest.approx([0.08, 0.06, 0.04, 0.02])  # two updates an epoch


def test_a_fraction_of_the_steps() -> None:
    trainer = walk(timestep_fraction=0.67, epochs=1)
    lesson = trainer.lesson(gathered(trainer))
    rows = lesson.rows(torch.arange(64), 0)
    assert rows.steps is not None and len(rows) == 128
    assert all(len(set(rows.steps[rows.items == i][:, 0].tolist())) == 2 for i in range(64))


def test_fp16_leaves_out_an_update_whose_gradient_overflows(make: Callable[..., DiffusionPolicy]) -> None:
    """At a loss scale of 1e38 no gradient fits: the weights stay, the scale halves, and training goes on from there."""
    policy = make(adapter=AdapterConfig(), precision="fp16", sampler=SamplerConfig(steps=3))
    settings = TrainerConfig(epochs=3, samples_per_epoch=8, batch_size=8, learning_rate=1e-2)
    trainer = Trainer(policy, Rollouts(Brightness(), PROMPTS), settings=settings, precision="fp16")
    assert trainer.scaler.get_scale() == 2**16
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.train(1)
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.parameters.items())
    assert trainer.scaler.get_scale() == pytest.approx(5e37)
    trainer.scaler = torch.amp.GradScaler("cpu")
    trainer.train(2)
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.parameters.items())


CONFIG = {"model": "embedded:emoji", "rewards": ["x"], "prompts": {"source": "emoji"}}


def image_trainer(make: Callable[..., DiffusionPolicy], run: Run | None, **settings: Any) -> Trainer:
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=3))
    options = {"epochs": 4, "samples_per_epoch": 8, "batch_size": 4, "learning_rate": 1e-2, "inner_epochs": 2}
    return Trainer(
        policy, Rollouts(Brightness(), [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]),
        settings=TrainerConfig(**(options | settings)), credit=CreditConfig(rule="per-prompt", min_count=2), run=run,
    )  # fmt: skip


def test_resumed_equals_uninterrupted_bit_for_bit(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    """2 epochs, a new process's worth of objects, 2 more: the same bytes as 4 epochs; metrics are not doubled."""
    straight = image_trainer(make, None)
    straight.train()
    run = Run.create(tmp_path / "run", parse(CONFIG))
    image_trainer(make, run, epochs=2).train()
    run.log(3, {"reward/total": 0.0})  # what a crash in epoch 3 leaves behind
    resumed = image_trainer(make, run)
    assert resumed.resume() and resumed.epoch == 2
    resumed.train()
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    states = zip(straight.optimiser.state.values(), resumed.optimiser.state.values(), strict=True)
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in states)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]


def test_a_half_written_checkpoint_does_not_count(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse(CONFIG))
    image_trainer(make, run, epochs=2).train()
    half = run.path / "checkpoints" / ".step-3.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2"]
    assert image_trainer(make, run).resume()


def test_a_checkpoint_of_another_adapter_is_refused(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse(CONFIG))
    image_trainer(make, run, epochs=1).train()
    policy = make(adapter=AdapterConfig(rank=7), sampler=SamplerConfig(steps=3))
    other = Trainer(policy, Rollouts(Brightness(), [Prompt("a red ball")]), run=run)
    with pytest.raises(ConfigError, match="another model or adapter"):
        other.resume()


def test_ctrl_c_saves_and_stops(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    """Pressed in the second epoch's sampling: the state of the first epoch's end is on disk, and a resume from it ends
    where an uninterrupted run ends."""
    run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer = image_trainer(make, run, checkpoint_every=100)
    trainer.on_epoch = lambda *_: signal.raise_signal(signal.SIGINT) if trainer.epoch == 2 else None
    with pytest.raises(Interrupted):
        trainer.train()
    assert [path.name for path in run.checkpoints()] == ["step-2"]
    resumed, straight = image_trainer(make, run), image_trainer(make, None)
    resumed.resume()
    resumed.train()
    straight.train()
    assert all(torch.equal(p, resumed.parameters[n]) for n, p in straight.parameters.items())


def test_metrics_are_means_over_the_updates_that_were_made() -> None:
    """One sample of 64 has an advantage, so one of the two batches makes an update: on-policy, its ratio is 1."""
    trainer = walk(epochs=1)
    lesson = trainer.lesson(gathered(trainer))
    assert isinstance(lesson, Steps)
    lesson.advantages = torch.zeros(64)
    lesson.advantages[5] = 1.0
    assert trainer.update(lesson)["policy/ratio"] == 1
    assert trainer.updates == 1
    lesson.advantages = torch.zeros(64)
    nothing = trainer.update(lesson)
    assert trainer.updates == 1 and "policy/ratio" not in nothing and nothing["advantage/zero_fraction"] == 1


def test_ctrl_c_in_the_last_epoch_counts_too(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    """What follows training (an evaluation may take long) is not begun; a resume has nothing left to train."""
    run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer = image_trainer(make, run, epochs=2, checkpoint_every=100)
    trainer.on_epoch = lambda *_: signal.raise_signal(signal.SIGINT) if trainer.epoch == 2 else None
    with pytest.raises(Interrupted):
        trainer.train()
    assert [path.name for path in run.checkpoints()] == ["step-2"]
    resumed = image_trainer(make, run, epochs=2)
    assert resumed.resume()
    resumed.train()
    assert resumed.epoch == 2 and len(run.metrics()) == 2


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    make: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", parse(CONFIG))
    assert not image_trainer(make, run).resume() and not (run.path / "metrics.jsonl").exists()
    run.log(1, {"reward/total": 0.0})
    trainer = image_trainer(make, run, epochs=2)
    assert not trainer.resume()
    trainer.train()
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_checkpoint_of_another_seed_is_refused() -> None:
    one = walk()
    other = Trainer(WalkPolicy(), Rollouts(Target(), PROMPTS), seed=7)
    with pytest.raises(ConfigError, match="run with seed 0, and this one has seed 7"):
        other.load_state_dict(one.state_dict())
