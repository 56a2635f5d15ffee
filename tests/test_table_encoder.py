"""A table row as conditioning: the encoder by itself, the policy over it, its training, and the one that ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.seeds import derive
from diffalign.types import Draw, Prompt
from diffalign.worlds import brain_mr
from pipelines.diffusion import DiffusionPolicy
from pipelines.embedded import table_encoder as training
from pipelines.families import Conditioning
from pipelines.loading import EMBEDDED, load_policy, load_table_encoder
from pipelines.table_encoder import FOLDER, TableEncoder
from rewards.registry import load as load_reward

COLUMNS = {"thing": ["ball", "cube"], "colour": ["red", "blue"]}
COMBINATIONS = torch.tensor([[1, 1], [1, 2], [2, 1]])  # there are no blue cubes
BALL = Prompt("a red ball", attributes={"thing": "ball", "colour": "red", "age": 40})
CUBE = Prompt("a cube", attributes={"thing": "cube", "colour": None})
MakePolicy = Callable[..., DiffusionPolicy]


@pytest.fixture
def tiny() -> TableEncoder:
    """Random weights, as wide as the denoiser of the tiny pipeline."""
    torch.manual_seed(0)
    made = TableEncoder(COLUMNS, COMBINATIONS, tokens=3, width=16, layers=1, heads=2)
    return made.requires_grad_(False).eval()


def test_a_row_decides_its_tokens_alone(tiny: TableEncoder) -> None:
    rows = [{"thing": "ball", "colour": "red"}, {"thing": "cube"}, {"colour": "red", "thing": "ball"}]
    together = tiny.encode(rows)
    assert together.shape == (3, 3, 16) and together.dtype == torch.float32
    for row, tokens in zip(rows, together, strict=True):
        assert torch.equal(tiny.encode([row])[0], tokens)
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])


def test_a_missing_cell_is_said_in_three_ways_and_differs_from_every_value(tiny: TableEncoder) -> None:
    rows = [{"thing": "ball"}, {"thing": "ball", "colour": None}, {"thing": "ball", "colour": ""}]
    absent, none, blank = tiny.encode(rows)
    assert torch.equal(absent, none) and torch.equal(absent, blank)
    for colour in COLUMNS["colour"]:
        assert not torch.allclose(absent, tiny.encode([{"thing": "ball", "colour": colour}])[0])
    assert tiny.codes({}) == tiny.empty == (0, 0)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"thing": "pear"}, "thing is 'pear'; the table encoder knows ball, cube"),
        ({"thing": 1}, "thing is 1; the table encoder knows ball, cube"),
        ({"shade": "red"}, "column shade is none of the table encoder; it has thing, colour"),
        (
            {"thing": "cube", "colour": "blue"},
            "the row (thing cube, colour blue) contradicts itself: the table encoder knows no such combination",
        ),
    ],
)
def test_what_it_does_not_know_is_one_sentence(tiny: TableEncoder, row: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.encode([row])
    assert str(caught.value) == sentence


def test_it_is_saved_and_loaded(tiny: TableEncoder, tmp_path: Path) -> None:
    """Half precision has 11 bits: a weight moves by at most a 2048th of itself."""
    tiny.save(tmp_path / FOLDER)
    loaded = TableEncoder.load(tmp_path / FOLDER)
    assert loaded.columns == tiny.columns and not loaded.training
    for name, weight in tiny.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=2**-11, atol=1e-7)
    loaded.save(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / FOLDER / file).read_bytes()


def test_a_broken_folder_is_one_sentence(tiny: TableEncoder, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no table encoder"):
        TableEncoder.load(tmp_path / FOLDER)
    tiny.save(tmp_path / FOLDER)
    config = tmp_path / FOLDER / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"width": 32}))
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        TableEncoder.load(tmp_path / FOLDER)
    assert "\n" not in str(caught.value)


def test_the_denoiser_reads_the_row_and_not_the_text(make: MakePolicy, tiny: TableEncoder) -> None:
    policy = make(table=tiny, sampler=SamplerConfig(steps=3))
    other_text = Prompt("two blue cube", attributes=BALL.attributes)
    other_row = Prompt(BALL.text, attributes=CUBE.attributes)
    first = policy.rollout([BALL, other_text, other_row], [1, 1, 1]).state["latents"][:, -1]
    torch.testing.assert_close(first[0], first[1])
    assert not torch.allclose(first[0], first[2], atol=1e-3)


def test_guidance_goes_away_from_the_empty_row(make: MakePolicy, tiny: TableEncoder) -> None:
    """The first step by hand: unconditional + 3 (conditional - unconditional), the denoiser called for each alone."""
    policy = make(table=tiny, sampler=SamplerConfig(steps=2, eta=0.0, guidance_scale=3.0))
    rollout = policy.rollout([BALL], [4])
    start, then = rollout.state["latents"][:, 0], rollout.state["latents"][:, 1]
    with torch.no_grad():
        rows = [{"thing": "ball", "colour": "red"}, {}]
        with_row, without = (
            policy.family.denoise(start, policy.schedule.timesteps[:1], Conditioning(tiny.encode([row])))
            for row in rows
        )
    noise = without + 3 * (with_row - without)
    signal, following = policy.schedule.signal[0], policy.schedule.next_signal[0]
    clean = (start - (1 - signal).sqrt() * noise) / signal.sqrt()
    torch.testing.assert_close(then, following.sqrt() * clean + (1 - following).sqrt() * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replay_has_ratio_exactly_one(make: MakePolicy, tiny: TableEncoder, guidance: float) -> None:
    policy = make(
        table=tiny, adapter=AdapterConfig(), sampler=SamplerConfig(steps=4, guidance_scale=guidance)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    rollout = policy.rollout([BALL, CUBE], [1, 2])
    for step in range(4):
        replayed = policy.step_log_probs(rollout, torch.full((2, 1), step)).log_probs[:, 0]
        assert torch.equal(replayed.detach(), rollout.log_probs[:, step])


def test_the_likelihood_is_conditioned_on_the_row(make: MakePolicy, tiny: TableEncoder) -> None:
    policy = make(table=tiny, sampler=SamplerConfig(steps=2))
    sample = policy.rollout([BALL], [1]).samples[0]
    draw = Draw(torch.tensor([0.5, 0.5]), (7, 7))
    same = type(sample)(Prompt("two", attributes=BALL.attributes), image=sample.image)
    other = type(sample)(Prompt(BALL.text, attributes=CUBE.attributes), image=sample.image)
    with torch.no_grad():
        found = policy.log_likelihood([sample, same], draw)
        torch.testing.assert_close(found[0], found[1])
        assert not torch.allclose(found[0], policy.log_likelihood([other, other], draw)[0])


def test_prompts_that_are_no_rows_are_refused(make: MakePolicy, tiny: TableEncoder) -> None:
    policy = make(table=tiny, name="tiny", sampler=SamplerConfig(steps=2, guidance_scale=2.0))
    with pytest.raises(ConfigError, match=r"prompt 'a red ball' has no table row to condition on; .* thing, colour$"):
        policy.rollout([Prompt("a red ball")], [1])
    with pytest.raises(ConfigError, match="negative 'green' is a text"):
        policy.rollout([Prompt("", attributes={"thing": "ball"}, negative="green")], [1])


def test_a_policy_with_a_table_is_saved_and_loaded(tiny_folder: Path, tiny: TableEncoder, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no table encoder, a folder table_encoder"):
        load_policy(str(tiny_folder), condition="table")
    policy = load_policy(str(tiny_folder), full=True, sampler=SamplerConfig(steps=2))
    assert isinstance(policy, DiffusionPolicy)
    policy.table = tiny
    for parameter in policy.trainable().values():
        parameter.data += 0.01
    saved = policy.save(tmp_path)
    again = load_policy(str(saved), condition="table", sampler=SamplerConfig(steps=2))
    assert isinstance(again, DiffusionPolicy) and again.table is not None
    policy.table = TableEncoder.load(saved / FOLDER)
    ours, theirs = (p.rollout([BALL, CUBE], [1, 2]).state["latents"] for p in (policy, again))
    torch.testing.assert_close(ours, theirs)


def test_an_encoder_of_another_width_and_a_text_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    policy = load_policy(str(tiny_folder), full=True)
    folder = policy.save(tmp_path)
    TableEncoder(COLUMNS, COMBINATIONS, tokens=2, width=8, heads=2).save(folder / FOLDER)
    with pytest.raises(InputError, match="makes tokens of width 8, and the denoiser reads 16"):
        load_policy(str(folder), condition="table")
    with pytest.raises(ConfigError, match="only image models have a table encoder"):
        load_policy("embedded:findings-lm", condition="table")


def test_training_rows_are_coded_as_the_encoder_codes_them() -> None:
    """Two writers of one code: the trainer in bulk, the encoder row by row."""
    full = brain_mr.combinations()
    codes = training.code(full)
    encoder = TableEncoder(training.columns(), codes, tokens=2, width=8, heads=2)
    assert [tuple(row) for row in codes.tolist()] == [encoder.codes(row) for row in full]
    assert set(encoder.columns["side"]) == {"left", "right", "anterior", "posterior"}
    assert len(encoder.columns["level"]) == 9


def test_cells_are_left_out_in_the_shares_that_are_said() -> None:
    """Of 20 000 rows of 6 cells half stay whole (and of 40 %, 1 in 64), a tenth is empty (and 1 in 64): by chance the
    standard deviation is 0.0035, so 0.02 is far beyond it.
    """
    torch.manual_seed(0)
    left = training.drop(torch.ones(20_000, 6, dtype=torch.long)).sum(1)
    for cells, share in ((6, 0.5 + 0.4 / 64), (0, 0.1 + 0.4 / 64), (3, 0.4 * 20 / 64)):
        assert abs(float((left == cells).float().mean()) - share) < 0.02


def test_training_leaves_the_image_model_alone_and_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates in one go, and one update, a new process and another: the same encoder, bit by bit."""
    monkeypatch.setattr(training, "VALIDATION", 2)
    one_go = training.Trainer(EMBEDDED / "brain-mr", tmp_path, 6)
    one_go.start(regression=1)
    begun = {name: weight.clone() for name, weight in one_go.encoder.state_dict().items()}
    frozen = {name: weight.clone() for name, weight in one_go.unet.state_dict().items()}
    one_go.step(2, 1e-3, training.FOCUS)
    one_go.checkpoint()
    one_go.step(2, 1e-3, training.FOCUS)
    assert any(not torch.equal(weight, begun[name]) for name, weight in one_go.encoder.state_dict().items())
    assert all(torch.equal(weight, frozen[name]) for name, weight in one_go.unet.state_dict().items())
    again = training.Trainer(EMBEDDED / "brain-mr", tmp_path, 6)
    again.start(regression=1)
    assert again.steps == 1
    again.step(2, 1e-3, training.FOCUS)
    for ours, theirs in ((one_go.encoder, again.encoder), (one_go.average, again.average)):
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name


# -- the one that ships -----------------------------------------------------------------------------------------------


def test_the_embedded_encoder_knows_the_world_and_is_small() -> None:
    encoder = load_table_encoder("embedded:brain-mr")
    assert tuple(encoder.columns) == brain_mr.FIELDS
    for row in brain_mr.combinations():
        for left_out in brain_mr.FIELDS:
            encoder.codes({name: value for name, value in row.items() if name != left_out})
    for wrong in ({"lesion": "none", "side": "left"}, {"plane": "sagittal", "side": "left"}):
        with pytest.raises(ConfigError, match="contradicts itself"):
            encoder.codes(wrong)
    assert sum(file.stat().st_size for file in (EMBEDDED / "brain-mr" / FOLDER).iterdir()) < 1_000_000


def test_the_embedded_model_draws_rows_and_rows_with_missing_cells() -> None:
    """Sixteen rows under guidance, eight without lesion cells: all that their cells say is judged by the checker."""
    prompts = [brain_mr.scene(derive(5, "row", i)).prompt for i in range(16)]
    asked = [replace(prompt, text="") for prompt in prompts]
    for i in range(8):
        asked[i] = replace(asked[i], attributes={name: prompts[i].attributes[name] for name in ("plane", "contrast")})
    policy = load_policy("embedded:brain-mr", condition="table", sampler=SamplerConfig(steps=5, guidance_scale=2.0))
    samples = [
        replace(sample, prompt=prompt)
        for sample, prompt in zip(policy.rollout(asked, range(16)).samples, prompts, strict=True)
    ]
    scores = load_reward("brain-mr-checker")(samples)
    assert float(scores.parts["plane"].mean()) > 0.9 and float(scores.parts["contrast"].mean()) > 0.9
    assert float(scores.total[8:].mean()) > 0.8
