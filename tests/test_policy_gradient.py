"""Policy-gradient objectives against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.policy_gradient import kl_estimate, masked_mean, ppo_clip, reinforce, value_clip


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


def test_clip_higher_by_hand() -> None:
    """Ratios 1.25 and 0.75 at advantage 1, bounds 0.8 and 1.3: -1.25 is kept, -0.75 is (its clip, -0.8, is smaller).
    With the bound 1.2 the first is clipped to -1.2. At advantage -1: 1.25 stays 1.25, 0.75 is clipped to 0.8."""
    log_probs, old = torch.tensor([[1.25, 0.75]]).log(), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for advantage, high, expected in [(1.0, 0.3, [-1.25, -0.75]), (1.0, None, [-1.2, -0.75]), (-1.0, 0.3, [1.25, 0.8])]:
        loss, metrics = ppo_clip(log_probs, old, torch.tensor([advantage]), mask, clip_range=0.2, clip_range_high=high)
        assert torch.allclose(loss, torch.tensor([expected]))
        assert float(metrics["clip_fraction"]) == (0.5 if high else 1.0)


def test_kl_estimates_of_a_known_divergence() -> None:
    """Two coins, p = 0.7 and q = 0.5: KL is 0.7 ln 1.4 + 0.3 ln 0.6 = 0.0823. In the mean k1 and k3 are it."""
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.5]])
    kl = 0.7 * math.log(1.4) + 0.3 * math.log(0.6)
    means = {kind: float((p * kl_estimate(p.log(), q.log(), kind)).sum()) for kind in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(kl) and means["k3"] == pytest.approx(kl)
    assert means["k2"] == pytest.approx(0.5 * (0.7 * math.log(1.4) ** 2 + 0.3 * math.log(0.6) ** 2))
    assert bool((kl_estimate(p.log(), q.log(), "k3") >= 0).all())
    # The gradient of k2 in the mean is that of the KL: d/dp of 0.7 at fixed samples, by the logit z, sigma(z) = 0.7.
    z = torch.tensor(math.log(0.7 / 0.3), requires_grad=True)
    logs = torch.stack([torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)])
    (torch.tensor([0.7, 0.3]) * kl_estimate(logs, q[0].log(), "k2")).sum().backward()
    assert z.grad is not None
    assert float(z.grad) == pytest.approx(0.7 * 0.3 * math.log(0.7 / 0.3), rel=1e-5)


def test_the_error_of_a_critic_by_hand() -> None:
    """Old 0, returns 1, clip 0.2: a value of 0.5 is near at 0.2, whose error 0.64 is the larger: 0.32. A value of -0.1
    has its own, 1.21 / 2. Padding is 0."""
    values = torch.tensor([[0.5, -0.1, 9.0]])
    mask = torch.tensor([[True, True, False]])
    loss, metrics = value_clip(values, torch.zeros(1, 3), torch.ones(1, 3), mask, clip_range=0.2)
    assert torch.allclose(loss, torch.tensor([[0.32, 0.605, 0.0]]))
    assert float(metrics["value_error"]) == pytest.approx((0.25 + 1.21) / 2)
