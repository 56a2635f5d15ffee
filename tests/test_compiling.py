"""torch.compile of a denoiser's blocks: the same samples, likelihoods and gradients in every state of the policy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch.utils import cpp_extension

from apps import build as builds
from apps import evaluate
from diffalign import checks
from diffalign.config import AdapterConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError, RefusedError
from diffalign.experience import Rollouts
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Draw, Prompt, Rollout, Sample, StepLikelihood
from pipelines import compiling
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy
from tests import test_cli
from tests.bright import Bright
from tests.test_cli import diffalign
from tests.test_families import Build, build  # noqa: F401 - a fixture

desk = test_cli.desk
LORA = "pytorch_lora_weights.safetensors"
PROMPTS = [Prompt("a red ball"), Prompt("two blue cube")]
STEPS = 2


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks are traced and guarded as always, and the graphs run as they are: quicker to make than C++."""
    yield from backend(monkeypatch, "eager")


def backend(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", name)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def versions() -> int:
    """How many graphs were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def moved(policy: DiffusionPolicy) -> DiffusionPolicy:
    """The trained weights as after updates."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def gradients(policy: DiffusionPolicy, rollout: Rollout) -> list[Tensor]:
    for parameter in policy.trainable().values():
        parameter.grad = None
    for step in range(STEPS):
        policy.step_log_probs(rollout, torch.full((len(rollout), 1), step)).log_probs.sum().backward()
    return [parameter.grad for parameter in policy.trainable().values() if parameter.grad is not None]


def answers(policy: DiffusionPolicy) -> dict[str, Tensor]:
    """All that a policy is asked in a run: sampling as it is, merged and as the reference, replays, likelihoods."""
    rollout = policy.rollout(PROMPTS, [1, 2])
    draw = Draw(torch.tensor([0.3, 0.7]), (5, 6))
    found = {"latents": rollout.state["latents"], "log-probs": rollout.log_probs}
    found["likelihood"] = policy.log_likelihood(rollout.samples, draw).detach()
    with policy.reference():
        found["reference"] = policy.rollout(PROMPTS, [1, 2]).state["latents"]
    with policy.merged():
        found["merged"] = policy.rollout(PROMPTS, [1, 2]).state["latents"]
    found |= {f"gradient {i}": gradient.clone() for i, gradient in enumerate(gradients(policy, rollout))}
    found["one alone"] = policy.rollout(PROMPTS[:1], [1]).state["latents"]
    return found


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they are, or by C++ as in a run."""
    yield from backend(monkeypatch, request.param)


def test_a_compiled_policy_answers_as_it_did_and_compiles_each_state_once(build: Build, made_by: None) -> None:  # noqa: F811
    """Two widths would be two versions each; the tiny U-Net has attention of one width.

    By hand: adapters on, off and merged without gradient; with gradient the first block, whose input has none, and the
    others: 5 versions for two rows, and the first alone for one row: 6. The probe is one more.
    """
    plain = moved(build("sd", adapter=AdapterConfig(rank=2)))
    expected, before = answers(plain), versions()
    policy = moved(build("sd", adapter=AdapterConfig(rank=2), compiled=True))
    assert policy.compiled == {"BasicTransformerBlock": 4}
    assert list(policy.family.denoiser.state_dict()) == list(plain.family.denoiser.state_dict())
    found = answers(policy)
    assert found.keys() == expected.keys() and len(found) > 6
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(found["reference"], found["latents"], atol=1e-3)
    assert versions() - before == 7
    again = answers(policy)
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    rollout = policy.rollout(PROMPTS, [1, 2])
    assert checks.ratio_is_one(policy, rollout, "fp32", micro_batch=2) <= checks.COMPILED
    assert versions() - before == 7


@pytest.mark.parametrize(
    ("objective", "trainer"),
    [
        ({"name": "ppo-clip", "kl_coefficient": 0.1}, {"gradient_checkpointing": True}),
        ({"name": "nft"}, {"ema_decay": 0.5}),
        ({"name": "draft"}, {"gradient_checkpointing": True}),
    ],
)
def test_a_compiled_run_trains_what_another_does(
    build: Build, traced: None, objective: dict[str, Any], trainer: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    """Remembered, averaged and reference weights, and activations that are made again."""
    ended: list[list[Tensor]] = []
    settings = TrainerConfig.model_validate(
        {"epochs": 2, "samples_per_epoch": 3, "batch_size": 3, "micro_batch_size": 2, "learning_rate": 1e-2, **trainer}
    )
    for compiled in (False, True):
        policy = build(
            "sd", SamplerConfig(steps=STEPS, size=16, batch_size=2), adapter=AdapterConfig(rank=2), compiled=compiled,
            gradient_checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
        started = [p.detach().clone() for p in policy.trainable().values()]
        before = versions()
        job = Trainer(
            policy, Rollouts(Bright(), PROMPTS), settings=settings, objective=ObjectiveConfig.model_validate(objective)
        )
        job.train()
        with job.averaged():
            ended.append([p.detach().clone() for p in policy.trainable().values()])
        assert (versions() > before) == compiled
        assert any(not torch.equal(a, b) for a, b in zip(started, ended[-1], strict=True))
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_copy_is_compiled_as_well(build: Build, traced: None) -> None:  # noqa: F811
    policy = build("sd", full=True, compiled=True)
    with policy.reference():
        before = versions()
        policy.rollout(PROMPTS, [1, 2])
        assert versions() > before


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("sd3", {"JointTransformerBlock": 2}),
        pytest.param("flux", {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1}, marks=pytest.mark.slow),
        pytest.param("z-image", {"ZImageTransformerBlock": 3}, marks=pytest.mark.slow),
    ],
)
def test_flow_transformers_are_compiled_by_their_blocks(
    build: Build, traced: None, family: str, blocks: dict[str, int]  # noqa: F811
) -> None:  # fmt: skip
    plain = moved(build(family, adapter=AdapterConfig(rank=2))).rollout(PROMPTS, [1, 2])
    policy, before = moved(build(family, adapter=AdapterConfig(rank=2), compiled=True)), versions()
    assert policy.compiled == blocks
    rollout = policy.rollout(PROMPTS, [1, 2])
    torch.testing.assert_close(rollout.state["latents"], plain.state["latents"], rtol=1e-4, atol=1e-5)
    assert versions() > before
    assert checks.ratio_is_one(policy, rollout, "fp32", micro_batch=2) <= checks.COMPILED


# -- the check of the ratio -------------------------------------------------------------------------------------------


class Drifting:
    """Answers as it sampled, but for what a gradient adds."""

    steps_at_once, compiled = 1, {"Block": 1}

    def __init__(self, drift: float) -> None:
        self.drift, self.asked = drift, list[int]()

    def step_log_probs(self, rollout: Rollout, steps: Tensor) -> StepLikelihood:
        self.asked.append(len(rollout))
        found = rollout.log_probs.gather(1, steps)
        return StepLikelihood(found + self.drift if torch.is_grad_enabled() else found)


def recorded() -> Rollout:
    samples = tuple(Sample(Prompt("x"), seed=seed) for seed in range(4))
    return Rollout(samples, torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool), {})


def test_the_ratio_of_a_compiled_policy_is_asked_with_gradient_too() -> None:
    """exp(4e-6) - 1 = 4e-6 is below 1e-5; exp(1e-3) - 1 = 1.0005e-3 is above. 2 steps of 4 rows, then of 3."""
    policy = Drifting(4e-6)
    assert checks.ratio_is_one(policy, recorded(), "fp32", micro_batch=3) == pytest.approx(4e-6, rel=0.02)  # type: ignore[arg-type]
    assert policy.asked == [4, 4, 3, 3]
    with pytest.raises(RefusedError, match=r"is 0.001, allowed in fp32, compiled, is 1e-05"):
        checks.ratio_is_one(Drifting(1e-3), recorded(), "fp32", micro_batch=3)  # type: ignore[arg-type]


def test_a_policy_that_is_not_compiled_is_held_to_the_bit() -> None:
    policy = Drifting(1e-3)
    policy.compiled = {}
    assert checks.ratio_is_one(policy, recorded(), "fp32", micro_batch=3) == 0  # type: ignore[arg-type]
    assert policy.asked == [4, 4]
    assert checks.rounding(policy, "fp32") == 0  # type: ignore[arg-type]


def test_rounding_beyond_the_clip_range_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checks.ratio_is_one(Drifting(4e-6), recorded(), "fp32", clip_range=1e-6)  # type: ignore[arg-type]
    assert "more than objective.clip_range 1e-06" in caplog.text


# -- refusals, and the command ----------------------------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As where there is no C++ compiler, and nothing that one has made before."""
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_builder.cpp_compiler_search.cache_clear()
    torch.compiler.reset()
    yield
    cpp_builder.cpp_compiler_search.cache_clear()
    torch.compiler.reset()


def test_without_a_compiler_one_sentence_says_so(desk: Path, no_compiler: None) -> None:
    result = diffalign("align", "run.yaml", "--set", "compile=true", "--out", "run")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: compile: torch.compile does not work for device cpu here: ")
    assert "No working C++ compiler" in result.stderr and "leave compile out" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (desk / "run").exists()


def test_torch_does_not_tell_a_cpu_of_the_cuda_toolkit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks for that when it is first imported, as before the first graph of a process; other warnings are heard."""
    monkeypatch.setenv("CUDA_HOME", "/opt/toolkit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpp_extension.logger, "handlers", [caplog.handler])
    look = cpp_extension._find_cuda_home
    with compiling._quiet_about_cuda():
        assert look() == "/opt/toolkit"
        cpp_extension.logger.warning("no ninja")
    assert "no ninja" in caplog.text and "CUDA" not in caplog.text
    look()
    assert "No CUDA runtime is found" in caplog.text


def test_a_dry_run_shows_what_is_compiled_and_compiles_none_of_it(desk: Path, traced: None) -> None:
    before = versions()
    result = diffalign("align", "run.yaml", "--set", "compile=true", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "compiled:            4 x BasicTransformerBlock" in result.output and "\ncompile: true\n" in result.output
    assert "the activations are those without torch.compile" in result.output
    assert versions() - before == 1  # the probe


def test_off_by_default_and_refused_for_texts() -> None:
    assert parse({"model": "m", "prompts": {"source": "emoji"}, "rewards": ["compressibility"]}).compile is False
    with pytest.raises(ConfigError, match="compile: embedded:findings-lm makes texts"):
        load_policy("embedded:findings-lm", compiled=True)


def test_a_model_without_named_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="diffusers names no blocks of a Linear"):
        compiling.compile_blocks([torch.nn.Linear(1, 1)], torch.device("cpu"))


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_precision_rounds_where_it_does_without_compiling(
    build: Build, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Left to itself, torch rounds fewer values of a chain, others with gradient: the ratio was 0.028 away from 1."""
    for _ in backend(monkeypatch, "inductor"):
        policy = moved(build("sd", adapter=AdapterConfig(rank=2), precision="bf16", compiled=True))
        assert checks.ratio_is_one(policy, policy.rollout(PROMPTS, [1, 2]), "bf16", micro_batch=2) < 1e-3


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """3 samples in batches of 2: by the second epoch both sizes are known, in a resumed process neither is. Where a
    version for any size took the place of the first, the two would round differently.
    """
    ended: list[dict[str, Tensor]] = []
    settings = TrainerConfig(samples_per_epoch=3, batch_size=3, micro_batch_size=4, learning_rate=1e-2)
    for parts in ([2], [1, 2]):
        (tmp_path / str(len(parts))).mkdir()
        for epochs in parts:
            for _ in backend(monkeypatch, "inductor"):
                policy = build(
                    "sd", SamplerConfig(steps=STEPS, size=16, batch_size=2), adapter=AdapterConfig(rank=2),
                    compiled=True,
                )  # fmt: skip
                run = Run(tmp_path / str(len(parts)))
                job = Trainer(policy, Rollouts(Bright(), PROMPTS), settings=settings, run=run)
                job.resume()
                job.train(epochs)
        ended.append({name: p.detach().clone() for name, p in policy.trainable().items()})
    assert all(torch.equal(ended[1][name], tensor) for name, tensor in ended[0].items())


def test_the_command_trains_evaluates_and_saves_as_ever(desk: Path, traced: None) -> None:
    made = diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--out", "plain")
    assert made.exit_code == 0 and "compil" not in made.stderr
    made = diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--set", "compile=true", "--out", "run")
    assert made.exit_code == 0, made.stderr
    said = made.stderr.splitlines()
    assert said[0].startswith("compiling 4 x BasicTransformerBlock: whatever is asked"), said
    assert sum("compiling" in line for line in said) == 1
    plain, compiled = (load_file(desk / run / "adapter" / LORA) for run in ("plain", "run"))
    assert plain.keys() == compiled.keys()
    for name, tensor in compiled.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)
    measured = diffalign("evaluate", "run", "--out", "evaluated")
    assert measured.exit_code == 0 and "compiling 4 x BasicTransformerBlock" in measured.stderr, measured.output
    judged = evaluate.sampler("run", builds.configuration("run"))
    assert isinstance(judged, DiffusionPolicy) and judged.compiled == {"BasicTransformerBlock": 4}
    again = ["align", "run.yaml", "--resume", "--out", "run", "--set", "compile=false"]
    refused = diffalign(*again)
    assert refused.exit_code == 2 and "--resume: compile is True in" in refused.stderr
