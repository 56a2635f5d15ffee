"""The lines of a report for diffusers: they are run as they stand, for every family."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline

from apps import report, report_diffusers
from diffalign.config import SamplerConfig, parse
from diffalign.runs import Run
from diffalign.types import Prompt
from pipelines.loading import load_policy
from tests.tiny_pipelines import SIZE, TINY

FAMILIES = [name for name in TINY if name != "sd3-without-t5"]


def begun(path: Path, sampler: dict[str, Any], pipeline: dict[str, Any] | None) -> Run:
    """A run of the model folder ``model`` that has an adapter, and no sample yet."""
    fields = {"model": "model", "rewards": ["compressibility"], "sampler": sampler, "prompts": {"source": "emoji"}}
    run = Run.create(path, parse(fields | {"objective": {"name": "nft"}}))
    run.write_environment(0, {}, **({} if pipeline is None else {"pipeline": pipeline}))
    (path / "adapter").mkdir()
    return run


def lines(run: Run) -> str:
    """The lines for diffusers, less the one that loads the adapter."""
    found = re.search(r"<code>(from diffusers .*?)</code>", report.render(run), re.DOTALL)
    assert found is not None
    code = html.unescape(found[1])
    assert '\npipe.load_lora_weights("run/adapter")\n' in code
    return code.replace('pipe.load_lora_weights("run/adapter")\n', "")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_lines_make_the_picture_that_the_policy_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, guidance: float
) -> None:
    """Of the same latents and without noise, to one grey level."""
    TINY[name](tmp_path).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    sampler = {"steps": 3, "eta": 0.0, "guidance_scale": guidance, "size": SIZE}
    run = begun(Path("run"), sampler, None)
    policy = load_policy("model", sampler=SamplerConfig(**sampler))
    run.write_environment(0, {}, pipeline=report_diffusers.facts(policy.family))
    rollout = policy.rollout([Prompt("a prompt")], [1])
    ours = np.asarray(rollout.samples[0].image, dtype=float) / 255
    latents = rollout.state["latents"][:, 0]
    if name.startswith("flux"):
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    code = lines(run).replace("image = pipe(", "image = pipe(latents=latents, output_type='np', prompt=")
    known: dict[str, Any] = {"latents": latents}
    exec(code, known)
    np.testing.assert_allclose(known["image"], ours, atol=1.01 / 255)


@pytest.mark.parametrize("pipeline", [None, {"class": "StableDiffusionPipeline", "guidance_embedded": False}])
def test_a_sampler_that_names_no_noise_has_the_default_of_ddim(tmp_path: Path, pipeline: dict[str, Any] | None) -> None:
    """A null was written as ``eta=None``, at which diffusers fails."""
    run = begun(tmp_path / "run", {"steps": 3}, pipeline)
    text = html.unescape(report.render(run))
    assert 'pipe("a prompt", num_inference_steps=3, eta=1.0, guidance_scale=1.0).images[0]' in text


def test_what_a_flow_model_is_shown_with_is_said_to_have_had_noise(tmp_path: Path) -> None:
    flow = {"class": "StableDiffusion3Pipeline", "guidance_embedded": False}
    text = report.render(begun(tmp_path / "noisy", {"steps": 3}, flow))
    assert "diffusers adds no noise" in text and "DDIMScheduler" not in text
    assert "diffusers adds no noise" not in report.render(begun(tmp_path / "still", {"steps": 3, "eta": 0}, flow))
