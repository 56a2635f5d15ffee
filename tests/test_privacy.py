"""The privacy gate: a model that copies its training set fails it, fresh noise passes it, and silence never passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from apps import dataset_features, dataset_privacy
from apps.cli import main
from apps.dataset_features import TRAINED_ON, Looks, Made, source
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.synthesis import privacy, release, utility
from diffalign.synthesis.extraction import extraction, largest_clique
from diffalign.synthesis.privacy import Measure
from pipelines.embedded.data import scenes
from tests.synthetic import drawn, generated

DIMENSIONS = 16


def noise(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, DIMENSIONS))


TRAINING, HELD_OUT = noise(0, 400), noise(1, 300)


def measured(made: np.ndarray, again: np.ndarray | None = None, member_gain: float = 0.0) -> dict[str, Measure]:
    """All measures of some images by a model that gives ``again`` for every prompt, or fresh images."""
    far, own = privacy.nearest(HELD_OUT, TRAINING)[0][:, 0], privacy.nearest(made, TRAINING)[0][:, 0]
    chance = np.random.default_rng(5)
    counter = iter(range(1000))
    losses = chance.normal(1, 0.1, 2000)
    return {
        "nearest_features": privacy.closer(own, far, "images"),
        "nearest_pixels": privacy.closer(own, far, "images"),
        "copies": privacy.copies({"features": (own, far)}, [f"syn-{i}" for i in range(len(made))]),
        "authenticity": privacy.authenticity(made, TRAINING, HELD_OUT),
        "extraction": extraction(
            lambda prompt: noise(100 + next(counter), 12) if again is None else again, ["a", "b", "c"], TRAINING, far
        ),
        "membership": privacy.membership(losses[:1000] - member_gain, losses[1000:]),
    }


def test_fresh_noise_passes() -> None:
    found = privacy.report(measured(noise(2, 500)), {})
    assert found["verdict"] == "passed", found["why"]
    assert found["measures"]["nearest_features"]["value"] < 0.05
    assert found["measures"]["membership"]["value"] == pytest.approx(0.5, abs=0.05)
    json.dumps(found, allow_nan=False)


def test_a_model_that_copies_its_training_set_fails_everywhere() -> None:
    """Copies with a little noise; the same image again and again for a prompt; losses that know the training images."""
    copied = np.concatenate([TRAINING[:250] + 0.01 * noise(3, 250), noise(4, 250)])
    found = privacy.report(measured(copied, np.repeat(TRAINING[:1], 12, axis=0), 0.5), {})
    assert found["verdict"] == "failed"
    for name in privacy.REQUIRED:
        assert found["measures"][name]["verdict"] == "failed", name
    assert found["measures"]["nearest_features"]["value"] == pytest.approx(0.5, abs=0.03)
    assert found["measures"]["copies"]["value"] == 0.5
    assert found["measures"]["copies"]["cases"][:2] == ["syn-0", "syn-1"]
    authentic = found["measures"]["authenticity"]
    assert authentic["value"] < authentic["held_out"]["value"] - 0.2


def test_one_copy_among_many_fails_although_the_share_does_not_show_it() -> None:
    made = noise(2, 500)
    made[77] = TRAINING[5]
    found = privacy.report(measured(made), {})
    assert found["measures"]["nearest_features"]["verdict"] == "passed"
    assert found["verdict"] == "failed" and found["measures"]["copies"]["cases"] == ["syn-77"]


@pytest.mark.parametrize("name", privacy.REQUIRED)
def test_what_was_not_measured_does_not_pass(name: str) -> None:
    whole = measured(noise(2, 500))
    found = privacy.report({key: value for key, value in whole.items() if key != name}, {})
    assert found["verdict"] == "not assessed" and privacy.shown(name) in found["why"]
    failed = privacy.report({**whole, name: replace(whole[name], verdict="failed")}, {})
    assert failed["verdict"] == "failed"


def test_a_training_index_with_gaps_does_not_pass() -> None:
    found = privacy.report(measured(noise(2, 500)), {}, index="the training index is not whole")
    assert found["verdict"] == "not assessed" and "not whole" in found["why"]


def test_a_pass_says_what_it_does_not_cover() -> None:
    found = privacy.report(measured(noise(2, 500)), {}, scope="texts were not assessed")
    assert found["verdict"] == "passed" and found["why"].endswith("; texts were not assessed")


def test_a_held_out_image_that_resembles_a_training_image_hides_no_copy() -> None:
    """One of 300 held-out rows is a training row but for a trace of noise: their 1st percentile is the 3rd smallest."""
    other = HELD_OUT.copy()
    other[0] = TRAINING[0] + 1e-6
    far, made = privacy.nearest(other, TRAINING)[0][:, 0], noise(2, 500)
    made[7] = TRAINING[9] + 0.01 * noise(3, 1)[0]
    own = privacy.nearest(made, TRAINING)[0][:, 0]
    found = privacy.copies({"features": (own, far)}, [str(i) for i in range(500)])
    assert found.verdict == "failed" and found.facts["cases"] == ["7"]
    assert extraction(lambda _: made[:12], ["a"], TRAINING, far).verdict == "failed"
    assert extraction(lambda _: made[20:32], ["a"], TRAINING, far).verdict == "passed"


def test_held_out_images_that_are_training_images_leave_copies_open_but_for_the_same_pixels() -> None:
    far = np.concatenate([np.zeros(3), np.ones(297)])
    own = np.full(100, 2.0)
    names = [str(i) for i in range(100)]
    assert privacy.copies({"pixels": (own, far)}, names).verdict == "not assessed"
    same = [i == 4 for i in range(100)]
    assert privacy.copies({"pixels": (own, far)}, names, same).facts["cases"] == ["4"]
    assert privacy.copies({"pixels": (own, far)}, names, same).verdict == "failed"
    assert extraction(lambda _: noise(2, 12), ["a"], TRAINING, far).verdict == "not assessed"


def test_one_training_image_among_many_different_ones_is_extracted() -> None:
    made, far = noise(2, 12), privacy.nearest(HELD_OUT, TRAINING)[0][:, 0]
    made[5] = TRAINING[3]
    found = extraction(lambda _: made, ["a"], TRAINING, far)
    assert found.verdict == "failed" and found.facts["alike"] == 0


def test_what_is_no_number_passes_nothing() -> None:
    broken = TRAINING.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="1 of 400 training rows hold what is no number"):
        privacy.nearest(HELD_OUT, broken)
    far, hole = np.ones(300), np.full(300, np.nan)
    for own, other in ((hole, far), (far, hole)):
        assert privacy.closer(own, other, "images").verdict == "not assessed"
        assert privacy.copies({"pixels": (own, other)}, ["x"] * 300).verdict == "not assessed"
    assert extraction(lambda _: noise(2, 12), ["a"], TRAINING, hole).verdict == "not assessed"


def test_held_out_images_that_are_known_better_than_training_images_leave_membership_open() -> None:
    losses = np.random.default_rng(5).normal(1, 0.1, 2000)
    found = privacy.membership(losses[:1000] + 0.1, losses[1000:])
    assert found.ci95 is not None and found.ci95[1] < 0.4
    assert found.verdict == "not assessed" and "not what it is said to be" in found.why


def test_few_cases_neither_pass_nor_fail() -> None:
    """0 of 30: Wilson's upper end is 1.96^2 / (30 + 1.96^2) = 11 %, above the limit of 5 %."""
    far = privacy.nearest(HELD_OUT, TRAINING)[0][:, 0]
    found = privacy.closer(np.full(30, far.max()), far, "images")
    assert found.verdict == "not assessed" and found.ci95 is not None
    assert found.ci95[1] == pytest.approx(1.959964**2 / (30 + 1.959964**2))
    assert privacy.closer(far, far[:100], "images").verdict == "not assessed"


def test_the_threshold_is_the_first_percentile() -> None:
    """The 3rd smallest of 300: two of 300 lie below it."""
    values = np.random.default_rng(0).permutation(300) + 1.0
    assert privacy.threshold(values) == 3
    assert privacy.closer(values, values, "images").value == pytest.approx(2 / 300)


def test_false_alarms_are_rare_and_copiers_are_always_caught() -> None:
    """40 honest sets: none fails, nearly all pass. A tenth of near copies always fails."""
    verdicts, caught = [], []
    for seed in range(40):
        known, other, made = (noise(1000 + 3 * seed + k, n) for k, n in enumerate((300, 300, 300)))
        far, own = (privacy.nearest(rows, known)[0][:, 0] for rows in (other, made))
        verdicts.append(privacy.closer(own, far, "images").verdict)
        made[:45] = known[:45] + 0.05 * noise(5000 + seed, 45)
        caught.append(privacy.closer(privacy.nearest(made, known)[0][:, 0], far, "images").verdict)
    assert verdicts.count("failed") == 0 and verdicts.count("passed") >= 36
    assert set(caught) == {"failed"}


def test_nearest_neighbours_are_those_of_a_loop() -> None:
    queries, known = noise(7, 20), noise(8, 50)
    queries[3] = known[9]
    distances, which = privacy.nearest(queries, known, 2)
    for i, row in enumerate(queries):
        every = sorted((float(np.linalg.norm(np.float32(row) - np.float32(other))), j) for j, other in enumerate(known))
        assert which[i].tolist() == [j for _, j in every[:2]]
        assert distances[i] == pytest.approx([d for d, _ in every[:2]], abs=1e-5)
    assert distances[3, 0] == 0


def test_auc_counts_pairs_and_its_interval_is_delong_s() -> None:
    """Members 1, 2, 4 against 2, 3, 5: of nine pairs 1+1+1, .5+1+1, 0+0+1 = 6.5 are lower. Components: members 1, 5/6,
    1/3; others .5, 2/3, 1: variances .1204 and .0648, over three each; 1.96 sqrt(.0617) = .487.
    """
    value, ends = privacy.auc(np.array([1.0, 2, 4]), np.array([2.0, 3, 5]))
    assert value == pytest.approx(6.5 / 9)
    half = 1.96 * np.sqrt((np.var([1, 5 / 6, 1 / 3], ddof=1) + np.var([0.5, 2 / 3, 1], ddof=1)) / 3)
    assert ends == pytest.approx((6.5 / 9 - half, 1.0)) and half == pytest.approx(0.487, abs=0.002)


def test_a_few_images_that_are_known_by_heart_fail_membership_although_the_area_does_not_show_it() -> None:
    losses = np.random.default_rng(0).normal(1, 0.1, 2000)
    losses[:110] = 0.1
    found = privacy.membership(losses[:1000], losses[1000:])
    assert found.ci95 is not None and found.ci95[1] < privacy.AUC_LIMIT
    assert found.verdict == "failed"


def test_losses_that_are_no_numbers_are_not_assessed() -> None:
    assert privacy.membership(np.full(300, np.nan), np.ones(300)).verdict == "not assessed"


def test_a_model_of_few_looks_that_copies_nothing_passes_extraction() -> None:
    far = privacy.nearest(HELD_OUT, TRAINING)[0][:, 0]
    found = extraction(lambda prompt: np.repeat(noise(50, 1), 12, axis=0), ["a", "b"], TRAINING, far)
    assert found.verdict == "passed" and found.facts["alike"] == 2


def test_the_largest_clique_is_found() -> None:
    """0, 1, 2, 3 all know each other; 4, 5, 6 too, and 3 knows 4."""
    near = np.zeros((7, 7), dtype=bool)
    for group in ([0, 1, 2, 3], [4, 5, 6], [3, 4]):
        near[np.ix_(group, group)] = True
    assert sorted(largest_clique(near)) == [0, 1, 2, 3]


def test_table_rows_that_are_training_rows_fail_and_twins_give_nobody_away() -> None:
    kinds = {"age": "number", "weight": "number"}
    chance = np.random.default_rng(0)

    def people(n: int) -> list[dict[str, float]]:
        return [{"age": a, "weight": w} for a, w in chance.normal(50, 10, (n, 2)).tolist()]

    known, other, fresh = people(300), people(300), people(300)
    assert privacy.closest_records(known[:200], known, other, kinds).verdict == "failed"
    assert privacy.closest_records(fresh, known, other, kinds).verdict == "passed"
    plain = [{"side": side} for side in ("left", "right") * 150]
    twins = privacy.closest_records(plain, plain, plain, {"side": "category"})
    assert twins.verdict is None and "twin" in twins.why
    assert privacy.closest_records(fresh, known, other, {"size": "category"}).verdict == "not assessed"


# -- the command ------------------------------------------------------------------------------------------------------


def pictures(folder: Path, numbers: Sequence[int]) -> Path:
    """A folder of images with a table beside them."""
    folder.mkdir(parents=True)
    lines = []
    for number in numbers:
        drawn(number).save(folder / f"{number}.png")
        facts = {"file_name": f"{number}.png", "plane": ("axial", "coronal")[number % 2], "age": 20 + number % 60}
        lines.append(json.dumps(facts))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """How well networks learn is another file's business, and what is kept stays among the tests."""
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(utility, "STEPS", 3)
    monkeypatch.setattr(utility, "NETWORKS", 1)


def evaluate(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.output


def test_without_a_training_index_privacy_is_not_assessed(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 12).folder
    real = pictures(tmp_path / "real", range(500, 515))
    code, told = evaluate(made, "--against", real)
    assert code == 0, told
    assert "not assessed" in told and "kid" in told
    assert release.read(made).verdict == "not assessed"
    facts = json.loads((made / "evaluation.json").read_text())
    assert facts["fidelity"]["encoder"]["sha256"].startswith("sha256:")
    assert facts["against"] == {"name": "real", "n": 15} and str(tmp_path) not in json.dumps(facts)
    assert facts["table"]["columns"].keys() == {"plane", "age"}


def test_a_place_that_takes_no_file_is_told_before_anything_is_looked_at(tmp_path: Path) -> None:
    made, real = generated(tmp_path / "made", 12).folder, pictures(tmp_path / "real", range(500, 515))
    code, told = evaluate(made, "--against", real, "--out", real / "metadata.jsonl" / "out")
    assert code == 2 and "cannot write into" in told and "not a directory" in told
    assert "real images" not in told


def test_copies_of_training_images_fail_by_the_command(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 12, image=lambda number: drawn(900 + number)).folder
    real = pictures(tmp_path / "real", range(500, 700))
    training = pictures(tmp_path / "training", range(900, 950))
    other = generated(tmp_path / "other", 12).folder
    code, told = evaluate(
        made, "--against", real, "--training", training, "--baseline", other, "--out", tmp_path / "out"
    )
    assert code == 0, told
    found = release.read(tmp_path / "out")
    assert told.count("a probe and 1 small networks (3 steps at most) are trained for each of plane: where") == 2
    assert found.verdict == "failed" and found.measures["copies"]["value"] == 1
    assert found.measures["extraction"]["verdict"] == "not assessed"  # the model of a drawn dataset cannot be asked
    assert not (made / "privacy.json").exists()
    gap = json.loads((tmp_path / "out" / "evaluation.json").read_text())["baseline"]["difference"]
    assert gap["fidelity"]["kid"]["ci95"] is not None


def test_real_images_that_are_training_images_are_refused(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 12).folder
    real = pictures(tmp_path / "real", range(500, 520))
    training = pictures(tmp_path / "training", range(519, 540))
    code, told = evaluate(made, "--against", real, "--training", training)
    assert code == 2 and "1 of the 20 images of real are training images too" in told
    assert not (made / "privacy.json").exists()


def test_a_dataset_is_no_yardstick_for_itself(tmp_path: Path) -> None:
    """Neither as it is, nor as a folder of images that holds one of its own."""
    made = generated(tmp_path / "made", 12).folder
    training = pictures(tmp_path / "training", range(900, 950))
    code, told = evaluate(made, "--against", made, "--training", training)
    assert code == 2 and "drawn is a synthetic dataset" in told
    real = pictures(tmp_path / "real", [3, *range(500, 520)])
    code, told = evaluate(made, "--against", real, "--training", training)
    assert code == 2 and "1 of the 21 images of real are images of the dataset too" in " ".join(told.split())


@pytest.mark.parametrize(
    ("training", "facts", "word", "said"),
    [
        ("world:brain-mr", {}, False, ""),
        ("world:brain-mr?cases=99", {}, True, "holds 99 images of world:brain-mr, which is not all"),
        ("world:brain-mr", {"adapter": {"name": "adapter"}}, False, "made with an adapter"),
        ("world:brain-mr", {"adapter": {"name": "adapter"}}, True, ""),
        ("world:brain-mr", {"base": "model"}, False, "nothing shows"),
        (".", {}, False, "nothing shows that the images of"),
        (".", {}, True, ""),
    ],
)
def test_whether_the_training_images_are_all_is_known_or_somebodys_word(
    tmp_path: Path, training: str, facts: dict[str, object], word: bool, said: str
) -> None:
    folder = pictures(tmp_path / "training", range(3))
    made = Made(generated(tmp_path / "made", 8).folder)
    made.generated.manifest = replace(made.generated.manifest, models={"image": {**made.facts, **facts}})
    index = source(str(folder) if training == "." else training, training=True)
    found = dataset_privacy._gap(made, index, word)
    assert (said in found) if said else not found


def test_the_scenes_of_another_world_are_no_training_images(tmp_path: Path) -> None:
    real = pictures(tmp_path / "real", range(500, 520))
    made = generated(tmp_path / "made", 8).folder
    code, told = evaluate(made, "--against", real, "--training", "world:emoji?cases=9")
    assert code == 2 and "made by embedded:brain-mr, and world:emoji is not what that was trained on" in told


def test_every_image_of_a_large_dataset_is_compared_with_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fidelity looks at 8 of 30 images, which leave number 29 out; that is a copy, and the rows are of a table."""
    monkeypatch.setattr(dataset_features.chosen, "__defaults__", (8,))
    monkeypatch.setattr(dataset_features.look, "__kwdefaults__", {"most": 8})
    made = generated(tmp_path / "made", 30, image=lambda i: drawn(907 if i == 29 else i), rows_from="table").folder
    assert 29 not in dataset_features.chosen(Made(made))
    training = pictures(tmp_path / "training", range(900, 950))
    code, told = evaluate(made, "--against", pictures(tmp_path / "real", range(500, 520)), "--training", training)
    assert code == 0, told
    found = release.read(made)
    assert found.verdict == "failed" and found.measures["copies"]["cases"] == ["syn-5a5a5a5a-000029"]
    assert found.measures["given_rows"]["verdict"] == "not assessed"
    assert json.loads((made / "evaluation.json").read_text())["n"] == 8


def test_cells_of_a_csv_are_what_the_dataset_says_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    drawn(1).save(folder / "a.png")
    kinds = {"smokes": "boolean", "grade": "category", "age": "integer", "site": "category"}

    def row(cells: str) -> dict[str, object]:
        (folder / "metadata.csv").write_text(f"file_name,smokes,grade,age,other\n{cells}\n", encoding="utf-8")
        found = source(str(folder))
        looks = Looks(np.zeros((1, 1)), np.zeros((1, 1)), (b"",), (found.row(0),), (0,))
        return dict(looks.typed(kinds, found.name).rows[0])

    assert row("a.png,true,1,,x") == {"smokes": True, "grade": "1", "age": None}
    with pytest.raises(InputError, match=r"real, image 1: age is 'N/A', and the column is of kind number"):
        row("a.png,true,1,N/A,x")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(InputError, match="is no object with columns"):
        source(str(folder))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--against IMAGES"),
        (("--against", "world:brain-mr?cases=9", "--training-is-whole"), "name them by --training"),
        (("--against", "nowhere"), "no folder nowhere"),
        (("--against", "world:moon"), "is no world"),
        (("--against", "world:brain-mr?cases=0"), "behind the ? of a world stands cases=N"),
        (("--against", "world:brain-mr?case=9"), "behind the ? of a world stands cases=N"),
        (("--against", "world:brain-mr?cases=9", "--set", "a=1"), "--set is for models"),
        (("--against", "world:brain-mr?cases=9", "--model", "embedded:emoji"), "--training"),
        (("--against", "world:brain-mr?cases=9", "--baseline", "world:emoji"), "no dataset"),
        (("--against", "world:brain-mr?cases=3"), "it needs more than"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    code, told = evaluate(generated(tmp_path / "made", 8).folder, *arguments)
    assert code == 2 and said in told


def test_options_for_datasets_are_refused_for_models() -> None:
    code, told = evaluate("embedded:brain-mr", "--training", "world:brain-mr")
    assert code == 2 and "--training is for datasets" in told


def test_images_without_a_dataset_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no image"):
        source(str(tmp_path))
    with pytest.raises(RefusedError, match="is not finished: continue it with"):
        source(str(generated(tmp_path / "half", 5, complete=False).folder))
    with pytest.raises(ConfigError, match="of a world stands cases=N"):
        source("world:brain-mr?scenes=3")


def test_the_training_scenes_of_a_world_are_those_of_its_model() -> None:
    trained, _ = scenes("brain-mr", 2)
    training, real = source("world:brain-mr", training=True), source("world:brain-mr")
    assert len(training) == TRAINED_ON
    for i in range(2):
        assert np.array_equal(np.asarray(training.picture(i)), trained[i].permute(1, 2, 0).numpy())
        assert not np.array_equal(np.asarray(real.picture(i)), trained[i].permute(1, 2, 0).numpy())
    assert isinstance(training.picture(0), Image.Image) and training.row(0)["plane"] in training.caption(0)
