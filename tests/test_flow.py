"""The stochastic steps of flow models against diffusers, against float64 arithmetic of another form, and by statistics.

In all of them x is noisy, v the velocity, s the scale of the noise, D = following - sigma < 0.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffalign import denoising, flow
from diffalign.config import SamplerConfig
from diffalign.errors import ConfigError
from pipelines.schedules import Flow

RNG = np.random.default_rng(0)
NOISY, VELOCITY = RNG.normal(size=(2, 3, 2, 4, 4))
SIGMA, FOLLOWING = np.array([0.9, 0.5, 0.2]), np.array([0.7, 0.3, 0.1])


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array).float() for array in arrays]


def wide(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


def scheduler(steps: int, **config: object) -> FlowMatchEulerDiscreteScheduler:
    found = FlowMatchEulerDiscreteScheduler(**config)  # type: ignore[arg-type]
    found.set_timesteps(steps)
    return found


def schedule(steps: int = 6, **sampler: object) -> Flow:
    settings = SamplerConfig.model_validate({"steps": steps, **sampler})
    return Flow(scheduler(steps, shift=3.0), settings, torch.device("cpu"))


def test_forward_process_and_residual_in_float64() -> None:
    """x = (1 - s) x0 + s e, so dx/ds = e - x0; what the velocity believes in must mix back to x."""
    clean, noise = RNG.normal(size=(2, 3, 2, 4, 4))
    found = flow.noised(*tensors(clean, noise, SIGMA))
    np.testing.assert_allclose(found, clean + wide(SIGMA) * (noise - clean), rtol=1e-5, atol=1e-6)
    x0, x1 = flow.clean_and_noise(*tensors(NOISY, VELOCITY, SIGMA))
    np.testing.assert_allclose(flow.noised(x0, x1, torch.tensor(SIGMA).float()), NOISY, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x1 - x0, VELOCITY, rtol=1e-4, atol=1e-5)
    exact = flow.residual(*tensors(noise - clean, clean, noise))
    assert exact.abs().max() < 1e-6
    np.testing.assert_allclose(flow.residual(*tensors(VELOCITY, clean, noise)), VELOCITY + clean - noise, atol=1e-5)


def test_the_mean_of_flow_grpo_in_float64() -> None:
    """Flow-GRPO's code writes it as x (1 + s^2 D / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) D."""
    a = 0.7
    s = a * np.sqrt(SIGMA / (1 - np.minimum(SIGMA, 0.95)))
    delta = FOLLOWING - SIGMA
    by_hand = NOISY * wide(1 + s**2 * delta / (2 * SIGMA)) + VELOCITY * wide(
        (1 + s**2 * (1 - SIGMA) / (2 * SIGMA)) * delta
    )
    noisy, velocity, sigma, following = tensors(NOISY, VELOCITY, SIGMA, FOLLOWING)
    scale = flow.sde_scale(sigma, a, torch.tensor(0.95))
    np.testing.assert_allclose(scale, s, rtol=1e-6)
    np.testing.assert_allclose(flow.sde_mean(noisy, velocity, sigma, following, scale), by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flow.sde_std(sigma, following, scale), s * np.sqrt(-delta), rtol=1e-5)


def test_the_mean_of_dance_grpo_in_float64() -> None:
    """DanceGRPO's own form: x0 = x - sigma v, score = -(x - (1 - sigma) x0) / sigma^2, x + (v - eta^2 score / 2) D."""
    eta = 0.3
    clean = NOISY - wide(SIGMA) * VELOCITY
    score = -(NOISY - wide(1 - SIGMA) * clean) / wide(SIGMA) ** 2
    by_hand = NOISY + (VELOCITY - 0.5 * eta**2 * score) * wide(FOLLOWING - SIGMA)
    noisy, velocity, sigma, following = tensors(NOISY, VELOCITY, SIGMA, FOLLOWING)
    scale = flow.dance_scale(sigma, eta)
    np.testing.assert_allclose(flow.sde_mean(noisy, velocity, sigma, following, scale), by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flow.sde_std(sigma, following, scale), eta * np.sqrt(SIGMA - FOLLOWING), rtol=1e-5)


def test_coefficients_preserving_sampling_in_float64() -> None:
    """(1 - s') (x - sigma v) + sqrt(s'^2 - std^2) (x + (1 - sigma) v), std = s' sin(a pi / 2)."""
    a = 0.8
    std = FOLLOWING * math.sin(a * math.pi / 2)
    by_hand = wide(1 - FOLLOWING) * (NOISY - wide(SIGMA) * VELOCITY) + wide(np.sqrt(FOLLOWING**2 - std**2)) * (
        NOISY + wide(1 - SIGMA) * VELOCITY
    )
    noisy, velocity, sigma, following = tensors(NOISY, VELOCITY, SIGMA, FOLLOWING)
    found = flow.cps_std(following, a)
    np.testing.assert_allclose(found, std, rtol=1e-6)
    np.testing.assert_allclose(flow.cps_mean(noisy, velocity, sigma, following, found), by_hand, rtol=1e-4, atol=1e-5)


def test_the_log_probability_of_a_cps_step_is_its_density() -> None:
    """Gaussian = -mean square / (2 std^2) - log std - log sqrt(2 pi), element by element and so in the mean."""
    value, mean = RNG.normal(size=(2, 3, 2, 4, 4))
    std = np.array([0.4, 0.2, 0.1])
    square = ((value - mean) ** 2).mean((1, 2, 3))
    gaussian = -square / (2 * std**2) - np.log(std) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(denoising.log_density(*tensors(value, mean, std)), gaussian, rtol=1e-5)


def test_kl_is_that_of_the_paper_with_the_time_step_in_it() -> None:
    """Flow-GRPO's paper, in velocities: KL = |D| / 2 (s (1 - sigma) / (2 sigma) + 1 / s)^2 |v - v_ref|^2."""
    a, other = 0.7, RNG.normal(size=NOISY.shape)
    noisy, velocity, reference, sigma, following = tensors(NOISY, VELOCITY, other, SIGMA, FOLLOWING)
    scale = flow.sde_scale(sigma, a, torch.tensor(0.95))
    means = [flow.sde_mean(noisy, v, sigma, following, scale) for v in (velocity, reference)]
    found = denoising.gaussian_kl(means[0], means[1], flow.sde_std(sigma, following, scale))
    s = a * np.sqrt(SIGMA / (1 - SIGMA))
    factor = (SIGMA - FOLLOWING) / 2 * (s * (1 - SIGMA) / (2 * SIGMA) + 1 / s) ** 2
    np.testing.assert_allclose(found, factor * ((VELOCITY - other) ** 2).mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("noise", ["sde", "cps", "dance"])
def test_without_noise_every_kind_is_the_step_of_diffusers(noise: str) -> None:
    """Each of 6 shifted steps against FlowMatchEulerDiscreteScheduler.step, from a fresh point at each."""
    own, theirs = schedule(noise=noise, eta=0.0), scheduler(6, shift=3.0)
    assert not own.std.any()
    for step, timestep in enumerate(theirs.timesteps):
        latents, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        expected = theirs.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(own.mean(latents, output, torch.full((2,), step)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("noise", "eta"), [("sde", 0.7), ("dance", 0.9)])
def test_many_steps_end_at_the_distribution_of_the_data(noise: str, eta: float) -> None:
    """Data N(2, 0.5^2): the exact velocity is known, and 400 steps of 20,000 chains must end at that mean and spread.

    x is N((1 - s) 2, g^2) with g^2 = (1 - s)^2 / 4 + s^2, so v = E[e - x0 | x] = -2 + (s - (1 - s) / 4) / g^2 times
    (x - (1 - s) 2). A wrong sign of the score would widen or narrow the end. A standard error of the mean is 0.0035.
    """
    steps = 400
    own = schedule(steps, noise=noise, eta=eta)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 20_000, generator=generator)
    for step in range(steps):
        s = own.sigma[step]
        spread = (1 - s) ** 2 / 4 + s**2
        velocity = -2 + (s - (1 - s) / 4) / spread * (x - 2 * (1 - s))
        x = own.mean(x, velocity, torch.tensor([step])) + own.std[step] * torch.randn(x.shape, generator=generator)
    assert float(x.mean()) == pytest.approx(2, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_cps_keeps_the_noise_level_of_every_step() -> None:
    """Data that is always 2: v = (x - 2) / s is exact, and x stays N((1 - s) 2, s^2) at each step, down to 2 itself.

    The SDE's Euler step does not: at 6 steps it leaves more noise than the level says, which is what CPS is for.
    """
    spreads = {}
    for noise in ("cps", "sde"):
        own, generator = schedule(noise=noise), torch.Generator().manual_seed(3)
        x, spreads[noise] = torch.randn(1, 50_000, generator=generator), []
        for step in range(6):
            velocity = (x - 2) / own.sigma[step]
            x = own.mean(x, velocity, torch.tensor([step])) + own.std[step] * torch.randn(x.shape, generator=generator)
            assert float(x.mean()) == pytest.approx(2 * (1 - float(own.following[step])), abs=0.02)
            spreads[noise].append(float(x.std()))
    levels = own.following.tolist()
    assert spreads["cps"] == pytest.approx(levels, rel=0.02, abs=1e-5)
    assert all(found > 1.05 * level for found, level in zip(spreads["sde"][:-1], levels[:-1], strict=True))


@pytest.mark.parametrize("noise", ["sde", "cps", "dance"])
def test_every_step_but_the_last_has_noise_that_is_finite(noise: str) -> None:
    own = schedule(noise=noise)
    assert own.sigma[0] == 1 and own.std.isfinite().all()
    assert (own.std[:-1] > 0).all() and own.std[-1] == 0
    latents, output = torch.randn(2, 6, 4, 2, 2)
    assert own.mean(latents, output, torch.arange(6)).isfinite().all()


def test_the_first_step_of_flow_grpo_is_bounded_by_the_second_sigma() -> None:
    """At sigma 1, or just below as some schedules begin, the denominator is 1 - sigmas[1]."""
    for first in (1.0, 0.999875):
        sigma = torch.tensor([first, 0.8, 0.4])
        expected = [0.7 * math.sqrt(first / 0.2), 0.7 * math.sqrt(0.8 / 0.2), 0.7 * math.sqrt(0.4 / 0.6)]
        assert flow.sde_scale(sigma, 0.7, sigma[1]).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_default_has_noise_as_published() -> None:
    """Flow-GRPO's SDE at 0.7; each kind has a level of its own."""
    own = schedule()
    assert (own.noise, own.eta) == ("sde", 0.7)
    assert (schedule(noise="cps").eta, schedule(noise="dance").eta) == (0.8, 0.3)
    assert schedule(noise="dance", eta=0.5).eta == 0.5


@pytest.mark.parametrize("noise", ["sde", "cps", "dance"])
def test_a_window_leaves_the_other_steps_to_the_ode(noise: str) -> None:
    own, ode = schedule(noise=noise, window={"start": 1, "steps": 2}), schedule(eta=0.0)
    full = schedule(noise=noise)
    assert (own.std > 0).tolist() == [False, True, True, False, False, False]
    assert torch.equal(own.std[1:3], full.std[1:3])
    latents, output = torch.randn(2, 6, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    every = torch.arange(6)
    found, plain, noisy = (each.mean(latents, output, every) for each in (own, ode, full))
    outside = [0, 3, 4, 5]
    torch.testing.assert_close(found[outside], plain[outside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:3], noisy[1:3])


def test_a_window_that_never_has_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.window is on the last of the 6 steps"):
        schedule(window={"start": 5, "steps": 1})
    with pytest.raises(ValueError, match="window ends at step 8, and there are 6 steps"):
        SamplerConfig.model_validate({"steps": 6, "window": {"start": 4, "steps": 4}})
