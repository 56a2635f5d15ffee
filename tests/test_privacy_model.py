"""The model behind a dataset, asked: by the command, with a tiny model of its own, and to a verdict."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from apps import dataset_privacy
from apps.cli import main
from apps.dataset_features import Looks, Made, source
from apps.generate_models import Makers
from apps.progress import Status
from diffalign.errors import ConfigError
from diffalign.sampling import SamplerConfig
from diffalign.synthesis import release, rows, spec, utility
from diffalign.types import Prompt
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_policy
from tests import tiny_pipelines
from tests.synthetic import drawn, generated

CASES = 300
"""Three of them are nearer to training than 99 % of held-out ones, by chance; up to seven may be."""
FIELDS: dict[str, Any] = {
    "name": "tiny",
    "cases": CASES,
    "axes": {"count": ["one", "two", "three"], "colour": ["red", "green", "blue"], "thing": ["ball", "cube"]},
    "image": {
        "template": "{count} {colour} {thing}",
        "negative": "a",
        "sampler": {"steps": 2, "eta": 0, "size": 16, "guidance_scale": 2},
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """How well networks learn is another file's business, and what is kept stays among the tests."""
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(utility, "STEPS", 3)
    monkeypatch.setattr(utility, "NETWORKS", 1)


def run(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(main, [*map(str, arguments)])
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.output


def made_by(model: Path, folder: Path) -> Path:
    file = folder / "spec.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**FIELDS, "image": {**FIELDS["image"], "model": str(model)}}), encoding="utf-8")
    code, told = run("generate", file, "--out", folder / "made")
    assert code == 0, told
    return folder / "made"


def pictures(folder: Path, images: Sequence[tuple[str, Image.Image]]) -> Path:
    """Images, and a table with the captions of those that have one."""
    folder.mkdir(parents=True)
    lines = []
    for number, (caption, image) in enumerate(images):
        image.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def dreams(policy: DiffusionPolicy, seeds: range) -> list[tuple[str, Image.Image]]:
    """Images of a model, with the captions that a dataset of ``FIELDS`` asks for."""
    captions = [" ".join(words) for words in itertools.product(*FIELDS["axes"].values())]
    prompts = [Prompt(captions[seed % len(captions)], negative="a") for seed in seeds]
    samples = policy.rollout(prompts, list(seeds)).samples
    return [(sample.prompt.text, sample.image) for sample in samples if sample.image is not None]


def test_a_model_that_knows_none_of_the_images_passes_by_the_command(tmp_path: Path) -> None:
    """Training, held-out and synthetic images are of one distribution, and the model (random weights) learned nothing:
    the null of every measure. By chance one set in twenty would be left open; this one is not.
    """
    model = tiny_pipelines.save("sd", tmp_path / "model")
    made = made_by(model, tmp_path)
    policy = load_policy(str(model), sampler=SamplerConfig(**FIELDS["image"]["sampler"]))
    assert isinstance(policy, DiffusionPolicy)
    training = pictures(tmp_path / "training", dreams(policy, range(1000, 1300)))
    real = pictures(tmp_path / "real", dreams(policy, range(2000, 2400)))
    code, told = run(
        "evaluate", made, "--against", real, "--training", training, "--model", model, "--training-is-whole"
    )
    assert code == 0, told
    found = release.read(made)
    assert found.verdict == "passed", found.why
    assert "is the word of" in found.why and "rows not" in found.why
    assert {name: one["verdict"] for name, one in found.measures.items()} == {
        "nearest_features": "passed", "nearest_pixels": "passed", "copies": "passed", "authenticity": "described",
        "extraction": "passed", "membership": "passed",
    }  # fmt: skip
    assert found.measures["extraction"]["images"] == dataset_privacy.PROMPTS * dataset_privacy.SEEDS
    assert found.measures["membership"]["n"] == 300


def collapsed(folder: Path) -> Path:
    """A model that gives one image for a prompt, whatever the noise: the noise does not get into it."""
    folder = tiny_pipelines.save("sd", folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    torch.nn.init.zeros_(pipeline.unet.conv_in.weight)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample", clip_sample=False)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return folder


def test_a_model_that_gives_its_training_images_back_fails_by_the_command(tmp_path: Path) -> None:
    """Its 18 prompts give 18 images; they are in the training set, and all cases are among them."""
    model = collapsed(tmp_path / "model")
    made = made_by(model, tmp_path)
    cases = Made(made)
    own = {case.prompt: cases.picture(i) for i, case in enumerate(cases.cases)}
    assert len(own) == 18
    noise = [("", drawn(number, size=16)) for number in range(420)]
    training = pictures(tmp_path / "training", [*noise[:200], *own.items()])
    real = pictures(tmp_path / "real", noise[200:])
    code, told = run("evaluate", made, "--against", real, "--training", training, "--model", model)
    assert code == 0, told
    found = release.read(made)
    assert found.verdict == "failed"
    assert found.measures["copies"]["value"] == 1 and found.measures["extraction"]["value"] == 1
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, told = run("evaluate", made, "--against", real, "--training", training, "--model", model)
    assert code == 2 and "its hash is another" in " ".join(told.split())


def facts_of(**image: Any) -> dict[str, Any]:
    """What the manifest says of a model of the table-conditioned kind."""
    wanted = spec.parse(
        {
            "cases": 4, "axes": {"plane": ["axial", "coronal"]}, "precision": "bf16",
            "image": {"model": "embedded:brain-mr", "template": "{plane}", **image},
        }
    )  # fmt: skip
    makers = Makers(wanted)
    assert makers.manifest(rows.survey(wanted)).rows_from == "axes"
    return makers.facts["image"]


def test_the_model_is_asked_as_it_was_when_the_images_were_made(tmp_path: Path) -> None:
    made = Made(generated(tmp_path / "made", 8).folder)
    facts = facts_of(condition="table", sampler={"steps": 3, "guidance_scale": 1.5})
    assert (facts["condition"], facts["negative"]) == ("table", "")

    def told(facts: dict[str, Any]) -> DiffusionPolicy:
        made.generated.manifest = replace(made.generated.manifest, models={"image": facts})
        return dataset_privacy.image_model(made, None)

    policy = told(facts)
    assert policy.table is not None and policy.precision == torch.bfloat16
    assert (policy.sampler.steps, policy.sampler.guidance_scale) == (3, 1.5)
    for name in ("condition", "negative", "precision"):
        with pytest.raises(ConfigError, match=name):
            told({key: value for key, value in facts.items() if key != name})
    with pytest.raises(ConfigError, match="hash is another"):
        told({**facts, "parts": {**facts["parts"], "unet": "sha256:" + "0" * 64}})


def looks(rows: list[dict[str, Any]]) -> Looks:
    n = len(rows)
    return Looks(np.zeros((n, 1)), np.zeros((n, 1)), (b"",) * n, tuple(rows), tuple(range(n)))


def test_prompts_are_rows_for_a_model_of_rows_and_are_drawn_from_everywhere() -> None:
    policy = load_policy("embedded:brain-mr", condition="table")
    assert isinstance(policy, DiffusionPolicy) and policy.table is not None
    known = source("world:brain-mr?cases=40", training=True)
    some = looks([dict(known.row(i)) for i in range(40)])
    prompts = dataset_privacy._prompts(policy, known, some, "")
    assert all(set(prompt.attributes) <= set(policy.table.columns) for prompt in prompts.values())
    assert all(prompt.attributes for prompt in prompts.values())
    policy.table = None
    texts = dataset_privacy._prompts(policy, known, some, "noise")
    assert len(texts) == dataset_privacy.PROMPTS and {prompt.negative for prompt in texts.values()} == {"noise"}
    assert list(texts) != list(dict.fromkeys(known.caption(i) for i in range(40)))[: dataset_privacy.PROMPTS]


def test_losses_are_the_mean_denoising_errors_of_images_drawn_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image's loss is that of the image alone; of 40 files the 8 that are asked are not the first 8."""
    monkeypatch.setattr(dataset_privacy, "ASKED", 8)
    policy = load_policy("embedded:brain-mr")
    assert isinstance(policy, DiffusionPolicy)
    known = source("world:brain-mr?cases=40", training=True)
    some = looks([{}] * 40)
    asked: list[int] = []
    picture = known.picture
    monkeypatch.setattr(known, "picture", lambda i: (asked.append(i), picture(i))[1])
    with Status() as status:
        found = dataset_privacy.losses(policy, known, some, status, "training")
        assert len(found) == 8 and (found > 0).all() and sorted(asked) != list(range(8)) and len(set(asked)) == 8
        assert dataset_privacy.losses(policy, known, some, status, "training") == pytest.approx(found, rel=1e-6)
