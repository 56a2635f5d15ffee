"""Specifications of datasets: what they say of the rows, and what is refused before anything is made."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apps.catalogue import dataset_recipes
from diffalign.errors import ConfigError, UserError
from diffalign.synthesis import rows, spec
from diffalign.synthesis.axes import Numbers
from diffalign.synthesis.naming import without_places
from diffalign.synthesis.prompting import Prompting
from diffalign.synthesis.spec import Spec

AXES = """name: test
cases: 20
axes:
  plane: [axial, coronal]
  lesion: {present: 0.75, none: 0.25}
  side: [left, right]
conditions:
  - {when: {lesion: none}, drop: [side]}
strata: [plane]
image:
  model: embedded:brain-mr
  template:
    - {when: {lesion: present}, text: "{plane} slice, lesion {side}"}
    - "{plane} slice"
"""


def load(folder: Path, text: str, *overrides: str) -> Spec:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return spec.load(path, overrides)


def cells(wanted: Spec) -> list[dict[str, Any]]:
    return [dict(row.cells) for row in rows.rows(wanted)]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_have_their_shares_exactly(tmp_path: Path) -> None:
    """Of 20 rows 10 are axial; 7.5 of those have a lesion: 8, since Hamilton's method rounds the first of equal halves
    up, and then 7 of the coronal ones, which are owed half a row less.
    """
    found = cells(load(tmp_path, AXES))
    assert Counter(row["plane"] for row in found) == {"axial": 10, "coronal": 10}
    assert Counter((row["plane"], row["lesion"]) for row in found) == {
        ("axial", "present"): 8, ("axial", "none"): 2, ("coronal", "present"): 7, ("coronal", "none"): 3,
    }  # fmt: skip
    sides = Counter(row["side"] for row in found)
    assert sides == {"left": 8, "right": 7, None: 5}
    assert all((row["side"] is None) == (row["lesion"] == "none") for row in found)


def test_hamilton() -> None:
    """7 by shares .5, .3, .2 is 3.5, 2.1, 1.4: 3 + 2 + 1, and the seventh to the largest remainder."""
    assert rows.allotted([0.5, 0.3, 0.2], 7, [0, 0, 0]) == [4, 2, 1]
    owed = [0.0, 0.0, 0.0]
    given = [rows.allotted([0.5, 0.3, 0.2], 1, owed) for _ in range(10)]
    assert [sum(column) for column in zip(*given, strict=True)] == [5, 3, 2]


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5), st.lists(st.integers(0, 30), min_size=1, max_size=40)
)  # fmt: skip
def test_what_is_owed_stays_small(weights: list[int], counts: list[int]) -> None:
    """However small the groups are, over all of them each value has its share, to within about a row a value."""
    shares = [weight / sum(weights) for weight in weights]
    owed, given_ = [0.0] * len(shares), [0] * len(shares)
    for count in counts:
        found = rows.allotted(shares, count, owed)
        assert sum(found) == count and min(found) >= 0
        assert all(abs(one - share * count) <= 1 for one, share in zip(found, shares, strict=True))
        given_ = [a + b for a, b in zip(given_, found, strict=True)]
    for total, share in zip(given_, shares, strict=True):
        assert abs(total - share * sum(counts)) <= len(shares)


def test_the_recipe_is_balanced_to_within_a_percent() -> None:
    """2 000 cases over 45 strata: each plane, contrast, side and size has its share to within 1 %."""
    wanted = spec.load(dataset_recipes()["brain-mr-dataset"])
    found = cells(wanted)
    assert len(found) == 2000
    shares = {"plane": 1 / 3, "contrast": 1 / 3, "size": 0.5, "lesion": None, "side": None}
    for name, share in shares.items():
        counts = Counter(row[name] for row in found if row[name] is not None)
        if share is not None:
            assert all(abs(n / (sum(counts.values()) * share) - 1) < 0.01 for n in counts.values()), name
    assert Counter(row["lesion"] for row in found) == {"present": 1600, "none": 400}
    for pair in (("left", "right"), ("anterior", "posterior")):
        first, second = (sum(row["side"] == side for row in found) for side in pair)
        assert abs(first - second) <= 0.01 * first
    strata = Counter(row.stratum for row in rows.rows(wanted))
    assert len(strata) == 45 and max(strata.values()) - min(strata.values()) <= 1
    for stratum in strata:
        splits = Counter(row.split for row in rows.rows(wanted) if row.stratum == stratum)
        assert abs(splits["train"] - 0.8 * sum(splits.values())) < 2
    assert Counter(row.split for row in rows.rows(wanted)) == {"train": 1600, "validation": 200, "test": 200}


@pytest.mark.parametrize("cases", [45, 60, 100, 333])
def test_small_splits_have_their_share_of_every_value(cases: int) -> None:
    """The axes go round in fives (4 lesions, 1 none), and a test split takes every tenth row: dealt by strata alone it
    had none without a lesion among 60 rows, and nothing else among 45. Every count is within 2.5 of its share,
    that of lesions within 1, so that a split that is asked for one row of a value has one.
    """
    wanted = spec.load(dataset_recipes()["brain-mr-dataset"], [f"cases={cases}"])
    found = list(rows.rows(wanted))
    quotas = {45: (36, 5, 4), 60: (48, 6, 6), 100: (80, 10, 10), 333: (267, 33, 33)}  # 266.4 has the largest remainder
    sizes = Counter(row.split for row in found)
    assert tuple(sizes[split] for split in ("train", "validation", "test")) == quotas[cases]
    for name in wanted.strata:
        whole = Counter(row.cells[name] for row in found if row.cells[name] is not None)
        counts = Counter((row.split, row.cells[name]) for row in found)
        for (split, share), (value, count) in itertools.product(wanted.splits.items(), whole.items()):
            assert abs(counts[split, value] - share * count) < (1 if name == "lesion" else 2.5), (split, value)
    assert rows.survey(wanted) == rows.survey(wanted)


def test_a_split_that_is_too_small_is_told(tmp_path: Path) -> None:
    """Of 4 rows, 3 with a lesion, a test split of a quarter has one row: it lacks a plane, and one sort of lesion."""
    wanted = load(tmp_path, AXES, "cases=4", "strata=[plane, lesion]", "splits={train: 0.75, test: 0.25}", "seed=1")
    found = rows.survey(wanted)
    assert Counter(row.cells["lesion"] for row in rows.rows(wanted)) == {"present": 3, "none": 1}
    test = next(row.cells for row in rows.rows(wanted) if row.split == "test")
    others = [f"lesion {'none' if test['lesion'] == 'present' else 'present'}",
              f"plane {'coronal' if test['plane'] == 'axial' else 'axial'}"]  # fmt: skip
    assert found.splits["test"] == 1 and found.lacking["test"] == tuple(others)
    assert f"split test has 1 of the 4 rows, and none with {', '.join(others)}" in found.warnings()
    assert rows.survey(load(tmp_path, AXES)).warnings() == []


def test_numbers_follow_their_distribution(tmp_path: Path) -> None:
    """4 000 draws: the mean of uniform integers 20..80 is 50 with a standard error of 17.6/63 = 0.28; the normal one,
    cut at one deviation, has its mean and all of it within the range.
    """
    text = AXES.replace("cases: 20", "cases: 4000") + "splits: {a_1: 1.0}\n"
    text = text.replace("  side:", "  age: {integer: [20, 80]}\n  mm: {number: [4, 6], distribution: normal, mean: 5,"
                        " sd: 1}\n  side:")  # fmt: skip
    found = cells(load(tmp_path, text))
    ages, sizes = [row["age"] for row in found], [row["mm"] for row in found]
    assert {type(age) for age in ages} == {int} and set(ages) == set(range(20, 81))
    assert abs(sum(ages) / 4000 - 50) < 4 * 0.28
    assert all(4 <= size <= 6 for size in sizes) and abs(sum(sizes) / 4000 - 5) < 0.04
    # Of a normal distribution cut at one deviation 0.3829 / 0.6827 = 56 % lie within half a deviation.
    assert abs(sum(abs(size - 5) < 0.5 for size in sizes) / 4000 - 0.561) < 0.032
    assert rows.columns(load(tmp_path, text)) == {
        "plane": "category", "lesion": "category", "age": "integer", "mm": "number", "side": "category"
    }  # fmt: skip
    assert rows._number(Numbers(integer=(3, 3)), 0.99) == 3


def test_seeds_do_not_depend_on_how_work_is_cut(tmp_path: Path) -> None:
    first = load(tmp_path, AXES)
    for change in ("chunk=7", "attempts=3", "image.sampler.batch_size=5", "threads=2"):
        other = load(tmp_path, AXES, change)
        assert other.identity == first.identity and other.sha256 != first.sha256
    for change in ("seed=1", "cases=21", "image.sampler.steps=11", "splits={train: 0.5, test: 0.5}"):
        assert load(tmp_path, AXES, change).identity != first.identity


def test_a_dump_is_the_same_specification(tmp_path: Path) -> None:
    wanted = load(tmp_path, AXES, "gates=[blank, duplicate]")
    data = yaml.safe_load(wanted.dump())
    again = spec.parse(data)
    assert again == wanted and again.sha256 == wanted.sha256 == spec.sha256_of(data)
    assert json.loads(json.dumps(data)) == data


def test_nothing_that_is_handed_out_names_a_place(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    wanted = spec.parse(
        yaml.safe_load(AXES)
        | {
            "rewards": [
                f"clinician?folder={tmp_path}/fitted&device=cpu",
                f"{tmp_path}/mine.py:score",
                "http://host:1/x",
            ],
            "gates": [{"gate": "memorised", "images": f"{tmp_path}/training"}],
            "image": {"model": f"{tmp_path}/model", "adapter": "~/runs/a/adapter", "template": "x"},
        }
    )
    assert str(tmp_path) not in wanted.dump() and "host" not in wanted.dump() and "~" not in wanted.dump()
    assert wanted.public()["rewards"] == ["clinician?folder=fitted&device=cpu", "mine.py:score", "remote"]
    names = ["embedded:emoji", "org/model", "runs/a/b", "clip?model=hf-hub:a/b", "../x", None, "C:\\Users\\me\\model"]
    assert [without_places(name) for name in names] == [
        "embedded:emoji", "org/model", "b", "clip?model=hf-hub:a/b", "x", None, "model"
    ]  # fmt: skip


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts(tmp_path: Path) -> None:
    wanted = load(tmp_path, AXES)
    prompting = Prompting(wanted)
    for row in rows.rows(wanted):
        asked = prompting.prompt("image", row)
        side = f", lesion {row.cells['side']}" if row.cells["side"] else ""
        assert asked.text == f"{row.cells['plane']} slice{side}" and asked.id == row.id
        assert asked.attributes == {name: cell for name, cell in row.cells.items() if cell is not None}


def test_prompts_in_the_words_of_a_world() -> None:
    wanted = spec.load(dataset_recipes()["brain-mr-dataset"])
    row = next(row for row in rows.rows(wanted) if row.cells["lesion"] == "none")
    image, text = (Prompting(wanted).prompt(part, row) for part in ("image", "text"))
    assert image.text == f"axial T1 brain MRI at the level of the {row.cells['level']}, no lesion"
    assert text.text == f"row: plane=axial; contrast=T1; level={row.cells['level']}; lesion=none\ntask: findings\n"
    assert dict(text.attributes) == {**image.attributes, "task": "findings"}


# -- tables -----------------------------------------------------------------------------------------------------------

TABLE = """name: test
table: {file: FILE, id: who}
strata: [sex]
image: {model: "embedded:brain-mr", template: "patient of {age}, {sex}"}
"""
CSV = "who,age,sex,weight,smokes,note\na1,30,f,61.5,true,x\na2,41,m,70,false,\na3,52,f,,true,z\na4,63,m,80,false,w\n"


def table(folder: Path, content: str, *overrides: str) -> Spec:
    (folder / "rows.csv").write_text(content, encoding="utf-8")
    return load(folder, TABLE.replace("FILE", str(folder / "rows.csv")), *overrides)


def test_rows_of_a_table(tmp_path: Path) -> None:
    wanted = table(tmp_path, CSV)
    kinds = {
        "age": "integer",
        "sex": "category",
        "weight": "number",
        "smokes": "boolean",
        "note": "text",
    }
    assert rows.survey(wanted).columns == kinds
    assert rows.survey(wanted).strata == {"f": 2, "m": 2}
    assert cells(wanted)[2] == {"age": 52, "sex": "f", "weight": None, "smokes": True, "note": "z"}
    named = [{"who": f"a{i}", **row} for i, row in enumerate(cells(wanted))]
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "rows.parquet")
    other = load(tmp_path, TABLE.replace("FILE", str(tmp_path / "rows.parquet")))
    assert cells(other) == cells(wanted)
    assert other.public()["table"]["file"] == "rows.parquet"
    (tmp_path / "rows.csv").write_text(CSV.replace("61.5", "61.6"))
    with pytest.raises(ConfigError, match=r"table.file: .* was changed since the dataset was begun"):
        cells(wanted)


def test_where_a_table_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the specification, then in the working directory, and what is said names both."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "rows.csv").write_text(CSV if folder is there else CSV.replace("61.5", "99.5"))
    monkeypatch.chdir(here)
    text = TABLE.replace("FILE", "rows.csv")
    assert cells(load(there, text))[0]["weight"] == 61.5
    assert load(there, text).public()["table"]["file"] == "rows.csv"
    (there / "rows.csv").unlink()
    assert cells(load(there, text))[0]["weight"] == 99.5
    (here / "rows.csv").unlink()
    with pytest.raises(UserError, match=f"there is no table rows.csv: it is neither in {there}, .* nor in {here}"):
        load(there, text)


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        ("", [], r"the table .*rows.csv is empty: it has no row"),
        ("who,age,sex\n", [], r"is empty: it has no row"),
        (CSV.replace("a3", "a1"), [], r"rows.csv:4: who is 'a1' again, as in 2"),
        (CSV.replace("a3", ""), [], r"rows.csv:4: who is empty, and it names the rows"),
        (CSV.replace("52", "old"), [], r"rows.csv:4: age is 'old', and above it the column has numbers; mend it"),
        (
            CSV.replace("30", "young"),
            ["table.columns.age=integer"],
            r"rows.csv:2: age is 'young', and the column is of",
        ),
        (CSV.replace("61.5", "nan"), ["table.columns.weight=number"], r"weight is 'nan', and the column is of kind"),
        (CSV.replace(",x", ""), [], r"rows.csv:2: 5 cells, and there are 6 columns"),
        (CSV.replace("sex", "s\x07x"), ["strata=[age]"], r"'s.x07x' is no name of a column"),
        (CSV.replace("note", "age"), [], r"rows.csv:1: every column needs a name of its own"),
        (CSV.replace(",x\n", ",a\0b\n"), [], r"rows.csv:2: .*(NUL|note is)"),
        (CSV, ["table.id=name"], r"has no column name; it has who, age"),
        (CSV, ["table.columns.length=integer"], r"has no column length; it has who"),
        (CSV, ["strata=[sexe]"], r"strata: the table has no column sexe; did you mean sex\?"),
        (CSV, ["strata=[who]"], r"strata: the table has no column who"),
        (CSV, ["image.template=of {who}"], r"\{who\} is no column"),
        (CSV, ["strata=[age]"], r"strata: age is a column of kind integer; strata are made of categories"),
        (CSV, ["image.template=at {weight}"], r"\{weight\} is empty in row 2 \(age 52"),
        (CSV, ["cases=3"], r"cases: a table has its own rows"),
        (CSV, ["table.file=rows.txt"], r"there is no table rows.txt"),
    ],
)
def test_what_is_wrong_in_a_table(tmp_path: Path, content: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        table(tmp_path, content, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("axes.lesion={present: 0.7, none: 0.2}", r"axes.lesion: its shares add up to 0.9, not to 1"),
        ("axes.lesion={present: 1.2, none: -0.2}", r"axes.lesion: its shares: a share is above 0; got -0.2"),
        ("axes.lesion={present: much, none: 0.2}", r"axes.lesion: a share is a number; got 'much'"),
        ("axes.side=[left, left]", r"axes.side: the value 'left' stands there twice"),
        ("axes.side=[]", r"axes.side: .*at least 1"),
        ("axes.side=3", r"axes.side: an axis is a list of values"),
        ("axes.side={integer: [5, 2]}", r"axes.side: the range goes from 5 to 2"),
        ("axes.side={integer: [1, 2], mean: 1}", r"axes.side: mean and sd go with distribution: normal"),
        (
            "axes.side={integer: [20, 80], distribution: normal, mean: 500, sd: 12}",
            r"axes.side: a normal distribution of mean 500 and sd 12 has next to nothing from 20 to 80; the mean",
        ),
        ("axes.side={number: [1, 2], distribution: normal, mean: .nan, sd: 1}", r"axes.side: mean and sd are finite"),
        ("axes.side={integer: [1, 2], men: 1}", r"axes.side: unknown field men; did you mean mean\?"),
        ("splits={train: 0.8, test: 0.1}", r"splits add up to 0.9, not to 1"),
        ("splits={../x: 1.0}", r"splits: '../x' is no name of a split"),
        ("splits={a: 0.5, A: 0.5}", r"splits: two names differ in capitals only"),
        ("axes.side=[left, 1]", r"axes.side: its values are of several kinds \('left', 1\); quote them all"),
        ("conditions=[{when: {lesion: none}, set: {side: [1, 2]}}]", r"axes.side: conditions give it values"),
        ("strata=[plan]", r"strata: there is no axis plan; did you mean plane\?"),
        ("strata=[plane, plane]", r"strata: plane stands there twice"),
        ("conditions=[{when: {lession: none}, drop: [side]}]", r"conditions.0: there is no axis lession; did you mean"),
        ("conditions=[{when: {lesion: non}, drop: [side]}]", r"conditions.0.when: lesion is never 'non'; did you mean"),
        ("conditions=[{when: {side: left}, drop: [plane]}]", r"conditions.0: plane stands before side, on which it"),
        ("conditions=[{when: {lesion: none}}]", r"conditions.0: it neither sets nor drops an axis"),
        ("conditions=[]", None),
        ("image.template=a {plan} slice", r"image.template: \{plan\} is no column; did you mean plane\?"),
        ("image.template=lesion {side}", r"image.template: \{side\} is empty in row 8 \(plane axial, lesion none\)"),
        ("image.template=a {plane", r"image.template: 'a \{plane': .*write a brace that is meant as one twice"),
        ("image.template=a {plane.__class__}", r"in braces stands the name of a column, such as \{plane\}"),
        ("image.template={world: brain-mr}", r"row 0 .* is none of the world brain-mr: brain-mr attributes lack"),
        ("image.template={world: findings}", r"image.template: task is missing: findings or explain"),
        ("image.template=[{when: {lesion: none}, text: x}]", r"none is for row 0 .*; add one without when"),
        ("image.modle=x", r"unknown field image.modle; did you mean image.model\?"),
        ("image.sampler={window: {steps: 2, every: 3}}", r"image.sampler: window.every moves the window in training"),
        ("image=null", r"there is neither image nor text"),
        ("cases=0", r"cases: input should be greater than or equal to 1 \(given: 0\)"),
        ("cases=null", r"cases is missing: how many rows"),
        ("table={file: x.csv}", r"give axes, from which rows are drawn, or a table of rows"),
        ("gates=[blan]", r"gates.0: there is no gate 'blan'; did you mean blank"),
        ("gates=[{gate: blank, contrst: 1}]", r"gates.0: unknown field contrst; did you mean contrast\?"),
        ("gates=[{gate: reward, reward: clip, at_least: 1}]", r"gates.0: .* clip is not among rewards, of which"),
        ("gates=[{gate: reward, reward: clip, at_last: 1}]", r"gates.0: unknown field at_last; did you mean at_least"),
        ("gates=[blank, blank]", r"gates: blank stands there twice"),
        ("attempts=true", r"attempts: input should be a number, not true or false"),
        ("name=../up", r"name: string should match pattern"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_specification(tmp_path: Path, override: str, said: str | None) -> None:
    """One sentence, with the field; nothing was loaded or made for it."""
    if said is None:
        assert Counter(row["side"] for row in cells(load(tmp_path, AXES, override))) == {"left": 10, "right": 10}
        return
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path, AXES, override)
    told = str(caught.value)
    assert "\n" not in told
    whole = ("there is neither image nor text", "give axes, from which rows are drawn")
    assert told.startswith((f"--set {override} (in place of ", f"--set {override}: ", str(tmp_path), *whole))


def test_an_error_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spec.yaml:5: axes.lesion: its shares add up to 1.05, not to 1"):
        load(tmp_path, AXES.replace("0.75", "0.8"))
    with pytest.raises(ConfigError, match=r"spec.yaml:9: strata: there is no axis plan"):
        load(tmp_path, AXES.replace("strata: [plane]", "strata: [plan]"))
    with pytest.raises(ConfigError, match=r"spec.yaml:12: image.template: \{plan\} is no column; did you mean plane\?"):
        load(tmp_path, AXES.replace('- "{plane} slice"', '- "{plan} slice"'))
    with pytest.raises(ConfigError, match=r"spec.yaml:10: the field image.model is missing"):
        load(tmp_path, AXES.replace("  model: embedded:brain-mr\n", ""))


@pytest.mark.parametrize("name", list(dataset_recipes()))
def test_recipes(name: str) -> None:
    """Every recipe is in order, and says in its first line what it makes."""
    path = dataset_recipes()[name]
    wanted = spec.load(path)
    assert wanted.name == name and path.read_text().startswith("# ")
    assert rows.survey(wanted).count == wanted.cases
