"""What the training loop refuses: before it starts, and when a run goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from diffalign import checks
from diffalign.config import AdapterConfig, ObjectiveConfig, TrainerConfig, parse
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.experience import Rollouts
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Rollout, Sample, Scores, StepLikelihood
from pipelines.diffusion import DiffusionPolicy
from tests.test_trainer import CONFIG, PROMPTS, Brightness, Constant, Target, WalkPolicy, image_trainer, walk


@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), "NaN or infinite for all 64"), (0.5, "constant: 0.5 for all 64")]
)
def test_a_reward_that_cannot_teach_is_refused(value: float, reason: str) -> None:
    trainer = walk()
    trainer.source.reward = Constant(value)  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match=reason):
        trainer.train()
    assert not trainer.policy.mean.any()  # type: ignore[attr-defined]


class Dying(Target):
    """Works twice, and then no more, as a server that is gone."""

    calls = 0

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        self.calls += 1
        if self.calls > 2:
            raise RefusedError("the server is gone")
        return super().__call__(samples)


def test_a_reward_that_fails_for_good_costs_no_finished_epoch(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer = walk(epochs=5, checkpoint_every=100)
    trainer.run, trainer.source.reward = run, Dying()  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="the server is gone"):
        trainer.train()
    assert [path.name for path in run.checkpoints()] == ["step-2"]
    resumed, straight = walk(epochs=5), walk(epochs=5)
    resumed.run = run
    assert resumed.resume()
    resumed.train()
    straight.train()
    assert torch.equal(resumed.policy.mean, straight.policy.mean)  # type: ignore[attr-defined]


def test_a_reward_that_became_perfect_is_no_fault() -> None:
    trainer = walk(epochs=1)
    trainer.train()
    trainer.source.reward = Constant(1.0)  # type: ignore[attr-defined]
    before = trainer.policy.mean.detach().clone()  # type: ignore[attr-defined]
    trainer.train(2)
    assert trainer.epoch == 2 and torch.equal(before, trainer.policy.mean)  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_diverging_run_stops_with_the_last_good_checkpoint(
    make: Callable[..., DiffusionPolicy], tmp_path: Path, batch_size: int
) -> None:
    """With two updates an epoch the second one's loss is NaN; after a single one only its own likelihood tells."""
    run = Run.create(tmp_path / "run", parse(CONFIG))
    options = {"batch_size": batch_size, "inner_epochs": 1}
    image_trainer(make, run, epochs=2, **options).train()
    trainer = image_trainer(make, run, learning_rate=1e30, epochs=5, **options)
    assert trainer.resume()
    with pytest.raises(RefusedError) as caught:
        trainer.train()
    assert "training diverged" in str(caught.value) and "trainer.learning_rate (now 1e+30)" in str(caught.value)
    assert f"the last good checkpoint is {run.checkpoints()[-1]}" in str(caught.value)
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2"]
    for path in run.checkpoints():
        weights = torch.load(path / "state.pt", weights_only=True)["parameters"]
        assert weights and all(w.isfinite().all() and w.abs().max() < 1e3 for w in weights.values())


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_run_that_diverges_at_once_keeps_nothing(
    make: Callable[..., DiffusionPolicy], tmp_path: Path, batch_size: int
) -> None:
    run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer = image_trainer(make, run, learning_rate=1e30, batch_size=batch_size, inner_epochs=1)
    with pytest.raises(RefusedError, match=r"training diverged.*now 1e\+30.*there is no checkpoint yet"):
        trainer.train()
    assert not run.checkpoints()


def test_broken_samples_are_the_fault_of_the_updates_before_them(
    make: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    """Pixels that are NaN before any update are the model's own fault, and are reported as what they are."""
    trainer = image_trainer(make, Run.create(tmp_path / "run", parse(CONFIG)))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        trainer.gather()
    trainer.updates = 1
    with pytest.raises(RefusedError, match=r"training diverged: .*pixels.*learning_rate"):
        trainer.gather()
    with pytest.raises(RefusedError, match=r"training diverged: .*trained weights are not finite"):
        trainer.save()


def test_samples_without_a_finite_likelihood_are_a_divergence() -> None:
    trainer = walk()
    trainer.updates = 1
    trainer.policy.mean.data.fill_(float("inf"))  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match=r"training diverged: .*log-probabilities"):
        trainer.gather()


@pytest.mark.parametrize(("size", "diverged"), [(9e3, False), (2e4, True), (-2e4, True)])
def test_a_weight_that_is_finite_and_huge_is_a_divergence(size: float, diverged: bool, tmp_path: Path) -> None:
    trainer = walk()
    trainer.run = Run.create(tmp_path / "run", parse(CONFIG))
    trainer.policy.mean.data[0, 0] = size  # type: ignore[attr-defined]
    if not diverged:
        trainer.save()
        assert trainer.run.checkpoints()
        return
    with pytest.raises(RefusedError, match=r"training diverged: the trained weight mean has grown to 2e\+04\. Lower"):
        trainer.save()
    assert not trainer.run.checkpoints()


class ForgetfulPolicy(WalkPolicy):
    """Replays with other noise than it sampled with."""

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        found = super().step_log_probs(rollout, steps, kl=kl)
        return StepLikelihood(found.log_probs + torch.randn_like(found.log_probs) * 1e-3, found.kl)


class BrokenReplay(WalkPolicy):
    """Its replay is NaN, which is larger than nothing in Python."""

    calls = 0

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        self.calls += 1
        found = super().step_log_probs(rollout, steps, kl=kl)
        return found if self.calls == 1 else StepLikelihood(found.log_probs * float("nan"))


class MovingReference(WalkPolicy):
    """Its reference shares weights with the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.start = self.mean  # type: ignore[assignment]


class DeafPolicy(WalkPolicy):
    """Its log-probability ignores the trained weights."""

    def _mean(self, which: Tensor) -> Tensor:
        return self.mean[which] * 0


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (ForgetfulPolicy, "other probabilities"),
        (BrokenReplay, "other probabilities"),
        (MovingReference, "reference moved"),
        (DeafPolicy, "gradient of every trainable parameter is zero"),
    ],
)
def test_a_policy_that_would_train_wrongly_is_refused(policy: type[WalkPolicy], reason: str) -> None:
    trainer = Trainer(
        policy(), Rollouts(Target(), PROMPTS), settings=TrainerConfig(samples_per_epoch=8, batch_size=8, epochs=2)
    )
    with pytest.raises(RefusedError, match=reason):
        trainer.train()


def test_a_reward_of_another_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="judges images, but the model makes texts"):
        Trainer(WalkPolicy(), Rollouts(Brightness(), PROMPTS))


@pytest.mark.parametrize(
    ("objective", "clip_range", "warned"),
    [("ppo-clip", 1e-4, True), ("ppo-clip", 0.2, False), ("reinforce", None, False)],
)
def test_rounding_beyond_the_clip_range_is_warned_of(
    objective: str, clip_range: float | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The replay is off by some 1e-3, which bf16 explains: no refusal, but an image's clip range is smaller."""
    policy = ForgetfulPolicy()
    policy.capabilities = frozenset({"step_log_probs"})  # a reference is compared to the last bit
    settings = TrainerConfig(samples_per_epoch=8, batch_size=8)
    chosen = ObjectiveConfig(name=objective, clip_range=clip_range)  # type: ignore[arg-type]
    source = Rollouts(Target(), PROMPTS)
    Trainer(policy, source, settings=settings, objective=chosen, precision="bf16").gather()
    assert ("more than objective.clip_range 0.0001" in caplog.text) is warned
    assert ("precision to fp32" in caplog.text) is warned


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"distributed_type": DistributedType.FSDP}, "divided among processes by FSDP.* set trainer.shard"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "divided among processes by DEEPSPEED"),
        ({"mixed_precision": "bf16"}, "Accelerate's mixed precision is bf16"),
        ({"gradient_accumulation_steps": 4}, "Accelerate's gradient accumulation is 4"),
    ],
)
def test_what_accelerate_would_do_beside_the_loop_is_refused(
    setting: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, object] = {
        "distributed_type": DistributedType.NO,
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
    }
    monkeypatch.setattr(checks, "Accelerator", lambda **_: SimpleNamespace(**(plain | setting)))
    with pytest.raises(ConfigError, match=message):
        walk()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MIXED_PRECISION", "bf16"),
        ("MIXED_PRECISION", "fp16"),  # refused by Accelerate itself where there is no GPU
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_accelerate_variables_are_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    try:
        with pytest.raises(ConfigError, match="ACCELERATE_ variable"):
            walk()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_gradient_checkpointing_is_never_silently_ignored(make: Callable[..., DiffusionPolicy]) -> None:
    settings, source = TrainerConfig(gradient_checkpointing=True), Rollouts(Brightness(), PROMPTS)
    with pytest.raises(ConfigError, match="build the policy with gradient_checkpointing=True"):
        Trainer(make(adapter=AdapterConfig()), source, settings=settings)
    Trainer(make(adapter=AdapterConfig(), gradient_checkpointing=True), source, settings=settings)
