"""Configuration: what is refused, and how the message helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apps.build import recipes
from diffalign.config import RunConfig, dump, load, parse
from diffalign.errors import ConfigError

MINIMAL = "model: embedded:emoji\nrewards: [compressibility]\nprompts:\n  source: emoji\ntrainer:\n  epochs: 3\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(file: Path) -> None:
    overrides = ["trainer.learning_rate=1e-4", "rewards.0.weight=2", "adapter.rank=8", "device=cpu"]
    config = load(file, overrides)
    assert config.trainer.epochs == 3 and config.trainer.learning_rate == 1e-4
    assert config.rewards[0].reward == "compressibility" and config.rewards[0].weight == 2
    assert config.adapter is not None and config.adapter.rank == 8
    assert load(file, ["adapter=null"]).adapter is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.epoch=1",
            "--set trainer.epoch=1: unknown field trainer.epoch; did you mean trainer.epochs ({file}:6)?",
        ),
        ("learning_rate=1", "unknown field learning_rate; did you mean trainer.learning_rate?"),
        ("zzz=1", "unknown field zzz; fields here: name, seed, model"),
        ("trainer.epochs=-1", "trainer.epochs: input should be greater than or equal to 0 (given: -1)"),
        ("trainer.samples_per_epoch=30", "nearest batch sizes that do: 10, 15, 30"),
        ("trainer.samples_per_prompt=7", "nearest group sizes that do: 2, 4, 8"),
        ("credit.rule=group", "set trainer.samples_per_prompt to 2 or more"),
        ("objective.name=dpo", "objective.name: input should be 'ppo-clip' or 'reinforce' (given: 'dpo')"),
        ("rewards=[]", "rewards: list should have at least 1 item"),
        ("rewards.3.weight=1", "'3' is not an index from 0 to 0"),
        ("model.path=x", "model is a value, it has no fields"),
    ],
)
def test_refusals(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, [override])
    assert message.format(file=file) in str(caught.value)


def test_a_wrong_field_in_the_file_is_found_by_its_line(file: Path) -> None:
    file.write_text(MINIMAL + "  batchsize: 8\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml:7: unknown field trainer.batchsize; did you mean trainer.batch_size"
    ):
        load(file)


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_is_valid_and_its_dump_is_the_same_configuration(recipe: str) -> None:
    config = load(recipes()[recipe])
    assert parse(yaml.safe_load(dump(config))) == config
    assert recipes()[recipe].read_text().startswith("# ")


@given(st.integers(1, 500), st.integers(1, 500))
def test_batches_divide_or_are_refused(total: int, batch: int) -> None:
    data = {
        "model": "m", "rewards": ["r"], "prompts": {"source": "emoji"},
        "trainer": {"samples_per_epoch": total, "batch_size": batch},
    }  # fmt: skip
    if total % batch == 0:
        assert isinstance(parse(data), RunConfig)
    else:
        with pytest.raises(ConfigError, match="does not divide"):
            parse(data)
