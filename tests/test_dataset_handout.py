"""What is handed out: grey pictures as DICOM, one id of a case in every form, and in which files the day stands."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import tarfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from apps import dataset_report
from apps.cli import FORMATS, main
from diffalign.errors import ConfigError, RefusedError
from diffalign.synthesis import exports, store, sums
from diffalign.synthesis.store import Generated
from diffalign.synthesis.verify import verify
from tests.synthetic import generated


def noisy(number: int, spread: int = 9) -> Image.Image:
    """A grey picture whose channels differ by up to ``spread`` levels, as a model of colour pictures makes it."""
    chance = np.random.default_rng(number)
    grey = chance.integers(60, 190, (8, 7, 1))
    apart = np.stack([chance.integers(0, spread + 1, (8, 7)) for _ in range(3)], axis=2)
    apart[0, 0] = (0, spread, spread // 2)
    return Image.fromarray((grey + apart).astype(np.uint8))


def faults(folder: Path) -> list[str]:
    return [fault for check in verify(folder) for fault in check.faults]


# -- grey -------------------------------------------------------------------------------------------------------------


def test_grey_pictures_are_monochrome_in_dicom(tmp_path: Path) -> None:
    """Luminance by ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B), worked out here, to within the rounding of a level."""
    import pydicom

    made = generated(tmp_path / "made", 5, image=noisy)
    folder = exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True, grey=True)
    for case in made.cases():
        assert case.image is not None
        colour = np.asarray(Image.open(io.BytesIO(made.image(case.image)))).astype(float)
        wanted = colour @ (0.299, 0.587, 0.114)
        found = pydicom.dcmread(next((folder / "data").rglob(f"{case.index:08d}.dcm")))
        assert (found.PhotometricInterpretation, found.SamplesPerPixel, found.BitsStored) == ("MONOCHROME2", 1, 8)
        assert "luminance" in found.DerivationDescription
        assert np.abs(found.pixel_array - wanted).max() <= 0.51
    assert faults(folder) == []
    path = next((folder / "data").rglob("*.dcm"))
    found = pydicom.dcmread(path)
    found.PixelData = bytes([found.PixelData[0] ^ 1]) + found.PixelData[1:]
    found.save_as(path)
    sums.write(folder)
    assert any("its pixels are not those" in fault for fault in faults(folder))


def test_an_export_of_grey_pictures_inside_its_dataset_is_verified(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4, image=noisy)
    exports.export(made, "dicom", made.folder / "export" / "dicom", allow_unsafe=True, grey=True)
    assert [fault for fault in faults(made.folder) if "export/" in fault] == []


@pytest.mark.parametrize(("spread", "refused"), [(24, False), (25, True)])
def test_colour_is_not_made_grey(tmp_path: Path, spread: int, refused: bool) -> None:
    made = generated(tmp_path / "made", 3, image=lambda i: noisy(i, spread if i == 2 else 3))
    if refused:
        with pytest.raises(RefusedError, match="case 2 is in colour: its channels differ by up to 25 of 255"):
            exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True, grey=True)
        assert not (tmp_path / "out").exists()
    else:
        assert exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True, grey=True)


def test_grey_is_for_dicom_and_the_command_tells_of_it(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 3, image=noisy)
    with pytest.raises(ConfigError, match="--grey is for dicom"):
        exports.export(made, "png", tmp_path / "out", allow_unsafe=True, grey=True)

    def run(*arguments: str) -> Result:
        command = ["export", str(made.folder), "--format", "dicom", "--allow-unsafe", *arguments]
        return CliRunner().invoke(main, command)

    told = run("--out", str(tmp_path / "colour"))
    assert told.exit_code == 0 and "--grey stores their luminance, as MONOCHROME2" in told.stderr
    told = run("--out", str(tmp_path / "grey"), "--grey")
    assert told.exit_code == 0 and "luminance" not in told.stderr
    assert exports.Exported.read(tmp_path / "grey").layout.grey


# -- DICOM ------------------------------------------------------------------------------------------------------------

ONE = {
    "PatientID", "StudyInstanceUID", "Modality", "SeriesInstanceUID", "ConversionType", "SOPClassUID", "SOPInstanceUID",
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelData", "SpecificCharacterSet", "ImageType",
}  # fmt: skip
"""Type 1 (and 1C whose condition holds) of the modules that PS3.3 A.8.1 asks of a Secondary Capture image, and what
this export relies on."""
TWO = {
    "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID",
    "AccessionNumber", "SeriesNumber", "InstanceNumber", "PatientOrientation",
}  # fmt: skip
"""Type 2, and 2C whose condition holds: there, and perhaps empty."""


@pytest.mark.parametrize("grey", [True, False])
def test_a_secondary_capture_has_what_the_standard_asks_of_it(tmp_path: Path, grey: bool) -> None:
    import pydicom

    made = generated(tmp_path / "made", 3, image=noisy)
    folder = exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True, grey=grey)
    for path in (folder / "data").rglob("*.dcm"):
        found = pydicom.dcmread(path)
        assert not [name for name in ONE if name not in found or found[name].is_empty]
        assert not [name for name in TWO if name not in found]
        assert ("PlanarConfiguration" in found) == (not grey)
        assert found.BitsAllocated == found.BitsStored == found.HighBit + 1
        for item in found.AcquisitionContextSequence:
            (code,) = item.ConceptNameCodeSequence
            assert code.CodeValue and code.CodingSchemeDesignator and code.CodeMeaning
            assert item.ValueType == "TEXT" or item.MeasurementUnitsCodeSequence[0].CodeValue == "1"


# -- the tables beside tar files and DICOM ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["webdataset", "dicom"])
def test_the_table_beside_the_files_is_checked(form: str, tmp_path: Path) -> None:
    """Rows that say something else than the files, and files that are not there, are found though the list is new."""
    made = generated(tmp_path / "made", 5)
    folder = exports.export(made, form, tmp_path / "out", allow_unsafe=True)
    assert faults(folder) == []
    path = folder / "data" / "metadata.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    pq.write_table(table.slice(1), path)
    sums.write(folder)
    assert any("metadata.parquet lacks case 0" in fault for fault in faults(folder))
    by_index = {row["index"]: row for row in rows}
    by_index[2]["side"], by_index[3]["file_name"] = "nowhere", "../../../made/journal.sqlite"
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    sums.write(folder)
    found = faults(folder)
    assert any("metadata.parquet: the row of case 2 is not the one" in fault for fault in found)
    assert any("metadata.parquet: case 3 is in " in fault and "journal.sqlite" in fault for fault in found)


def forms_with_a_table(folder: Path, form: str) -> Path:
    """An export of six cases, 0 to 3 for training, and 4 and 5 for testing."""
    made = generated(folder / "made", 6, split=lambda number: "test" if number >= 4 else "train")
    exported = exports.export(made, form, folder / "out", allow_unsafe=True)
    assert faults(exported) == []
    return exported


@pytest.mark.parametrize(("form", "other"), [("dicom", 1), ("dicom", 4), ("webdataset", 4)])
def test_the_table_names_the_file_of_the_case_itself(form: str, other: int, tmp_path: Path) -> None:
    """The files of two cases are exchanged in the table: each is there, and each is another's."""
    folder = forms_with_a_table(tmp_path, form)
    path = folder / "data" / "metadata.parquet"
    table = pq.read_table(path)
    rows = {row["index"]: row for row in table.to_pylist()}
    one, two = rows[0]["file_name"], rows[other]["file_name"]
    rows[0]["file_name"], rows[other]["file_name"] = two, one
    pq.write_table(type(table).from_pylist(list(rows.values()), table.schema), path)
    sums.write(folder)
    assert sorted(faults(folder)) == [
        f"metadata.parquet: case 0 is in {one}, not in {two!r}",
        f"metadata.parquet: case {other} is in {two}, not in {one!r}",
    ]


def test_a_dicom_file_lies_where_its_case_belongs(tmp_path: Path) -> None:
    """A case for training is put among those for testing, and the table is told."""
    folder = forms_with_a_table(tmp_path, "dicom")
    (folder / "data" / "train/00000/00000000.dcm").rename(folder / "data" / "test/00000/00000000.dcm")
    path = folder / "data" / "metadata.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["file_name"] = "test/00000/00000000.dcm"
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    sums.write(folder)
    name = "test/00000/00000000.dcm"
    assert f"case 0 names {name!r} as its image, which is not where an export has it" in faults(folder)


@pytest.mark.parametrize(("old", "new"), [("test-00000", "train-00000"), ("00000004", "00000009")])
def test_a_case_in_a_tar_has_the_shard_of_its_split_and_its_own_number(old: str, new: str, tmp_path: Path) -> None:
    folder = forms_with_a_table(tmp_path, "webdataset")
    shard = folder / "data" / "test-00000-of-00001.tar"
    other = folder / "data" / shard.name.replace(old, new).replace("of-00001", "of-00002")
    with tarfile.open(shard) as tar, tarfile.open(folder / "copy.tar", "w") as copy:
        for member in tar:
            file = tar.extractfile(member)
            member.name = member.name.replace(old, new)
            copy.addfile(member, file)
    shard.unlink()
    (folder / "copy.tar").rename(other)
    sums.write(folder)
    key = "00000004".replace(old, new)
    assert f"case 4 is '{key}' in {other.name}, which is not where an export has it" in faults(folder)


@pytest.mark.parametrize("form", ["webdataset", "dicom"])
def test_an_export_from_before_there_was_the_table_passes_without(form: str, tmp_path: Path) -> None:
    """Its manifest does not promise one; where it is promised, its absence is a fault with a sentence of its own."""
    folder = forms_with_a_table(tmp_path, form)
    (folder / "data" / "metadata.parquet").unlink()
    sums.write(folder)
    assert "manifest.json promises data/metadata.parquet, which is missing" in faults(folder)
    about = json.loads((folder / "manifest.json").read_text())
    assert about["layout"].pop("table") is True
    (folder / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")
    sums.write(folder)
    assert faults(folder) == []


@pytest.mark.parametrize("form", FORMATS)
def test_only_a_table_that_is_written_is_promised(form: str, tmp_path: Path) -> None:
    folder = forms_with_a_table(tmp_path, form)
    assert exports.Exported.read(folder).layout.table == (folder / "data" / "metadata.parquet").is_file()


# -- what a model was aligned to ---------------------------------------------------------------------------------------

ALIGNED = {
    "base": "embedded:brain-mr", "recipe": "mine", "objective": "ppo-clip",
    "rewards": [{"reward": "brain-mr-checker", "weight": 1.0}],
    "experience": "rollouts", "examples": "pairs.parquet", "seed": 7, "epochs": 12,
    "held_out": {
        "brain-mr-checker": {
            "before": {"mean": 0.7125, "ci95": [0.68, 0.74], "n": 64},
            "after": {"mean": 0.9, "ci95": [0.88, 0.92], "n": 64},
            "difference": {"mean": 0.1875, "ci95": [0.15, 0.22]}, "trained_on": True,
        },
        "clip": {"before": {"mean": 0.5}, "after": {"mean": 0.4}, "difference": {"mean": -0.1, "ci95": None},
                 "trained_on": False},
    },
    "win_rate": {"value": 0.8125, "ci95": [0.7, 0.89], "n": 64, "by": "brain-mr-checker", "ties": 0.1},
}  # fmt: skip


def test_what_the_model_was_aligned_to_stands_on_the_page_and_the_card(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4)
    models = dict(made.manifest.models)
    assert "aligned" not in told_by(made.folder).lower().replace("what it was asked", "")
    models["image"] = {**models["image"], "aligned": ALIGNED}
    store.write_manifest(made.folder, replace(made.manifest, models=models), complete=True)
    said = (
        "aligned from embedded:brain-mr by ppo-clip (recipe mine) to brain-mr-checker (weight 1) and the examples of"
        " pairs.parquet, 12 epochs, seed 7"
    )
    page = told_by(made.folder)
    assert said in page and "won 81 % (70 to 89 %) of 64 comparisons with its base, by brain-mr-checker" in page
    assert page.index("clip no 0.500 0.400 \u22120.100") < page.index(
        "brain-mr-checker yes 0.713 0.900 +0.188 +0.150 to"
    )
    folder = exports.export(Generated.open(made.folder), "png", tmp_path / "out", allow_unsafe=True)
    card = (folder / "README.md").read_text().replace("\\", "")
    assert said in card and "| brain-mr-checker | yes | 0.713 | 0.900 | +0.188 (+0.150 to +0.220) |" in card
    assert "aligned /" not in card


def told_by(folder: Path) -> str:
    """The words of a dataset's page."""
    text = dataset_report.write(folder).read_text(encoding="utf-8").partition("</head>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


# -- one id -----------------------------------------------------------------------------------------------------------


def ids(form: str, folder: Path) -> dict[int, str]:
    """Id of each case by the number that its file, or row, has in a format."""
    import pydicom

    data = folder / "data"
    found: dict[int, str] = {}
    if form == "parquet":
        for path in data.glob("*.parquet"):
            found |= {row["index"]: row["id"] for row in pq.read_table(path).to_pylist()}
    elif form == "imagefolder":
        for path in data.rglob("metadata.parquet"):
            found |= {int(Path(row["file_name"]).stem): row["id"] for row in pq.read_table(path).to_pylist()}
    elif form == "png":
        with (data / "rows.csv").open(encoding="utf-8", newline="") as file:
            found = {int(Path(row["file_name"]).stem): row["id"] for row in csv.DictReader(file)}
    elif form == "webdataset":
        for path in data.glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        found[int(Path(member.name).stem)] = json.load(tar.extractfile(member))["id"]  # type: ignore[arg-type]
    else:
        found = {int(path.stem): str(pydicom.dcmread(path).PatientID) for path in data.rglob("*.dcm")}
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_a_case_has_one_id_and_one_number_in_every_form(form: str, tmp_path: Path) -> None:
    """The number is that of the row, from 0; the id ends in it."""
    made = generated(tmp_path / "made", 6)
    wanted = {case.index: case.id for case in made.cases()}
    assert wanted == {i: f"syn-5a5a5a5a-{i:06d}" for i in range(6)}
    folder = exports.export(made, form, tmp_path / "out", allow_unsafe=True)
    assert ids(form, folder) == wanted
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert {line["index"]: line["id"] for line in lines} == wanted


# -- the day ----------------------------------------------------------------------------------------------------------

SPEC = {
    "name": "day", "cases": 3, "axes": {"plane": ["axial", "coronal"]}, "strata": ["plane"],
    "image": {"model": "embedded:brain-mr", "template": "{plane} T1 brain MRI, no lesion", "sampler": {"steps": 1}},
    "gates": ["blank"],
}  # fmt: skip
DAYS = ("2031-03-04", "2031-03-05")


def made_on(day: str, folder: Path, spec: Path, patch: pytest.MonkeyPatch) -> Path:
    """The dataset and all its exports, with every clock at noon of a day."""
    noon = datetime.fromisoformat(f"{day}T12:00:00+00:00")

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            assert tz is UTC
            return cls.fromtimestamp(noon.timestamp(), UTC)

    patch.setattr("apps.generate_models.datetime", Clock)
    patch.setattr(time, "time", noon.timestamp)
    done = CliRunner().invoke(main, ["generate", str(spec), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    made = Generated.open(folder)
    for form in FORMATS:
        exports.export(made, form, folder / "export" / form, allow_unsafe=True)
    made.close()
    return folder


def test_the_day_stands_in_these_files_and_in_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same specification on two days, by the command: all other files are the same, byte by byte."""
    file = tmp_path / "day.yaml"
    file.write_text(yaml.safe_dump(SPEC, sort_keys=False), encoding="utf-8")
    first, second = (made_on(day, tmp_path / day, file, monkeypatch) for day in DAYS)
    found = [{p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}
             for top in (first, second)]  # fmt: skip
    assert found[0].keys() == found[1].keys()
    different = {name for name in found[0] if found[0][name] != found[1][name]}
    own = {"manifest.json", "report.html", "SHA256SUMS"}
    exported = ("README.md", "croissant.json", "manifest.json", "SHA256SUMS")
    assert different == own | {f"export/{form}/{name}" for form in FORMATS for name in exported}
    for name in different:
        one, other = (files[name].decode() for files in found)
        if not name.endswith("SHA256SUMS"):
            assert one.replace(DAYS[0], DAYS[1]) == other, name
    today = datetime.now(UTC).date()
    for name, data in found[0].items():
        assert today.isoformat().encode() not in data and f"{today:%Y%m%d}".encode() not in data, name
