"""How likely a diffusion policy says that a whole image is: minus the denoising error at a shared draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler

from diffalign import images
from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import InputError
from diffalign.types import Draw, Prompt, Sample
from pipelines.diffusion import DiffusionPolicy

MakePolicy = Callable[..., DiffusionPolicy]
DRAW = Draw(torch.tensor([0.1, 0.7]), (11, 12))


def pair(size: int = 16) -> list[Sample]:
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    texts = ("a red ball", "two blue cube")
    return [Sample(Prompt(text), image=image) for text, image in zip(texts, images.to_pil(pixels), strict=True)]


def perturb(policy: DiffusionPolicy) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_it_is_the_denoising_error_of_diffusers_own_parts(make: MakePolicy, prediction: str) -> None:
    """Noise added, and the target formed, by diffusers' DDPMScheduler: time 0.1 of 1000 steps is timestep 100."""
    policy, samples = make(prediction), pair()
    found = policy.log_likelihood(samples, DRAW)
    pipeline = policy.family.pipeline
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        pixels = 2 * images.to_tensor([s.image for s in samples if s.image is not None]) - 1
        clean = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (11, 12)])
        steps = torch.tensor([100, 700])
        text = pipeline.text_encoder(
            pipeline.tokenizer(
                [s.prompt.text for s in samples], padding="max_length", return_tensors="pt"
            ).input_ids
        )[0]  # fmt: skip
        output = pipeline.unet(scheduler.add_noise(clean, noise, steps), steps, text).sample
        target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, steps)}
    expected = -((output - target[prediction]) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_sample_does_not_depend_on_the_others(make: MakePolicy) -> None:
    policy, samples = make(), pair()
    together = policy.log_likelihood(samples, DRAW)
    alone = policy.log_likelihood(samples[1:], Draw(DRAW.time[1:], DRAW.seeds[1:]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


def test_the_draw_is_all_the_randomness(make: MakePolicy) -> None:
    policy, samples = make(), pair()
    assert torch.equal(policy.log_likelihood(samples, DRAW), policy.log_likelihood(samples, DRAW))
    other = policy.log_likelihood(samples, Draw(DRAW.time, (11, 13)))
    assert other[0] == policy.log_likelihood(samples, DRAW)[0] and other[1] != policy.log_likelihood(samples, DRAW)[1]


def test_the_reference_is_the_base_and_gradients_reach_the_adapter(make: MakePolicy) -> None:
    base = make().log_likelihood(pair(), DRAW).detach()
    policy = make(adapter=AdapterConfig())
    assert torch.equal(policy.log_likelihood(pair(), DRAW).detach(), base)
    perturb(policy)
    likelihood = policy.log_likelihood(pair(), DRAW)
    assert not torch.equal(likelihood.detach(), base)
    with policy.reference():
        assert torch.equal(policy.log_likelihood(pair(), DRAW).detach(), base)
    likelihood.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.trainable().values())


def test_guidance_plays_no_part(make: MakePolicy) -> None:
    plain, guided = (make(sampler=SamplerConfig(guidance_scale=scale)) for scale in (1.0, 5.0))
    assert torch.equal(plain.log_likelihood(pair(), DRAW), guided.log_likelihood(pair(), DRAW))


def test_an_image_of_another_size_is_fitted(make: MakePolicy) -> None:
    assert make().log_likelihood(pair(40), DRAW).isfinite().all()


def test_a_sample_without_image_is_refused(make: MakePolicy) -> None:
    with pytest.raises(InputError, match="1 of 2 samples have no image"):
        make().log_likelihood([pair()[0], Sample(Prompt("a"), text="b")], DRAW)


def test_training_on_it_makes_an_image_likelier(make: MakePolicy) -> None:
    """SFT in miniature: 30 steps up the likelihood of one image at random draws; judged at 64 fresh draws."""
    policy, sample = make(adapter=AdapterConfig(rank=8, targets="all")), pair()[0]

    def fresh(seed: int, count: int) -> Draw:
        return Draw(torch.rand(count, generator=torch.Generator().manual_seed(seed)), tuple(range(seed, seed + count)))

    judged = fresh(10_000, 64)
    before = policy.log_likelihood([sample] * 64, judged).mean().item()
    optimiser = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for step in range(30):
        optimiser.zero_grad()
        (-policy.log_likelihood([sample] * 8, fresh(100 * step, 8)).mean()).backward()
        optimiser.step()
    assert policy.log_likelihood([sample] * 64, judged).mean().item() > before + 0.02


def test_a_fresh_sample_has_the_latents_that_it_was_decoded_from(make: MakePolicy) -> None:
    """Encoding its pixels would blur them; a copy of the image is a stranger, and is encoded."""
    policy = make(sampler=SamplerConfig(steps=2))
    rollout = policy.rollout([Prompt("a red ball"), Prompt("two blue cube")], [1, 2])
    torch.testing.assert_close(policy._latents(rollout.samples), rollout.state["latents"][:, -1], rtol=0, atol=0)
    copies = [Sample(s.prompt, image=s.image.copy()) for s in rollout.samples if s.image is not None]
    assert not torch.equal(policy._latents(copies), policy._latents(rollout.samples))
