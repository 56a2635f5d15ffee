"""What is particular to a family: what its denoiser is told, what is refused, and how texts are kept."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.sampling import WindowConfig
from diffalign.types import Prompt
from pipelines import diffusion, loading
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import FAMILIES, Conditioning, joined
from pipelines.loading import load_adapter, load_family, load_policy
from pipelines.schedules import Ddim, Flow, Schedule
from pipelines.table_encoder import FOLDER, TableEncoder
from tests import tiny_pipelines
from tests.tiny_pipelines import SIZE

BALL = Prompt("a red ball")
Build = Callable[..., DiffusionPolicy]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A policy over a tiny pipeline, not saved in between."""

    def build(name: str, sampler: SamplerConfig | None = None, **options: object) -> DiffusionPolicy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = tiny_pipelines.TINY[name](tmp_path / name)
        family = FAMILIES[type(pipeline).__name__](pipeline)
        return DiffusionPolicy(family, sampler=sampler or SamplerConfig(steps=2, size=SIZE), **options)  # type: ignore[arg-type]

    return build


def calls_of(policy: DiffusionPolicy) -> list[tuple[Tensor, Conditioning]]:
    """What the denoiser is given from now on."""
    seen, original = [], policy.family.denoise

    def spy(latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        seen.append((latents, text))
        return original(latents, timesteps, text)

    policy.family.denoise = spy  # type: ignore[method-assign]
    return seen


# -- what is refused ----------------------------------------------------------------------------------------------


def test_a_pipeline_of_another_class_is_refused_with_those_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(
        ConfigError, match="is a PixArtSigmaPipeline; what can be aligned is StableDiffusionPipeline, "
    ) as caught:
        load_family(str(tmp_path))
    assert all(name in str(caught.value) for name in FAMILIES) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_family(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_kind_of_noise_for_flows_is_refused_where_there_is_none(build: Build, name: str) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.noise cps is for flow models, and this model samples by DDIM"):
        build(name, SamplerConfig(noise="cps", size=SIZE))


@pytest.mark.parametrize(
    ("name", "size", "near"), [("sd", 17, 16), ("flux", 18, 16), ("sd3", 23, 24), ("z-image", 9, 8)]
)
def test_a_size_that_does_not_divide_is_refused(build: Build, name: str, size: int, near: int) -> None:
    """A latent is 2 pixels wide here, and a token of a transformer 2 latents."""
    with pytest.raises(ConfigError, match=rf"sampler\.size {size} is no multiple of the . pixels.* that is: {near}"):
        build(name, SamplerConfig(size=size))


def test_a_size_beyond_the_places_that_a_model_knows_is_refused(build: Build) -> None:
    """16 tokens along a side, of 2 latents of 2 pixels each, are 64 pixels."""
    build("sd3", SamplerConfig(steps=1, size=64)).rollout([BALL], [1])
    with pytest.raises(ConfigError, match=r"sampler\.size 68 is more than the 64 pixels"):
        build("sd3", SamplerConfig(size=68))


def test_a_window_on_a_step_that_never_has_noise_is_refused(build: Build) -> None:
    """SDXL's schedule, as it is saved here, ends at an image."""
    with pytest.raises(ConfigError, match=r"sampler\.window is on the last of the 4 steps"):
        build("sdxl", SamplerConfig(steps=4, size=SIZE, window=WindowConfig(start=3, steps=1)))


def test_a_window_is_for_every_kind_of_model(build: Build) -> None:
    """Outside it a U-Net's steps are those of eta 0, and have no likelihood."""
    policy = build("sd", SamplerConfig(steps=3, size=SIZE, window=WindowConfig(start=1, steps=1)))
    rollout, plain = (
        policy.rollout([BALL], [1]),
        build("sd", SamplerConfig(steps=3, size=SIZE, eta=0)).rollout([BALL], [1]),
    )
    assert rollout.mask.tolist() == [[False, True, False]] and not plain.mask.any()
    found, expected = rollout.state["latents"][0], plain.state["latents"][0]
    assert torch.equal(found[:2], expected[:2]) and not torch.allclose(found[2], expected[2], atol=1e-2)


def test_a_negative_prompt_has_no_use_where_guidance_is_an_input(build: Build) -> None:
    policy = build("flux")
    with pytest.raises(ConfigError, match="negative 'blurry' belongs to the unconditional pass of guidance"):
        policy.rollout([Prompt("a red ball", negative="blurry")], [1])


def test_a_table_encoder_is_for_denoisers_that_read_tokens_alone(tmp_path: Path) -> None:
    folder = tiny_pipelines.save("sdxl", tmp_path)
    TableEncoder({"thing": ["ball", "cube"]}, torch.tensor([[1], [2]]), tokens=2, width=48).save(folder / FOLDER)
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline, whose denoiser reads more of a text"):
        load_policy(str(folder), condition="table")


def test_an_adapter_of_another_family_is_refused(build: Build, tmp_path: Path) -> None:
    saved = build("sd3", adapter=AdapterConfig()).save(tmp_path / "run")
    with pytest.raises(InputError, match="does not fit the model"):
        load_adapter(build("z-image", adapter=AdapterConfig()), saved)


def test_unknown_targets_are_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets"):
        build("flux", adapter=AdapterConfig(targets=["no_such_layer"]))


# -- guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [("flux", 1), ("flux-schnell", 2), ("sd3", 2)])
def test_guidance_costs_a_second_pass_only_where_it_is_no_input(build: Build, name: str, rows: int) -> None:
    policy = build(name, SamplerConfig(steps=2, size=SIZE, guidance_scale=3.5))
    seen = calls_of(policy)
    policy.rollout([BALL], [1])
    assert [len(latents) for latents, _ in seen] == [rows] * 2
    told = [None if text.guidance is None else text.guidance.tolist() for _, text in seen]
    assert told == ([[3.5]] * 2 if name == "flux" else [None] * 2)


def test_a_distilled_model_is_told_the_same_guidance_when_its_likelihood_is_asked(build: Build) -> None:
    """Otherwise it would be trained at another guidance than it samples with."""
    from diffalign.types import Draw

    policy = build("flux", SamplerConfig(steps=2, size=SIZE, guidance_scale=3.5))
    samples, seen = policy.rollout([BALL], [1]).samples, calls_of(policy)
    policy.log_likelihood(samples, Draw(torch.tensor([0.5]), (1,)))
    assert seen[0][1].guidance is not None and seen[0][1].guidance.tolist() == [3.5]


# -- conditions ---------------------------------------------------------------------------------------------------


def test_sdxl_is_told_the_size_as_its_own_pipeline_does(build: Build) -> None:
    policy = build("sdxl")
    pipeline = policy.family.pipeline
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    expected = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 32)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["added_cond_kwargs"]), with_kwargs=True
    )
    policy.rollout([BALL, BALL], [1, 2])
    assert torch.equal(seen[0]["time_ids"], expected.expand(2, -1))
    assert seen[0]["text_embeds"].shape == (2, 32)


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_text_of_sdxl_is_zeros_where_the_checkpoint_says_so(build: Build, zeros: bool) -> None:
    """Against the unconditional branch of diffusers' own encoding, of both tokens and pooled text."""
    family = build("sdxl").family
    family.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, tokens, _, pooled = family.pipeline.encode_prompt("a red ball", negative_prompt=None)
    found = family.encode_text([""])
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)
    assert bool(found.tokens.any()) != zeros
    assert family.encode_text(["a red ball"]).tokens.any()


def test_a_flow_without_t5_reads_zeros_in_its_place(build: Build) -> None:
    with_t5, without = (build(name).family.encode_text(["a red ball"]).tokens for name in ("sd3", "sd3-without-t5"))
    assert with_t5.shape == without.shape == (1, 16 + 256, 32)
    assert with_t5[:, 16:].any() and not without[:, 16:].any()


@pytest.mark.parametrize(("size", "tokens"), [(16, 16), (32, 64)])
def test_the_shift_grows_with_the_image(build: Build, size: int, tokens: int) -> None:
    """FLUX: mu is the line through (256, 0.5) and (4096, 1.15), and sigma = e^mu / (e^mu + 1 / s - 1) for s from 1."""
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    plain = [1.0, 0.75, 0.5, 0.25]
    expected = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in plain]
    schedule = build("flux", SamplerConfig(steps=4, size=size)).schedule
    assert (schedule.timesteps / 1000).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_text_that_a_language_model_does_not_read_to_its_end_is_warned_of(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """A token a byte: 600 of the text, and 19 of the chat (3 markers, "user", "assistant" and 3 ends of a line)."""
    policy = build("z-image")
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            policy.rollout([Prompt("x" * 600)], [seed])
    (message,) = [record.message for record in caplog.records if "tokens" in record.message]
    assert "is 619 tokens long and the text encoder takes 512: its last 107 tokens are cut" in message


# -- what a schedule says of clean latents ------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_error_of_clean_latents_follows_from_the_residual(prediction: str) -> None:
    """A denoiser that is wrong by r is asked what clean latents it believes in: their error, found by another way.

    The noisy latents are known, and so are the formulas of each prediction: x0 = (x - sqrt(1 - a) e) / sqrt(a),
    x0 = sqrt(a) x - sqrt(1 - a) v, x0 itself, and x0 = x - s v.
    """
    clean, noise, wrong = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    device, time = torch.device("cpu"), torch.tensor([0.2, 0.6])
    schedule: Schedule
    if prediction == "flow":
        flow = FlowMatchEulerDiscreteScheduler()
        flow.set_timesteps(4)
        schedule = Flow(flow, SamplerConfig(steps=4), device)
    else:
        ddim = DDIMScheduler(prediction_type=prediction, clip_sample=False)
        schedule = Ddim(ddim, prediction, SamplerConfig(steps=4), device)  # type: ignore[arg-type]
    noisy, _, level = schedule.noised(clean, noise, time)
    a = level[:, None, None, None]
    right = {
        "epsilon": noise, "sample": clean, "flow": noise - clean,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean,
    }[prediction]  # fmt: skip
    output = right + wrong
    believed = {
        "epsilon": (noisy - (1 - a).sqrt() * output) / a.sqrt(), "sample": output, "flow": noisy - a * output,
        "v_prediction": a.sqrt() * noisy - (1 - a).sqrt() * output,
    }[prediction]  # fmt: skip
    residual = schedule.residual(output, clean, noise, level)
    torch.testing.assert_close(residual, wrong, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.clean_error(residual, level), believed - clean, rtol=1e-3, atol=1e-4)


def test_a_sampler_says_in_a_file_what_it_was_given() -> None:
    """The hash of a dataset's specification, from which its seeds derive, is of these words: none may come unasked."""
    assert SamplerConfig(eta=1.0).model_dump() == {"steps": 10, "eta": 1.0, "guidance_scale": 1.0, "batch_size": 32}
    given = {"steps": 6, "noise": "cps", "eta": 0.5, "window": {"start": 1, "steps": 2}, "size": 64}
    found = SamplerConfig.model_validate(given)
    assert given.items() <= found.model_dump().items()
    assert SamplerConfig.model_validate(found.model_dump()) == found


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "z-image"])
def test_attention_is_torchs_own_fused_one(build: Build, name: str) -> None:
    """Every attention of the denoiser is one fused call; a softmax by itself would be one that is written out."""
    from torch.profiler import ProfilerActivity, profile

    policy = build(name)
    text = policy._encode([BALL])
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.no_grad():
        policy.family.denoise(torch.zeros(1, *policy.family.latent_shape), policy.schedule.timesteps[:1], text)
    counts = {event.key: event.count for event in found.key_averages()}
    assert counts["aten::scaled_dot_product_attention"] > 0 and "aten::softmax" not in counts


# -- texts are encoded once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "z-image"])
def test_each_text_is_encoded_once_and_by_itself(build: Build, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(name, SamplerConfig(steps=2, size=SIZE, guidance_scale=2.0))
    asked, original = [], policy.family.encode_text
    monkeypatch.setattr(policy.family, "encode_text", lambda texts: asked.append(list(texts)) or original(texts))
    rollout = policy.rollout([BALL, Prompt("two blue cube"), BALL], [1, 2, 3])
    policy.step_log_probs(rollout, torch.zeros((3, 1), dtype=torch.int64))
    own = [["a red ball"], ["two blue cube"]]
    assert asked == (own if name == "flux" else [[""], *own])


def test_the_texts_that_are_kept_are_bounded_by_their_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build("sd")
    one = policy.family.encode_text(["a"]).nbytes
    assert one == 16 * 16 * 4  # tokens, width, float32
    monkeypatch.setattr(diffusion, "KNOWN_BYTES", 3 * one)
    for text in ("one", "two", "three", "red"):
        policy._embed([text])
    assert list(policy._text) == ["red"]
    policy._embed(["red", "green"])
    assert list(policy._text) == ["red", "green"]


def test_rows_of_other_lengths_are_joined_by_padding() -> None:
    """Two and three tokens of width one; what is padding stays out by the mask."""
    short = Conditioning(torch.tensor([[[1.0], [2.0]]]), mask=torch.tensor([[True, True]]))
    longer = Conditioning(torch.tensor([[[3.0], [4.0], [5.0]]]), mask=torch.tensor([[True, True, False]]))
    both = joined([short, longer])
    assert both.tokens[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert both.mask is not None and both.mask.tolist() == [[True, True, False], [True, True, False]]
    assert both.pooled is None and len(both) == 2


def test_an_autoencoder_with_statistics_of_its_own_is_heeded(build: Build) -> None:
    """Latents are (x - mean) * scale / std, one mean and deviation for each channel; decoding undoes that."""
    family = build("sdxl").family
    vae = family.pipeline.vae
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = family.encode(pictures) / vae.config.scaling_factor
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    before = family.decode(plain * vae.config.scaling_factor)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    found = family.encode(pictures)
    column = torch.tensor([mean, std])[:, None, :, None, None]
    torch.testing.assert_close(found, (plain - column[0]) * vae.config.scaling_factor / column[1])
    torch.testing.assert_close(family.decode(found), before, rtol=1e-4, atol=1e-5)


def test_every_family_is_named_by_a_class_of_diffusers() -> None:
    import diffusers

    assert all(issubclass(getattr(diffusers, name), DiffusionPipeline) for name in FAMILIES)


@pytest.mark.parametrize("missing", ["folder", "files"])
@pytest.mark.parametrize(("name", "part"), [("sd", "tokenizer"), ("sdxl", "tokenizer_2"), ("sd3", "tokenizer_3")])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path, name: str, part: str, missing: str) -> None:
    """transformers makes an empty one in its place: all words are the unknown one, and all prompts the same."""
    tiny_pipelines.TINY[name](tmp_path / "words").save_pretrained(tmp_path / "model")
    load_family(str(tmp_path / "model"))
    if missing == "folder":
        shutil.rmtree(tmp_path / "model" / part)
    else:
        (tmp_path / "model" / part / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=f"its {part} knows no word"):
        load_family(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("unet", "conv_out.weight"),
        ("vae", "decoder.conv_out.weight"),
        ("text_encoder", "encoder.layers.1.mlp.fc1.weight"),
        ("text_encoder", "mlp.fc1.weight"),
    ],
)
@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_a_checkpoint_that_lacks_a_weight_is_refused(
    tmp_path: Path, part: str, weight: str, level: int, request: pytest.FixtureRequest
) -> None:
    """diffusers fails later, and transformers goes on with a random one, even where nobody hears its warning."""
    tiny_pipelines.stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "model")
    file = next((tmp_path / "model" / part).glob("*.safetensors"))
    weights = load_file(file)
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(weight)}
    save_file(weights, file, metadata={"format": "pt"})
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(level)
    request.addfinalizer(lambda: log.setLevel(before))
    with pytest.raises(InputError, match=rf"the files of its {part.replace('_', ' ')} lack weights: .*{weight}$"):
        load_family(str(tmp_path / "model"))


@pytest.mark.parametrize("load", ["load_family", "load_language_model"])
def test_a_hub_that_cannot_be_reached_is_not_called_a_missing_file(monkeypatch: pytest.MonkeyPatch, load: str) -> None:
    """Without a network diffusers says that the model has no model_index.json; why it has none is the first cause."""

    def fails(*_: object, **__: object) -> None:
        try:
            raise OSError("Name or service not known")
        except OSError as reason:
            missing = LocalEntryNotFoundError("check your connection")
            missing.__cause__ = reason
            raise OSError("org/model does not appear to have a file named model_index.json") from missing

    monkeypatch.setattr(loading.DiffusionPipeline, "load_config", fails)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(NotFoundError, match=r"the hub could not be reached \(Name or service not known\)"):
        getattr(loading, load)("org/model")
