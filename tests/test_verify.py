"""``diffalign verify``: a dataset or an export that is as it was made passes; whatever was changed in it is found."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.cli import FORMATS, main
from diffalign.errors import NotFoundError
from diffalign.synthesis import exports, store, sums
from diffalign.synthesis.spec import sha256_of
from diffalign.synthesis.store import Generated
from diffalign.synthesis.verify import verify
from tests.synthetic import drawn, generated

HOME = "/" + "home"  # in two pieces, for no file of this repository names such a place


def sealed(folder: Path, n: int = 5, **options: object) -> Generated:
    """A finished dataset whose manifest has the hash of its specification, with the list of its hashes."""
    made = generated(folder, n, image=lambda number: drawn(number, size=4), **options)  # type: ignore[arg-type]
    spec = yaml.safe_load((folder / store.SPEC).read_text(encoding="utf-8"))
    made.manifest = replace(made.manifest, spec_sha256=sha256_of(spec))
    store.write_manifest(folder, made.manifest, complete=made.complete)
    sums.write(folder)
    return made


def faults(folder: Path) -> list[str]:
    return [fault for check in verify(folder) for fault in check.faults]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with all five of its exports inside."""
    folder = tmp_path_factory.mktemp("verify") / "made"
    made = sealed(folder)
    for form in FORMATS:
        exports.export(made, form, folder / "export" / form, allow_unsafe=True)
    made.close()
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export, or of the dataset without any."""

    def make(form: str = "") -> Path:
        origin = whole / "export" / form if form else whole
        return Path(
            shutil.copytree(origin, tmp_path / "copy", ignore=None if form else shutil.ignore_patterns("export"))
        )

    return make


def test_what_was_just_made_passes(whole: Path) -> None:
    checks = list(verify(whole))
    assert [check.faults for check in checks if check.faults] == []
    assert all(check.told for check in checks)
    assert len(checks) == 5 + 6 * len(FORMATS)


def places(folder: Path) -> list[Path]:
    """Every file of a dataset (without its exports), or of an export."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and "export" not in path.relative_to(folder).parts
    )


def flipped(folder: Path, path: Path, at: int, mask: int) -> list[str]:
    """The faults of the first check that fails once a byte was changed; the file is put back as it was."""
    data = path.read_bytes()
    path.write_bytes(bytes([*data[:at], data[at] ^ mask, *data[at + 1 :]]))
    try:
        return list(next((check.faults for check in verify(folder) if check.faults), ()))
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("form", ["", *FORMATS])
def test_one_flipped_byte_anywhere_is_found(form: str, whole: Path) -> None:
    """In every file: the first byte, the last, and some between; the fault names the file."""
    folder, chance = whole / "export" / form if form else whole, random.Random(0)
    assert len(places(folder)) >= 7
    for path in places(folder):
        size = path.stat().st_size
        for at in {0, size - 1, *(chance.randrange(size) for _ in range(6))}:
            found = flipped(folder, path, at, 1 << chance.randrange(8))
            assert any(path.name in fault for fault in found), (path, at)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_of_any_export_is_found(data: st.DataObject, whole: Path) -> None:
    folder = whole / "export" / data.draw(st.sampled_from(FORMATS))
    path = data.draw(st.sampled_from(places(folder)))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    assert flipped(folder, path, at, data.draw(st.integers(1, 255)))


def test_every_byte_of_the_list_counts(whole: Path) -> None:
    folder = whole / "export" / "parquet"
    for at in range(0, (folder / sums.NAME).stat().st_size, 3):
        assert flipped(folder, folder / sums.NAME, at, 0x20), at


@pytest.mark.parametrize("form", ["", *FORMATS])
def test_a_file_too_many_or_too_few_is_found(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    (folder / ".hidden").write_text("")
    assert faults(folder) == [".hidden is not listed in SHA256SUMS"]
    (folder / ".hidden").unlink()
    for path in places(folder):
        aside = path.with_name("aside")
        path.rename(aside)
        name = path.relative_to(folder).as_posix()
        found = list(next(iter(verify(folder))).faults)
        wanted = "SHA256SUMS is missing" if name == sums.NAME else f"{name} is listed in SHA256SUMS but missing"
        assert wanted in found
        aside.rename(path)
    assert faults(folder) == []


def test_a_link_is_no_file(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("png")
    path = next(folder.rglob("*.png"))
    path.rename(tmp_path / "elsewhere.png")
    path.symlink_to(tmp_path / "elsewhere.png")
    assert f"{path.relative_to(folder).as_posix()} is a link, not a file" in faults(folder)
    (folder / "data" / "more").symlink_to(tmp_path)
    assert "data/more is not listed in SHA256SUMS" in faults(folder)


# -- changes by somebody who writes the list of hashes anew ----------------------------------------------------------


def changed_row(folder: Path) -> None:
    path = next(folder.rglob("train-*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["side"] = "right" if rows[0]["side"] == "left" else "left"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def exchanged_images(folder: Path) -> None:
    path = next(folder.rglob("train-*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def dropped_case(folder: Path) -> None:
    path = next(folder.rglob("train-*.parquet"))
    pq.write_table(pq.read_table(path).slice(1), path)


def doubled_case(folder: Path) -> None:
    path = next(folder.rglob("train-*.parquet"))
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)


def dropped_column(folder: Path) -> None:
    path = next(folder.rglob("train-*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["age"]), path)


def another_seed(folder: Path) -> None:
    path = folder / "provenance.jsonl"
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 11', 1))


def fewer_lines(folder: Path) -> None:
    path = folder / "provenance.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def wrong_croissant(folder: Path) -> None:
    path = folder / "croissant.json"
    facts = json.loads(path.read_text())
    facts["recordSet"][0]["field"][0]["source"]["fileSet"]["@id"] = "nothing"
    path.write_text(json.dumps(facts))


def named_home(folder: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write(f"\nMade in {HOME}/somebody/data.\n")


def unasked(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"allowed_unsafe": true', '"allowed_unsafe": false'))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_row, "case 0: its row or text is not the one in provenance.jsonl"),
        (exchanged_images, "case 1: its pixels are not those in provenance.jsonl"),
        (dropped_case, "case 0 of provenance.jsonl is missing"),
        (doubled_case, "case 0 is not in provenance.jsonl, or is there twice"),
        (dropped_column, "case 0 has not the columns that manifest.json names"),
        (another_seed, "provenance.jsonl, line 1: models is not that of manifest.json"),
        (fewer_lines, "provenance.jsonl does not have as many cases in each split as manifest.json says"),
        (wrong_croissant, "croissant.json is not valid Croissant"),
        (named_home, f"README.md names a place of a machine or a user: '{HOME}/s'"),
        (unasked, "manifest.json: the privacy is not assessed, and nobody allowed that"),
        (no_manifest, "manifest.json is not the manifest of an export"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_change_with_new_hashes_is_found_by_what_it_contradicts(
    change: Callable[[Path], None], said: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("parquet")
    change(folder)
    sums.write(folder)
    found = faults(folder)
    assert any(fault.startswith(said) for fault in found), found


@pytest.mark.parametrize(
    "name", ["../../outside.png", "00000/00000001.png/..", "00000/00000009.png", "", "/etc/passwd"]
)
def test_a_table_that_names_another_file_is_not_followed(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("imagefolder")
    path = folder / "data" / "train" / "metadata.parquet"
    table = pq.read_table(path)
    names = [name, *table["file_name"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, "file_name", pa.array(names, pa.string())), path)
    sums.write(folder)
    assert any("which is not where an export has it" in fault for fault in faults(folder))


def test_a_pickle_in_a_tar_is_not_read(copy: Callable[[str], Path]) -> None:
    import io
    import tarfile

    folder = copy("webdataset")
    with tarfile.open(next(folder.rglob("train-*.tar")), "a") as tar:
        member = tarfile.TarInfo("00000099.pkl")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"N.  "))
    sums.write(folder)
    assert any("'00000099.pkl', which is not png, json or txt" in fault for fault in faults(folder))


# -- a dataset -------------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_not_complete(tmp_path: Path) -> None:
    """One that was begun is no dataset that was changed; one that was finished, and lacks a case now, is."""
    sealed(tmp_path / "made", complete=False)
    (tmp_path / "made" / sums.NAME).unlink()
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "made")])
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1
    assert done.output.startswith(f"error: {tmp_path / 'made'} is not finished") and "--resume" in done.output
    sums.write(tmp_path / "made")
    found = faults(tmp_path / "made")
    assert any(fault.startswith(f"{tmp_path / 'made'} is not finished: continue it with") for fault in found)
    assert any("cases instead of" in fault for fault in found)


def test_another_specification(copy: Callable[[str], Path]) -> None:
    folder = copy("")
    path = folder / store.SPEC
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    sums.add(folder, store.SPEC)
    assert faults(folder) == ["spec.yaml is not the specification whose hash manifest.json has"]


def test_an_image_that_is_not_what_its_name_says(copy: Callable[[str], Path]) -> None:
    folder = copy("")
    first, second, *_ = sorted((folder / "files").rglob("*.png"))
    shutil.copy(second, first)
    sums.add(folder, first.relative_to(folder).as_posix())
    assert any(f"the file {first.stem} of the dataset was changed" in fault for fault in faults(folder))


def test_an_image_that_nothing_names(copy: Callable[[str], Path]) -> None:
    folder = copy("")
    stray = folder / "files" / "ab" / f"{'ab' * 32}.png"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"")
    sums.write(folder)
    assert faults(folder) == [f"files/ab/{'ab' * 32}.png is named by no attempt in the journal"]


def test_an_export_of_another_dataset(copy: Callable[[str], Path], tmp_path: Path) -> None:
    other = sealed(tmp_path / "other", 4)
    folder = copy("")
    exports.export(other, "png", folder / "export" / "png", allow_unsafe=True)
    assert "export/png: its manifest is not that of the dataset" in faults(folder)


def test_a_report_that_is_added_later(copy: Callable[[str], Path]) -> None:
    """Only what is named is hashed anew: a change elsewhere stays one."""
    folder = copy("")
    (folder / "privacy.json").write_text('{"verdict": "passed"}')
    assert faults(folder) == ["privacy.json is not listed in SHA256SUMS"]
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b" ")
    sums.add(folder, "privacy.json")
    assert faults(folder) == ["manifest.json was changed: its hash is not the one in SHA256SUMS"]


def test_a_user_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "annabeth")
    sealed(tmp_path / "made", text=lambda number: "by annabeth" if number == 3 else "a text")
    assert faults(tmp_path / "made") == ["journal.sqlite names a place of a machine or a user: 'annabeth'"]


# -- the command -----------------------------------------------------------------------------------------------------


def run(folder: Path) -> Result:
    return CliRunner().invoke(main, ["verify", str(folder)])


def test_the_command_passes(copy: Callable[[str], Path]) -> None:
    done = run(copy("parquet"))
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", name] for name in ("files", "manifest", "records", "croissant", "traces")
    ]


def test_the_command_names_the_first_fault_and_lists_all(copy: Callable[[str], Path]) -> None:
    folder = copy("png")
    for name in ("README.md", "croissant.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    done = run(folder)
    assert done.exit_code == 2
    for name in ("README.md", "croissant.json"):
        assert f"        {name} was changed: its hash is not the one in SHA256SUMS\n" in done.stdout
    assert done.stderr.count("\n") == 1 and "README.md was changed" in done.stderr
    assert done.stdout.startswith("FAILED  files")


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="neither a dataset of diffalign nor an export"):
        list(verify(tmp_path))
    assert run(tmp_path).exit_code == 2
    assert run(tmp_path / "nowhere").exit_code == 2
