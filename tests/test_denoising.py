"""The stochastic denoising step and its log-density, against diffusers and against float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffalign import denoising
from diffalign.denoising import Prediction


def scheduler(prediction: str, **options: object) -> DDIMScheduler:
    settings: dict[str, object] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": prediction,
    }  # fmt: skip
    return DDIMScheduler(**(settings | options))  # type: ignore[arg-type]


def signals(reference: DDIMScheduler, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative signal before and after each step, read off diffusers' scheduler one timestep at a time."""
    reference.set_timesteps(steps)
    before, after = [], []
    for t in reference.timesteps.tolist():
        following = t - reference.config.num_train_timesteps // steps
        before.append(reference.alphas_cumprod[t])
        after.append(reference.alphas_cumprod[following] if following >= 0 else reference.final_alpha_cumprod)
    return torch.stack(before), torch.stack(after)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"set_alpha_to_one": True},
        {"clip_sample": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=["stable-diffusion", "last-step-without-noise", "clipped", "zero-terminal-signal"],
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_equals_diffusers(prediction: Prediction, options: dict[str, object], eta: float) -> None:
    """With noise 0 the step is the mean; with noise z it is mean + std z. Both must equal DDIMScheduler.step."""
    if prediction == "epsilon" and options.get("rescale_betas_zero_snr"):
        pytest.skip("a step from pure noise cannot predict epsilon")
    reference = scheduler(prediction, **options)
    a, b = signals(reference, 10)
    generator = torch.Generator().manual_seed(0)
    noisy, output, z = torch.randn(3, 2, 4, 8, 8, generator=generator)
    clip = 1.0 if options.get("clip_sample") else None
    for i, t in enumerate(reference.timesteps):
        std = denoising.ddim_std(a[i].expand(2), b[i].expand(2), eta)
        clean, noise = denoising.clean_and_noise(noisy, output, a[i].expand(2), prediction, clip=clip)
        mean = denoising.ddim_mean(clean, noise, b[i].expand(2), std)
        for draw in (torch.zeros_like(z), z):
            ours = mean + denoising.expand(std, mean) * draw
            theirs = reference.step(output, t, noisy, eta=eta, variance_noise=draw if eta else None).prev_sample
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@given(st.integers(0, 2**31), st.floats(0.02, 1.0))
def test_log_density_equals_the_formula_in_float64(seed: int, deviation: float) -> None:
    """mean over elements of -(x - m)^2 / (2 s^2) - log s - log sqrt(2 pi), term by term in float64."""
    rng = np.random.default_rng(seed)
    value, mean = rng.normal(size=(2, 3, 4, 5, 5)) * deviation
    expected = np.mean(
        -((value - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi)),
        axis=(1, 2, 3),
    )
    actual = denoising.log_density(torch.tensor(value).float(), torch.tensor(mean).float(), torch.full((3,), deviation))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=2e-5)


def test_log_density_is_that_of_torch_distributions_per_element() -> None:
    value, mean = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    std = torch.tensor([0.3, 2.0])
    expected = torch.distributions.Normal(mean, denoising.expand(std, mean)).log_prob(value).flatten(1).mean(1)
    torch.testing.assert_close(denoising.log_density(value, mean, std), expected)


def test_kl_is_that_of_torch_distributions_per_element() -> None:
    first, second = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    std = torch.tensor([0.3, 2.0])
    normal = torch.distributions.Normal
    wide = denoising.expand(std, first)
    expected = torch.distributions.kl_divergence(normal(first, wide), normal(second, wide)).flatten(1).mean(1)
    torch.testing.assert_close(denoising.gaussian_kl(first, second, std), expected)


def test_a_step_without_noise_has_no_likelihood_and_no_nan() -> None:
    """eta = 0, and the last step of a schedule that ends at signal 1, have deviation 0."""
    a, b = torch.tensor([0.5, 0.9]), torch.tensor([0.8, 1.0])
    assert denoising.ddim_std(a, b, 0.0).tolist() == [0.0, 0.0]
    std = denoising.ddim_std(a, b, 1.0)
    assert std[0] > 0 and std[1] == 0
    mean = torch.randn(2, 4, 2, 2, requires_grad=True)
    density = denoising.log_density(torch.randn(2, 4, 2, 2), mean, std)
    density.sum().backward()
    assert density[1] == 0 and mean.grad is not None and mean.grad.isfinite().all() and not mean.grad[1].any()
