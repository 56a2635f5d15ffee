"""Forward-process objectives against independent float64 arithmetic, and where their gradients point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives.forward_process import (
    LEAST_ERROR,
    contrasted,
    elbo_ppo_clip,
    elbo_reinforce,
    nft,
    optimality,
    output_distance,
)


def test_elbo_reinforce_by_hand() -> None:
    """-A E: -(2)(-0.3) = 0.6 and -(-1)(-0.5) = -0.5; the gradient by E is -A."""
    likelihood = torch.tensor([-0.3, -0.5], requires_grad=True)
    loss, metrics = elbo_reinforce(likelihood, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(loss.detach(), torch.tensor([0.6, -0.5]))
    loss.sum().backward()
    assert likelihood.grad is not None and likelihood.grad.tolist() == [-2.0, 1.0]
    assert float(metrics["log_likelihood"]) == pytest.approx(-0.4)


def test_elbo_ppo_clip_against_numpy() -> None:
    """max(-A r, -A clip(r)) in float64, bounds 0.9 and 1.2, for good and bad samples at ratios inside and outside."""
    rng = np.random.default_rng(0)
    now, old, advantages = -rng.uniform(0, 1, 64), -rng.uniform(0, 1, 64), rng.normal(size=64)
    ratio = np.exp(now - old)
    expected = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.9, 1.2))
    loss, metrics = elbo_ppo_clip(
        torch.tensor(now), torch.tensor(old), torch.tensor(advantages), clip_range=0.1, clip_range_high=0.2
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert float(metrics["clip_fraction"]) == pytest.approx(np.mean((ratio < 0.9) | (ratio > 1.2)), rel=1e-6)
    assert float(metrics["ratio"]) == pytest.approx(ratio.mean(), rel=1e-6)
    assert float(metrics["approx_kl"]) == pytest.approx(0.5 * np.mean((now - old) ** 2), rel=1e-6)


def test_at_ratio_one_the_clipped_gradient_is_the_plain_one() -> None:
    values = -torch.rand(16, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(1))
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda now: elbo_reinforce(now, advantages)[0],
        lambda now: elbo_ppo_clip(now, values, advantages, clip_range=1e-4)[0],
    ]
    gradients = []
    for loss in losses:
        now = values.clone().requires_grad_()
        loss(now).sum().backward()
        gradients.append(now.grad)
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def test_how_good_a_sample_is() -> None:
    """A_max 5: -5 and below are 0, 0 is one half, 2.5 is 3/4, 5 and above are 1."""
    found = optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 7.0]), 5.0)
    assert found.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_nft_against_numpy(beta: float) -> None:
    """The paper's own way: x0+ = x_t - t v+ of interpolated velocities, the error of each weighted by its mean size."""
    rng = np.random.default_rng(3)
    clean, noise, v, v_old = (rng.normal(size=(5, 2, 3)) for _ in range(4))
    t, advantages = rng.uniform(0.1, 0.9, (5, 1, 1)), np.array([-6.0, -1.0, 0.0, 2.0, 5.0])
    noisy = (1 - t) * clean + t * noise
    good = np.clip(advantages / 10 + 0.5, 0, 1)
    losses = []
    for own in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
        error = noisy - t * own - clean
        losses.append((error**2).mean((1, 2)) / np.abs(error).mean((1, 2)))
    expected = 5 / beta * (good * losses[0] + (1 - good) * losses[1])
    errors = [torch.tensor(noisy - t * own - clean) for own in (v, v_old)]
    positive, negative = contrasted(errors[0], errors[1], beta=beta)
    loss, metrics = nft(positive, negative, torch.tensor(advantages), beta=beta, largest=5.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(metrics["optimality"]) == pytest.approx(good.mean())
    assert float(metrics["positive_error"]) == pytest.approx(losses[0].mean(), rel=1e-6)


def test_no_error_is_divided_by_the_least_weight() -> None:
    """An error of 1e-6 everywhere has mean square 1e-12, over 1e-5; no error at all is 0 and not NaN."""
    error = torch.tensor([[1e-6, 1e-6], [0.0, 0.0]])
    positive, _ = contrasted(error, torch.zeros(2, 2), beta=1.0)
    torch.testing.assert_close(positive, torch.tensor([1e-12 / LEAST_ERROR, 0.0]))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_first_gradient_of_nft_is_that_of_the_advantage(beta: float) -> None:
    """On policy both implicit policies are the policy, L+ = L- = mean(e^2) / w, and d loss / de = A 2 e / (n w)."""
    old = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    error = old.clone().requires_grad_()
    advantages = torch.tensor([-5.0, -1.0, 0.0, 3.0])
    positive, negative = contrasted(error, old, beta=beta)
    nft(positive, negative, advantages, beta=beta, largest=5.0)[0].sum().backward()
    expected = advantages[:, None] * 2 * old / (6 * old.abs().mean(1, keepdim=True))
    assert error.grad is not None
    torch.testing.assert_close(error.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("advantage", "sign"), [(5.0, 1.0), (-5.0, -1.0)])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_where_nft_comes_to_rest(advantage: float, sign: float, beta: float) -> None:
    """Old policy in error by e. A good sample: (1 - b) e + b x = 0 at x = e (1 - 1/b). A bad one: (1 + b) e - b x = 0
    at x = e (1 + 1/b). So good samples are approached and bad ones left, each by e / b from where the old policy is.
    """
    old = torch.tensor([[0.4, -0.2, 0.1]])
    error = old.clone().requires_grad_()
    optimiser = torch.optim.SGD([error], lr=0.01 / beta)
    for _ in range(4000):
        optimiser.zero_grad()
        positive, negative = contrasted(error, old, beta=beta)
        nft(positive, negative, torch.tensor([advantage]), beta=beta, largest=5.0)[0].sum().backward()
        optimiser.step()
    torch.testing.assert_close(error.detach(), old * (1 - sign / beta), atol=0.02, rtol=0)


def test_neither_good_nor_bad_pulls_back_to_the_old_policy() -> None:
    """At A = 0 and equal weights L+ + L- = 2 mean(e^2) + 2 b^2 mean((x - e)^2): no gradient on policy, back to it off
    it."""
    old = torch.tensor([[0.4, -0.4]])
    for shift, sign in ((0.0, 0.0), (0.05, 1.0), (-0.05, -1.0)):
        error = (old + shift * torch.tensor([[1.0, 1.0]])).requires_grad_()
        positive, negative = contrasted(error, old, beta=1.0)
        nft(positive, negative, torch.zeros(1), beta=1.0, largest=5.0)[0].sum().backward()
        assert error.grad is not None
        assert torch.equal(error.grad.sum().round(decimals=4).sign(), torch.tensor(sign))


def test_the_distance_of_outputs_by_hand() -> None:
    """Residuals 1 and 3 against 0 and 1: (1 + 4) / 2 = 2.5; the gradient comes through the policy's alone."""
    own = torch.tensor([[1.0, 3.0]], requires_grad=True)
    distance = output_distance(own, torch.tensor([[0.0, 1.0]]))
    distance.sum().backward()
    assert distance.tolist() == [2.5] and own.grad is not None and own.grad.tolist() == [[1.0, 2.0]]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elbo-reinforce": lambda e, a: elbo_reinforce(e, a)[0],
    "elbo-ppo-clip": lambda e, a: elbo_ppo_clip(e, e.detach(), a, clip_range=0.1)[0],
    "nft": lambda e, a: nft(-e, -e, a, beta=1.0, largest=5.0)[0],
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_objective_on_one_row_none_and_each_type(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """A row's loss depends on that row alone, keeps its type, and is there for none, too."""
    rows = -torch.rand(5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    whole = loss(rows, advantages)
    assert whole.dtype == dtype and whole.shape == (5,)
    assert torch.equal(torch.cat([loss(rows[i : i + 1], advantages[i : i + 1]) for i in range(5)]), whole)
    assert loss(rows[:0], advantages[:0]).shape == (0,)
