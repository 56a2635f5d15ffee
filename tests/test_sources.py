"""``diffalign align`` from what was recorded, and from what simulated raters say: the real command on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import rewards
from apps import build, configured, dry_run
from diffalign import preferences
from diffalign.errors import InputError
from diffalign.runs import Run
from diffalign.types import Preference, Prompt, Sample
from tests.test_cli import desk, diffalign

__all__ = ["desk"]

RATERS = Path(rewards.__file__).parent / "raters"
MEDIAN = 0.043
"""About the median utility of what the tiny model draws."""
TEXTS = [f"{n} {c} ball" for n in ("one", "two") for c in ("red", "blue")]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 40, 255 - shade))


def pairs(count: int = 16, *, criteria: tuple[str, ...] = ("overall",), label: float | None = None) -> list[Preference]:
    """Redder is better, for each of the four texts in turn."""
    made = []
    for i in range(count):
        prompt = Prompt(TEXTS[i % 4])
        first, second = Sample(prompt, image=picture(20 * (i % 10))), Sample(prompt, image=picture(20 * (i % 7) + 10))
        won = float(20 * (i % 10) > 20 * (i % 7) + 10)
        for criterion in criteria:
            made.append(Preference(prompt, first, second, won if label is None else label, criterion=criterion))
    return made


def learn(desk: Path, source: str, objective: str, path: str | None, **experience: object) -> None:
    """Writes ``learn.yaml``: the desk's run, but from recorded judgements."""
    data = yaml.safe_load((desk / "run.yaml").read_text())
    del data["credit"]
    data |= {
        "rewards": [], "experience": {"source": source, "path": path, **experience}, "objective": {"name": objective},
    }  # fmt: skip
    data["evaluation"]["rewards"] = ["reward.py:brightness", "compressibility"]
    (desk / "learn.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def labels(path: Path, good: Callable[[int], bool]) -> None:
    (path.parent / "pictures").mkdir()
    rows = []
    for i in range(8):
        picture(30 * i).save(path.parent / "pictures" / f"{i}.png")
        rows.append({"prompt": TEXTS[i % 4], "image": f"pictures/{i}.png", "label": good(i)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(desk: Path) -> None:
    (desk / "shown").mkdir()
    for i in range(8):
        picture(30 * i).save(desk / "shown" / f"{i}.png")
    rows = [{"file": f"{i}.png", "prompt": TEXTS[i % 4]} for i in range(8)]
    (desk / "shown" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("source", "objective"),
    [("pairs", "dpo"), ("pairs", "kto"), ("pairs", "sft"), ("labels", "kto"), ("demonstrations", "sft")],
)
def test_a_run_learns_from_what_was_recorded(desk: Path, source: str, objective: str) -> None:
    """Half of the texts are held out, and what was recorded about those is left out of training, and said to be."""
    match source:
        case "pairs":
            preferences.write(desk / "recorded", pairs())
        case "labels":
            labels(desk / "recorded", lambda i: i % 3 > 0)
        case _:
            shown(desk)
    learn(desk, source, objective, "shown" if source == "demonstrations" else "recorded")
    result = diffalign("align", "learn.yaml")
    assert result.exit_code == 0, result.output
    count, what = (16, "pairs") if source == "pairs" else (8, "labels" if source == "labels" else "images")
    assert f"{count // 2} of {count} {what} are of held-out prompts, and left out of training" in result.output
    assert ("the loss of DPO starts near ln 2" in result.output) is (objective == "dpo")
    run = Run(desk / "runs" / "learn")
    metrics = run.metrics()[0]
    assert {"policy/loss", "count/updates", "time/update"} <= metrics.keys() and "reward/total" not in metrics
    compared = source == "pairs" and objective != "sft"
    assert any("policy/held_out_accuracy" in row for row in run.metrics()) is compared
    assert ("Held-out preferences in order" in (run.path / "report.html").read_text()) is compared
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert evaluation["win_rate"]["by"] == "brightness"
    assert not any(entry["trained_on"] for entry in evaluation["rewards"].values())
    page = (run.path / "report.html").read_text()
    assert f"the {source} in" in page
    hashes = json.loads((run.path / "environment.json").read_text())["hashes"]
    assert hashes["experience"].startswith("sha256:")


def rated(desk: Path, source: str, objective: str, rater: str = "emoji") -> None:
    learn(desk, source, objective, None, rater=rater, **({} if source == "online-pairs" else {"collect": 12}))
    data = yaml.safe_load((desk / "learn.yaml").read_text())
    data["prompts"] = {"source": "emoji", "train": 6, "held_out": 5}
    data["trainer"]["samples_per_prompt"] = 2 if source == "online-pairs" else 1
    data["evaluation"] = {"rewards": [f"hidden-utility?rater={rater}", "compressibility"], "seeds_per_prompt": 1}
    (desk / "learn.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


@pytest.mark.parametrize(("source", "objective"), [("pairs", "dpo"), ("labels", "kto"), ("online-pairs", "ipo")])
def test_simulated_raters_stand_in_for_people(desk: Path, source: str, objective: str) -> None:
    """What they said is kept, and asked for once; what they want was never optimised."""
    lenient = RATERS.joinpath("emoji.yaml").read_text().replace("good_above: 0.73", f"good_above: {MEDIAN}")
    (desk / "lenient.yaml").write_text(lenient)
    rater = "lenient.yaml" if source == "labels" else "emoji"
    rated(desk, source, objective, rater)
    result = diffalign("align", "learn.yaml", "--set", "evaluation.seeds_per_prompt=2")
    assert result.exit_code == 0, result.output
    run = Run(desk / "runs" / "learn")
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert not evaluation["rewards"]["hidden-utility"]["trained_on"]
    assert not evaluation["rewards"]["compressibility"]["trained_on"]
    assert f"what the simulated raters {rater} prefer" in (run.path / "report.html").read_text()
    if source == "pairs":
        table = preferences.Table(run.path / "preferences.parquet")
        assert len(table) == 12 and {p.criterion for p in table} == {"overall"}
        assert all(p.provenance["simulated"] for p in table)
        before = (run.path / "preferences.parquet").stat().st_mtime_ns
        more = diffalign("align", "learn.yaml", "--resume", "--out", str(run.path), "--set", "trainer.epochs=3")
        assert more.exit_code == 0, more.output
        assert (run.path / "preferences.parquet").stat().st_mtime_ns == before


def test_the_plan_of_a_preference_run(desk: Path) -> None:
    """By hand: 12 pairs are 24 images of 3 steps; 2 epochs of 8 pairs at 1 draw ask policy and reference of two sides:
    64 calls; 10 images are evaluated and 2 x 5 compared."""
    rated(desk, "pairs", "dpo")
    config = configured.configuration("learn.yaml")
    assert dry_run.generated(config, 5) == (24, 0, 10)
    assert dry_run.calls(config, 5) == (24 + 10 + 10) * 3 + 64
    result = diffalign("align", "learn.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "dpo from pairs, judged by the simulated raters emoji" in result.output
    assert "2 (each over 4 pairs)" in result.output


def test_a_run_fits_its_own_reward_first(desk: Path) -> None:
    """Its configuration names the reward as ``fitted``, so it can be repeated elsewhere; a finished fit is kept."""
    data = yaml.safe_load((desk / "run.yaml").read_text())
    data |= {
        "rewards": ["preference?folder=fitted"],
        "fit": {"rater": "emoji", "collect": 60, "criteria": ["overall"], "ensemble": 2},
        "prompts": {"source": "emoji", "train": 20, "held_out": 5},
    }
    data["evaluation"] = {"rewards": ["hidden-utility?rater=emoji"], "seeds_per_prompt": 1}
    (desk / "loop.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    result = diffalign("align", "loop.yaml")
    assert result.exit_code == 0, result.output
    run = desk / "runs" / "loop"
    assert (run / "reward" / "reward.json").is_file() and (run / "reward-card.html").is_file()
    assert "preference?folder=fitted" in (run / "config.yaml").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())["rewards"]
    assert evaluation["preference"]["trained_on"] and not evaluation["hidden-utility"]["trained_on"]
    before = (run / "reward" / "heads.safetensors").read_bytes()
    more = diffalign("align", "loop.yaml", "--resume", "--out", str(run))
    assert more.exit_code == 0 and (run / "reward" / "heads.safetensors").read_bytes() == before
    assert diffalign("evaluate", str(run), "--out", "again").exit_code == 0
    for change, message in ((["--set", "fit=null"], "a reward names folder=fitted, but there is no section fit"),):
        refused = diffalign("align", "loop.yaml", *change)
        assert refused.exit_code == 2 and message in refused.stderr


def broken_labels(desk: Path) -> None:
    (desk / "recorded").write_text('{"prompt": "a", "image": "nowhere.png", "label": true}\n')


def other_columns(desk: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "winner": [1]}), desk / "recorded")


@pytest.mark.parametrize(
    ("prepare", "source", "objective", "message"),
    [
        (lambda desk: None, "pairs", "dpo", "there is no file recorded"),
        (other_columns, "pairs", "dpo", "has the columns prompt, winner, which fit no format"),
        (
            lambda desk: preferences.write(desk / "recorded", pairs(criteria=("anatomy", "quality"))),
            "pairs", "dpo", "has judgements by several criteria, anatomy, quality: say which to learn from",
        ),
        (
            lambda desk: preferences.write(desk / "recorded", pairs(label=0.5)),
            "pairs", "dpo", "all 8 pairs are ties, so none says what is better",
        ),
        (lambda desk: labels(desk / "recorded", lambda i: True), "labels", "kto", "labels are good: there is nothing"),
        (broken_labels, "labels", "kto", "nowhere.png"),
        (lambda desk: (desk / "recorded").mkdir(), "demonstrations", "sft", "no prompts.jsonl or prompts.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_sentence(
    desk: Path, prepare: Callable[[Path], object], source: str, objective: str, message: str
) -> None:
    prepare(desk)
    learn(desk, source, objective, "recorded")
    result = diffalign("align", "learn.yaml")
    assert result.exit_code == 2, result.output
    said = result.stderr.strip().splitlines()
    assert message in said[-1] and [line.startswith("error: ") for line in said].count(True) == 1
    assert not (desk / "runs" / "learn").exists()


def test_prompts_come_from_the_preferences_themselves(desk: Path) -> None:
    """As the README says: one's own pairs, a part of their prompts held out."""
    preferences.write(desk / "own.parquet", pairs())
    learn(desk, "pairs", "dpo", "own.parquet")
    settings = ["prompts.source=own.parquet", "prompts.train=3", "prompts.held_out=1", "trainer.epochs=1"]
    result = diffalign("align", "learn.yaml", *[word for setting in settings for word in ("--set", setting)])
    assert result.exit_code == 0, result.output
    assert "4 of 16 pairs are of held-out prompts, and left out of training" in result.output
    assert "own.parquet brings its own prompts, so prompts.train (3) limits nothing here" in result.output


def test_training_prompts_are_counted_only_where_they_are_sampled(desk: Path) -> None:
    """Four prompts, of which one is held out: the 64 of the default are asked for by simulated raters, not by pairs."""
    preferences.write(desk / "recorded", pairs())
    learn(desk, "pairs", "dpo", "recorded")
    data = yaml.safe_load((desk / "learn.yaml").read_text())
    data["prompts"] = {"source": "prompts.txt", "held_out": 1}
    (desk / "learn.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    planned = diffalign("align", "learn.yaml", "--dry-run")
    assert "those of the file to train on, 1 held out" in planned.output, planned.output
    assert diffalign("align", "learn.yaml", "--set", "trainer.epochs=1", "--out", "run").exit_code == 0
    fitted = ["--set", "fit={rater: emoji, collect: 16}", "--set", "evaluation.rewards=['clinician?folder=fitted']"]
    changes = [
        ["--set", change] for change in ("experience={source: pairs, rater: emoji}", "warm_up={demonstrations: emoji}")
    ]
    for change in (*changes, fitted):
        for more in ([], ["--dry-run"]):
            refused = diffalign("align", "learn.yaml", *change, *more)
            assert refused.exit_code == 2 and "prompts.train 64 and prompts.held_out 1 ask for 65" in refused.stderr


def test_an_evaluation_asks_for_held_out_prompts_alone(desk: Path) -> None:
    assert diffalign("align", "run.yaml", "--set", "trainer.epochs=1", "--out", "run").exit_code == 0
    (desk / "others.txt").write_text("a tree\na house\n")
    result = diffalign("evaluate", "run", "--set", "prompts.source=others.txt", "--out", "out")
    assert result.exit_code == 0, result.output
    assert {row["prompt"] for row in json.loads((desk / "out" / "samples" / "prompts.json").read_text())} == {
        "a tree", "a house",
    }  # fmt: skip


def as_rows(desk: Path, name: str, label: object = 1) -> None:
    """Twelve pairs of pictures as labelled rows, the last with this label."""
    (desk / "pictures").mkdir(exist_ok=True)
    for i in range(2):
        picture(80 * i).save(desk / "pictures" / f"{i}.png")
    row = {"image_0": "pictures/1.png", "image_1": "pictures/0.png"}
    rows = [{"prompt": TEXTS[i % 4], **row, "label": label if i == 11 else 1} for i in range(12)]
    (desk / name).write_text("\n".join(map(json.dumps, rows)))


def test_pairs_of_any_form_are_learned_from(desk: Path) -> None:
    """What is not in the native form is copied into it, in the run's folder, and the run can be resumed."""
    as_rows(desk, "rows.jsonl")
    learn(desk, "pairs", "dpo", "rows.jsonl")
    result = diffalign("align", "learn.yaml", "--set", "trainer.epochs=1", "--out", "run")
    assert result.exit_code == 0, result.output
    copy = preferences.Table(desk / "run" / "preferences.parquet")
    assert len(copy) == 12 and {pair.label for pair in copy} == {1.0}
    again = diffalign("align", "learn.yaml", "--set", "trainer.epochs=1", "--out", "run", "--resume")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("label", "said"),
    [("better", "rows.jsonl: line 12: unknown label"), (1, "rows.jsonl has no judgement by 'taste'")],
)
def test_a_run_that_cannot_use_its_pairs_leaves_no_copy(desk: Path, label: object, said: str) -> None:
    as_rows(desk, "rows.jsonl", label)
    learn(desk, "pairs", "dpo", "rows.jsonl", **({"criterion": "taste"} if label == 1 else {}))
    result = diffalign("align", "learn.yaml")
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not (desk / "runs" / "learn").exists()


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "unreadable image: second is not an image that can be decoded"),
        (flipped, "unreadable image: second is not an image that can be decoded"),
        (lambda data: b"no picture", "unreadable image: second is not an image that can be decoded"),
        (lambda data: None, "no image: second is empty"),
    ],
)
def test_a_broken_image_in_a_native_file_is_refused_before_any_work(
    desk: Path, damage: Callable[[bytes], bytes | None], reason: str
) -> None:
    """Row 9 of 16 is of the last epoch, or of none; what `convert` makes of the file is learned from."""
    preferences.write(desk / "whole.parquet", pairs())
    rows = pq.read_table(desk / "whole.parquet").to_pylist()
    rows[9]["second"]["bytes"] = damage(rows[9]["second"]["bytes"])
    pq.write_table(pa.Table.from_pylist(rows, preferences.table.schema("image")), desk / "own.parquet")
    learn(desk, "pairs", "dpo", "own.parquet")
    refused = diffalign("align", "learn.yaml", "--set", "trainer.epochs=1")
    assert refused.exit_code == 2, refused.output
    assert f"error: own.parquet: 1 of 16 rows cannot be used, row 9: {reason}" in refused.stderr
    assert "`diffalign preferences convert own.parquet clean.parquet` lists them" in refused.stderr
    assert not (desk / "runs" / "learn").exists()
    assert diffalign("preferences", "convert", "own.parquet", "clean.parquet").exit_code == 0
    clean = diffalign("align", "learn.yaml", "--set", "trainer.epochs=1", "--set", "experience.path=clean.parquet")
    assert clean.exit_code == 0, clean.output


@pytest.mark.parametrize(
    ("column", "value"), [("provenance", "{broken"), ("strength", -5.0), ("strength", math.nan), ("label", 2.0)]
)
def test_a_row_whose_cells_are_wrong_is_found_with_its_images_whole(desk: Path, column: str, value: object) -> None:
    preferences.write(desk / "whole.parquet", pairs())
    rows = pq.read_table(desk / "whole.parquet").to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows, preferences.table.schema("image")), desk / "own.parquet")
    table = preferences.Table(desk / "own.parquet")
    with pytest.raises(InputError) as caught:
        table[1]
    found = [one for one in table.broken() if one]
    assert len(found) == 1 and found[0].row == 1
    assert found[0].reason in str(caught.value)


TEXT_PAIR = {"prompt": "a", "text_0": "one", "text_1": "two", "label": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rewards=[readability]"], "reward readability judges texts, but the model embedded:emoji makes images"),
        (
            ["rewards=[own.py:score]"],
            "reward score judges texts, but the model embedded:emoji makes images (a function",
        ),
        (["evaluation.rewards=[readability]"], "reward readability judges texts, but"),
    ],
)
def test_another_modality_is_refused_before_any_work(desk: Path, settings: list[str], message: str) -> None:
    (desk / "own.py").write_text("def score(samples):\n    return [1.0] * len(samples)\nscore.modality = 'text'\n")
    for more in ([], ["--dry-run"]):
        result = diffalign("align", "emoji-ddpo", *[word for one in settings for word in ("--set", one)], *more)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert "writing to" not in result.output and not (desk / "runs").exists()


def test_pairs_of_another_modality_are_refused_before_any_work(desk: Path) -> None:
    (desk / "texts.jsonl").write_text(json.dumps(TEXT_PAIR) + "\n")
    preferences.write(desk / "texts.parquet", preferences.read(desk / "texts.jsonl"))  # type: ignore[arg-type]
    for name in ("texts.jsonl", "texts.parquet"):
        learn(desk, "pairs", "dpo", name)
        for more in ([], ["--dry-run"]):
            result = diffalign("align", "learn.yaml", *more)
            assert result.exit_code == 2, result.output
            assert f"experience.path: {name} has texts, but the model" in result.stderr
            assert "writing to" not in result.output
    learn(desk, "pairs", "dpo", None, rater="findings")
    result = diffalign("align", "learn.yaml", "--dry-run")
    assert result.exit_code == 2 and "experience.rater: findings judges texts" in result.stderr, result.output


def test_a_criterion_is_chosen(desk: Path) -> None:
    preferences.write(desk / "recorded", pairs(criteria=("anatomy", "quality")))
    learn(desk, "pairs", "dpo", "recorded", criterion="quality")
    assert diffalign("align", "learn.yaml", "--set", "trainer.epochs=1").exit_code == 0
    missing = diffalign("align", "learn.yaml", "--set", "experience.criterion=taste", "--out", "other")
    assert missing.exit_code == 2 and "has no judgement by 'taste'; it has anatomy, quality" in missing.stderr


def test_all_pairs_of_held_out_prompts_are_refused(desk: Path) -> None:
    """A text is held out whatever its case and spaces, though the pair file gives it an id of its own."""
    same = [Preference(Prompt(f" {TEXTS[0].upper()}", "other id"), p.first, p.second, p.label) for p in pairs()]
    preferences.write(desk / "recorded", same)
    (desk / "prompts.txt").write_text(f"{TEXTS[0]}\n{TEXTS[1]}\n")
    learn(desk, "pairs", "dpo", "recorded")
    refused = []
    for seed in range(6):
        out = diffalign(
            "align", "learn.yaml", "--out", f"{seed}", "--set", f"seed={seed}", "--set", "prompts.train=1", "--set",
            "prompts.held_out=1", "--set", "trainer.epochs=0",
        )  # fmt: skip
        refused.append("belong to held-out prompts" in out.stderr)
    assert any(refused) and not all(refused)


def test_rewards_that_go_by_the_same_are_no_independent_judges(tmp_path: Path) -> None:
    """A hidden utility is built on its world's checker; a fitted model is one judge under any name."""
    one = str(tmp_path / "reward")
    assert build.standards("hidden-utility?rater=emoji") & build.standards("emoji-checker?graded=true")
    assert not build.standards("hidden-utility?rater=emoji") & build.standards("brain-mr-checker")
    same = RATERS / "emoji.yaml"
    assert build.standards("hidden-utility?rater=emoji") == build.standards(f"hidden-utility?rater={same}")
    fitted = build.standards(f"clinician?folder={one}&kappa=0&name=mean")
    assert fitted == build.standards(f"preference?folder={one}") and not fitted & build.standards("preference?folder=x")
    assert not build.standards("clip") & build.standards("clip?model=ViT-B-32&pretrained=openai")
    assert build.judges(configured.configuration("emoji-rest")).trained_on == {"hidden-utility", "emoji-checker"}
    assert not build.judges(configured.configuration("emoji-dpo")).trained_on


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("emoji-dpo", "experience.rater=emojii", "emojii"),
        ("emoji-loop", "fit.rater=emojii", "emojii"),
        ("emoji-loop", "evaluation.rewards=[nonsense]", "there is no reward 'nonsense'"),
        ("emoji-loop", "rewards=[preference?folder=fitted-old]", "fit: no reward names what it fits"),
        ("sd15-dpo", "experience.path=nowhere.parquet", "experience.path: there is no file nowhere.parquet"),
    ],
)
def test_mistakes_are_told_before_any_work(desk: Path, recipe: str, change: str, message: str) -> None:
    for more in ([], ["--dry-run"]):
        (desk / "pairs.parquet").unlink(missing_ok=True)
        preferences.write(desk / "pairs.parquet", pairs())
        settings = [change, "prompts.train=2", "prompts.held_out=1"] if recipe.startswith("sd15") else [change]
        result = diffalign("align", recipe, *[w for s in settings for w in ("--set", s)], *more)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and not (desk / "runs" / recipe).exists()


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.jsonl"])
def test_criteria_that_nobody_judged_are_told_before_any_work(desk: Path, name: str) -> None:
    preferences.write(desk / "pairs.parquet", pairs())
    Image.new("RGB", (8, 8)).save(desk / "x.png")
    (desk / "pairs.jsonl").write_text('{"prompt": "a", "image_0": "x.png", "image_1": "x.png", "label": 1}\n')
    change = ["fit.rater=null", f"fit.preferences={name}", "fit.criteria=[overall, mood, anatomy]", "device=cpu"]
    for more in ([], ["--dry-run"]):
        result = diffalign("align", "emoji-loop", *[w for s in change for w in ("--set", s)], *more)
        assert result.exit_code == 2, result.output
        assert f"fit.criteria: no pair of {name} judges anatomy, mood; it has overall" in result.stderr
        assert not (desk / "runs").exists()


def test_the_plan_counts_what_a_fit_collects() -> None:
    config = configured.configuration("emoji-loop")
    assert dry_run.generated(config, 0)[0] == 12 * 64 + 2 * 1024
    kto = configured.configuration("emoji-dpo", ["objective={name: kto}"])
    assert dry_run.updates(kto) == "at most 8 (each over 16 samples)"


def test_the_plan_counts_each_pass_over_the_best_by_what_it_keeps() -> None:
    """Of 64 samples the first pass has 32, two updates of 16, and the second 16; ten steps of each are asked about."""
    config = configured.configuration("emoji-rest")
    assert dry_run.updates(config) == "at most 3 (each over 16 samples)"
    assert dry_run.learning_calls(config) == (32 + 16) * 10
    assert dry_run.updates(configured.configuration("emoji-rest", ["trainer.inner_epochs=3"])).startswith("at most 4 ")
