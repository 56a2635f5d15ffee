"""The page about a dataset: what it shows is what is there, what is missing is said, and nothing else is needed."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from apps import dataset_report
from apps.cli import main
from apps.dataset_report_cases import MOST_SHEETS, gather, hardest, places
from diffalign.images import to_rgb
from diffalign.synthesis import balance, release, rows, spec, store, sums, utility
from diffalign.synthesis.axes import Numbers
from diffalign.synthesis.engine import Engine
from diffalign.synthesis.journal import Attempt, Journal, Row
from diffalign.synthesis.store import Acceptance, Generated
from diffalign.synthesis.verify import verify
from tests import synthesis_stubs as stubs
from tests.synthetic import drawn, generated
from tests.test_report import ATTACK, Page

AXES: dict[str, Any] = {
    "plane": ["axial", "sagittal"],
    "lesion": {"present": 0.75, "none": 0.25},
    "side": ["left", "right"],
    "age": {"integer": [20, 79]},
}
CONDITIONS = [
    {"when": {"plane": "sagittal"}, "set": {"side": ["anterior", "posterior", "middle", "top"]}},
    {"when": {"lesion": "none"}, "drop": ["side"]},
]


def page(folder: Path, beside: Path | None = None) -> Page:
    return Page(dataset_report.write(folder, beside).read_text(encoding="utf-8"))


def told(folder: Path) -> str:
    """The words of the page, with a space between any two elements, and one for each run of spaces."""
    text = dataset_report.write(folder).read_text(encoding="utf-8").partition("</head>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def made_by_stub(folder: Path, cases: int = 40) -> Path:
    """A finished dataset with a specification of axes; the rewards of its manifest are the stub's."""
    wanted = stubs.spec_of(cases=cases)
    stubs.begun(folder, wanted)
    stubs.run(folder, wanted)
    manifest, _ = store.read_manifest(folder)
    known = {
        name: {"range": [0.0, 1.0], "unit": "fraction", "modality": modality, "higher_is_better": True}
        for name, modality in (("luck", "image"), ("words", "text"))
    }
    gates = ({"gate": "decodable"}, *wanted.public()["gates"])
    store.write_manifest(folder, replace(manifest, rewards=known, gates=gates), complete=True)
    return folder


def estimate(value: float, half: float = 0.01, n: int = 12) -> dict[str, Any]:
    return {"value": value, "ci95": [value - half, value + half], "n": n}


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    near = {
        "kid": estimate(0.123),
        "coverage": estimate(0.5, n=40),
        "vendi": estimate(7.5),
        "vendi_real": estimate(8.0),
    }
    facts: dict[str, Any] = {
        "dataset": "drawn", **release.about(folder), "against": {"name": "world:brain-mr", "n": 40},
        "fidelity": {
            "encoder": {"name": "embedded:clip", "sha256": "sha256:12ab"}, "nearest": 5, "all": near,
            "groups": {"plane: axial": near, "stratum: axial / none": {"kid": estimate(0.9)}},
            "too_few": ["stratum: coronal / none"],
        },
        "utility": {"side": {"probe": estimate(0.8), "network": estimate(0.7), "guessing": estimate(0.5)}},
        "table": {"column_shapes": 0.9, "pair_trends": 0.8, "n": [12, 40]}, "n": 12,
        "notes": ["Fewer than 2048 cases (12): scores depend on the number of cases."],
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(facts | changes))
    return facts


def privacy(folder: Path, verdict: str, **changes: Any) -> None:
    measures = {
        "copies": {"verdict": verdict, "why": "0 of 12 are copies", **estimate(0.0), "limit": 0.0},
        "membership": {"verdict": verdict, "why": "it cannot be told", **estimate(0.51), "limit": 0.6},
    }
    facts = {"verdict": verdict, "why": "as it is", "measures": measures, **release.about(folder)}
    (folder / "privacy.json").write_text(json.dumps(facts | changes))


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself_and_is_the_same_each_time(tmp_path: Path) -> None:
    folder = made_by_stub(tmp_path / "alice-home" / "set")
    found = page(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not found.open and not {"script", "iframe", "object"} & set(found.tags)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert "url(" not in text and "@import" not in text and "alice" not in text and str(tmp_path) not in text
    assert found.headings[:1] == ["stub"] and "40 synthetic cases" in found.text
    dataset_report.write(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == text


def test_what_the_cases_say_is_text_and_no_markup(tmp_path: Path) -> None:
    made = generated(
        tmp_path / "set", 6, prompt=lambda number: ATTACK, text=lambda number: ATTACK,
        rows=lambda number: {ATTACK: ATTACK}, columns={ATTACK: "category"}, stratum=lambda row: ATTACK,
    )  # fmt: skip
    found = page(made.folder)
    assert "script" not in found.tags and found.text.count(ATTACK) > 10
    assert found.images[0]["alt"] == ATTACK


def test_images_are_shown_as_they_are(tmp_path: Path) -> None:
    """The picture of a 16-bit image is grey, from its lowest to its highest level; colours stay exact in a PNG."""
    made = generated(tmp_path / "wide", 4, image=lambda number: drawn(number, wide=True))
    shown = [decoded(values["src"]) for values in page(made.folder).images]
    cases = [case.image or "" for case in made.cases()]
    # Two strata of two cases each, in the order in which they first come: 0, 3 are axial/coronal present, ...
    wanted = [to_rgb(Image.open(io.BytesIO(made.image(name)))).convert("L") for name in cases]
    assert sorted(image.tobytes() for image in shown) == sorted(image.tobytes() for image in wanted)
    assert {image.mode for image in shown} == {"L"} and shown[0].getextrema() == (0, 255)
    assert "Images of 16 bits" in page(made.folder).text
    made = generated(tmp_path / "colour", 1)
    (values,) = page(made.folder).images
    assert decoded(values["src"]).tobytes() == drawn(0).tobytes()
    assert "Images of 16 bits" not in page(made.folder).text


def decoded(address: str) -> Image.Image:
    """What a browser makes of a data address. No slash stands in its data, which could spell a path by chance."""
    body = address.partition("base64,")[2]
    assert "/" not in body
    return Image.open(io.BytesIO(base64.b64decode(unquote(body))))


def test_a_missing_and_a_damaged_image_are_said_to_be(tmp_path: Path) -> None:
    made = generated(tmp_path / "set", 4)
    first, second, *_ = (made.files.path(case.image or "") for case in made.cases())
    first.unlink()
    second.write_bytes(b"no image")
    assert page(made.folder).text.count("no image") == 2


def test_datasets_of_one_part(tmp_path: Path) -> None:
    texts = page(generated(tmp_path / "texts", 4, image=lambda number: None).folder)
    assert not texts.images and "each a text and a table row" in texts.text and "Case 0: a lesion" in texts.text
    pictures = page(generated(tmp_path / "pictures", 4, text=lambda number: None).folder)
    assert len(pictures.images) == 4 and "Texts" not in pictures.headings


def test_the_page_of_a_large_dataset_stays_small(tmp_path: Path) -> None:
    """60 strata of 6 images that compress badly: at most 48 sheets, the hardest stratum among them, and 6 MB."""
    made = generated(
        tmp_path / "set", 360, image=lambda number: drawn(number % 9, size=144), text=lambda number: None,
        rows=lambda number: {"group": f"g{number // 6}"}, columns={"group": "category"},
        stratum=lambda row: str(row["group"]), rejected=(331,),
    )  # fmt: skip
    found = page(made.folder)
    assert (made.folder / "report.html").stat().st_size < 6e6
    assert len(found.images) == MOST_SHEETS * 6 and "48 of 60 strata" in found.text
    assert any("g55" in values["title"] for values in found.images)


def test_which_cases_are_shown() -> None:
    assert places(3, 6) == [0, 1, 2] and places(11, 3) == [0, 5, 10] and places(45, 6) == [0, 9, 18, 26, 35, 44]
    filled = {"easy": Acceptance(2, 2, 2), "hard": Acceptance(2, 2, 9), "middle": Acceptance(2, 2, 3)}
    assert hardest(filled) == ["hard", "middle", "easy"]


def test_memory_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    """500 and 4 000 cases: less than 20 bytes for each case more."""
    peaks = []
    for number in (500, 4000):
        folder = many(tmp_path / str(number), number)
        made = Generated.open(folder)
        gather(made)  # so that what is loaded once does not count
        tracemalloc.start()
        gather(made)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        made.close()
    assert peaks[1] - peaks[0] < 3500 * 20


def many(folder: Path, count: int) -> Path:
    """A dataset of texts; its journal alone is written."""
    generated(folder, 2, image=lambda number: None, rejected=()).close()
    manifest, _ = store.read_manifest(folder)
    (folder / store.JOURNAL).unlink()
    journal = Journal.create(folder / store.JOURNAL)
    cells = {"plane": "axial", "lesion": "none", "side": None, "age": 30, "weight": 50.5}
    row = [Row(i, f"syn-{i}", cells, "all", "train") for i in range(count)]
    told = [Attempt(i, "text", 0, i, None, f"text {i % 50} " * (i % 9 + 1), {"words": i % 7 / 7}) for i in range(count)]
    journal.record([(one, "", "row") for one in row], told)
    journal.close_round(0, [])
    journal.finish()
    store.write_manifest(folder, replace(manifest, strata={"all": count}), complete=True)
    return folder


# -- what was measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "title", "follows"),
    [
        ("passed", "Privacy: passed what was measured", "diffalign export hands it out"),
        ("failed", "Privacy: failed", "diffalign export refuses it. Handle it like the data"),
        ("not assessed", "Privacy: not assessed", "it may hold copies of training data"),
    ],
)
def test_the_verdict_in_words(tmp_path: Path, verdict: str, title: str, follows: str) -> None:
    folder = generated(tmp_path / "set", 4).folder
    privacy(folder, verdict)
    assert title in page(folder).headings
    said = told(folder)
    assert follows in said and "As it is." in said and "safe" not in said.lower()
    assert f"Copies 0 of 12 are copies 0.0 % −1.0 to 1.0 % 12 none {verdict}" in said
    assert f"Membership it cannot be told 0.510 0.500 to 0.520 12 at most 0.6 {verdict}" in said


def test_a_report_of_other_cases_counts_for_nothing(tmp_path: Path) -> None:
    folder = generated(tmp_path / "set", 4).folder
    evaluation(folder, journal_sha256="0" * 64)
    privacy(folder, "passed", journal_sha256="0" * 64)
    found = page(folder)
    assert "Privacy: not assessed" in found.headings and "of other cases" in found.text
    assert "0.123" not in found.text and found.text.count("Nothing was measured yet") == 1


def test_what_was_not_measured_is_said_to_be_missing(tmp_path: Path) -> None:
    found = page(generated(tmp_path / "set", 4).folder)
    assert found.text.count("diffalign evaluate . --against world:brain-mr") == 1
    assert found.text.count("Nothing was measured yet") == 1 and "Not assessed yet" not in found.text
    assert "The images were not compared with real ones" in found.text
    assert "Before and after alignment" not in found.headings


def test_fidelity_stands_beside_privacy(tmp_path: Path) -> None:
    """Lemma 2 of Naeem et al. by hand, for 12 cases, 40 real ones and 5 neighbours: 1 - Π (40-i)/(52-i), i = 1..5."""
    folder = generated(tmp_path / "set", 12).folder
    evaluation(folder)
    privacy(folder, "passed")
    said = told(folder)
    assert said.index("KID distance") < said.index("Copies 0 of 12") < said.index("side linear probe")
    assert "0.123 0.113 to 0.133 12" in said
    expected = 1 - (39 / 51) * (38 / 50) * (37 / 49) * (36 / 48) * (35 / 47)
    assert f"of the same distribution: {expected:.3f}" in said
    assert "as many real ones: 8.00 (7.99 to 8.01)" in said and "embedded:clip (sha256:12ab)" in said
    assert "side linear probe 0.800 0.790 to 0.810 12 by guessing: 0.500" in said
    groups = said[said.index("By stratum, and by the values") :]
    assert groups.index("stratum: axial / none 12 0.90 0.89 to 0.91") < groups.index("plane: axial 12 0.12")
    assert "Column shapes how alike single columns are 0.900 12 Pair trends" in said


def test_before_and_after_alignment(tmp_path: Path) -> None:
    """Less KID is better, and an interval that holds 0 says nothing."""
    folder = generated(tmp_path / "set", 12).folder
    near = {"kid": estimate(0.3), "vendi": estimate(9.0)}
    gaps = {"kid": {"value": -0.177, "ci95": [-0.2, -0.1]}, "vendi": {"value": -1.5, "ci95": [-2.0, -1.0]}}
    probe = {"side": {"probe": {"value": 0.01, "ci95": [-0.1, 0.12]}}}
    base = {
        "dataset": "base", "n": 450, "fidelity": {"all": near}, "utility": {"side": {"probe": estimate(0.79)}},
        "difference": {"fidelity": gaps, "utility": probe},
    }  # fmt: skip
    evaluation(folder, baseline=base)
    said = told(folder)
    assert "The baseline is base, 450 images" in said
    assert "KID 0.300 0.123 ▲ clearly better: −0.177 −0.200 to −0.100" in said
    assert "Vendi 9.000 7.500 ▼ clearly worse: −1.500" in said
    assert "side, linear probe on real 0.790 0.800 ≈ no clear change: +0.010" in said


def test_an_evaluation_that_lies_elsewhere(tmp_path: Path) -> None:
    folder, beside = generated(tmp_path / "set", 12).folder, tmp_path / "out"
    beside.mkdir()
    evaluation(folder)
    (folder / "evaluation.json").rename(beside / "evaluation.json")
    privacy(folder, "passed")
    (folder / "privacy.json").rename(beside / "privacy.json")
    found = page(folder, beside)
    assert "0.123" in found.text and "Privacy: passed what was measured" in found.headings
    assert (beside / "report.html").is_file() and not (folder / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_evaluation_is_no_evaluation(tmp_path: Path, content: str) -> None:
    folder = generated(tmp_path / "set", 4).folder
    (folder / "evaluation.json").write_text(content)
    if content == "{":
        with pytest.raises(Exception, match=r"evaluation.json is no evaluation of a dataset"):
            dataset_report.write(folder)
    else:
        assert "Nothing was measured yet" in page(folder).text


# -- what was asked for, and how it was filled ------------------------------------------------------------------------


def asked() -> balance.Asked:
    found = balance.asked(stubs.spec_of(axes=AXES, conditions=CONDITIONS, strata=["plane", "lesion", "side"]))
    assert found is not None
    return found


def test_shares_that_are_asked_for_by_hand() -> None:
    """Half of the slices are axial; 3/4 of each have a lesion, on one of two sides, or of four in sagittal ones."""
    found = asked()
    assert found.values["plane"] == {"axial": 0.5, "sagittal": 0.5}
    sides = {"left": 3 / 16, "right": 3 / 16, "anterior": 3 / 32, "posterior": 3 / 32, "middle": 3 / 32, "top": 3 / 32}
    assert found.values["side"] == pytest.approx({**sides, None: 1 / 4})
    assert found.strata["sagittal / present / top"] == pytest.approx(3 / 32)
    assert found.strata["axial / none"] == pytest.approx(1 / 8) and sum(found.strata.values()) == pytest.approx(1)
    assert {form.range for form, _ in found.numbers["age"]} == {(20, 79)}
    assert sum(share for _, share in found.numbers["age"]) == pytest.approx(1)


def test_shares_that_are_asked_for_are_those_of_many_rows() -> None:
    """By another way: 3 200 rows divide without a rest, so each stratum has exactly its share of them."""
    wanted = stubs.spec_of(axes=AXES, conditions=CONDITIONS, strata=["plane", "lesion", "side"], cases=3200)
    found = rows.survey(wanted).strata
    assert {name: count / 3200 for name, count in found.items()} == pytest.approx(asked().strata)
    name, gap = balance.furthest(found, asked().strata)
    assert name in found and gap == pytest.approx(0)
    assert balance.furthest({"a": 3, "b": 1}, {"a": 0.5, "b": 0.5}) == ("a", 0.25)
    assert balance.furthest({}, {}) == ("", 0.0)


def test_a_table_asks_for_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("plane\naxial\n")
    wanted = stubs.spec_of(axes={}, cases=None, table={"file": str(path)}, strata=[], image=None,
                           text={"model": "m", "template": "{plane}"}, rewards=[], gates=[])  # fmt: skip
    assert balance.asked(wanted) is None


@pytest.mark.parametrize(
    "form",
    [
        Numbers(integer=(20, 80)),
        Numbers(number=(-1.0, 3.0)),
        Numbers(integer=(20, 80), distribution="normal", mean=50, sd=12),
        Numbers(number=(0.0, 1.0), distribution="normal", mean=0.9, sd=0.5),
        Numbers(integer=(7, 7)),
    ],
)
def test_numbers_that_are_asked_for_are_those_that_are_drawn(form: Numbers) -> None:
    """Quantiles at 20 000 even steps, which is how rows draw them, counted in the bins: the shares to 1/1000."""
    edges = balance.edges(*form.range, integer=form.integer is not None)
    values = [rows._number(form, (i + 0.5) / 20_000) for i in range(20_000)]
    counts, _ = np.histogram(values, edges)
    assert balance.expected([(form, 1.0)], edges) == pytest.approx(counts / 20_000, abs=1e-3)


def test_a_number_far_from_the_mean_by_hand() -> None:
    """Of a normal distribution cut to [0, 2] at mean 0 and sd 1, below 1 lies (Φ(1) - 1/2) / (Φ(2) - 1/2)."""
    form = Numbers(number=(0.0, 2.0), distribution="normal", mean=0, sd=1)
    below = (NormalDist().cdf(1) - 0.5) / (NormalDist().cdf(2) - 0.5)
    assert balance.expected([(form, 0.5)], [0, 1, 2]) == pytest.approx([0.5 * below, 0.5 * (1 - below)])


def test_wanted_against_got(tmp_path: Path) -> None:
    """40 cases of the stub: half of them axial; the page has counts, shares, what was asked for, and the difference."""
    folder = made_by_stub(tmp_path / "set")
    said = told(folder)
    assert "axial 20 50.0 % 50.0 %" in said and "Together, 4 strata. Every share is as asked for." in said
    # 13 cases over two planes and two lesions: 7 axial (53.8 %), where 50 % are asked for; 4, 3, 3, 3 of 3.25 each.
    said = told(made_by_stub(tmp_path / "odd", 13))
    assert "Largest deviation: axial, +3.85 percentage points (+0.5 cases)." in said
    assert "+5.77 percentage points (+0.8 cases)" in said


def test_acceptance_and_what_the_gates_said(tmp_path: Path) -> None:
    """Against a count of the journal, attempt by attempt."""
    folder = made_by_stub(tmp_path / "set")
    made = Generated.open(folder)
    attempts = list(made.attempts())
    floor = [one for one in attempts if one.gate == "luck"]
    worst = min(made.acceptance().items(), key=lambda item: item[1].accepted / item[1].attempts)
    said = told(folder)
    total = sum(one.attempts for one in made.acceptance().values())
    (reason, times), *_ = Counter(one.reason for one in floor).most_common(1)
    assert times > 1 and f"luck {len(floor)} {100 * len(floor) / total:.1f} {reason} ({times})" in said
    silent = {str(gate["gate"]) for gate in made.manifest.gates} - {one.gate for one in attempts} - {"reward"}
    assert silent and all(f"{name} 0 0.0 nothing" in said for name in silent)
    after = said[said.index("By stratum, the hardest first") :]
    first = min(made.manifest.strata, key=after.index)
    share = 100 * worst[1].accepted / worst[1].attempts
    assert first == worst[0] and f"{worst[1].accepted} 10.0 {worst[1].attempts} {share:.0f} %" in after


def test_scores_of_accepted_and_of_all(tmp_path: Path) -> None:
    folder = made_by_stub(tmp_path / "set")
    made = Generated.open(folder)
    given = [(one.scores["luck"], one.gate is None) for one in made.attempts() if "luck" in one.scores]
    kept = [value for value, good in given if good]
    found = gather(made).scores["luck"]
    assert (found.counts, sum(found.accepted)) == ([len(given), len(kept)], len(kept) == 40 and 40)
    assert found.accepted == np.histogram(kept, 20, (0, 1))[0].tolist()
    assert found.all == np.histogram([value for value, _ in given], 20, (0, 1))[0].tolist()
    said = told(folder)
    assert f"40 accepted, mean {np.mean(kept):.3f}; {len(given)} attempts, mean" in said
    half = np.mean([one.scores["luck/half"] for one in made.attempts() if "luck/half" in one.scores])
    assert f"half {half:.3f}" in said


def test_texts_are_counted(tmp_path: Path) -> None:
    """Texts of 1, 2, 3 and 3 words, of which the last two are the same."""
    texts = ["one", "one two", "one two three", "one two three"]
    found = page(generated(tmp_path / "set", 4, text=lambda number: texts[number]).folder).text.replace("\u00a0", " ")
    assert "4 texts of 1 to 3 words, 2.2 on average. 3 different ones (75 %)." in found


# -- limitations, and how to repeat it --------------------------------------------------------------------------------


def test_limitations_follow_from_the_facts(tmp_path: Path) -> None:
    made = generated(tmp_path / "set", 12)
    said = told(made.folder)
    for words in (
        "There was no gate blank.", "There was no gate duplicate.", "There was no gate memorised.",
        "Cases were chosen by brain-mr-checker", "No reward judged the texts.", "strata have fewer than 20 cases",
        "embedded:brain-mr, which made the images, does not state what it was trained on",
    ):  # fmt: skip
        assert words in said, words
    manifest, _ = store.read_manifest(made.folder)
    models = {"image": {**manifest.models["image"], "training_data": "30,000 slices of `this`."}}
    gates = tuple({"gate": name} for name in ("decodable", "blank", "duplicate", "memorised"))
    store.write_manifest(made.folder, replace(manifest, models=models, gates=gates), complete=True)
    evaluation(made.folder)
    said = told(made.folder)
    assert "There was no gate reward." in said and "There was no gate blank" not in said
    assert "was trained on 30,000 slices of this." in said and "No reward judged the texts" not in said
    assert "trained on drawn scenes of this project" in said and "The images were not compared" not in said
    assert "1 group has fewer than 20 cases, synthetic or real, and was not measured: stratum: coronal / none." in said


def test_how_to_repeat_it(tmp_path: Path) -> None:
    """What lies somewhere on the machine has to be named again; hashes and versions are there."""
    folder = made_by_stub(tmp_path / "set")
    said = told(folder)
    manifest, _ = store.read_manifest(folder)
    assert "diffalign generate spec.yaml --out ../again diff -r . ../again" in said and manifest.spec_sha256 in said
    wanted = stubs.spec_of(image={"model": str(tmp_path / "m"), "adapter": "runs/x/adapter", "template": "{plane}"})
    assert dataset_report._elsewhere(spec.parse(wanted.public())) == ["image.model", "image.adapter"]
    assert dataset_report._elsewhere(stubs.spec_of()) == []


# -- where it is made -------------------------------------------------------------------------------------------------


def test_a_run_that_stops_before_the_page_writes_it_when_it_goes_on(tmp_path: Path) -> None:
    """What is made at the end is made before the hashes are: the list has it, and a stopped run makes it anew."""
    folder, wanted = tmp_path / "set", stubs.spec_of()
    stubs.begun(folder, wanted)

    def engine(at_end: Callable[[], object]) -> Engine:
        return Engine(wanted, folder, stubs.makers(), at_end=at_end)

    def stopped() -> None:
        (folder / ".report.html.tmp").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(stopped).run()
    assert not (folder / sums.NAME).exists()
    engine(lambda: dataset_report.write(folder)).run()
    assert "report.html" in sums.read(folder) and not list(sums.faults(folder))
    assert not (folder / ".report.html.tmp").exists()
    engine(stopped).run()  # all is there, so nothing is made


def test_an_evaluation_rewrites_the_page_and_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "STEPS", 3)
    monkeypatch.setattr(utility, "NETWORKS", 1)
    folder = made_by_stub(tmp_path / "set", 12)
    dataset_report.write(folder)
    sums.write(folder)
    real = tmp_path / "real"
    real.mkdir()
    for number in range(10):
        drawn(500 + number).save(real / f"{number}.png")
    done = CliRunner().invoke(main, ["evaluate", str(folder), "--against", str(real)])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output and not list(sums.faults(folder))
    said = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "Against 10 of real." in said and "no training images were given" in said.lower()


def test_a_trace_of_the_machine_in_the_page_is_found(tmp_path: Path) -> None:
    folder = made_by_stub(tmp_path / "set", 12)
    dataset_report.write(folder)
    sums.write(folder)
    assert not [fault for check in verify(folder) for fault in check.faults]
    with (folder / "report.html").open("a") as file:
        file.write(f"<p>/{'home'}/alice/data</p>")
    sums.add(folder, "report.html")
    (fault,) = [fault for check in verify(folder) for fault in check.faults]
    assert fault.startswith("report.html names a place of a machine or a user: '/")


def test_unescaped_characters_of_the_specification(tmp_path: Path) -> None:
    folder = generated(tmp_path / "set", 4).folder
    (folder / store.SPEC).write_text("name: '<b>'\n")
    text = dataset_report.write(folder).read_text(encoding="utf-8")
    assert "name: &#39;&lt;b&gt;&#39;" in text and "<b>'" not in text
