"""``diffalign reward fit``: the real command on small studies, and on every kind of bad one."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from apps import reward_fit
from apps.catalogue import fit_recipes
from apps.cli import main
from apps.progress import Status
from diffalign.errors import ConfigError, NotFoundError
from diffalign.preferences import write
from diffalign.types import Preference, Prompt, Sample
from rewards.fit_config import FitConfig, load, parse
from rewards.registry import load as load_reward
from tests import preference_files, reward_studies, tiny_clip

ATTACK = "<script>alert(1)</script> | `x`"
QUICK = ("--set", "learning_rate=3e-3", "--set", "hidden=8", "--set", "ensemble=3", "--set", "learning_curve=false")


def diffalign(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reward", "fit", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One fit of a study that two raters judged, every pair by the first, a third of them by the second too."""
    folder = tmp_path_factory.mktemp("study")
    pairs = reward_studies.emoji_pairs(240)
    again = [Preference(p.prompt, p.second, p.first, 1 - p.label, rater=ATTACK) for p in pairs[::3]]
    reward_studies.file(folder / "pairs.parquet", [*pairs, *again])
    (folder / "fit.yaml").write_text(
        f"name: backgrounds\npreferences: {folder}/pairs.parquet\nheld_out: 0.5\nhidden: 8\nensemble: 3\n"
        "learning_rate: 0.003\n"
    )
    return folder, diffalign(folder / "fit.yaml", "--out", folder / "out")


def test_what_is_printed_and_written(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert result.exit_code == 0, result.output
    out = folder / "out"
    assert {p.name for p in out.iterdir()} == {"config.yaml", "reward", "card.json", "card.md", "card.html"}
    assert {p.name for p in (out / "reward").iterdir()} == {"reward.json", "heads.safetensors"}
    assert "criterion" in result.stdout and "overall" in result.stdout
    assert f"reward: preference?folder={out / 'reward'}" in result.stdout.replace("\n", "")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert set(config) == set(FitConfig.model_fields) and config["ties"] == "auto"


def test_the_card_tells_what_was_put_in(done: tuple[Path, Result]) -> None:
    """81 % of labels name the right background, 10 % are ties; the second rater repeats the first, side for side."""
    card = json.loads((done[0] / "out" / "card.json").read_text())
    assert (card["data"]["pairs"], card["data"]["prompts"], card["data"]["raters"]) == (320, 80, 2)
    one = card["criteria"]["overall"]
    assert sum(one["pairs"].values()) == 320 and sum(one["prompts"].values()) == 80
    assert one["accuracy"]["value"] > 0.75
    assert one["accuracy"]["ci95"][0] > one["baselines"]["always the first"]["value"]
    assert one["agreement"]["value"] == 1 and one["agreement"]["pairs"] == 80
    assert one["ties"]["share"] == pytest.approx(0.1, abs=0.08)
    assert one["ties"]["predicted"] == pytest.approx(one["ties"]["share"], abs=0.1)
    assert len(one["learning_curve"]["points"]) == 4
    assert {group["by"] for group in one["subgroups"]} >= {"rater", "background"}


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, value in attrs if value and "//" in value}, attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_card_can_be_read_and_needs_nothing_but_itself(done: tuple[Path, Result]) -> None:
    out = done[0] / "out"
    page, text = Page((out / "card.html").read_text()), (out / "card.md").read_text()
    assert "script" not in page.tags and ATTACK in page.text
    assert page.tags.count("svg") == 2 and str(done[0]) not in page.text + text
    assert "\\<script\\>" in text and "\\|" in text
    card = json.loads((out / "card.json").read_text())["criteria"]["overall"]
    for said in (f"{card['accuracy']['value']:.1%}", "What it must not be used for", "would more labels help"):
        assert said in page.text and said in text


def test_a_rise_of_the_reward_is_a_better_background(done: tuple[Path, Result]) -> None:
    reward = load_reward(f"preference?folder={done[0] / 'out' / 'reward'}")
    fresh = reward_studies.emoji_pairs(60, seed=9)
    decided = [pair for pair in fresh if pair.label != 0.5]
    first, second = ([getattr(pair, side) for pair in decided] for side in ("first", "second"))
    right = (reward(first).total > reward(second).total).tolist()
    assert sum(r == (pair.label > 0.5) for r, pair in zip(right, decided, strict=True)) > 0.7 * len(decided)


def test_the_folder_of_a_fit_repeats_it_to_the_byte(done: tuple[Path, Result], tmp_path: Path) -> None:
    out = done[0] / "out"
    again = diffalign(out, "--set", "learning_curve=false", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in ("reward.json", "heads.safetensors"):
        assert (tmp_path / "again" / "reward" / name).read_bytes() == (out / "reward" / name).read_bytes()


def test_a_fit_inside_another_run(done: tuple[Path, Result], tmp_path: Path) -> None:
    """Beside the files of a run; the card has a name of its own, and its essentials fit into lines."""
    (tmp_path / "config.yaml").write_text("mine")
    fields = {"preferences": f"{done[0]}/pairs.parquet", "learning_curve": False, "held_out": 0.5, "ensemble": 2}
    with Status() as status:
        card = reward_fit.fit_into(parse(fields), tmp_path, "reward-card", status)
    names = {"config.yaml", "reward", "reward-card.json", "reward-card.md", "reward-card.html"}
    assert {p.name for p in tmp_path.iterdir()} == names and (tmp_path / "config.yaml").read_text() == "mine"
    assert json.loads((tmp_path / "reward-card.json").read_text()) == card
    lines = reward_fit.in_words(card)
    assert lines[0].startswith(f"overall: accuracy {card['criteria']['overall']['accuracy']['value']:.1%} (")
    assert len(lines) > 2 and not any("\n" in line for line in lines)


def test_a_run_gets_the_name_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two criteria by the recipe for clinicians, from a file that also has a broken row; a second run is -2."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i, pair in enumerate(reward_studies.brain_pairs(90)):
        for side, sample in (("a", pair.first), ("b", pair.second)):
            assert sample.image is not None
            sample.image.save(folder / f"{i}{side}.png")
        rows.append({
            "prompt": pair.prompt.text, "image_0": f"{i}a.png", "image_1": f"{i}b.png", "label": pair.label,
            "criterion": pair.criterion,
        })  # fmt: skip
    preference_files.json_lines(folder / "labels.jsonl", [*rows, rows[0] | {"label": 7}])
    for name, which in (("clinician", "null"), ("clinician-2", "[image quality]")):
        chosen = ("--set", "preferences=data/labels.jsonl", "--set", "held_out=0.5", "--set", f"criteria={which}")
        result = diffalign("clinician", *chosen, *QUICK)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "runs" / name / "reward" / "reward.json").is_file()
    assert "1 rows could not be read" in result.stdout and "broken: line 181: label out of range" in result.stderr
    card = json.loads((tmp_path / "runs" / "clinician" / "card.json").read_text())
    assert set(card["criteria"]) == {"contrast as asked", "image quality"}
    assert "no pair was judged twice" in (tmp_path / "runs" / "clinician" / "card.md").read_text()


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that nothing can be learned from."""
    folder = tmp_path_factory.mktemp("bad")
    pair = preference_files.pair
    write(folder / "good.parquet", [pair(f"p{i}", float(i % 2), (i % 9, i % 9 + 1)) for i in range(60)])
    write(folder / "first.parquet", [pair(f"p{i}", 1.0, (i % 9, i % 9 + 1)) for i in range(60)])
    write(folder / "ties.parquet", [pair(f"p{i}", 0.5, (i % 9, i % 9 + 1)) for i in range(60)])
    write(folder / "soft.parquet", [pair(f"p{i}", 0.3 + 0.4 * (i % 2), (i % 9, i % 9 + 1)) for i in range(60)])
    write(folder / "one.parquet", [pair("p", float(i % 2), (i % 9, i % 9 + 1)) for i in range(60)])
    asked = Prompt("p")
    write(folder / "texts.parquet", [Preference(asked, Sample(asked, text="a"), Sample(asked, text="b"), 1.0)])
    (folder / "empty.parquet").write_bytes(b"")
    preference_files.json_lines(folder / "broken.jsonl", [{"prompt": "p", "image_0": "x", "image_1": "y", "label": 1}])
    (folder / "list.yaml").write_text("- a\n")
    (folder / "wrong.yaml").write_text("preferences: x\nensembel: 3\n")
    (folder / "number.yaml").write_text("preferences: x\n\nensemble: many\n")
    (folder / "broken.yaml").write_text("preferences: [x\n")
    tiny_clip.build(folder / "clip")
    return folder


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("wrong.yaml", (), "wrong.yaml:2: unknown field ensembel; did you mean ensemble?"),
        ("number.yaml", (), "number.yaml:3: ensemble: input should be a valid integer"),
        ("list.yaml", (), "a configuration is a mapping"),
        ("broken.yaml", (), "not valid YAML"),
        ("gone.yaml", (), "no configuration file"),
        ("nonsense", (), "no recipe 'nonsense'"),
        ("preference", (), "preferences is not given"),
        ("preference", ("preferences=gone.parquet",), "there is no preference file gone.parquet"),
        ("preference", ("preferences=empty.parquet",), "empty.parquet is empty"),
        ("preference", ("preferences=broken.jsonl",), "no preference to learn from: missing image (1)"),
        ("preference", ("preferences=texts.parquet",), "the pairs compare texts, and the encoder sees images"),
        ("preference", ("preferences=first.parquet",), "every decided pair prefers the first"),
        ("preference", ("preferences=ties.parquet",), "none of the pairs to learn from is decided (all "),
        ("preference", ("preferences=soft.parquet", "ties=outcome"), "needs hard labels"),
        ("preference", ("preferences=one.parquet",), "1 different prompts or cases"),
        ("preference", ("preferences=good.parquet", "criteria=[mood]"), "no pair judges mood; the file has overall"),
        ("preference", ("preferences=good.parquet", "criteria=[overall, overall]"), "criteria: one is named twice"),
        ("preference", ("preferences=good.parquet", "held_out=1"), "held_out: input should be less than 1"),
        ("preference", ("preferences=good.parquet", "ensemble=true"), "not true or false"),
        ("preference", ("preferences=good.parquet", "encoder=./gone"), "there is no folder"),
        ("preference", ("preferences=good.parquet", "device=abacus"), "no device 'abacus'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, settings: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(bad)
    quick = () if recipe != "preference" or "encoder=./gone" in settings else ("--set", "encoder=./clip")
    result = diffalign(recipe, *quick, *(word for s in settings for word in ("--set", s)), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty_is_refused(bad: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = diffalign("preference", "--set", f"preferences={bad / 'good.parquet'}", "--out", tmp_path)
    assert result.exit_code == 2 and "is not empty: choose another --out" in result.stderr


def test_recipes_are_valid_and_need_a_file(tmp_path: Path) -> None:
    recipes = list(fit_recipes().values())
    assert [path.stem for path in recipes] == ["clinician", "preference", "text-preference"]
    for path in recipes:
        assert load(path, ["preferences=x"]).name == path.stem
        with pytest.raises(ConfigError, match="preferences is not given"):
            load(path)
    with pytest.raises(NotFoundError):
        load(tmp_path / "none.yaml")
