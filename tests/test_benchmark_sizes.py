"""What the benchmark of real sizes measures, on models that take no time."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apps import dry_run
from benchmarks import sizes, sizes_models, sizes_page, sizes_side, trl_ddpo, trl_ddpo_page
from benchmarks.environment import WorkerError
from benchmarks.measuring import Memory
from benchmarks.sizes_models import MODELS, Settings
from pipelines.embedded import tokenizer as tokenizers
from tests import tiny_pipelines
from tests.tiny_pipelines import SIZE

RECORDED = Path(sizes.__file__).parent / "results" / "sizes.json"


def test_encoders_and_autoencoders_have_the_sizes_that_are_published(tmp_path: Path) -> None:
    """Parameters of CLIP ViT-L/14's text half, of OpenCLIP ViT-bigG/14's with its projection, and of the autoencoders
    of Stable Diffusion 1.5 and FLUX, which has 16 channels and no convolutions around its latents.
    """
    words = tokenizers.build(["a red ball"] * 3, tmp_path)
    with torch.device("meta"):
        parts = [
            sizes_models.text_encoder(words, sizes_models.CLIP_L),
            sizes_models.text_encoder(words, sizes_models.CLIP_BIG_G, projected=True),
            sizes_models.autoencoder(4),
            sizes_models.autoencoder(16, use_quant_conv=False, use_post_quant_conv=False),
        ]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        123_060_480, 694_659_840, 83_653_863, 83_819_683,
    ]  # fmt: skip


def test_a_model_is_made_of_half_precision_and_loads_as_a_pipeline_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tiny pipeline in the place of a large one; nothing half made is left, and the default precision stays."""
    from pipelines.loading import load_family

    def tiny(tokenizer: Any, side: int | None) -> Any:
        assert side == 16 and tokenizer.model_max_length == 77
        return tiny_pipelines.stable_diffusion(tmp_path / "words")

    monkeypatch.setattr(sizes_models, "MODELS", {"tiny": sizes_models.Model("tiny", tiny)})
    folder = sizes_models.make("tiny", tmp_path / "made" / "tiny", 16)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert torch.get_default_dtype() == torch.float32
    config = json.loads((folder / "model_index.json").read_text())
    assert config["_class_name"] == "StableDiffusionPipeline"
    assert next(load_family(str(folder)).denoiser.parameters()).dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory has a peak to forget on Linux only")
def test_a_peak_is_that_since_the_last_was_forgotten() -> None:
    memory = Memory(torch.device("cpu"))
    large = torch.ones(50_000_000)  # 200 MB
    del large
    assert memory.peak() > memory.now() + 150e6
    memory.forget()
    assert memory.peak() < memory.now() + 50e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the allocator cannot tell what is in use")
def test_what_is_live_is_what_was_allocated_and_not_freed() -> None:
    """10 tensors of 4 MB from the allocator's heap: freed, they may stay resident, but are in use no more."""
    memory = Memory(torch.device("cpu"))
    before = memory.live()
    several = [torch.ones(1_000_000) for _ in range(10)]
    assert memory.live() - before == pytest.approx(40e6, rel=0.05)
    several.clear()
    assert memory.live() - before == pytest.approx(0, abs=2e6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny flow model: 2 images of 3 steps under guidance, whose last step has no noise."""
    settings = Settings(pixels=SIZE, steps=3, micro_batch=3, rank=2, matmul=64)
    ready, answer = sizes_side.build(tiny_pipelines.save("sd3-without-t5", tmp_path_factory.mktemp("model")), settings)
    found = {"model": "sd35-medium", "title": "Tiny", "note": "", "date": "2026-01-01", "ready": ready}
    machine = {"cpu": "a", "cores": 2, "memory_gb": 8, "threads": 1}
    found |= {"machine": machine, "warm_up": answer({}), "counted": answer({"count": True})}
    return found | {"timed": [answer({}), answer({})]} | answer({"estimate": True})


def test_an_iteration_is_that_of_the_trainer(measured: dict[str, Any]) -> None:
    """Sampling sends 2 images through 3 steps, learning through the 2 that have noise, guidance both twice."""
    assert measured["ready"]["trained_steps"] == 2
    assert measured["ready"]["latents"] == measured["timed"][0]["latents"] == 2 * (2 * 3 + 2 * 2)
    assert measured["warm_up"]["latents"] > measured["timed"][0]["latents"]  # with the start-up checks
    sizes.check(measured)
    assert all(answer["grad_norm"] > 0 for answer in measured["timed"])


def test_operations_of_a_rollout_are_those_of_its_steps_and_of_decoding(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    """3 calls of the denoiser with 2 images under guidance, and the decoder once; all prompts are encoded before."""
    folder = tiny_pipelines.save("sd3-without-t5", tmp_path)
    side = sizes_side.Side(folder, Settings(pixels=SIZE, steps=3, rank=2, matmul=64))
    family = side.policy.family
    latents, text = torch.zeros(4, *family.latent_shape), family.encode_text(["a"] * 4)
    with torch.no_grad(), FlopCounterMode(display=False) as call:
        family.denoise(latents, torch.full((4,), 500.0), text)
    with torch.no_grad(), FlopCounterMode(display=False) as decoding:
        family.decode(latents[:2])
    flop = measured["counted"]["flop"]
    assert flop["rollout"] == 3 * call.get_total_flops() + decoding.get_total_flops()
    assert flop["reward"] == 0 < flop["update"]


def test_the_estimate_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dry_run, "parts", lambda policy, config: {"weights": 3_000_000, "rank": config.adapter.rank})
    folder = tiny_pipelines.save("sd", tmp_path)
    side = sizes_side.Side(folder, Settings(pixels=SIZE, rank=7))
    assert side.estimate() == {"estimate_mb": {"weights": 3.0, "rank": 7e-6}}


@pytest.mark.parametrize(("field", "value", "words"), [("latents", 19, "19 latents"), ("updates", 3, "no update")])
def test_other_work_than_was_asked_for_is_refused(measured: dict[str, Any], field: str, value: int, words: str) -> None:
    broken = measured | {"timed": [measured["timed"][0], measured["timed"][1] | {field: value}]}
    with pytest.raises(WorkerError, match=words):
        sizes.check(broken)


def test_the_page_divides_by_what_a_product_reached_beside_it(measured: dict[str, Any]) -> None:
    """8e9 operations in 2 s beside products at 8e9/s are 50 %, in 4 s beside products at 4e9/s as well.

    With two threads that have half of the processors each, products take 1 processor second a second, where they
    could take 2: others were there. 8e9 operations in 1 processor second, beside 16e9 in one, are 50 % again.
    """
    parts = {name: {"wall": 2.0, "cpu": 1.0} for name in ("rollout", "reward", "update")}
    slow = {name: {"wall": 4.0, "cpu": 1.0} for name in parts}
    timed = [
        {
            "parts": each,
            "matmul": {"wall": product, "cpu": 16e9},
            "live_mb": 850.0,
            "load_average": 1.0,
            "peak_mb": dict.fromkeys(each, peak),
        }
        for each, product, peak in ((parts, 8e9, 1000.0), (slow, 4e9, 1100.0))
    ]
    counted = {"flop": {"rollout": 8e9, "reward": 0, "update": 16e9}}
    alone = [each | {"matmul": {"wall": each["matmul"]["wall"], "cpu": each["matmul"]["wall"]}} for each in timed]
    ready = measured["ready"] | {"start_mb": 100.0, "start_live_mb": 50.0, "loading_peak_mb": 600.0}
    found = measured | {
        "timed": alone,
        "counted": counted,
        "ready": ready,
        "estimate_mb": {"weights": 700, "rest": 100},
    }
    assert sizes_page.share(found, "rollout") == 0.5
    assert sizes_page.share(found, "update") == 1.0
    assert sizes_page.memory(found) == {
        "estimate": 800, "loading": 500, "live": 800, "rollout": 1000, "update": 1000
    }  # fmt: skip
    page = sizes_page.page([found])
    assert (
        "| Tiny, fp32, pixels 16, steps 3, micro-batch 3, rank 2 | 0.80 | 0.80 | 1.00 | 1.00 | 1.25 | 1.00 | 0.50 |"
        in page
    )
    assert "| 2 × 3 | 3.0 s | 3.0 s | 0.222 | 0.0 + 0.0 | 50% | 100% | 6 GFLOP/s |" in page
    busy = found | {"timed": timed, "machine": measured["machine"] | {"threads": 2}}
    assert (sizes_page.clock(found), sizes_page.clock(busy)) == ("wall", "cpu")
    assert sizes_page.share(busy, "rollout") == 0.5
    assert "| 3.0 s (1.0) | 3.0 s (1.0) | 0.222 | 0.0 + 0.0 | 50% | 100% | 16 GFLOP/s |" in sizes_page.page([busy])


def test_a_later_measurement_takes_the_place_of_its_like_alone(measured: dict[str, Any]) -> None:
    def one(model: str, precision: str, date: str) -> dict[str, Any]:
        settings = measured["ready"]["settings"] | {"precision": precision}
        return measured | {"model": model, "date": date, "ready": measured["ready"] | {"settings": settings}}

    before = [one("sdxl", "fp32", "old"), one("sdxl", "bf16", "old")]
    found = sizes.merged(sizes.merged(before, one("sdxl", "fp32", "new")), one("sd15", "fp32", "new"))
    told = [(each["model"], each["ready"]["settings"]["precision"], each["date"]) for each in found]
    assert told == [("sd15", "fp32", "new"), ("sdxl", "bf16", "old"), ("sdxl", "fp32", "new")]


def test_a_model_is_measured_in_its_own_precisions_where_none_is_asked_for() -> None:
    runs = sizes.planned(sizes.parse(["--models", "sd15", "sd35-medium", "--pixels", "512", "--device", "cuda"]))
    assert [(name, settings.precision) for name, settings in runs] == [
        ("sd15", "fp32"), ("sd35-medium", "fp32"), ("sd35-medium", "bf16"),
    ]  # fmt: skip
    assert {(settings.pixels, settings.device) for _, settings in runs} == {(512, "cuda")}
    asked = sizes.planned(sizes.parse(["--models", "flux", "--precision", "fp16", "--guidance-scale", "2"]))
    assert [(settings.precision, settings.guidance_scale) for _, settings in asked] == [("fp16", 2)]
    assert sizes.planned(sizes.parse(["--models", "flux"]))[0][1].guidance_scale == MODELS["flux"].guidance_scale


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "1"], "--images is at least 2"),
        (["--micro-batch", "0"], "--micro-batch is at least 1; got 0"),
        (["--models", "sd9"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        sizes.parse(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(not RECORDED.is_file(), reason="it has not been run yet")
def test_the_recorded_page_is_that_of_the_recorded_results() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert sizes_page.page(recorded) == RECORDED.parents[1].joinpath("sizes.md").read_text()
    for found in recorded:
        sizes.check(found)


# -- DDPO against TRL at a real size --------------------------------------------------------------------------------


def test_a_real_size_has_a_section_of_its_own_and_leaves_the_first_table_as_it_is(tmp_path: Path) -> None:
    """The recorded comparison, in the place of one at a real size, twice as slow at both sides: 3.6 s become 7.2 s."""
    recorded = json.loads((RECORDED.parent / "trl_ddpo.json").read_text())
    recorded.pop("sizes", None)
    slow = json.loads(json.dumps(recorded))
    for answer in (answer for side in slow["equal"].values() for answer in side):
        answer["parts"] = {
            part: {clock: 2 * value for clock, value in told.items()} for part, told in answer["parts"].items()
        }
    slow |= {"setup": slow["setup"] | {"pixels": 128, "matmul": 4096}, "best": {}}
    first, page = (trl_ddpo_page.page(recorded | {"sizes": sizes}) for sizes in ({}, {"sd15": slow}))
    assert page.startswith(first)
    section = page.removeprefix(first)
    assert section.startswith("\n## At the size of Stable Diffusion 1.5\n") and section.count("\n## ") == 1
    assert "images of 128×128 pixels" in " ".join(section.split()) and "4096×4096" in section
    seconds = trl_ddpo_page.seconds(recorded["equal"]["diffalign"], "iteration", "wall")
    assert f"| {2 * seconds:.3f} |" in section and f"| {seconds:.3f} |" in first


@pytest.mark.parametrize("arguments", [["--size", "sd15"], ["--page-only"]])
def test_a_comparison_that_was_never_made_has_no_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        trl_ddpo.main([*arguments, "--out", str(tmp_path / "none.json"), "--page", str(tmp_path / "page.md")])
    assert ended.value.code == 2
    assert "measure the tiny model first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
