"""Policy-gradient objectives against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.policy_gradient import masked_mean, ppo_clip, reinforce


def test_ppo_clip_by_hand() -> None:
    """clip 0.1; ratios e^0.2 = 1.2214 and e^-0.2 = 0.8187.

    A = 1: max(-1.2214, -1.1) = -1.1 and max(-0.8187, -0.9) = -0.8187: gains are capped, losses are not.
    A = -2: max(2.4428, 2.2) = 2.4428 and max(1.6375, 1.8) = 1.8.
    """
    new = torch.tensor([[0.2, -0.2], [0.2, -0.2]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, metrics = ppo_clip(new, torch.zeros(2, 2), torch.tensor([1.0, -2.0]), mask, clip_range=0.1)
    up, down = math.exp(0.2), math.exp(-0.2)
    torch.testing.assert_close(loss, torch.tensor([[-1.1, -down], [2 * up, 1.8]]))
    assert metrics["clip_fraction"] == 1.0
    assert float(metrics["ratio"]) == pytest.approx((up + down) / 2)
    assert float(metrics["approx_kl"]) == pytest.approx(0.02)


def test_clipped_steps_have_no_gradient() -> None:
    new = torch.tensor([[0.2, 0.05]], requires_grad=True)
    loss, _ = ppo_clip(new, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2, dtype=torch.bool), clip_range=0.1)
    loss.sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -math.exp(0.05)]]))


def test_on_policy_ppo_gradient_equals_reinforce() -> None:
    """At ratio 1, d(-A r) = -A r dlogp = -A dlogp."""
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -0.5, 0.0, 3.0])
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    gradients = []
    for objective in (lambda *a: ppo_clip(*a, clip_range=1e-4), reinforce):
        new = values.clone().requires_grad_()
        loss, metrics = objective(new, values, advantages, mask)
        loss.sum().backward()
        gradients.append(new.grad)
        assert metrics["ratio"] == 1 and metrics["approx_kl"] == 0
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])


def test_masked_steps_count_nowhere() -> None:
    mask = torch.tensor([[True, False]])
    for objective in (lambda *a: ppo_clip(*a, clip_range=0.1), reinforce):
        new = torch.tensor([[0.0, 5.0]], requires_grad=True)
        loss, metrics = objective(new, torch.zeros(1, 2), torch.tensor([2.0]), mask)
        loss.sum().backward()
        assert loss[0, 1] == 0 and new.grad is not None and new.grad[0, 1] == 0
        assert metrics["ratio"] == 1


def test_masked_mean_of_nothing_is_zero() -> None:
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == 0
