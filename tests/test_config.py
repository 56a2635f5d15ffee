"""Configuration: what is refused, and how the message helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apps import configured
from apps.catalogue import recipes
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
        ("objective.name=ppo", "objective.name: input should be 'ppo-clip', 'reinforce', 'reward-weighted', 'dpo',"),
        ("objective={name: elbo-reinforce, noise_range: [0.9, 0.4]}", "[0.45, 1.0]; [0.9, 0.4] does not"),
        ("objective={name: elbo-reinforce, noise_range: [0.9]}", "objective.noise_range: "),
        ("objective.noise_range=[0, 1]", "objective: ppo-clip has no noise_range; it has clip_range"),
        ("objective.name=dpo", "objective dpo learns from pairs or online-pairs, not from rollouts: change"),
        ("objective.beta=1", "objective: ppo-clip has no beta; it has clip_range, clip_range_high, kl_coefficient"),
        ("objective.clip_range=true", "should be a number, not true or false (given: True)"),
        ("experience.source=pairs", "source pairs needs experience.path, or experience.rater, and not both"),
        ("experience.criterion=x", "experience.criterion chooses among recorded pairs, and source is rollouts"),
        ("fit={rater: emoji}", "fit: no reward names what it fits; write one as clinician?folder=fitted or"),
        ("fit={}", "fit: it needs fit.preferences or fit.rater, and not both"),
        ("experience.path=x", "source rollouts makes its own samples; it has no use for experience.path"),
        ("experience={source: best-of-n}", "source best-of-n compares the samples of one prompt: set trainer.samples"),
        ("rewards=[]", "rewards: there is none, and source rollouts learns from them; name one at least"),
        ("trainer.epochs=true", "trainer.epochs: input should be a number, not true or false (given: True)"),
        ("rewards.0.weight=false", "rewards.0.weight: input should be a number, not true or false (given: False)"),
        ("credit.min_count=33", "buffer_size 32 is below min_count 33, so per-prompt would never"),
        ("rewards=[a?b=1, c", "--set rewards=[a?b=1, c: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("rewards=[a ?b]", """--set 'rewards=["brain-mr-checker?graded=true"]'"""),
        ("rewards.3.weight=1", "'3' is not an index from 0 to 0"),
        ("model.path=x", "model is a value, it has no fields"),
        (
            "trainer={epochs: -1}",
            "--set trainer={{epochs: -1}} (in place of {file}:5): trainer.epochs: input should be",
        ),
    ],
)
def test_refusals(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, [override])
    assert message.format(file=file) in str(caught.value)


DPO = ["rewards=[]", "evaluation.rewards=[clip]", "objective.name=dpo"]
PAIRS = [*DPO, "experience.source=pairs", "experience.path=x.parquet"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experience.collect=8"], "experience.collect is 8, but it counts what simulated raters"),
        ([*PAIRS, "experience.keep=[0.1]"], "experience.keep is [0.1], but it is for experience.source best-of-n"),
        (
            [*PAIRS, "credit.rule=group"],
            "credit.rule is group, but objective dpo with experience.source pairs gives no credit for scores: leave it",
        ),
        (
            ["experience.source=best-of-n", "trainer.samples_per_prompt=2", "credit.rule=group"],
            "credit.rule is group, but objective ppo-clip with experience.source best-of-n gives no credit for scores",
        ),
        ([*PAIRS, "trainer.samples_per_prompt=2"], "the samples of experience.source pairs were made before the run"),
        ([*PAIRS, "trainer.timestep_fraction=0.5"], "which learn from single steps: leave it out, or at 1.0"),
        ([*PAIRS, "sampler.window={steps: 2, every: 3}"], "sampler.window.every is 3, but the samples of"),
        (["credit.rule=batch", "credit.min_count=8"], "credit.rule batch remembers no scores: leave it out, or at 16"),
        (
            ["objective.name=draft", "credit.clip=2"],
            "objective draft with experience.source rollouts gives no credit for scores: leave it out, or at 5",
        ),
    ],
)
def test_a_field_that_the_method_has_no_use_for_is_refused(file: Path, overrides: list[str], message: str) -> None:
    """The same configuration without that field is a good one, and so is what it is written as.

    A run that was begun with the field, when it was not refused yet, can still be read; other faults it cannot have.
    """
    good = load(file, overrides[:-1])
    assert parse(yaml.safe_load(dump(good))) == good
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert message in str(caught.value)
    begun = load(file, overrides, made=True)
    assert begun != good and parse(yaml.safe_load(dump(begun)), made=True) == begun
    with pytest.raises(ConfigError, match=r"unknown field trainer\.epoch;"):
        load(file, [*overrides, "trainer.epoch=3"], made=True)


def test_compiled_blocks_are_not_divided_among_processes(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile and trainer\.shard were never tried together: leave one of them"):
        load(file, ["compile=true", "trainer.shard=true"])


def test_a_wrong_field_in_the_file_is_found_by_its_line(file: Path) -> None:
    file.write_text(MINIMAL + "  batchsize: 8\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml:7: unknown field trainer.batchsize; did you mean trainer.batch_size"
    ):
        load(file)


def test_whole_numbers_and_exponents_are_numbers(file: Path) -> None:
    file.write_text(MINIMAL + "  learning_rate: 1e-4\n  weight_decay: 3\n  gradient_checkpointing: true\n")
    trainer = load(file).trainer
    assert (trainer.learning_rate, trainer.weight_decay, trainer.gradient_checkpointing) == (1e-4, 3.0, True)


@pytest.mark.parametrize(
    ("value", "rewards"),
    [
        ("[brain-mr-checker?graded=true]", ["brain-mr-checker?graded=true"]),
        ("[a?x=1&y=2, own.py:f?z=p:q,b]", ["a?x=1&y=2", "own.py:f?z=p:q", "b"]),
        ("""["a?x=1", 'b?y=2', c?z=3]""", ["a?x=1", "b?y=2", "c?z=3"]),
        ("[{reward: a?x=1, weight: 2}]", ["a?x=1"]),
    ],
)
def test_rewards_with_arguments_in_a_list(file: Path, value: str, rewards: list[str]) -> None:
    """YAML takes a question mark inside brackets for a sign of its own, unless it is quoted."""
    assert [entry.reward for entry in load(file, [f"rewards={value}"]).rewards] == rewards


def test_a_value_that_is_no_yaml_is_text(file: Path) -> None:
    assert load(file, ["name=@home: now"]).name == "@home: now"
    assert load(file, ["name=2024-13-45"]).name == "2024-13-45"


@pytest.mark.parametrize("name", ["\0", "2024-13-45"])
def test_what_yaml_cannot_read_is_one_line(file: Path, name: str) -> None:
    file.write_text(f"{MINIMAL}name: {name}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml.*: not valid YAML: [^\n]+\Z"):
        load(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed 8\nmodel: m\n", "run.yaml:1: not valid YAML: could not find expected ':'"),
        ("model: m\nseed 8\n", "run.yaml:2: not valid YAML: could not find expected ':'"),
        ("trainer:\n  epochs 8\n\n  # less\n  batch_size: 3\n", "run.yaml:2: not valid YAML: could not find expected"),
        ("model embedded:emoji\nname: x\n", "run.yaml:1: not valid YAML: could not find expected ':'"),
        (
            "# a\u2028b\u2028c\nmodel: m\nname: a: b\n",
            "run.yaml:4: not valid YAML: mapping values are not allowed here",
        ),
        ("model: m\nname: a: b\n", "run.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("rewards:\n- clip\n  weight: 2\n", "run.yaml:3: not valid YAML: mapping values are not allowed here"),
    ],
)
def test_a_missing_colon_is_told_in_its_own_line(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text"):
        load(file)


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_is_valid_and_its_dump_is_the_same_configuration(recipe: str) -> None:
    config = configured.configuration(recipe)
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


@pytest.mark.parametrize("recipe", ["brain-mr-clinician", "text-reward"])
def test_peoples_own_pairs_take_the_place_of_a_recipes_raters(recipe: str) -> None:
    """How many the simulated raters would have judged may stay: one changes what the pairs are, and nothing else."""
    config = configured.configuration(recipe, ["fit.rater=null", "fit.preferences=mine.parquet"])
    assert config.fit is not None and config.fit.preferences == "mine.parquet" and config.fit.collect == 1024
