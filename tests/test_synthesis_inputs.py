"""What a dataset takes from a user: tables are not changed silently, and no place of a machine is handed out."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.errors import InputError
from diffalign.synthesis import tables, tabular, traces
from diffalign.synthesis.naming import without_places

# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    ["007", "2024_01", "1_000", "٣٤", "+7", "00", "12E4", "1e5", "01.5", "1_0.5", "1" * 30, "9223372036854775808"],
)  # fmt: skip
def test_a_code_stays_the_text_that_it_is(tmp_path: Path, code: str) -> None:
    """Python would read each as a number, and write another text."""
    path = tmp_path / "rows.csv"
    path.write_text(f"who,code\na,{code}\nb,x\n", encoding="utf-8")
    kinds = tables.kinds(path, {}, None)
    assert kinds["code"] in ("text", "category")
    assert [row["code"] for row in tables.rows(path, kinds)] == [code, "x"]
    for kind in ("integer", "number"):
        with pytest.raises(InputError, match=rf"here is .*, and the column is of kind {kind}"):
            tables.converted(code, kind, "here")


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["0", "-12", " 9223372036854775807 ", "-9223372036854775808"], "integer", [0, -12, 2**63 - 1, -(2**63)]),
        (["61.5", "70", ".25", "-3.10", "1e-05", "2.5E+16"], "number", [61.5, 70.0, 0.25, -3.1, 1e-5, 2.5e16]),
    ],
)
def test_numbers_as_programs_write_them(tmp_path: Path, cells: list[str], kind: str, values: list[float]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["n,m", *(f"{cell},x" for cell in cells)]), encoding="utf-8")
    kinds = tables.kinds(path, {}, None)
    assert kinds["n"] == kind
    found = [row["n"] for row in tables.rows(path, kinds)]
    assert found == values and {type(one) for one in found} == {type(values[0])}


def test_numbers_of_other_types() -> None:
    """As they come from Parquet: floats that are whole, and what 64 bits do not hold."""
    assert tables.converted(3.0, "integer", "here") == 3
    assert tables.converted(1e22, "number", "here") == 1e22
    assert tables.converted(7, "number", "here") == 7.0
    for cell, kind in ((1e300, "integer"), (2**63, "integer"), (2**53, "number"), (float("nan"), "number")):
        with pytest.raises(InputError, match=f"of kind {kind}"):
            tables.converted(cell, kind, "here")


def test_a_column_that_the_first_real_row_lacks_counts() -> None:
    """Made: left and right are .5 each; real: .25 each, and .5 is empty. So 1 - (.25 + .25 + .5) / 2 = .5."""
    made = [{"side": side} for side in ("left", "left", "right", "right")]
    real = [{"age": 3}, {"age": 4, "side": None}, {"side": "left"}, {"side": "right"}]
    found = tabular.fidelity(made, real, {"side": "category", "age": "integer", "plane": "category"})
    assert found["columns"]["side"] == pytest.approx(0.5)
    assert set(found["columns"]) == {"side", "age"} and found["left_out"] == ["plane"]


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("clip?model=local-dir:/clip", "clip?model=local-dir:clip"),
        ("clip?model=local-dir:/scans/ward/clip&pretrained=/w/a.safetensors",
         "clip?model=local-dir:clip&pretrained=a.safetensors"),
        ("local-dir:ward/clip", "local-dir:clip"),
        ("judge?url=http://gpu7.ward&model=small", "judge?url=remote&model=small"),
        ("judge?url=https://gpu7.ward:8000/v1/chat?a=1&model=org/small", "judge?url=remote&model=org/small"),
        ("judge?url=http%3A%2F%2Fgpu7.ward", "judge?url=remote"),
        ("preference?folder=%2Fscans%2Fward%2Ffitted", "preference?folder=fitted"),
        ("x?principles=50%25 %26 more", "x?principles=50%25 %26 more"),
        ("ward/mine.py:score", "mine.py:score"),
        ("C:/model", "model"),
        ("s3://bucket/model", "remote"),
        ("clip?model=hf-hub:org/name", "clip?model=hf-hub:org/name"),
        ("org/model", "org/model"),
        ("mine:score", "mine:score"),
    ],
)  # fmt: skip
def test_names_without_places(name: str, shown: str) -> None:
    assert without_places(name) == shown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("file:///home/x/scan.png", True),
        ("see file://server/share", True),
        ("profile:/x", False),
        ("in /data/ward7/x.png", True),
        ("'/nfs/scans'", True),
        ("/Volumes/Disk", True),
        ("/workspace/run", True),
        ("/private/var/folders/x", True),
        (r"\\srv7\share", True),
        (r'{"from": "\\\\srv7\\share\\x"}', True),
        (r'{"text": "\\alpha\\beta and \\gamma"}', False),
        (r'{"text": "left\\right \\\\ \\\\alpha"}', False),
        ("data/train/0.png and ./data/x and ../data/x", False),
        ("https://example.org/data/set", False),
        ("of image/data/volume", False),
    ],
)
def test_places_of_machines(text: str, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "u")
    monkeypatch.setattr("socket.gethostname", lambda: "h")
    machine = traces.of_this_machine()
    assert (machine.of_text(text) is not None) == found
    (tmp_path / "a.md").write_text(f"x\n{text}\n")
    assert (machine.of_file(tmp_path / "a.md") is not None) == found
