"""Exports of hostile content: it comes back as it was, or is refused in a sentence, and never names a file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.cli import FORMATS
from apps.dataset_features import Folder
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.synthesis import exports, traces
from diffalign.synthesis.cases import Case, Value
from diffalign.synthesis.exports import layout, pixels
from diffalign.synthesis.store import Generated
from diffalign.synthesis.verify import verify
from tests.synthetic import drawn, generated, text_of

HOME = "/" + "home"  # in two pieces, for no file of this repository names such a place


HOSTILE = {
    "quotes": 'a,"b",\'c\';\n""d\r\ne\r',
    "formula": "=cmd|' /C calc'!A0",
    "at": "@SUM(1+1)",
    "nul": "left\0right",
    "controls": "\x01\x1b[31m\x7f\x85",
    "right to left": "\u202egnp.exe\u2066 \u200f\u05e9\u05dc\u05d5\u05dd",
    "wide": "\U0001d54f \U0001f469\u200d\u2695\ufe0f e\u0301 \u00e9",
    "long": "x" * 1_000_000 + "\n",
    "markup": "<script>|`~\\..\\..//../",
    "empty": "",
    "blank": "  \t\n ",
    "date": "2020-01-02",
    "null": "null",
    "dicom": "A\\B^C=D",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generated]:
    def make(name: str) -> Generated:
        content = HOSTILE[name]
        return generated(
            tmp_path_factory.mktemp("hostile") / "made", 2, image=lambda n: drawn(n, size=3), text=lambda n: content,
            prompt=lambda n: content, rows=lambda n: {"odd": content, "fair": "x"},
            columns={"odd": "text", "fair": "category"}, split=lambda n: "train",
            stratum=lambda row: str(row["odd"])[:50],
        )  # fmt: skip

    return {name: make(name) for name in HOSTILE}


REFUSED = {("png", "nul"): "NUL"}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", FORMATS)
def test_hostile_texts_come_back_or_are_refused(
    form: str, name: str, hostile: dict[str, Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by our own readers; those of the libraries are compared above, and below for the odd ones."""
    monkeypatch.setattr("diffalign.synthesis.croissant.write", lambda about, folder: None)  # valid for all; slow
    if reason := REFUSED.get((form, name)):
        with pytest.raises(RefusedError, match=reason):
            exports.export(hostile[name], form, tmp_path / "out", allow_unsafe=True)
        assert not any(tmp_path.iterdir())
        return
    folder = exports.export(hostile[name], form, tmp_path / "out", allow_unsafe=True)
    for record, _ in exports.read(folder, exports.Exported.read(folder)):
        assert [record[key] for key in ("odd", "text", "prompt", "stratum")] == [
            *[HOSTILE[name]] * 3,
            HOSTILE[name][:50],
        ]
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")
    assert all(set(path.relative_to(folder).as_posix()) <= plain for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "name", ["quotes", "nul", "controls", "right to left", "wide", "long", "empty", "blank", "null", "date"]
)
@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_datasets_reads_hostile_texts(form: str, name: str, hostile: dict[str, Generated], tmp_path: Path) -> None:
    import datasets

    folder = exports.export(hostile[name], form, tmp_path / "out", allow_unsafe=True)
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert {(record["odd"], record["text"], record["prompt"]) for record in found} == {(HOSTILE[name],) * 3}


@pytest.mark.parametrize(
    ("cells", "columns", "said"),
    [
        ({"a": "\ud800"}, {"a": "text"}, "half of a character"),
        ({"a": float("inf")}, {"a": "number"}, "which is no number"),
        ({"a": 2**63}, {"a": "integer"}, "more than 64 bits"),
        ({"a": 2**53 + 1}, {"a": "number"}, "cannot hold exactly"),
        ({"a": "7"}, {"a": "integer"}, "of kind integer"),
        ({"a": True}, {"a": "integer"}, "of kind integer"),
        ({"a": "x"}, {"a": "text", "b": "text"}, "has not the columns"),
        ({"": "x"}, {"": "text"}, "is empty, longer"),
        ({"a\nb": "x"}, {"a\nb": "text"}, "not printable"),
        ({"a": f"see {HOME}/someone/x"}, {"a": "text"}, "names a place of a machine"),
        ({"a": "C:\\Users\\someone"}, {"a": "text"}, "names a place of a machine"),
    ],
)  # fmt: skip
def test_what_no_export_can_hold_is_refused(
    cells: dict[str, Value], columns: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of these cannot even be written to a journal, so the cases are given directly."""
    made = generated(tmp_path / "made", 1)
    case = Case(0, "one", cells, "all", "train", "prompt")
    monkeypatch.setattr(Generated, "cases", lambda self: iter([case]))
    made.manifest = replace(made.manifest, columns=columns)
    with pytest.raises((InputError, RefusedError), match=said):
        exports.export(made, "parquet", tmp_path / "out", allow_unsafe=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_datasets_reads_a_column_that_is_empty_throughout_a_split(form: str, tmp_path: Path) -> None:
    """One of each kind: the type is that of the other split, and what is empty stays so."""
    import datasets

    given: dict[str, Value] = {"side": "left", "age": 7, "mm": 1.5, "smokes": True}
    kinds = {"side": "category", "age": "integer", "mm": "number", "smokes": "boolean"}
    empty: dict[str, Value] = dict.fromkeys(given)
    made = generated(
        tmp_path / "made", 4, rows=lambda n: empty if n % 2 else given, columns=kinds,
        split=lambda n: "test" if n % 2 else "train", stratum=lambda row: "all",
    )  # fmt: skip
    folder = exports.export(made, form, tmp_path / "out", allow_unsafe=True)
    name, place = ("imagefolder", folder / "data") if form == "imagefolder" else ("parquet", folder / "data")
    found = datasets.load_dataset(name, data_dir=str(place), cache_dir=str(tmp_path / "cache"))
    for split, row in (("train", given), ("test", empty)):
        assert len(found[split]) == 2 and {name: found[split][0][name] for name in row} == row
    types = {name: found["test"].features[name].dtype for name in given}
    assert types == {"side": "string", "age": "int64", "mm": "float64", "smokes": "bool"}
    assert not [fault for check in verify(folder) for fault in check.faults]
    if form == "imagefolder":  # which `evaluate --against` takes as a folder of images with their rows
        pictures = Folder(folder / "data")
        assert [pictures.row(i)["side"] for i in range(4)] == [None, None, "left", "left"]


@pytest.mark.parametrize("split", ["../up", "", "a b", "train\n", "x" * 65, "Ähre"])
def test_a_split_that_cannot_name_files_is_refused(split: str, tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 2, split=lambda number: split)
    with pytest.raises(InputError, match="letters, digits and _ only"):
        exports.export(made, "imagefolder", tmp_path / "out", allow_unsafe=True)


def test_splits_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 2, split=lambda number: ("train", "Train")[number])
    with pytest.raises(InputError, match="differ in case alone"):
        exports.export(made, "imagefolder", tmp_path / "out", allow_unsafe=True)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([True, False], "bool"),
        ([1, 2.5], "float64"),
        (["a", None], "string"),
        ([None, None], "string"),
    ],
)
def test_a_category_has_the_type_of_its_values(values: list[Value], kind: str, tmp_path: Path) -> None:
    made = generated(
        tmp_path / "made", 2, rows=lambda n: {"a": values[n]}, columns={"a": "category"}, stratum=lambda row: "all"
    )
    assert layout.survey(made).kinds["a"] == kind
    folder = exports.export(made, "png", tmp_path / "out", allow_unsafe=True)
    assert [record["a"] for record, _ in exports.read(folder, exports.Exported.read(folder))] == values


def test_a_category_of_two_types_is_refused(tmp_path: Path) -> None:
    made = generated(
        tmp_path / "made", 2, rows=lambda n: {"a": (1, "b")[n]}, columns={"a": "category"}, stratum=lambda r: ""
    )
    with pytest.raises(InputError, match="different types"):
        exports.export(made, "png", tmp_path / "out", allow_unsafe=True)


def test_columns_named_like_the_exports_own_get_another_name(tmp_path: Path) -> None:
    names = ["id", "row_id", "image", "text", "file_name"]
    made = generated(
        tmp_path / "made", 2, rows=lambda n: dict.fromkeys(names, "x"), columns=dict.fromkeys(names, "text"),
        stratum=lambda row: "all",
    )  # fmt: skip
    shown = {column.name: column.shown for column in layout.survey(made).columns}
    assert shown == {
        "id": "row_row_id", "row_id": "row_id", "image": "row_image", "text": "row_text", "file_name": "row_file_name"
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_texts_alone(form: str, tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4, image=lambda number: None)
    if form in ("parquet", "webdataset"):
        folder = exports.export(made, form, tmp_path / "out", allow_unsafe=True)
        assert [check.faults for check in verify(folder) if check.faults] == []
        found = list(exports.read(folder, exports.Exported.read(folder)))
        assert all(pixel is None for _, pixel in found)
        assert {record["text"] for record, _ in found} == {text_of(number) for number in range(4)}
    else:
        with pytest.raises(RefusedError, match="have no images"):
            exports.export(made, form, tmp_path / "out", allow_unsafe=True)


def test_images_alone(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 4, text=lambda number: None)
    folder = exports.export(made, "dicom", tmp_path / "out", allow_unsafe=True)
    assert [check.faults for check in verify(folder) if check.faults] == []
    assert all("text" not in record for record, _ in exports.read(folder, exports.Exported.read(folder)))


# -- what else is refused --------------------------------------------------------------------------------------------


def test_an_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="not finished"):
        exports.export(generated(tmp_path / "made", 4, complete=False), "png", tmp_path / "out", allow_unsafe=True)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = generated(tmp_path_factory.mktemp("source") / "made", 2)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        exports.export(source, "png", tmp_path, allow_unsafe=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_image_ends_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 2)
    victim = next((made.folder / "files").rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(InputError, match="was changed, or is damaged"):
        exports.export(made, "parquet", tmp_path / "out", allow_unsafe=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_model_named_by_a_path_is_refused(tmp_path: Path) -> None:
    made = generated(tmp_path / "made", 2)
    models = {"image": {"name": f"{HOME}/somebody/model"}, "text": made.manifest.models["text"]}
    made.manifest = replace(made.manifest, models=models)
    with pytest.raises(RefusedError, match=f"'{HOME}/s'"):
        exports.export(made, "parquet", tmp_path / "out", allow_unsafe=True)


@pytest.mark.parametrize(
    ("user", "host", "text", "found"),
    [
        ("annabeth", "h", "by annabeth.", True),
        ("annabeth", "h", "annabethan", False),
        ("will", "h", "it will be", False),
        ("will", "h", "mail will@example", True),
        ("will", "h", "data/will/run", True),
        ("u", "node17.cluster.example", "on node17", True),
        ("u", "node17.cluster.example", "node17b", False),
        ("u", "vm", "will run on a vm", False),
        ("u", "vm", "me@vm", True),
        ("root", "localhost", "the square root of localhost", False),
        ("u", "h", "A:\\nleft lesion\\n", False),
        ("u", "h", "D:\\Data\\patients", True),
        ("u", "h", '"d": "D:\\\\data\\\\patients"', True),
        ("u", "h", "see https://example.org/home/page", False),
        ("u", "h", "in /tmp/work", True),
    ],
)
def test_traces(user: str, host: str, text: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: user)
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert (traces.of_this_machine().of_text(text) is not None) == found


def test_a_trace_that_lies_across_two_pieces_is_found(tmp_path: Path) -> None:
    for before in (traces.CHUNK - 3, traces.CHUNK - 8, 3 * traces.CHUNK - 1):
        (tmp_path / "a.tar").write_bytes(b"\0" * before + HOME.encode() + b"/somebody" + b"\0" * 100)
        assert traces.of_this_machine().of_file(tmp_path / "a.tar") == f"{HOME}/s"


def test_pixel_hashes_tell_types_shapes_and_values_apart() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    others = [grey.T, grey.astype(np.uint16), grey + 1, grey.reshape(1, 6), np.stack([grey, grey, grey + 1], -1)]
    hashes = {pixels.digest(found) for found in [grey, *others]}
    assert len(hashes) == 6
    assert pixels.digest(np.stack([grey] * 3, -1)) == pixels.digest(grey)
    assert pixels.digest(grey.astype(">u2")) == pixels.digest(grey.astype("<u2"))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "LA"])
def test_other_images_are_refused(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (2, 2)).save(buffer, "PNG")
    with pytest.raises(InputError, match="mode"):
        pixels.of_png(buffer.getvalue())
