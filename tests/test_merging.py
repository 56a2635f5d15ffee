"""Adapters added into the weights while samples alone are wanted: the same images, and weights that come back whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from diffalign.config import AdapterConfig, CreditConfig, ObjectiveConfig, SamplerConfig, TrainerConfig
from diffalign.evaluation import evaluate
from diffalign.experience import BestOfN, OnlinePairs, Rollouts
from diffalign.trainer import Trainer
from diffalign.types import Prompt
from pipelines import merging
from pipelines.diffusion import DiffusionPolicy
from tests.bright import Bright
from tests.test_families import Build, build  # noqa: F401 - a fixture

PROMPTS = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]
Make = Callable[..., DiffusionPolicy]


def moved(policy: DiffusionPolicy) -> DiffusionPolicy:
    """Both matrices of every adapter as after training: the images differ clearly from the base model's."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def base_weights(policy: DiffusionPolicy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.family.denoiser.named_parameters() if not p.requires_grad}


def merged_layers(policy: DiffusionPolicy) -> int:
    return sum(layer.merged for layer in policy.family.denoiser.modules() if isinstance(layer, BaseTunerLayer))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_weight_is_the_sum_of_what_was_there_and_the_adapter(make: Make, targets: str) -> None:
    """W + alpha / rank * B A, with B A of a convolution as a product over its rank; computed here in float64."""
    policy = moved(make(adapter=AdapterConfig(rank=2, alpha=3.0, targets=targets)))
    layers = {n: m for n, m in policy.family.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
    before = {name: layer.get_base_layer().weight.detach().double().clone() for name, layer in layers.items()}
    with policy.merged():
        for name, layer in layers.items():
            down, up = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            found = layer.get_base_layer().weight.double()
            torch.testing.assert_close(found, before[name] + 1.5 * product, rtol=1e-5, atol=1e-6)
            assert float((1.5 * product).abs().max()) > 1e-3
    assert any(down.ndim == 4 for down in before.values()) == (targets == "all")


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z-image"])
def test_images_are_the_same_to_a_grey_level_and_weights_to_the_bit(build: Build, family: str) -> None:  # noqa: F811
    policy = moved(build(family, adapter=AdapterConfig(targets="all")))
    before, plain = base_weights(policy), policy.rollout(PROMPTS, [1, 2, 3])
    with policy.reference():
        base = policy.rollout(PROMPTS, [1, 2, 3])
    with policy.merged():
        assert merged_layers(policy) > 0
        merged = policy.rollout(PROMPTS, [1, 2, 3])
    torch.testing.assert_close(merged.state["latents"], plain.state["latents"], rtol=1e-4, atol=1e-4)
    for one, other in zip(merged.samples, plain.samples, strict=True):
        assert np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).max() <= 1
    assert not torch.allclose(base.state["latents"], plain.state["latents"], atol=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(policy).items())
    assert merged_layers(policy) == 0
    assert torch.equal(policy.rollout(PROMPTS, [1, 2, 3]).log_probs, plain.log_probs)


def test_weights_come_back_when_sampling_fails(make: Make) -> None:
    policy = moved(make(adapter=AdapterConfig()))
    before = base_weights(policy)
    with pytest.raises(ZeroDivisionError), policy.merged():
        raise ZeroDivisionError
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(policy).items())
    assert merged_layers(policy) == 0


def test_nothing_is_merged_without_an_adapter_in_half_precision_or_inside_the_reference(make: Make) -> None:
    for policy in (make(), make(full=True), moved(make(adapter=AdapterConfig(), precision="bf16"))):
        with policy.merged():
            assert merged_layers(policy) == 0
    policy = moved(make(adapter=AdapterConfig()))
    with policy.reference():
        before = policy.rollout(PROMPTS, [1, 2, 3])
        with policy.merged():
            assert merged_layers(policy) == 0
            assert torch.equal(policy.rollout(PROMPTS, [1, 2, 3]).log_probs, before.log_probs)


def test_a_half_precision_base_is_left_alone(make: Make) -> None:
    """bfloat16 has 8 bits: an adapter of a thousandth of the weights would be gone."""
    policy = moved(make(adapter=AdapterConfig()))
    policy.family.denoiser.to(torch.bfloat16)
    with merging.merged(policy.family.denoiser):
        assert merged_layers(policy) == 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were merged in each rollout."""
    found: list[int] = []
    original = DiffusionPolicy.rollout
    monkeypatch.setattr(
        DiffusionPolicy, "rollout", lambda self, *given: found.append(merged_layers(self)) or original(self, *given)
    )
    return found


@pytest.mark.parametrize(
    ("objective", "source", "merges"),
    [
        ("ppo-clip", Rollouts, False), ("reinforce", Rollouts, False), ("draft", Rollouts, False),
        ("elbo-ppo-clip", Rollouts, True), ("nft", Rollouts, True), ("reward-weighted", Rollouts, True),
        ("sft", BestOfN, True), ("dpo", OnlinePairs, True),
    ],
)  # fmt: skip
def test_training_merges_where_no_step_is_replayed(
    make: Make, seen: list[int], objective: str, source: Callable[..., Rollouts], merges: bool
) -> None:
    policy = moved(make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=2)))
    trainer = Trainer(
        policy, source(Bright(), PROMPTS), objective=ObjectiveConfig(name=objective), credit=CreditConfig(rule="batch"),
        settings=TrainerConfig(samples_per_epoch=6, samples_per_prompt=2, batch_size=3, learning_rate=1e-3),
    )  # type: ignore[arg-type]  # fmt: skip
    trainer.gather()
    assert [bool(count) for count in seen] == [merges]


def test_an_evaluation_merges_what_was_trained(make: Make, seen: list[int]) -> None:
    """The base first, then the aligned model. Without a change of its adapter the two are equal to the bit."""
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=2))
    outcome = evaluate(policy, PROMPTS, Bright(), seeds_per_prompt=1)
    assert [bool(count) for count in seen] == [False, True]
    measure = outcome.measures["bright"]
    assert (measure.before == measure.after).all()


def test_merging_is_one_product_a_layer(make: Make) -> None:
    """Of a layer with an adapter, the two small matrices are not asked inside."""
    policy, asked = moved(make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=1))), []
    for layer in policy.family.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.lora_A["default"].register_forward_hook(lambda *_: asked.append(1))
    for scope, expected in ((nullcontext(), True), (policy.merged(), False)):
        asked.clear()
        with scope:
            policy.rollout(PROMPTS, [1, 2, 3])
        assert bool(asked) == expected


def test_an_adapter_of_the_hub_merges(make: Make, tmp_path: Path) -> None:
    """What ``load_lora_weights`` puts on, as ``generate`` and other tools do."""
    saved = moved(make(adapter=AdapterConfig(rank=2, alpha=2.0)))
    folder = saved.save(tmp_path)
    policy = make()
    policy.family.pipeline.load_lora_weights(folder, local_files_only=True)
    with policy.merged():
        assert merged_layers(policy) > 0
        found = policy.rollout(PROMPTS, [1, 2, 3])
    torch.testing.assert_close(
        found.state["latents"], saved.rollout(PROMPTS, [1, 2, 3]).state["latents"], rtol=1e-4, atol=1e-4
    )
