"""Reward models of texts: a language model with a scalar head learns what raters prefer, is saved, and judges.

The language model is a tiny one over letters. Raters want more of the letter ``a`` and less of ``b``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apps import reward_fit
from apps.cli import main
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.preferences import Table, write
from diffalign.types import Preference, Prompt, Sample
from rewards.fit import Effects, margins
from rewards.fit_config import TextFitConfig, parse
from rewards.fit_texts import correlation, slope
from rewards.language_model import Reader, judge, read_tokenizer
from rewards.language_reward import LanguageReward
from rewards.registry import load as load_reward
from tests import preference_files, reward_studies
from tests.tiny_language import tiny_language_model

PROMPTS = [Prompt(" ".join(letters)) for letters in product("cdefgh", repeat=2)]
QUICK = {
    "learning_rate": 3e-3, "epochs": 6, "patience": 6, "batch_size": 16, "learning_curve": False, "held_out": 0.4,
}  # fmt: skip


def diffalign(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reward", "fit", *(str(argument) for argument in arguments)])


def settings(**fields: object) -> list[str]:
    return [word for name, value in fields.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def text(rng: np.random.Generator) -> str:
    """Two to nine words of one to three letters."""
    return " ".join("".join(rng.choice(list("abcd"), rng.integers(1, 4))) for _ in range(rng.integers(2, 10)))


def pairs(
    count: int, wanted: Callable[[str], float] = lambda said: said.count("a") - said.count("b"), seed: int = 0
) -> list[Preference]:
    """Judged by Bradley and Terry's model at twice what is wanted; sides at random."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        asked = PROMPTS[i % len(PROMPTS)]
        one, other = text(rng), text(rng)
        label = float(rng.random() < 1 / (1 + math.exp(-2 * (wanted(one) - wanted(other)))))
        made.append(Preference(asked, Sample(asked, text=one), Sample(asked, text=other), label, rater=f"r{i % 2}"))
    return made


def save(folder: Path, **changes: object) -> Path:
    """The tiny model as a transformers folder; ``changes`` are attributes of its tokenizer."""
    model, tokenizer = tiny_language_model()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and pairs."""
    folder = tmp_path_factory.mktemp("texts")
    save(folder / "lm")
    write(folder / "pairs.parquet", pairs(360))
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Path, Result]:
    given = settings(preferences=str(place / "pairs.parquet"), encoder=str(place / "lm"), **QUICK)
    return place / "out", diffalign("text-preference", *given, "--out", place / "out")


def test_what_raters_prefer_is_learned_and_written(done: tuple[Path, Result]) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"config.yaml", "reward", "card.json", "card.md", "card.html"}
    assert f"reward: language-reward?folder={out / 'reward'}" in result.stdout.replace("\n", "")
    card = json.loads((out / "card.json").read_text())
    one = card["criteria"]["overall"]
    assert card["modality"] == "text" and sum(one["pairs"].values()) == 360
    assert one["accuracy"]["value"] > 0.75 and set(one["baselines"]) > {"always the first"}
    assert one["accuracy"]["ci95"][0] > max(judge["value"] for judge in one["baselines"].values())
    groups = {(g["by"], g["value"]) for g in one["subgroups"]}
    assert {("preferred text", "the longer"), ("preferred text", "the shorter"), ("rater", "r0")} <= groups
    page = (out / "card.md").read_text()
    for said in ("different texts", "scores and length correlate by", "reads well may be wrong", "every weight"):
        assert said in page
    assert "image" not in page


def test_other_programmes_load_it_and_find_the_same(done: tuple[Path, Result], place: Path) -> None:
    """transformers alone, a text at a time without padding: the same up to the level, which the header has."""
    folder = done[0] / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    fresh = [side for pair in pairs(8, seed=5) for side in (pair.first, pair.second)]
    reward = load_reward(f"language-reward?folder={folder}")
    level = json.loads((folder / "reward.json").read_text())["level"]
    theirs = []
    for sample in fresh:
        # This tokenizer adds nothing of its own: prompt, text and </s> stand one after another.
        rows = tokenizer(f"{sample.prompt.text}{sample.text}</s>", return_tensors="pt")
        with torch.no_grad():
            theirs.append(float(model(input_ids=rows.input_ids).logits[0, 0]) - level)
    ours = reward(fresh).total
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-4)
    alone = torch.cat([reward([sample]).total for sample in fresh])
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_scores_of_training_texts_are_standardised_and_probabilities_follow(
    done: tuple[Path, Result], place: Path
) -> None:
    """Mean 0 and deviation 1 over the different training texts; a rater's answers are as likely as is said."""
    from diffalign.preferences import group, split

    every = list(Table(place / "pairs.parquet"))
    train, _ = split([group(pair.prompt) for pair in every], 0.4, 0)
    texts = {(s.prompt.text, s.text): s for i in train for s in (every[i].first, every[i].second)}
    reward = LanguageReward(str(done[0] / "reward"))
    scores = reward(list(texts.values())).total
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-3)
    fresh = pairs(200, seed=9)
    win, tie = reward.probability([p.first for p in fresh], [p.second for p in fresh])
    label = torch.tensor([p.label for p in fresh])
    assert not tie.any() and float((win - label).mean().abs()) < 0.1
    assert float(((win > 0.5) == (label > 0.5)).float().mean()) > 0.75


def test_a_fit_repeats_to_the_byte(done: tuple[Path, Result], tmp_path: Path) -> None:
    again = diffalign(done[0], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in ("reward.json", "model.safetensors"):
        assert (tmp_path / "again" / "reward" / name).read_bytes() == (done[0] / "reward" / name).read_bytes()


def test_adapters_alone_learn_it_too_and_are_added(place: Path, tmp_path: Path) -> None:
    given = settings(preferences=str(place / "pairs.parquet"), encoder=str(place / "lm"), **QUICK, lora={"rank": 4})
    result = diffalign("text-preference", *given, *settings(learning_rate=1e-2), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["criteria"]["overall"]["accuracy"]["value"] > 0.7
    assert not list((tmp_path / "out" / "reward").glob("adapter*"))
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()
        for folder in (place / "lm", tmp_path / "out" / "reward")
    )
    changed = {name for name in after if not torch.equal(before[name], after[name])} - {"score.weight"}
    assert changed and all("proj" in name for name in changed)


# -- length -----------------------------------------------------------------------------------------------------------


def longer(said: str) -> float:
    """Raters who want ``a``, and length besides."""
    return said.count("a") + 0.7 * len(said.split())


def test_length_is_taken_out_of_the_scores(tmp_path: Path, place: Path) -> None:
    """Where raters like length, scores follow it; controlled, differences of scores and of length have no product
    left over the training pairs (the normal equation of a regression without a constant)."""
    from diffalign.preferences import group, split

    write(tmp_path / "pairs.parquet", every := pairs(240, longer))
    train, _ = split([group(pair.prompt) for pair in every], 0.4, 0)
    found = {}
    for length in ("free", "controlled"):
        given = settings(preferences=str(tmp_path / "pairs.parquet"), encoder=str(place / "lm"), **QUICK, length=length)
        result = diffalign("text-preference", *given, "--out", tmp_path / length)
        assert result.exit_code == 0, result.output
        reward = load_reward(f"language-reward?folder={tmp_path / length / 'reward'}")
        sides = [[getattr(every[i], side) for i in train] for side in ("first", "second")]
        gap = [[math.log(1 + len((s.text or "").split())) for s in side] for side in sides]
        scores = (reward(sides[0]).total - reward(sides[1]).total).double().numpy()
        sizes = np.array(gap[0]) - np.array(gap[1])
        found[length] = float((scores * sizes).sum() / math.sqrt((scores**2).sum() * (sizes**2).sum()))
        card = json.loads((tmp_path / length / "card.json").read_text())["criteria"]["overall"]
        assert card["length"]["raters"] > 0.3 and card["length"]["longer_preferred"] > 0.6
        assert "the longer text" in card["baselines"]
    assert found["free"] > 0.5 and abs(found["controlled"]) < 1e-3
    assert "was taken out of the scores" in (tmp_path / "controlled" / "card.md").read_text()


def test_correlation_and_slope_by_hand() -> None:
    """(1 x 2 + 2 x 1 + -1 x 1) / sqrt((1 + 4 + 1) (4 + 1 + 1)) = 3 / 6; the slope on the second is 3 / 6, too."""
    values, others = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 1.0, 1.0])
    assert correlation(values, others) == pytest.approx(0.5)
    assert slope(values, others) == pytest.approx(0.5)
    assert correlation(values, torch.zeros(3)) is None and slope(values, torch.zeros(3)) == 0


# -- margins ----------------------------------------------------------------------------------------------------------


def test_strength_as_a_margin_by_hand() -> None:
    """-log sigma(2 - 0.5) for the first preferred, -log sigma(-2 - 1) for the second; one rater adds nothing."""
    config = parse({"modality": "text", "preferences": "x", "encoder": "y", "strength": "margin", "side_bias": False})
    effects = Effects(["one"], 1, config, None)
    scores = torch.tensor([[2.0, 2.0]]), torch.zeros(1, 2)
    found = effects.loss(*scores, torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64), torch.tensor([0.5, 1.0]))
    assert found[0].tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log1p(math.exp(3.0))])


def test_margins_are_the_strengths() -> None:
    made, _ = reward_studies.study(4)
    made.strength[:] = torch.tensor([1.0, 0.3, 2.0, 0.0])
    assert margins(made, [2, 1], reward_studies.config(strength="margin")).tolist() == pytest.approx([2.0, 0.3])
    assert not margins(made, [2, 1], reward_studies.config()).any()


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_cut_off_text_has_no_end_and_a_template_is_kept_to(place: Path) -> None:
    """By hand: a is 3, b is 4, c is 5 in this vocabulary, and </s> is 2."""
    reader = Reader(read_tokenizer(place / "lm", "lm"), "lm", 64)
    asked = Prompt("ca")
    assert reader.tokens(Sample(asked, text="ab")) == [5, 3, 3, 4, 2]
    assert reader.tokens(Sample(asked, text="ab", evidence={"finished": False})) == [5, 3, 3, 4]
    tokenizer = read_tokenizer(place / "lm", "lm")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'b' if m.role == 'user' else 'c' }}{{ m.content }}d{% endfor %}"
    )
    chat = Reader(tokenizer, "lm", 64)
    assert chat.tokens(Sample(asked, text="ab")) == [4, 5, 3, 6, 5, 3, 4, 6]
    assert chat.tokens(Sample(asked, text="ab", evidence={"finished": False})) == [4, 5, 3, 6, 5, 3, 4]


def test_the_end_fills_up_where_there_is_no_padding_token(place: Path, tmp_path: Path) -> None:
    """A text's score is the same alone and beside a longer one."""
    save(tmp_path / "lm", pad_token=None)
    given = settings(preferences=str(place / "pairs.parquet"), encoder=str(tmp_path / "lm"), **QUICK)
    result = diffalign("text-preference", *given, *settings(epochs=3), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    reward = load_reward(f"language-reward?folder={tmp_path / 'out' / 'reward'}")
    some = [pair.first for pair in pairs(6, seed=3)]
    torch.testing.assert_close(
        reward(some).total, torch.cat([reward([one]).total for one in some]), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_read_whole_has_no_score(done: tuple[Path, Result]) -> None:
    reward = load_reward(f"language-reward?folder={done[0] / 'reward'}")
    asked = Prompt("c")
    samples = [Sample(asked, text="ab"), Sample(asked, text="a" * 70), Sample(asked, image=Image.new("RGB", (4, 4)))]
    assert reward(samples).total.isnan().tolist() == [False, True, True]
    assert reward([]).total.shape == (0,)


def test_pairs_that_are_too_long_are_left_out_and_counted(place: Path, tmp_path: Path) -> None:
    asked = PROMPTS[0]
    long = Preference(asked, Sample(asked, text="a " * 40), Sample(asked, text="b"), 1.0)
    write(tmp_path / "pairs.parquet", [long, *pairs(360)])
    given = settings(preferences=str(tmp_path / "pairs.parquet"), encoder=str(place / "lm"), **QUICK)
    result = diffalign("text-preference", *given, *settings(epochs=3), "--out", tmp_path / "out")
    assert result.exit_code == 0 and "row 0: longer than 64 tokens: 84 with the prompt" in result.stderr, result.output
    assert json.loads((tmp_path / "out" / "card.json").read_text())["data"]["pairs"] == 360


# -- reward models of others ------------------------------------------------------------------------------------------


def headed(folder: Path, labels: int) -> Path:
    save(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model.save_pretrained(folder)
    return folder


def test_a_reward_model_of_others_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = headed(tmp_path / "theirs", 1)
    reward = load_reward(f"language-reward?model={folder}&name=theirs")
    samples = [pair.first for pair in pairs(5)]
    reader = Reader(read_tokenizer(folder, "theirs"), "theirs", 64)
    with torch.no_grad():
        raw: list[Tensor] = [
            judge(folder, "theirs").eval()(torch.tensor([reader.tokens(s)])).logits[0, 0] for s in samples
        ]
    torch.testing.assert_close(reward(samples).total, torch.stack(raw), rtol=1e-4, atol=1e-4)
    assert reward.name == "theirs" and reward.unit == "the model's own"


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("language-reward", ConfigError, "wants either folder=, what"),
        ("language-reward?model={0}/nowhere", NotFoundError, "there is no such folder, and it is no hub id"),
        ("language-reward?model={0}/lm", InputError, "is no reward model: it has no weights for score.weight"),
        ("language-reward?model={0}/two", ConfigError, "tells 2 classes apart; a reward model has one label"),
        ("language-reward?folder={0}/lm", NotFoundError, "is no reward model: it has no reward.json"),
        ("language-reward?folder={0}/out", NotFoundError, "is the folder of a fit; the reward model is in"),
        ("preference?folder={0}/out/reward", ConfigError, "holds a reward model of texts; name it language-reward?"),
        ("language-reward?folder={0}/cut", InputError, "is not the file that reward.json describes"),
        (
            "language-reward?folder={0}/images",
            ConfigError,
            "holds a reward model of images; name it preference?folder=",
        ),
    ],
)
def test_what_is_no_reward_model_is_told(
    done: tuple[Path, Result], place: Path, spec: str, kind: type[Exception], message: str
) -> None:
    if not (place / "two").is_dir():
        headed(place / "two", 2)
        for name in ("cut", "images"):
            (place / name).mkdir()
            (place / name / "model.safetensors").write_bytes(b"cut off")
        (place / "cut" / "reward.json").write_bytes((done[0] / "reward" / "reward.json").read_bytes())
        (place / "images" / "reward.json").write_text('{"kind": "diffalign-reward-heads"}')
    with pytest.raises(kind, match=message.replace("?", r"\?")):
        load_reward(spec.format(place))([Sample(Prompt("c"), text="ab")])


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(place: Path) -> Path:
    """Files that a language model cannot be fitted to, and folders that are none."""
    folder = place / "bad"
    folder.mkdir()
    every = pairs(120)
    write(folder / "good.parquet", every)
    write(folder / "first.parquet", [Preference(p.prompt, p.first, p.second, 1.0) for p in every])
    write(folder / "ties.parquet", [Preference(p.prompt, p.first, p.second, 0.5) for p in every])
    some = [Preference(p.prompt, p.first, p.second, 0.5 if i % 3 == 0 else p.label) for i, p in enumerate(every)]
    write(folder / "some.parquet", some)
    two = [Preference(p.prompt, p.first, p.second, p.label, criterion=c) for p in every for c in ("ease", "facts")]
    write(folder / "two.parquet", two)
    write(
        folder / "images.parquet", [preference_files.pair(f"p{i}", float(i % 2), (i % 9, i % 9 + 1)) for i in range(60)]
    )
    save(folder / "mute", pad_token=None, eos_token=None)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preferences": "images.parquet"}, "the pairs compare images, and encoder ../lm reads texts"),
        ({"encoder": "mute"}, "mute has neither a padding token nor an end-of-text token"),
        ({"encoder": "broken"}, "broken is no language model that can be loaded"),
        ({"encoder": "embedded:nothing"}, "there is no embedded CLIP"),
        ({"preferences": "first.parquet"}, "every decided pair prefers the first"),
        ({"preferences": "ties.parquet"}, "none of the pairs to learn from is decided"),
        ({"preferences": "two.parquet"}, "learns one criterion, and the pairs are judged by ease, facts"),
        ({"preferences": "some.parquet", "strength": "margin"}, "strength: margin is for pairs with a winner"),
        ({"max_tokens": 3}, "there is no preference to learn from: longer than 3 tokens (120)"),
        ({"hidden": 8}, "unknown field hidden of a reward model of texts"),
        ({"length": "short"}, "length: input should be 'free' or 'controlled'"),
        ({"lora": {"targets": ["gone"]}}, "lora.targets ['gone']"),
        ({"learning_rate": 1e9}, "give"),
        ({"modality": "sound"}, "modality: image or text (given: 'sound')"),
        ({"modality": "image"}, "../lm has no open_clip_config.json"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(bad)
    given = {"preferences": "good.parquet", "encoder": "../lm", **QUICK, "epochs": 1, **fields}
    (bad / "fit.yaml").write_text(json.dumps(given))
    result = diffalign("fit.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_texts_are_not_given_to_an_encoder_of_images(bad: Path, tmp_path: Path) -> None:
    result = diffalign("preference", *settings(preferences=str(bad / "good.parquet")), "--out", tmp_path / "out")
    assert result.exit_code == 2 and "set encoder to one, such as embedded:findings-lm" in result.stderr


def test_what_an_encoder_reads_follows_from_its_name(place: Path) -> None:
    assert reward_fit.reads_texts("embedded:findings-lm") and reward_fit.reads_texts(str(place / "lm"))
    assert not reward_fit.reads_texts("embedded:clip") and not reward_fit.reads_texts("hf-hub:a/b")
    found = reward_fit.of_fields({"preferences": "x", "encoder": "org/name", "modality": "text"})
    assert isinstance(found, TextFitConfig)
