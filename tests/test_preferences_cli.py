"""``diffalign preferences``: the real command, on good files and on every kind of bad one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from apps import preferences_page
from apps.cli import main
from diffalign import images
from diffalign.preferences import Table, write
from tests import preference_files as files
from tests.preference_files import seeds

ATTACK = "two <script>alert(1)</script> \"cats\" & 'dogs'"


def diffalign(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["preferences", *(str(argument) for argument in arguments)])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder: Path, count: int = 30) -> Path:
    """Labelled rows of four prompts: first, second and ties by turns, then one of each of three defects."""
    paths = files.images(folder, 10)
    made = [
        {"prompt": f"prompt {i % 4}", "image_0": paths[i % 9], "image_1": paths[i % 9 + 1], "label": (1, 0, 0.5)[i % 3],
         "rater": f"r{i}"}
        for i in range(count)
    ]  # fmt: skip
    made += [made[0] | {"image_0": "gone.png"}, made[0] | {"label": 7}, made[0] | {"label": None}]
    return files.json_lines(folder / "rows.jsonl", made)


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attributes for tag, attributes in self.tags if tag == name]


def test_inspect_prints_counts_and_writes_a_page(desk: Path) -> None:
    rows(desk)
    result = diffalign("inspect", "rows.jsonl", "--page", "rows.html")
    assert result.exit_code == 0, result.output
    for words in (
        "format             labelled rows",
        "judgements         30",
        "broken rows        3 (missing image 1, label out of range 1, no label 1)",
        "labels             10 prefer the first, 10 the second, 10 are ties",
        "first preferred    50.0% of 20 decided pairs (95 % interval 29.9% to 70.1%)",
        "prompts            4 different, with 7 to 8 pairs each (median 7.5)",
        "sizes              8x8 60",
        "warning: 3 rows could not be read and are left out.",
        "example pairs: rows.html",
    ):
        assert words in result.stdout, result.stdout
    assert "broken: line 31: missing image: image_0 'gone.png' is not there" in result.stderr
    assert "broken: 1 x no label" in result.stderr
    page = Page((desk / "rows.html").read_text(encoding="utf-8"))
    assert len(page.all("figure")) == 2 * preferences_page.EXAMPLES
    assert "24 of 30 pairs, drawn at random" in page.text and "gone.png" in page.text


def test_inspect_writes_no_file_unless_it_is_asked_for_one(desk: Path) -> None:
    rows(desk)
    there = sorted(path.name for path in desk.iterdir())
    result = diffalign("inspect", "rows.jsonl")
    assert result.exit_code == 0 and "to see example pairs, write a page: --page PAGE.html" in result.stdout
    assert sorted(path.name for path in desk.iterdir()) == there


def test_the_page_needs_nothing_but_itself_and_is_the_same_again(desk: Path) -> None:
    rows(desk)
    for name in ("one.html", "two.html"):
        assert diffalign("inspect", "rows.jsonl", "--page", name).exit_code == 0
    text = (desk / "one.html").read_text(encoding="utf-8")
    assert text == (desk / "two.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert not page.all("script") and [link["href"] for link in page.all("link")] == ["data:,"]
    assert str(desk) not in text


def test_prompts_and_texts_are_escaped_and_the_preferred_one_is_marked(desk: Path) -> None:
    paths = files.images(desk, 2)
    row = {"prompt": ATTACK, "image_0": paths[0], "image_1": paths[1], "rater": ATTACK, "criterion": ATTACK}
    files.json_lines(desk / "rows.jsonl", [row | {"label": label} for label in (1, 0, 0.5, 0.75)])
    assert diffalign("inspect", "rows.jsonl", "--page", "page.html").exit_code == 0
    page = Page((desk / "page.html").read_text(encoding="utf-8"))
    assert not page.all("script") and page.text.count(ATTACK) >= 8
    assert [figure.get("class") == "preferred" for figure in page.all("figure")] == [
        True, False, False, True, False, False, True, False
    ]  # fmt: skip
    assert all(image["alt"] and ATTACK in image["alt"] for image in page.all("img"))
    assert "label 0.75" in page.text and "tie" in page.text
    answers = [{"prompt": "a", "chosen": ATTACK, "rejected": "</div><b>"}]
    files.json_lines(desk / "texts.jsonl", answers)
    assert diffalign("inspect", "texts.jsonl", "--page", "texts.html").exit_code == 0
    page = Page((desk / "texts.html").read_text(encoding="utf-8"))
    assert ATTACK in page.text and "</div><b>" in page.text and not page.all("script")


def test_inspect_as_json(desk: Path) -> None:
    rows(desk)
    result = diffalign("inspect", "rows.jsonl", "--json")
    data = json.loads(result.stdout)
    assert data["format"] == "labelled rows" and data["judgements"] == 30 and data["broken"]["rows"] == 3
    assert data["broken"]["reasons"] == {"missing image": 1, "label out of range": 1, "no label": 1}
    assert not list(desk.glob("*.html"))
    assert diffalign("inspect", "rows.jsonl", "--json", "--page", "page.html").exit_code == 0
    assert (desk / "page.html").is_file()


def test_texts_as_one_writes_them_are_inspected(desk: Path) -> None:
    row = {"prompt": "a", "text_0": "one", "text_1": "two"}
    files.json_lines(desk / "file.jsonl", [row | {"label": label} for label in (1, 0, 0.5)])
    result = diffalign("inspect", "file.jsonl", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["format"] == "labelled texts" and data["judgements"] == 3 and not data["broken"]["rows"]


def test_one_class_is_told(desk: Path) -> None:
    write(desk / "pairs.parquet", [files.pair(str(i), 1) for i in range(3)])
    result = diffalign("inspect", "pairs.parquet")
    assert result.exit_code == 0
    assert "warning: Every label prefers the first" in result.stdout


def test_the_sheet_is_a_fair_sample() -> None:
    """Each of 20 pairs is among 5 examples with probability 1/4: over 400 seeds 100 times, with a standard deviation
    of sqrt(400 * 1/4 * 3/4) = 8.7. Four of them are 35."""
    pairs = [files.pair(str(i), 1, (0, 1)) for i in range(20)]
    counts = [0] * 20
    for seed in range(400):
        sheet = preferences_page.Sheet(5, seed)
        for pair in pairs:
            sheet.offer(pair)
        for example in sheet.examples:
            counts[int(example.prompt)] += 1
    assert sum(counts) == 5 * 400 and all(65 <= count <= 135 for count in counts), counts


def test_images_that_are_cut_or_damaged_are_found(desk: Path) -> None:
    """JPEG and WebP have no checksums, and ``inspect`` decodes every pixel: a file without its end is found, and so is
    a progressive JPEG whose damage only decoding shows. The whole file of each kind is good."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture, table = Image.fromarray(pixels).resize((128, 128)), []
    for number, (kind, options) in enumerate((("JPEG", {}), ("WEBP", {}), ("JPEG", {"progressive": True}))):
        held = io.BytesIO()
        picture.save(held, kind, **options)
        data = held.getvalue()
        third = len(data) // 3
        bad = data[: 2 * third]
        if options:
            bad = data[:third] + np.random.default_rng(1).bytes(third) + data[2 * third :]
            images.require_whole(bad)
        for first in (data, bad):
            table.append({"prompt": f"p{number}", "image_0": first, "image_1": data, "label": 1.0})
    pq.write_table(pa.Table.from_pylist(table), desk / "pairs.parquet")
    result = diffalign("inspect", "pairs.parquet")
    assert result.exit_code == 0 and "3 x unreadable image" in result.stderr, result.output
    for row in (1, 3, 5):
        assert f"broken: row {row}: unreadable image: image_0" in result.stderr


def test_convert_keeps_what_is_good(desk: Path) -> None:
    rows(desk)
    result = diffalign("convert", "rows.jsonl", "deep/pairs.parquet")
    assert result.exit_code == 0, result.output
    assert "30 preferences (labelled rows) in deep/pairs.parquet; 3 broken rows are left out" in result.stdout
    assert "broken: line 33: no label: label is empty" in result.stderr and "broken: 1 x missing image" in result.stderr
    table = Table(desk / "deep" / "pairs.parquet")
    assert [pair.label for pair in table][:4] == [1, 0, 0.5, 1] and seeds(table[4]) == [4, 5]
    again = diffalign("convert", "deep/pairs.parquet", "again.parquet")
    assert again.exit_code == 0 and "30 preferences (diffalign images)" in again.stdout
    assert (desk / "again.parquet").read_bytes() == (desk / "deep" / "pairs.parquet").read_bytes()


def test_of_many_broken_rows_the_first_twenty_are_named(desk: Path) -> None:
    paths = files.images(desk, 1)
    row = {"prompt": "a", "image_0": paths[0], "image_1": paths[0], "label": 1}
    files.json_lines(desk / "rows.jsonl", [row, *[row | {"label": None}] * 50])
    result = diffalign("convert", "rows.jsonl", "pairs.parquet")
    assert result.exit_code == 0
    assert result.stderr.count("no label: label is empty") == 20 and "50 x no label" in result.stderr


def _empty(desk: Path) -> None:
    (desk / "file").write_text(" \n")


def _binary(desk: Path) -> None:
    (desk / "file").write_bytes(files.png(0))


def _utf_16(desk: Path) -> None:
    (desk / "file").write_text("prompt,text_0,text_1,label\na,b,c,left\n", encoding="utf-16")


def _latin_1(desk: Path) -> None:
    (desk / "file").write_text("prompt;text_0;text_1;label\nMünchen;b;c;left\n", encoding="latin-1")


def _prose(desk: Path) -> None:
    (desk / "file").write_text("Dear all,\nhere are the pairs.\n")


def _half_parquet(desk: Path) -> None:
    write(desk / "whole", [files.pair("a", 1)])
    (desk / "file").write_bytes((desk / "whole").read_bytes()[:-50])
    (desk / "whole").unlink()


def _no_rows(desk: Path) -> None:
    files.parquet(desk / "file", [files.pick_a_pic_row("a", 1)])
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(desk / "file").slice(0, 0), desk / "file")


def _wrong_columns(desk: Path) -> None:
    files.parquet(desk / "file", [{"caption": "a", "label_0": 1, "image_0_url": "https://example.org/0.png"}])


def _foreign_columns(desk: Path) -> None:
    files.parquet(desk / "file", [{"x": 1, "y": 2}])


def _not_json(desk: Path) -> None:
    (desk / "file").write_text('{"prompt": "a",\n"label": \n')


def _unpaired(desk: Path) -> None:
    files.json_lines(desk / "file", [{"prompt": "a", "image": "0.png", "label": True}])


def _no_images(desk: Path) -> None:
    row = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label": 1}
    files.json_lines(desk / "file", [row, row, row | {"label": None}])


def _unreadable(desk: Path) -> None:
    files.parquet(desk / "file", [files.pick_a_pic_row("a", 1, jpg_0=b"no image")])


def _labels(desk: Path) -> None:
    paths = files.images(desk, 2)
    row = {"prompt": "a", "image_0": paths[0], "image_1": paths[1]}
    files.json_lines(desk / "file", [row | {"label": label} for label in (5, -1, 2)])


def _empty_folder(desk: Path) -> None:
    (desk / "file").mkdir()


def _folders_without_images(desk: Path) -> None:
    for side in ("chosen", "rejected"):
        (desk / "file" / side).mkdir(parents=True)


def _nothing(desk: Path) -> None:
    pass


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_nothing, "there is no preference file file"),
        (_empty, "file is empty"),
        (_binary, "file is a binary file, but not Parquet; preferences are Parquet, JSON, JSON lines or CSV"),
        (_utf_16, "file is text in UTF-16, as some spreadsheets write it; save it as UTF-8"),
        (_latin_1, "not UTF-8: the byte 0xfc is none of it; in a spreadsheet save as CSV UTF-8"),
        (_prose, "file has the columns Dear all, which are none of a known format"),
        (_half_parquet, "file is not a Parquet file, or only a part of one"),
        (_no_rows, "file has no rows"),
        (_wrong_columns, "Pick-a-Pic is nearest, and lacks jpg_0, jpg_1"),
        (_foreign_columns, "file has the columns x, y, which are none of a known format (diffalign images, "),
        (_not_json, "no row of file can be read: line 1: not JSON"),
        (_unpaired, "which is no pair: diffalign.preferences.read_unpaired reads it"),
        (_no_images, "no row of file is a preference: missing image (2), no label (1)"),
        (_unreadable, "no row of file is a preference: unreadable image (1)"),
        (_labels, "no row of file is a preference: label out of range (3)"),
        (_empty_folder, "file has neither Parquet files in it nor the two folders chosen/ and rejected/"),
        (_folders_without_images, "no row of file is a preference: it has no rows"),
    ],
)
def test_a_bad_file_is_one_sentence_and_status_2(
    desk: Path, command: str, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(desk)
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    result = diffalign(command, "file", *(["out.parquet"] if command == "convert" else []))
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "rows.jsonl", "--page", "rows.jsonl"], "--page is a page, so its name ends in .html"),
        (["convert", "rows.jsonl", "out.csv"], "so the name ends in .parquet; got out.csv"),
        (["convert", "rows.jsonl", "there.parquet"], "output there.parquet exists already: choose another name"),
    ],
)
def test_an_output_that_cannot_be_is_refused(desk: Path, arguments: list[str], message: str) -> None:
    rows(desk)
    (desk / "there.parquet").write_text("precious")
    before = (desk / "rows.jsonl").read_bytes()
    result = diffalign(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert (desk / "there.parquet").read_text() == "precious" and (desk / "rows.jsonl").read_bytes() == before
