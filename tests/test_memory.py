"""What keeps memory low, and what is said of it: text encoders that leave, images decoded by themselves, the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apps import build, dry_run
from diffalign.config import RunConfig, SamplerConfig, parse
from diffalign.types import Prompt
from pipelines import visiting
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import base
from pipelines.loading import load_policy
from pipelines.visiting import Visitors
from tests import tiny_pipelines
from tests.tiny_pipelines import SIZE

GPU = torch.device("cuda")


class Travelling(nn.Linear):
    """100 weights of 4 bytes that note where they are sent, and stay: there is no such device here."""

    def __init__(self) -> None:
        super().__init__(10, 10, bias=False)
        self.sent: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Travelling:  # type: ignore[override]
        self.sent.append(torch.device(args[0]).type)
        return self


@pytest.mark.parametrize(
    ("device", "large", "sent"),
    [("cuda", 800, ["cpu", "cuda", "cpu"]), ("cuda", 801, ["cuda"]), ("cpu", 0, ["cpu"]), ("mps", 0, ["mps"])],
)
def test_large_networks_are_on_a_gpu_only_while_they_are_used(
    monkeypatch: pytest.MonkeyPatch, device: str, large: int, sent: list[str]
) -> None:
    """Two networks of 400 bytes, and a limit above or at their 800."""
    monkeypatch.setattr(visiting, "LARGE", large)
    networks = [Travelling(), Travelling()]
    visitors = Visitors(networks, torch.device(device))

    def use() -> None:
        with visitors.here():
            assert all(network.sent[-1] == device for network in networks)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        use()
    assert [network.sent for network in networks] == [sent, sent]


def made(folder: Path, name: str, **sampler: Any) -> DiffusionPolicy:
    settings = SamplerConfig.model_validate({"steps": 2, "size": SIZE, **sampler})
    policy = load_policy(str(tiny_pipelines.save(name, folder)), sampler=settings)
    assert isinstance(policy, DiffusionPolicy)
    return policy


@pytest.mark.parametrize(("name", "count"), [("sd", 1), ("sdxl", 2), ("sd3", 3), ("flux", 2), ("z-image", 1)])
def test_text_encoders_come_once_for_new_prompts_and_not_for_known_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, count: int
) -> None:
    policy = made(tmp_path, name)
    assert len(policy.encoders.networks) == count and policy.encoders.stay
    here = policy.rollout([Prompt("a red ball")], [1]).log_probs
    sent = []
    monkeypatch.setattr(policy.encoders, "_move", lambda device: sent.append(device.type))
    policy.encoders.stay, policy.encoders.device = False, GPU
    assert torch.equal(policy.rollout([Prompt("a red ball")], [1]).log_probs, here) and sent == []
    policy.rollout([Prompt("two"), Prompt("blue cube"), Prompt("a red ball")], [1, 2, 3])
    assert sent == ["cuda", "cpu"]


def test_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same images as in one batch, and the same gradient, to rounding."""
    policy = made(tmp_path, "flux")
    latents = torch.randn(3, *policy.family.latent_shape, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    decode = policy.family.pipeline.vae.decode

    def spied(given: torch.Tensor, **options: Any) -> Any:
        seen.append(len(given))
        return decode(given, **options)

    monkeypatch.setattr(policy.family.pipeline.vae, "decode", spied)
    found = []
    for limit in (SIZE + 1, SIZE):
        monkeypatch.setattr(base, "ONE_BY_ONE", limit)
        asked = latents.clone().requires_grad_()
        pictures = policy.family.decode(asked)
        pictures.square().sum().backward()
        assert asked.grad is not None
        found.append((pictures.detach(), asked.grad))
    assert seen == [3, 1, 1, 1]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def plan(folder: Path, name: str, **fields: Any) -> RunConfig:
    model = folder / name if (folder / name).exists() else tiny_pipelines.save(name, folder)
    (folder / "prompts.txt").write_text("a red ball\na blue ball\n")
    return parse(
        {
            "model": str(model),
            "prompts": {"source": str(folder / "prompts.txt")},
            "rewards": ["compressibility"],
            "sampler": {"steps": 3, "guidance_scale": 3.5, "size": SIZE},
            "trainer": {"epochs": 1, "samples_per_epoch": 4, "batch_size": 4, "micro_batch_size": 3},
            "device": "cpu",
            **fields,
        },
        "test",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "passes"), [("flux", 1), ("flux-schnell", 2)])
def test_guidance_that_is_an_input_takes_no_second_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, passes: int
) -> None:
    """No held-out prompt: 4 samples and their 4 replays, 3 steps each; twice with a second pass."""
    config = plan(tmp_path, name)
    policy = build.policy(config)
    assert isinstance(policy, DiffusionPolicy)
    assert dry_run.calls(config, 0, embedded=policy.family.guidance_embedded) == 24 * passes
    assert dry_run.WORK["image"](policy, config, 0)["denoiser calls"].startswith(f"{24 * passes} ")


def test_the_plan_of_memory_is_made_up_of_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By hand: weights by their bytes; for each trained number a gradient and two moments of 4 bytes.

    Where the text encoders leave the device they stand in for the activations, or these for them.
    """
    config = plan(tmp_path, "sd3", precision="bf16")
    policy = build.policy(config)
    assert isinstance(policy, DiffusionPolicy)
    pipeline, trained = policy.family.pipeline, sum(p.numel() for p in policy.trainable().values())
    # bfloat16 for the frozen transformer and the encoders, float32 for the autoencoder and the adapter
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    frozen = sum(p.numel() for p in policy.family.denoiser.parameters()) - trained
    weights = 2 * frozen + 4 * trained + 4 * sum(p.numel() for p in pipeline.vae.parameters())
    places = pipeline.transformer.pos_embed.pos_embed  # a table of 16 x 16 places, which is no parameter
    assert (places.numel(), places.element_size()) == (16 * 16 * 16, 2)
    weights += 2 * 16 * 16 * 16
    texts = 2 * sum(p.numel() for encoder in encoders for p in encoder.parameters())
    found = dry_run.parts(policy, config)
    assert (found["weights"], found["text encoders"]) == (weights, texts)
    assert (found["gradients and copies"], found["optimiser"]) == (4 * trained, 8 * trained)
    assert found["an epoch"] == 4 * 4 * 4 * 8 * 8 * 4
    assert dry_run.memory(policy, config) == sum(found.values())
    policy.encoders.stay = False
    left = dry_run.parts(policy, config)
    assert left.pop("activations, or text encoders") == max(found.pop("activations"), found.pop("text encoders"))
    assert left == found


def test_activations_kept_twice_count_once() -> None:
    """exp keeps its result, and so does a product that squares it: 100 numbers of 4 bytes, once. No weight counts."""

    class Plain:
        def __init__(self) -> None:
            self.model = nn.Linear(10, 10, bias=False)

    policy: Any = Plain()
    given = torch.ones(10, 10)

    def forward() -> torch.Tensor:
        found = policy.model(given).exp()
        return found * found

    assert dry_run._saved(policy, forward) == 400 + 400  # what the layer was given, and exp's result


def test_a_micro_batch_keeps_what_one_row_keeps_for_each(tmp_path: Path) -> None:
    """In float32 nothing is shared but small things such as timestep tables: 3 rows are 3 times one, to 2 %."""
    config = plan(tmp_path, "sd")
    policy = build.policy(config)
    sizes = []
    for rows in (1, 3):
        settings = config.trainer.model_copy(update={"micro_batch_size": rows})
        sizes.append(dry_run.parts(policy, config.model_copy(update={"trainer": settings}))["activations"])
    assert sizes[1] == pytest.approx(3 * sizes[0], rel=0.02)
