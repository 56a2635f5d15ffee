"""Exports of a dataset: each is read by the library that it is for, offline, and equals its source."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from apps.cli import FORMATS, main
from diffalign.errors import InputError, RefusedError
from diffalign.synthesis import exports, release, spec
from diffalign.synthesis.cases import Case, Value
from diffalign.synthesis.exports import layout
from diffalign.synthesis.store import Generated
from diffalign.synthesis.verify import verify
from tests.synthetic import SPEC, drawn, generated, row_of, text_of

N = 9
COLUMNS = {"plane": "category", "lesion": "category", "side": "category", "age": "integer", "weight": "number"}
COLUMNS |= {"treated": "boolean", "id": "text", "sex": "category", 'note, "odd"': "text"}


def row(number: int) -> dict[str, Value]:
    """The common row, a truth value, a column whose name exports use themselves, and one with an odd name."""
    treated = (True, False, None)[number % 3]
    odd = ("", None, "=SUM(A1)", "'quoted'", 'a,b;"c"\r\nd', "-3", "\r", " left ", "None")[number % 9]
    return {
        **row_of(number),
        "treated": treated,
        "id": f"row {number}",
        "sex": ("male", "F")[number % 2],
        [*COLUMNS][-1]: odd,
    }


def text(number: int) -> str:
    return ("", 'Zeile eins\nZeile zwei,\t"x"', "\u202eright to left\u202c עברית 漢字", "+1", text_of(number))[
        number % 5
    ]


def picture(number: int) -> Image.Image:
    """8-bit colour, 16-bit grey, 8-bit grey, and colour that is grey."""
    chance = np.random.default_rng(number)
    match number % 4:
        case 0:
            return drawn(number, size=7)
        case 1:
            return drawn(number, wide=True, size=7)
        case 2:
            return Image.fromarray(chance.integers(0, 256, (5, 7), dtype=np.uint8))
        case _:
            return Image.fromarray(chance.integers(0, 256, (5, 7), dtype=np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    made = generated(tmp_path_factory.mktemp("made") / "drawn", N, rows=row, columns=COLUMNS, image=picture, text=text)
    yield made
    made.close()


@pytest.fixture(scope="module")
def folders(source: Generated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        # Several shards and folders of a dataset of nine.
        patch.setattr(layout, "SHARD_ROWS", 3)
        patch.setattr(layout.shards, "__defaults__", (3,))
        return {form: exports.export(source, form, base / form, allow_unsafe=True) for form in FORMATS}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an outbound connection")

    monkeypatch.setattr("socket.socket.connect", refuse)


def same_picture(found: object, case: Case, source: Generated) -> None:
    """The pixels, compared with what Pillow finds in the dataset's own file."""
    assert case.image is not None
    wanted = np.asarray(Image.open(io.BytesIO(source.image(case.image))))
    array = np.asarray(found)
    if wanted.ndim == 3 and array.ndim == 2:
        assert (wanted == wanted[..., :1]).all(), "colour became grey"
        wanted = wanted[..., 0]
    assert array.dtype == wanted.dtype
    assert np.array_equal(array, wanted)


def same_row(found: Mapping[str, Any], case: Case) -> None:
    for name, value in case.row.items():
        assert found["row_id" if name == "id" else name] == value, name
    assert found["id"] == case.id
    assert (found["index"], found["split"], found["stratum"]) == (case.index, case.split, case.stratum)
    assert found["prompt"] == case.prompt


@pytest.fixture(scope="module")
def cases(source: Generated) -> dict[int, Case]:
    return {case.index: case for case in source.cases()}


def by_split(cases: Mapping[int, Case]) -> dict[str, list[int]]:
    return {split: [i for i, c in cases.items() if c.split == split] for split in ("train", "test")}


@pytest.mark.parametrize("form", ["parquet", "imagefolder", "by the card"])
def test_datasets_reads_them(
    form: str, folders: dict[str, Path], cases: dict[int, Case], source: Generated, tmp_path: Path
) -> None:
    import datasets

    cache = str(tmp_path)
    if form == "by the card":
        found = datasets.load_dataset(str(folders["imagefolder"]), cache_dir=cache)
    elif form == "imagefolder":
        found = datasets.load_dataset("imagefolder", data_dir=str(folders[form] / "data"), cache_dir=cache)
    else:
        found = datasets.load_dataset(str(folders[form]), cache_dir=cache)
    assert {split: list(found[split]["index"]) for split in found} == by_split(cases)
    for split in found:
        assert isinstance(found[split].features["image"], datasets.Image)
        for record in found[split]:
            case = cases[record["index"]]
            same_picture(record["image"], case, source)
            same_row(record, case)
            assert record["text"] == case.text


def test_webdataset_reads_its_own(
    folders: dict[str, Path], cases: dict[int, Case], source: Generated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    shards = sorted(str(path) for path in (folders["webdataset"] / "data").glob("*.tar"))
    assert len(shards) == 4  # 7 of train and 2 of test by threes
    seen = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        assert {key for key in sample if not key.startswith("__")} == {"png", "json", "txt"}
        record = json.loads(sample["json"])
        case = cases[record["index"]]
        same_picture(Image.open(io.BytesIO(sample["png"])), case, source)
        same_row(record, case)
        assert sample["txt"].decode() == case.text
        seen.append(record["index"])
    assert seen == [*by_split(cases)["test"], *by_split(cases)["train"]]
    for shard in shards:
        with tarfile.open(shard) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_pydicom_reads_its_own(folders: dict[str, Path], cases: dict[int, Case], source: Generated) -> None:
    import pydicom

    seen = set()
    for path in (folders["dicom"] / "data").rglob("*.dcm"):
        found = pydicom.dcmread(path)
        case = cases[int(path.stem)]
        assert path.parent.parent.name == case.split
        seen.add(case.index)
        same_picture(found.pixel_array, case, source)
        assert (found[0x0008, 0x001C].value, found.ImageType[0]) == ("YES", "DERIVED")
        assert found.PatientID == case.id and found.PatientIdentityRemoved == "YES"
        assert (found.BurnedInAnnotation, found.LossyImageCompression) == ("NO", "00")
        assert (found.PatientSex, found.PatientAge) == (("M", "F")[case.index % 2], f"{20 + case.index:03d}Y")
        assert found.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
        assert found.SOPInstanceUID == found.file_meta.MediaStorageSOPInstanceUID
        assert not found.StudyDate and "InstanceCreationDate" not in found
        assert found.get("ImageComments", "") == case.text
        record = json.loads(found.private_block(0x0071, "DIFFALIGN")[0x01].value)
        same_row(record, case)
        assert record["text"] == case.text
        told = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in found.AcquisitionContextSequence}
        assert told["weight"].FloatingPointValue == case.row["weight"]
        assert told["plane"].TextValue == case.row["plane"]
        assert ("side" in told) == (case.row["side"] is not None)
    assert seen == set(cases)


def test_no_two_cases_share_an_identifier(folders: dict[str, Path]) -> None:
    import pydicom

    found = [pydicom.dcmread(path) for path in (folders["dicom"] / "data").rglob("*.dcm")]
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        values = {str(getattr(dataset, name)) for dataset in found}
        assert len(values) == N
        assert name == "PatientID" or all(pydicom.uid.UID(value).is_valid for value in values)


def test_png_is_the_file_and_csv_the_row(folders: dict[str, Path], cases: dict[int, Case], source: Generated) -> None:
    """The reading rule of the format, written anew: an empty cell is missing, a text loses one leading apostrophe."""
    data = folders["png"] / "data"
    with (data / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(found["index"]) for found in rows] == list(cases)
    for found in rows:
        case = cases[int(found["index"])]
        assert case.image is not None
        assert (data / found["file_name"]).read_bytes() == source.image(case.image)
        for name, value in {**case.row, "text": case.text, "prompt": case.prompt}.items():
            cell = found["row_id" if name == "id" else name]
            if value is None:
                assert cell == ""
            elif isinstance(value, bool):
                assert cell == str(value).lower()
            elif isinstance(value, str):
                assert cell != "" and cell[0] not in "=+-@\t\r"
                assert cell[cell[0] == "'" :] == value
            else:
                assert float(cell) == value


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_dataset_gives_the_same_bytes(form: str, source: Generated, tmp_path: Path) -> None:
    made = [exports.export(source, form, tmp_path / name, allow_unsafe=True) for name in ("one", "another")]
    found = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in made]
    assert found[0] == found[1]


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_as_it_was_made(form: str, folders: dict[str, Path]) -> None:
    assert [(check.name, check.faults) for check in verify(folders[form]) if check.faults] == []


@pytest.mark.parametrize("form", FORMATS)
def test_sha256sum_checks_the_list(form: str, folders: dict[str, Path]) -> None:
    done = subprocess.run(
        ["sha256sum", "--strict", "--check", "SHA256SUMS"],
        cwd=folders[form],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == sum(path.is_file() for path in folders[form].rglob("*")) - 1


def test_mlcroissant_reads_parquet(folders: dict[str, Path], cases: dict[int, Case], source: Generated) -> None:
    import mlcroissant

    found = mlcroissant.Dataset(jsonld=str(folders["parquet"] / "croissant.json"))
    fields = {field.description: field.id for field in found.metadata.record_sets[0].fields}
    seen = set()
    for record in found.records("cases"):
        case = cases[int(record[fields["index"]])]
        same_picture(record[fields["The image."]], case, source)
        assert record[fields["id"]].decode() == case.id
        assert record[fields["row_id"]].decode() == case.row["id"]
        assert record[fields["weight"]] == case.row["weight"]
        seen.add(case.index)
    assert seen == set(cases)
    assert {record["provenance/id"].decode() for record in found.records("provenance")} == {
        c.id for c in cases.values()
    }
    stated = json.loads((folders["parquet"] / "croissant.json").read_text())
    assert "not assessed" in " ".join(stated["rai:personalSensitiveInformation"])
    assert stated["rai:dataLimitations"] and stated["license"] == "Apache-2.0"


@pytest.mark.parametrize("form", ["imagefolder", "png", "webdataset", "dicom"])
def test_mlcroissant_reads_other_tables(form: str, folders: dict[str, Path], cases: dict[int, Case]) -> None:
    """Each record has the case's id and weight, and names a file that is there."""
    import mlcroissant

    found = mlcroissant.Dataset(jsonld=str(folders[form] / "croissant.json"))
    fields = {field.description: field.id for field in found.metadata.record_sets[0].fields}
    records = {int(record["cases/1"]): record for record in found.records("cases")}
    assert set(records) == set(cases)
    for index, record in records.items():
        assert record[fields["id"]].decode() == cases[index].id
        assert record[fields["weight"]] == cases[index].row["weight"]
        folder = folders[form] / "data" / (cases[index].split if form == "imagefolder" else "")
        assert (folder / record[fields["file_name"]].decode()).is_file()


def test_provenance_tells_how_a_case_came_to_be(folders: dict[str, Path], cases: dict[int, Case]) -> None:
    for form in FORMATS:
        lines = [json.loads(line) for line in (folders[form] / "provenance.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [case.id for case in cases.values()]
    facts = lines[1]
    assert facts["image"]["sha256"] == cases[1].image
    assert (facts["made"]["seed"], facts["made"]["attempt"]) == (1001, 1)
    assert facts["models"]["image"]["sha256"].startswith("sha256:") and facts["models"]["image"]["steps"] == 10
    assert facts["models"]["image"]["scheduler"] == "DDIM" and facts["models"]["image"]["guidance_scale"] == 1.0
    reward = facts["rewards"]["brain-mr-checker"]
    assert (reward["score"], reward["parts"], reward["unit"]) == (1.0, {"everything": 1.0}, "fraction")
    wanted = spec.sha256_of({**SPEC, "cases": len(cases)})
    assert facts["versions"]["torch"] and facts["spec_sha256"] == wanted
    assert facts["licences"] == {"image": "Apache-2.0", "text": "Apache-2.0"}


def test_the_card_says_what_it_is(folders: dict[str, Path]) -> None:
    card = (folders["parquet"] / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["tags"] == ["synthetic", "diffalign"] and facts["size_categories"] == ["n<1K"]
    assert body.split("\n")[3].startswith("> **The privacy of this dataset was NOT ASSESSED.**")
    assert "--allow-unsafe" in body.split("## ")[0]
    for words in ("embedded:brain-mr", "not automatically anonymous", "lawful basis", "DDIM", "Apache-2.0"):
        assert words in body
    assert "| coronal / present | 3 | 3 | 4 | brain-mr-checker/everything 1 |" in body
    assert "Each is an image, a text and a table row." in body
    assert "Not for diagnosis" in body and "| test | 2 |" in body


def test_codes_stay_codes_as_the_card_of_png_says(tmp_path: Path) -> None:
    """Read as the card says, every cell is the text that it was; a reader that guesses makes 7 of 007."""
    pandas = pytest.importorskip("pandas")
    codes = ["007", "010", "NA", "1e5"]
    made = generated(
        tmp_path / "made", 4, rows=lambda n: {"code": codes[n]}, columns={"code": "category"}, stratum=lambda row: "all"
    )
    folder = exports.export(made, "png", tmp_path / "out", allow_unsafe=True)
    (said,) = re.findall(r"`pandas\.read_csv\(\"DIR/data/rows\.csv\", (.*?)\)`", (folder / "README.md").read_text())
    assert said == "dtype=str, keep_default_na=False"
    read = pandas.read_csv(folder / "data" / "rows.csv", dtype=str, keep_default_na=False)
    assert list(read["code"]) == codes and list(read["index"]) == ["0", "1", "2", "3"]
    assert list(pandas.read_csv(folder / "data" / "rows.csv")["code"].astype(str)) != codes
    assert (
        "pandas" not in (exports.export(made, "parquet", tmp_path / "p", allow_unsafe=True) / "README.md").read_text()
    )


def test_a_card_is_text_and_no_markup(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> | [a](javascript:b) \n# Title `c`"
    made = generated(tmp_path / "made", 4, stratum=lambda row: odd)
    folder = exports.export(made, "parquet", tmp_path / "out", allow_unsafe=True)
    card = (folder / "README.md").read_text()
    assert "<script>" not in card and "\n# Title" not in card
    assert "\\<script\\>alert\\(1\\)\\</script\\> \\| \\[a\\]" in card


# -- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "not assessed"),
        ({"verdict": "not assessed", "why": "there is no training index"}, "there is no training index"),
        ({"verdict": "failed", "why": "31 of 100 images are copies", "measures": {}}, "31 of 100 images are copies"),
        (
            {"verdict": "passed", "why": "no copies", "journal_sha256": "0" * 64},
            "the privacy report beside it is of another dataset, or of other cases",
        ),
    ],
)
def test_what_did_not_pass_is_not_handed_out(report: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4)
    if report is not None:
        (made.folder / "privacy.json").write_text(json.dumps(report))
    with pytest.raises(RefusedError, match=said):
        exports.export(made, "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = exports.export(made, "parquet", tmp_path / "out", allow_unsafe=True)
    found = json.loads((folder / "manifest.json").read_text())["privacy"]
    assert found["allowed_unsafe"] is True and said in (found["verdict"], found["why"])
    first = (folder / "README.md").read_text().split("## ")[0]
    assert "--allow-unsafe" in first and ("NOT ASSESSED" in first or "FAILED" in first) and said in first.lower()


def test_what_passed_is_handed_out_with_its_numbers(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4)
    report = {"verdict": "passed", "why": "no copies", "measures": {"share of copies": {"value": 0.0125, "n": 80}}}
    report |= release.about(made.folder)
    (made.folder / "privacy.json").write_text(json.dumps(report))
    card = (exports.export(made, "png", tmp_path / "out") / "README.md").read_text()
    assert "| share of copies / value | 0.0125 |\n| share of copies / n | 80 |" in card and "passed its tests" in card
    assert "--allow-unsafe" not in card


def test_a_pass_says_that_texts_were_not_assessed_and_on_whose_word_it_rests(tmp_path: Path) -> None:
    word = "that the training images are all there are is the word of the one who assessed it"
    for name, text in (("spoken", lambda i: f"text {i}"), ("silent", lambda i: None)):
        made = generated(tmp_path / name, 4, text=text)
        report = {"verdict": "passed", "why": f"{'x' * 150}; {word}", **release.about(made.folder)}
        (made.folder / "privacy.json").write_text(json.dumps(report))
        folder = exports.export(made, "png", tmp_path / f"{name}-out")
        first = (folder / "README.md").read_text().split("## ")[0]
        said = json.loads((folder / "croissant.json").read_text())["rai:personalSensitiveInformation"]
        for words in (first, " ".join(said)):
            assert word in words and ("texts: these were NOT ASSESSED" in words) == (name == "spoken")


@pytest.mark.parametrize(
    ("rows_from", "said"),
    [("axes", "No record belongs to a person"), ("table", "may be those of real people"), ("unknown", "is not known")],
)
def test_rows_that_were_given_are_not_said_to_be_nobodys(tmp_path: Path, rows_from: str, said: str) -> None:
    import pydicom

    made = generated(tmp_path / "made", 4, rows_from=rows_from)
    folder = exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True)
    card, croissant = (folder / "README.md").read_text(), (folder / "croissant.json").read_text()
    assert said in card and said in croissant
    assert ("No record belongs" in card + croissant) == (rows_from == "axes")
    found = pydicom.dcmread(next((folder / "data").rglob("*.dcm")))
    assert found.PatientIdentityRemoved == ("YES" if rows_from == "axes" else "NO")
    assert ("DeidentificationMethod" in found) == (rows_from == "axes")
    assert exports.Exported.read(folder).dataset.rows_from == rows_from


@pytest.mark.parametrize(
    "content", ["", "[]", '{"verdict": "safe"}', '{"verdict": ["passed"]}', '{"verdict": "passed", "why": 3}']
)
def test_a_damaged_report_is_no_pass(content: str, tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text(content)
    for allowed in (False, True):
        with pytest.raises(InputError, match="is not a privacy report"):
            release.gate(tmp_path, allow_unsafe=allowed)


def test_the_command(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["export", str(made.folder), *arguments])

    refused = run("--format", "parquet")
    assert refused.exit_code == 2 and "--allow-unsafe" in refused.output
    done = run("--format", "parquet", "--allow-unsafe")
    assert done.exit_code == 0 and "not assessed" in done.output
    assert (made.folder / "export" / "parquet" / "SHA256SUMS").is_file()
    assert run("--format", "parquet", "--allow-unsafe").exit_code == 2
    assert run("--format", "tfrecord").exit_code == 2


def test_the_formats_of_the_command_are_those_there_are() -> None:
    assert tuple(exports.FORMATS) == FORMATS


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 2)
    code = (
        "import sys; sys.modules['mlcroissant'] = None; from apps.cli import main;"
        f"main(['export', {str(made.folder)!r}, '--format', 'png', '--allow-unsafe'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: this needs the package mlcroissant: pip install 'diffalign[datasets]'"
    assert not (made.folder / "export" / "png").exists()
