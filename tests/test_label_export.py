"""What comes out of a study: every form is read back by our own readers, with the labels that raters gave."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from apps.cli import main
from diffalign import preferences
from diffalign.errors import ConfigError, InputError
from diffalign.images import png_bytes
from diffalign.preferences import Broken, read, read_unpaired
from diffalign.preferences.writing import user_number
from diffalign.study import Answer, Point, Protocol, Study, StudyPair
from diffalign.types import Preference, Prompt, Sample
from tests.studies import known_uids

__all__ = ["known_uids"]

RULES = """
name: test
version: 1
min_view_seconds: 0
overlap: 2
gold_share: 0.3
points: [defect]
criteria:
  - {name: fit, question: Which one fits}
  - {name: quality, question: How good, kind: scale, anchors: [bad, fair, good]}
"""
ANSWERS = ("better", "worse", "tie_good", "tie_bad", "better", "cannot_judge")
"""What ann says of pairs 0 to 5, in terms of the first sample."""
LABELS = {"better": 1.0, "worse": 0.0, "tie_good": 0.5, "tie_bad": 0.5}
HOSTILE = '=HYPERLINK("http://x")\0\u202e<script>'


def image(number: int, which: int) -> Image.Image:
    pixels = np.random.default_rng((number, which)).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def material(kind: str) -> Iterator[StudyPair]:
    for number in range(len(ANSWERS)):
        asked = Prompt(f"prompt {number}", f"id-{number}", {"case": number})
        if kind == "image":
            sides = [Sample(asked, image=image(number, which), seed=7) for which in (0, 1)]
        else:
            sides = [Sample(asked, text=f"{word} {number}") for word in ("one", "two")]
        yield StudyPair(asked, sides[0], sides[1], "base", "tuned")
    asked = Prompt("gold")
    if kind == "image":
        yield StudyPair(
            asked, Sample(asked, image=image(50, 0)), Sample(asked, image=image(50, 1)), "a", "b", "first"
        )  # fmt: skip
    else:
        yield StudyPair(asked, Sample(asked, text="right"), Sample(asked, text="wrong"), "a", "b", "first")


def is_first(study: Study, rater: str, token: str, kind: str) -> bool:
    """Whether the first sample stands left, by what the rater sees there."""
    data = study.content(rater, token, "left")
    if kind == "text":
        return data.startswith((b"one", b"right"))
    firsts = {png_bytes(image(number, 0)) for number in (*range(len(ANSWERS)), 50)}
    return data in firsts


def answer(said: str, first_is_left: bool) -> Answer:
    sides = {"better": "left" if first_is_left else "right", "worse": "right" if first_is_left else "left"}
    criteria: dict[str, object] = {}
    points: list[Point] = []
    if said == "better":
        first, second = ("left", "right") if first_is_left else ("right", "left")
        criteria = {"fit": second, "quality": {first: 3, second: 1}}
        points = [Point(second, 0.25, 0.5, "defect")]  # type: ignore[arg-type]
    choice = sides.get(said, said)
    return Answer(choice, 2 if said == "worse" else None, criteria, points, HOSTILE)  # type: ignore[arg-type]


@pytest.fixture(params=["image", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def study(tmp_path: Path, kind: str) -> Iterator[Study]:
    """Ann says what ``ANSWERS`` has; bob finds the first better everywhere. Sides are as they come."""
    made = voted(tmp_path / "s", kind)
    yield made
    made.close()


def voted(folder: Path, kind: str, simulated: Sequence[str] = ()) -> Study:
    made = Study.create(folder, Protocol.parse(RULES), material(kind), seed=3)
    left = set()
    for rater in ("ann", "bob"):
        made.add_rater(rater, simulated=rater in simulated)
        while (now := made.claim(rater)) is not None:
            number = None if now.prompt == "gold" else int(now.prompt.split()[1])
            said = "better" if rater == "bob" or number is None else ANSWERS[number]
            first_is_left = is_first(made, rater, now.token, kind)
            left.add(first_is_left)
            given = answer(said, first_is_left)
            if kind == "text":
                given = Answer(given.choice, given.strength, given.criteria, (), given.comment)
            made.vote(rater, now.token, given)
    assert left == {True, False}, "the test needs both orders"
    return made


Run = Callable[..., str]


@pytest.fixture
def export(study: Study, tmp_path: Path) -> Run:
    def run(out: str, *options: str, status: int = 0) -> str:
        done = CliRunner().invoke(main, ["label", "export", str(study.folder), "--out", str(tmp_path / out), *options])
        assert done.exit_code == status, done.output
        return done.output

    return run


def said(rater: str) -> list[tuple[str, float]]:
    """The votes that an export has, by hand."""
    if rater == "bob":
        return [(f"prompt {i}", 1.0) for i in range(6)]
    return [(f"prompt {i}", LABELS[word]) for i, word in enumerate(ANSWERS) if word in LABELS]


def both() -> list[tuple[str, float]]:
    return sorted(said("ann") + said("bob"))


def good(path: Path) -> list[Preference]:
    found = list(read(path))
    assert not any(isinstance(item, Broken) for item in found)
    return found  # type: ignore[return-value]


def content(sample: Sample) -> bytes:
    return (sample.text or "").encode() if sample.image is None else png_bytes(sample.image)


def first_of(prompt: str, kind: str) -> bytes:
    number = int(prompt.split()[1])
    return f"one {number}".encode() if kind == "text" else png_bytes(image(number, 0))


def test_preferences_are_what_was_said_whatever_stood_left(
    export: Run, tmp_path: Path, kind: str, study: Study
) -> None:
    output = export("p.parquet")
    found = good(tmp_path / "p.parquet")
    overall = [p for p in found if p.criterion == "overall"]
    assert sorted((p.prompt.text, p.label) for p in overall) == both()
    assert all(content(p.first) == first_of(p.prompt.text, kind) for p in found)
    assert {p.label for p in found if p.criterion == "fit"} == {0.0}, "fit was said to be the other way round"
    assert {p.provenance["left"] for p in overall} == {"first", "second"}
    assert all(p.provenance["comment"] == HOSTILE for p in found)
    assert left_out(study) in output and f"{len(found)} rows" in output
    raters = {p.rater for p in found}
    assert len(raters) == 2 and all(rater.startswith("r-") for rater in raters)
    assert not {b"ann", b"bob"} & {name.encode() for name in raters}
    one = next(p for p in overall if p.label == 0.0)
    assert one.strength == 2 and one.prompt.attributes == {"case": 1} and one.prompt.id == "id-1"


def left_out(study: Study, **reasons: int) -> str:
    """The line that counts votes: one of ann's judges nothing, and how many are on gold is drawn for each rater."""
    counts = {"cannot judge": 1, "gold pair": sum(rater.gold.n for rater in study.stats().raters)} | {
        name.replace("_", " "): count for name, count in reasons.items()
    }
    said = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()) if count)
    return f"left out: {sum(counts.values())} {'vote' if sum(counts.values()) == 1 else 'votes'} ({said})\n"


def test_a_criterion_can_be_chosen_and_the_rest_is_counted(export: Run, tmp_path: Path, study: Study) -> None:
    """Ann says nothing of fit in 3 of the 5 votes that judge something: one that is worse, and two ties."""
    output = export("p.parquet", "--criterion", "fit")
    assert {p.criterion for p in good(tmp_path / "p.parquet")} == {"fit"}
    assert left_out(study, no_answer_to_fit=3) in output


def test_what_is_left_out_is_told_in_votes_in_every_form(export: Run, kind: str, study: Study) -> None:
    """Three votes of ann have no score and no mark; two are ties, which TRL has no place for."""
    assert left_out(study) in export("all.parquet")
    assert left_out(study, no_score=3) in export("s.csv", "--format", "scores")
    if kind == "image":
        assert left_out(study, nothing_marked=3) in export("p.csv", "--format", "points")
    else:
        assert left_out(study, tie=2) in export("t.jsonl", "--format", "trl")


def test_a_verdict_replaces_votes_and_a_tie_of_a_pair_is_no_vote(tmp_path: Path) -> None:
    """Ann and bob disagree on both of two pairs, and ann says which fits; eve's verdicts are a side and a tie.

    By hand: bob's 2 votes are replaced. Ann's 2 stand for fit, which no verdict answers, and are replaced in overall,
    which is all that TRL takes; there the tie is of one pair.
    """
    pairs = list(material("text"))[:2]
    rules = RULES.replace("gold_share: 0.3", "gold_share: 0")
    study = Study.create(tmp_path / "s", Protocol.parse(rules), pairs)
    for rater, word in (("ann", b"one"), ("bob", b"two")):
        study.add_rater(rater)
        while (now := study.claim(rater)) is not None:
            left = study.content(rater, now.token, "left").startswith(word)
            said: dict[str, object] = {"fit": "left"} if rater == "ann" else {}
            study.vote(rater, now.token, Answer("left" if left else "right", None, said))
    study.add_rater("eve")
    for choice in ("left", "tie_good"):
        now = study.turn("eve", "disputed").now
        assert now is not None
        study.vote("eve", now.token, Answer(choice), "disputed")
    study.close()

    def out(name: str, *options: str) -> str:
        command = ["label", "export", str(tmp_path / "s"), "--final", "--out", str(tmp_path / name), *options]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        return done.output.replace(str(tmp_path / name), "FILE")

    assert out("p.parquet") == "4 rows (preferences) in FILE\nleft out: 2 votes (2 x adjudicated)\n"
    assert out("t.jsonl", "--format", "trl") == (
        "1 row (trl) in FILE\nleft out: 4 votes (4 x adjudicated)\nleft out: 1 pair (1 x tie)\n"
    )


def test_final_is_one_soft_label_per_pair(export: Run, tmp_path: Path) -> None:
    """Ann and bob by hand: 1+1, 0+1, .5+1, .5+1, 1+1, and bob alone where ann could not judge; halved."""
    export("p.parquet", "--final", "--criterion", "overall")
    found = {p.prompt.text: (p.label, p.rater) for p in good(tmp_path / "p.parquet")}
    expected = [1.0, 0.5, 0.75, 0.75, 1.0, 1.0]
    assert found == {f"prompt {i}": (label, "") for i, label in enumerate(expected)}


@pytest.mark.parametrize("kind", ["image"], indirect=True)
def test_pick_a_pic_has_its_columns_and_types(export: Run, tmp_path: Path, study: Study) -> None:
    """Names and types as in the published card of the second version, but for its index column."""
    export("p.parquet", "--format", "pick-a-pic")
    table = pq.read_table(tmp_path / "p.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "are_different": "bool", "best_image_uid": "string", "caption": "string", "created_at": "timestamp[ns]",
        "has_label": "bool", "image_0_uid": "string", "image_0_url": "string", "image_1_uid": "string",
        "image_1_url": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "double", "label_1": "double",
        "model_0": "string", "model_1": "string", "ranking_id": "int64", "user_id": "int64",
        "num_example_per_prompt": "int64",
    }  # fmt: skip
    rows = table.to_pylist()
    assert sorted((row["caption"], row["label_0"]) for row in rows) == both()
    for row in rows:
        assert row["jpg_0"] == first_of(row["caption"], "image")
        assert row["image_0_uid"] == hashlib.sha256(row["jpg_0"]).hexdigest()
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best and row["label_0"] + row["label_1"] == 1
        assert (row["model_0"], row["model_1"]) == ("base", "tuned") and row["has_label"] and row["are_different"]
        assert row["num_example_per_prompt"] == (1 if row["caption"] == "prompt 5" else 2)
    pseudonyms = {rater.rater for rater in study.stats().raters}
    assert {row["user_id"] for row in rows} == {int(name[2:], 16) for name in pseudonyms}
    assert sorted((p.prompt.text, p.label) for p in good(tmp_path / "p.parquet")) == both()


@pytest.mark.parametrize("kind", ["text"], indirect=True)
def test_trl_rows_have_a_chosen_one_and_count_ties(export: Run, tmp_path: Path) -> None:
    output = export("p.jsonl", "--format", "trl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    expected = [
        (text, f"{'one' if label else 'two'} {text[-1]}", f"{'two' if label else 'one'} {text[-1]}")
        for text, label in both()
        if label != 0.5
    ]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in rows) == sorted(expected)
    assert "2 x tie" in output and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    assert sorted((p.prompt.text, p.first.text, p.label) for p in good(tmp_path / "p.jsonl")) == sorted(
        (text, chosen, 1.0) for text, chosen, _ in expected
    )


def test_kto_labels_both_sides_and_knows_the_kind_of_tie(export: Run, tmp_path: Path, kind: str) -> None:
    """Of ann: two better, one worse, both good, both bad; of bob: six better. True: 2+1+2+0+6, false: 2+1+0+2+6."""
    out = tmp_path / ("k.parquet" if kind == "image" else "k.jsonl")
    export(out.name, "--format", "kto")
    found = list(read_unpaired(out))
    assert not any(isinstance(item, Broken) for item in found)
    labels = [item[1] for item in found]  # type: ignore[index]
    assert (labels.count(True), labels.count(False)) == (11, 11)
    of_tie = [item[1] for item in found if item[0].prompt.text == "prompt 2"]  # type: ignore[index]
    assert sorted(of_tie) == [False, True, True, True]
    firsts = [label for sample, label in found if content(sample) == first_of("prompt 1", kind)]  # type: ignore[misc]
    assert sorted(firsts) == [False, True]
    if kind == "image":
        features = json.loads(pq.read_schema(out).metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"} and features["label"]["dtype"] == "bool"
        assert set(features) == set(pq.read_schema(out).names)


@pytest.mark.parametrize("form", ["pick-a-pic", "trl", "kto"])
def test_simulated_votes_are_marked_in_the_forms_of_others(tmp_path: Path, kind: str, form: str) -> None:
    """Bob is a program: his six votes, each that the first is better, are marked, and none of ann's."""
    if (form, kind) in (("pick-a-pic", "text"), ("trl", "image")):
        pytest.skip("not a form for these")
    study = voted(tmp_path / "s", kind, simulated=["bob"])
    study.close()
    out = tmp_path / ("p.jsonl" if kind == "text" else "p.parquet")
    done = CliRunner().invoke(main, ["label", "export", str(tmp_path / "s"), "--out", str(out), "--format", form])
    assert done.exit_code == 0 and "simulated: no evidence about people" in done.output, done.output
    lines = out.read_text().splitlines() if kind == "text" else []
    rows = [json.loads(line) for line in lines] if lines else pq.read_table(out).to_pylist()
    each = 2 if form == "kto" else 1
    votes = len([label for _, label in said("ann") if label != 0.5 or form != "trl"])
    assert [row["simulated"] for row in rows].count(True) == 6 * each
    assert [row["simulated"] for row in rows].count(False) == votes * each
    if form == "kto":
        assert len(list(read_unpaired(out))) == len(rows)
        if kind == "image":
            features = json.loads(pq.read_schema(out).metadata[b"huggingface"])["info"]["features"]
            assert features["simulated"]["dtype"] == "bool" and set(features) == set(pq.read_schema(out).names)
        return
    marked = sorted(p.prompt.text for p in good(out) if p.provenance.get("simulated"))
    assert marked == [f"prompt {i}" for i in range(6)]
    inspected = CliRunner().invoke(main, ["preferences", "inspect", str(out)])
    assert f"6 of {6 + votes} judgements are simulated" in inspected.output, inspected.output


def test_scores_belong_to_samples_and_not_to_sides(export: Run, tmp_path: Path, kind: str) -> None:
    export("s.csv", "--format", "scores")
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 6)
    for row in rows:
        expected = "3" if row["sample"] == hashlib.sha256(first_of(row["prompt"], kind)).hexdigest() else "1"
        assert (row["score"], row["points"], row["criterion"]) == (expected, "3", "quality")
        assert row["arm"] == ("base" if expected == "3" else "tuned")
    export("s.parquet", "--format", "scores")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.num_rows == len(rows) and str(table.schema.field("score").type) == "int64"


@pytest.mark.parametrize("kind", ["image"], indirect=True)
def test_points_lie_where_they_were_set(export: Run, tmp_path: Path) -> None:
    export("p.jsonl", "--format", "points")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {(row["x"], row["y"], row["label"], row["arm"]) for row in rows} == {(0.25, 0.5, "defect", "tuned")}


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("p.csv", [], "written as .parquet"),
        ("p.parquet", ["--format", "trl"], "written as .jsonl"),
        ("p.csv", ["--format", "scores", "--final"], "about preferences"),
        ("p.parquet", ["--criterion", "nope"], "there is no criterion nope; there are overall, fit\n"),
        ("p.parquet", ["--criterion", "quality"], "quality was answered by scores, not by a preference"),
    ],
)
@pytest.mark.parametrize("kind", ["text"], indirect=True)
def test_what_cannot_be_written_leaves_no_file(
    export: Run, tmp_path: Path, out: str, options: list[str], message: str
) -> None:
    assert message in export(out, *options, status=2)
    assert not list(tmp_path.glob("*.csv")) + list(tmp_path.glob("*.parquet")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["text"], indirect=True)
def test_texts_are_no_pictures_and_files_are_not_overwritten(export: Run, tmp_path: Path) -> None:
    assert "no image pairs" in export("p.parquet", "--format", "pick-a-pic", status=2)
    assert "nobody has answered points" in export("p.csv", "--format", "points", status=2)
    (tmp_path / "there.parquet").write_text("kept")
    assert "exists already" in export("there.parquet", status=2)
    assert (tmp_path / "there.parquet").read_text() == "kept"


def test_a_study_of_both_kinds_asks_which(tmp_path: Path) -> None:
    asked = Prompt("p")
    sides = [Sample(asked, image=image(0, i)) for i in (0, 1)]
    texts = [Sample(asked, text=word) for word in ("a", "b")]
    pairs = [StudyPair(asked, *sides, "x", "y"), StudyPair(asked, *texts, "x", "y")]  # type: ignore[arg-type]
    study = Study.create(tmp_path / "s", Protocol.parse("name: t\nversion: 1\nmin_view_seconds: 0\n"), pairs)
    study.add_rater("ann")
    while (now := study.claim("ann")) is not None:
        study.vote("ann", now.token, Answer("left"))
    study.close()
    command = ["label", "export", str(tmp_path / "s"), "--out"]
    assert "say which, --kind" in CliRunner().invoke(main, [*command, str(tmp_path / "p.parquet")]).output
    for kind in ("image", "text"):
        out = tmp_path / f"{kind}.parquet"
        done = CliRunner().invoke(main, [*command, str(out), "--kind", kind])
        assert done.exit_code == 0 and len(good(out)) == 1 and "1 x" in done.output


# --- the functions by themselves ---


def pair(label: float = 1.0, first: str = "a", second: str = "b", **fields: object) -> Preference:
    asked = Prompt("p")
    return Preference(asked, Sample(asked, text=first), Sample(asked, text=second), label, **fields)  # type: ignore[arg-type]


def test_a_text_that_looks_like_a_formula_is_guarded_in_csv_only(tmp_path: Path) -> None:
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    rows = [{"text": text, "number": -1.5} for text in [*bad, "plain", "a=b"]]
    for name in ("r.csv", "r.jsonl"):
        assert preferences.write_rows(tmp_path / name, rows).rows == 8
    with (tmp_path / "r.csv").open(newline="") as file:
        read_back = list(csv.DictReader(file))
    assert [row["text"] for row in read_back] == [*(f"'{text}" for text in bad), "plain", "a=b"]
    assert {row["number"] for row in read_back} == {"-1.5"}
    assert [json.loads(line)["text"] for line in (tmp_path / "r.jsonl").read_text().split("\n")[:-1]] == [
        row["text"] for row in rows
    ]


def test_any_text_survives_json_lines(tmp_path: Path) -> None:
    strange = "\0\ud800\u202e\u2028{{x}}'; drop"
    preferences.write_trl(tmp_path / "t.jsonl", [pair(first=strange, second="=2")])
    row = json.loads((tmp_path / "t.jsonl").read_text(encoding="ascii"))
    assert row == {"prompt": "p", "chosen": strange, "rejected": "=2"}


def test_a_tie_that_does_not_say_which_gives_no_label(tmp_path: Path) -> None:
    rows = [pair(0.5), pair(0.5, provenance={"choice": "tie_good"}), pair(0.3)]
    other = pair(0.5, provenance={"choice": "tie_bad"}, criterion="fit")
    written = preferences.write_kto(tmp_path / "k.jsonl", [*rows, other])
    assert written.rows == 4 and written.left_out == {"tie, good or bad is not known": 2}
    labels = [json.loads(line)["label"] for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert labels == [True, True, False, True]


@pytest.mark.parametrize("write", [preferences.write_trl, preferences.write_kto, preferences.write_rows])
def test_nothing_to_write_is_an_error_and_no_file(tmp_path: Path, write: Callable[..., object]) -> None:
    with pytest.raises(InputError, match="there is no"):
        write(tmp_path / "x.jsonl", [])
    with pytest.raises(InputError, match="there is no row"):
        preferences.write_trl(tmp_path / "x.jsonl", [pair(0.5)])
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[Preference]:
        yield pair()
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        preferences.write_trl(tmp_path / "x.jsonl", rows())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"written as \.jsonl"):
        preferences.write_kto(tmp_path / "x.parquet", [pair()])
    with pytest.raises(ConfigError, match="no suffix"):
        preferences.write_rows(tmp_path / "x", [{"a": 1}])


def test_a_rater_is_the_same_number_every_time() -> None:
    assert user_number("r-0000000000ff") == 255 and user_number("") == 0
    assert user_number("ann") == user_number("ann") != user_number("bob")
    assert all(0 <= user_number(name) < 2**63 for name in ("r-", "r-xyz", "r--1", "r-" + "f" * 40, "ann"))
