"""Every format that can be read, and every kind of row that cannot be used."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign import images as engine_images
from diffalign.errors import InputError
from diffalign.preferences import Broken, Table, read, read_unpaired, write
from diffalign.preferences.formats import FORMATS
from diffalign.preferences.reading import FOLDERS
from diffalign.types import Preference, Prompt, Sample
from tests import preference_files as files
from tests.preference_files import good, seeds

ROOT = Path(__file__).resolve().parent.parent


def broken(path: Path) -> list[str]:
    return [str(item) for item in read(path) if isinstance(item, Broken)]


def test_pick_a_pic(tmp_path: Path) -> None:
    """label_0 is the probability that image 0 is preferred. A folder of several files is one data set."""
    rows = [files.pick_a_pic_row("cat", label, (i, i + 1)) for i, label in enumerate((1.0, 0.0, 0.5))]
    files.parquet(tmp_path / "data" / "train-0.parquet", rows[:2])
    rows += [files.pick_a_pic_row("dog", 0.5, has_label=False), files.pick_a_pic_row("dog", 1.0, label_1=1.0)]
    files.parquet(tmp_path / "data" / "train-1.parquet", rows[2:])
    files.parquet(tmp_path / "data" / "other.parquet", [{"x": 1}])
    (tmp_path / "data" / "cut.parquet").write_bytes((tmp_path / "data" / "train-0.parquet").read_bytes()[:100])
    assert read(tmp_path).format == read(tmp_path / "data" / "train-0.parquet").format == "Pick-a-Pic"
    pairs = [item for item in read(tmp_path) if isinstance(item, Preference)]
    assert [(pair.label, seeds(pair)) for pair in pairs] == [(1, [0, 1]), (0, [1, 2]), (0.5, [2, 3])]
    assert pairs[0].prompt.text == "cat" and pairs[0].rater == "12" and pairs[0].provenance["model_1"] == "sd15"
    reasons = broken(tmp_path)
    assert "data/cut.parquet: unreadable file" in reasons[0] and "data/other.parquet: other columns" in reasons[1]
    assert reasons[2] == "data/train-1.parquet row 1: no label: nobody chose (has_label is false)"
    assert "row 2: labels disagree: label_0 1 and label_1 1.0 do not add up to 1" in reasons[3]


def test_hpd_train(tmp_path: Path) -> None:
    """Paths leave out the folder ``train``; the 1 marks the preferred image."""
    files.images(tmp_path, 2)
    (tmp_path / "images").rename(tmp_path / "train")
    rows = [
        {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": votes, "user_hash": "u1"}
        for votes in ([1, 0], [0, 1], [1, 1], [0, 0], [1])
    ]
    path = files.json_list(tmp_path / "train.json", rows)
    pairs = [item for item in read(path) if isinstance(item, Preference)]
    assert read(path).format == "HPDv2 train"
    assert [pair.label for pair in pairs] == [1, 0, 0.5]
    assert seeds(pairs[0]) == [0, 1] and pairs[0].rater == "u1"
    assert broken(path) == [
        "row 3: no label: human_preference is [0, 0]", "row 4: not a pair: 2 images with 1 preferences"
    ]  # fmt: skip


def test_hpd_test_and_image_reward_rank(tmp_path: Path) -> None:
    """Ranks 2, 1, 2: the second beats both, and the others tie. Pairs are (0, 1), (0, 2), (1, 2)."""
    paths = files.images(tmp_path, 3)
    hpd = files.json_list(tmp_path / "test.json", [{"prompt": "a", "image_path": paths, "rank": [2, 1, 2]}])
    reward = files.json_list(tmp_path / "ir.json", [{"prompt": "a", "generations": paths, "ranking": [2, 1, 2]}])
    for path, name in ((hpd, "HPDv2 test"), (reward, "ImageReward")):
        assert read(path).format == name
        assert [(pair.label, seeds(pair)) for pair in good(path)] == [(0, [0, 1]), (0.5, [0, 2]), (1, [1, 2])]


def test_raw_annotations_are_raters(tmp_path: Path) -> None:
    paths = files.images(tmp_path, 2)
    votes = [{"rank": [1, 2], "user_hash": "u1"}, {"rank": [2, 1], "user_hash": "u2"}, {"rank": [1], "user_hash": "u3"}]
    path = files.json_list(
        tmp_path / "test.json", [{"prompt": "a", "image_path": paths, "rank": [1, 2], "raw_annotations": votes}]
    )
    pairs = [item for item in read(path) if isinstance(item, Preference)]
    assert [(pair.label, pair.rater) for pair in pairs] == [(1, "u1"), (0, "u2")]
    assert broken(path) == ["row 0: broken ranking: 1 ranks for 2 images"]


def test_a_missing_image_of_a_ranking_costs_its_own_pairs_only(tmp_path: Path) -> None:
    paths = [*files.images(tmp_path, 3), "images/gone.png"]
    row = {"prompt": "a", "generations": paths, "ranking": [1, 2, 3, 4]}
    found = list(read(files.json_list(tmp_path / "ir.json", [row])))
    assert [str(item) for item in found if isinstance(item, Broken)] == [
        "row 0: missing image: generations 'images/gone.png' is not there"
    ]
    assert sum(isinstance(item, Preference) for item in found) == 3


LABELS = {
    1: 1, 0: 0, 0.5: 0.5, 0.25: 0.25, "1": 1, "0": 0, "0.5": 0.5, "left": 1, "right": 0, "tie": 0.5, "First": 1,
    "second": 0, "image_0": 1, "image_1": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_labelled_rows(tmp_path: Path, kind: str) -> None:
    """The label is the probability that image_0 is preferred, in every container."""
    paths = files.images(tmp_path, 2)
    rows: list[dict[str, Any]] = [
        {"prompt": f"a, {i}", "image_0": paths[0], "image_1": paths[1], "label": label, "rater": "r1"}
        for i, label in enumerate(LABELS)
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        lines = [f'"{row["prompt"]}",{row["image_0"]},{row["image_1"]},{row["label"]},r1' for row in rows]
        path.write_text("\ufeffprompt,image_0,image_1,label,rater\n" + "\n".join(lines))
    elif kind == "parquet":
        files.parquet(path, [row | {"label": str(row["label"])} for row in rows])
    else:
        (files.json_lines if kind == "jsonl" else files.json_list)(path, rows)  # type: ignore[operator]
    pairs = good(path)
    assert read(path).format == "labelled rows"
    assert [pair.label for pair in pairs] == list(LABELS.values())
    assert seeds(pairs[0]) == [0, 1] and pairs[3].prompt.text == "a, 3" and pairs[0].rater == "r1"
    assert pairs[0].provenance == {"first": "0.png", "second": "1.png"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_labelled_texts(tmp_path: Path, kind: str) -> None:
    """The label is the probability that text_0 is preferred, in every container; a row without a text is broken."""
    labels = {"1": 1, "0": 0, "tie": 0.5, "text_0": 1, "TEXT_1": 0, "0.25": 0.25}
    rows = [
        {"prompt": f"a, {i}", "text_0": f"short {i}", "text_1": "a, much longer", "label": label, "rater": "r1"}
        for i, label in enumerate(labels)
    ]
    rows.append({**rows[0], "text_1": ""} if kind == "csv" else {**rows[0], "text_1": None})  # type: ignore[dict-item]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        quoted = [",".join(f'"{cell}"' for cell in row.values()) for row in rows]
        path.write_text("\n".join(["prompt,text_0,text_1,label,rater", *quoted]))
    elif kind == "parquet":
        files.parquet(path, rows)
    else:
        (files.json_lines if kind == "jsonl" else files.json_list)(path, rows)  # type: ignore[arg-type]
    found = read(path)
    pairs = [item for item in found if isinstance(item, Preference)]
    assert found.format == "labelled texts" and not found.native
    assert [pair.label for pair in pairs] == list(labels.values())
    assert (pairs[1].prompt.text, pairs[1].first.text, pairs[1].second.text) == ("a, 1", "short 1", "a, much longer")
    assert pairs[0].rater == "r1" and len(broken(path)) == 1 and "no text_1: it is empty" in broken(path)[0]
    write(tmp_path / "out.parquet", pairs)
    assert read(tmp_path / "out.parquet").native and Table(tmp_path / "out.parquet")[2].label == 0.5


def test_optional_columns_of_rows(tmp_path: Path) -> None:
    row = {
        "prompt": "a", "image_0": files.data_url(0), "image_1": files.data_url(1), "label": 1, "prompt_id": 7,
        "attributes": {"case": "c1"}, "negative": "blur", "strength": "2.5", "criterion": "anatomy", "rater": "r1",
    }  # fmt: skip
    (pair,) = good(files.json_lines(tmp_path / "rows.jsonl", [row]))
    assert pair.prompt == Prompt("a", "7", {"case": "c1"}, "blur")
    assert (pair.strength, pair.criterion, pair.rater) == (2.5, "anatomy", "r1")


def test_image_cells(tmp_path: Path) -> None:
    """Bytes, {bytes, path} and an absolute path; semicolons and data URLs in CSV."""
    files.images(tmp_path / "sub", 2)
    rows = [
        {"prompt": "a", "image_0": {"bytes": files.png(0), "path": "x.png"}, "image_1": files.png(1), "label": 1},
        {"prompt": "a", "image_0": {"bytes": None, "path": "sub/images/0.png"}, "image_1": files.png(1), "label": 1},
    ]  # fmt: skip
    assert [seeds(pair) for pair in good(files.parquet(tmp_path / "rows.parquet", rows))] == [[0, 1], [0, 1]]
    absolute = tmp_path / "sub" / "images" / "0.png"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.csv").write_text(
        f"prompt;image_0;image_1;label\na;{absolute};{files.data_url(1).replace(';', '%')};1\n"
        f'a;{absolute};"{files.data_url(1)}";1\n'
    )
    found = list(read(tmp_path / "other" / "rows.csv"))
    assert isinstance(found[1], Preference) and seeds(found[1]) == [0, 1]


def test_invoke_training(tmp_path: Path) -> None:
    paths = files.images(tmp_path, 2)
    rows = [
        {"image_0": paths[0], "image_1": paths[1], "prefer_0": first, "prefer_1": second, name: "a"}
        for first, second, name in (
            (True, False, "prompt"), (False, True, "caption"), (True, True, "prompt"), (False, False, "prompt"),
        )
    ]  # fmt: skip
    path = files.json_lines(tmp_path / "metadata.jsonl", rows)
    assert read(path).format == "invoke-training"
    assert [item.label for item in read(path) if isinstance(item, Preference)] == [1, 0, 0.5]
    assert broken(path) == ["line 4: no label: neither image was chosen (prefer_0 and prefer_1 are false)"]


def test_longcat(tmp_path: Path) -> None:
    paths = files.images(tmp_path, 2)
    row = {"img_path_win": paths[1], "img_path_lose": paths[0], "prompt": "a", "width": 8, "height": 8}
    path = files.json_lines(tmp_path / "pairs.txt", [row, row | {"ref_img_path": paths[0]}])
    found = list(read(path))
    assert read(path).format == "LongCat-Image"
    assert isinstance(found[0], Preference) and found[0].label == 1 and seeds(found[0]) == [1, 0]
    assert "an edit: " in str(found[1])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trl_texts(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}] * 2
    path = tmp_path / f"rows.{kind}"
    (files.json_lines if kind == "jsonl" else files.parquet)(path, rows)  # type: ignore[operator]
    pair = good(path)[1]
    assert read(path).format == "TRL texts"
    assert (pair.prompt.text, pair.first.text, pair.second.text, pair.label) == ("The sky is", " blue.", " green.", 1)


def test_conversations(tmp_path: Path) -> None:
    """One message a cell is that message; more, and prompts inside the answers, are refused with a reason."""

    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text} for text in texts]

    path = files.json_lines(
        tmp_path / "rows.jsonl",
        [
            {"prompt": said("why?"), "chosen": said("so"), "rejected": said("no")},
            {"prompt": said("why?"), "chosen": said("so", "and so"), "rejected": said("no")},
            {"chosen": "why? so", "rejected": "why? no"},
        ],
    )
    found = list(read(path))
    assert isinstance(found[0], Preference) and found[0].prompt.text == "why?" and found[0].first.text == "so"
    assert "line 2: conversation: chosen is a list of 2 messages" in str(found[1])
    assert "line 3: no prompt; where chosen and rejected begin with it" in str(found[2])


def test_folders(tmp_path: Path) -> None:
    """Names meet across suffixes. The prompt is NAME.txt, or in prompts.jsonl, or empty with the name as its id."""
    for side, seed in (("chosen", 0), ("rejected", 1)):
        (tmp_path / side / "deep").mkdir(parents=True)
        for name in ("a", "b", "c", "deep/d"):
            (tmp_path / side / f"{name}.png").write_bytes(files.png(seed))
    (tmp_path / "rejected" / "a.png").rename(tmp_path / "rejected" / "a.PNG")
    (tmp_path / "a.txt").write_text("an a\n")
    (tmp_path / "chosen" / "b.txt").write_text("a b")
    files.json_lines(tmp_path / "prompts.jsonl", [{"file": "c.png", "prompt": "a c", "attributes": {"case": 1}}])
    (tmp_path / "chosen" / "lonely.png").write_bytes(files.png(0))
    found = list(read(tmp_path))
    pairs = [item for item in found if isinstance(item, Preference)]
    assert read(tmp_path).format == FOLDERS
    assert [(pair.prompt.text, pair.prompt.key) for pair in pairs] == [
        ("an a", "an a"), ("a b", "a b"), ("a c", "a c"), ("", "deep/d")
    ]  # fmt: skip
    assert all(seeds(pair) == [0, 1] and pair.label == 1 for pair in pairs)
    assert pairs[2].prompt.attributes == {"case": 1}
    assert [str(item) for item in found if isinstance(item, Broken)] == [
        "lonely: no pair: images of this name are 1 in chosen, 0 in rejected"
    ]
    write(tmp_path / "out.parquet", pairs)
    assert [pair.prompt.key for pair in Table(tmp_path / "out.parquet")] == [pair.prompt.key for pair in pairs]


def test_unpaired(tmp_path: Path) -> None:
    """Rows for KTO are no pairs; their own reader takes them."""
    paths = files.images(tmp_path, 1)
    rows = [{"prompt": "a", "completion": "x", "label": True}, {"prompt": "a", "completion": "y", "label": False}]
    texts = files.json_lines(tmp_path / "texts.jsonl", [*rows, {"prompt": "a", "completion": "y", "label": 3}])
    with pytest.raises(InputError, match=r"which is no pair: diffalign\.preferences\.read_unpaired reads it"):
        read(texts)
    found = list(read_unpaired(texts))
    assert [item for item in found if not isinstance(item, Broken)] == [
        (Sample(Prompt("a"), text="x"), True), (Sample(Prompt("a"), text="y"), False)
    ]  # fmt: skip
    assert "line 3: unknown label: label is 3" in str(found[2])
    ((sample, good),) = read_unpaired(
        files.json_lines(tmp_path / "images.jsonl", [{"prompt": "a", "image": paths[0], "label": True}])
    )
    assert sample.image is not None and sample.image.tobytes() == files.picture(0).tobytes() and good
    with pytest.raises(InputError, match="unpaired answers need prompt, label"):
        list(read_unpaired(files.json_lines(tmp_path / "other.jsonl", [{"prompt": "a"}])))


def test_every_format_is_documented() -> None:
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    assert not [form.name for form in FORMATS if form.name not in page]
    assert not [name for form in FORMATS for name in form.columns if f"{name}" not in page]


def test_ties_never_become_winners(tmp_path: Path) -> None:
    """A tie of every format that can say one stays 0.5, also after conversion."""
    paths = files.images(tmp_path, 2)
    both = {"prompt": "a", "image_0": paths[0], "image_1": paths[1]}
    sources = [
        files.parquet(tmp_path / "1.parquet", [files.pick_a_pic_row("a", 0.5)]),
        files.json_list(
            tmp_path / "2.json", [{"prompt": "a", "file_path": paths, "human_preference": [1, 1], "user_hash": "u"}]
        ),
        files.json_list(tmp_path / "3.json", [{"prompt": "a", "image_path": paths, "rank": [3, 3]}]),
        files.json_list(tmp_path / "4.json", [{"prompt": "a", "generations": paths, "ranking": [1, 1]}]),
        files.json_lines(tmp_path / "5.jsonl", [both | {"label": "tie"}]),
        files.json_lines(tmp_path / "6.jsonl", [both | {"label": 0.5}]),
        files.json_lines(tmp_path / "7.jsonl", [both | {"prefer_0": True, "prefer_1": True}]),
    ]
    for number, source in enumerate(sources):
        write(tmp_path / f"out-{number}.parquet", good(source))
        for path in (source, tmp_path / f"out-{number}.parquet"):
            assert [pair.label for pair in good(path)] == [0.5], source


BAD_ROWS = [
    ({"label": None}, "no label: label is empty"),
    ({"label": ""}, "no label: label is empty"),
    ({"label": 2}, "label out of range: 2 is no probability"),
    ({"label": -0.5}, "label out of range: -0.5"),
    ({"label": "better"}, "unknown label: label is 'better'; write the probability that the first is preferred"),
    ({"label": True}, "unknown label: label is True"),
    ({"label": float("nan")}, "unknown label: label is nan"),
    ({"prompt": None}, "no prompt: it is empty"),
    ({"prompt": " "}, "no prompt: prompt is empty"),
    ({"prompt": ["a", "b"]}, "conversation: prompt is a list"),
    ({"prompt": "\ud800"}, "broken text: prompt holds half of a character"),
    ({"attributes": "[1]"}, "broken attributes: it is [1], and a JSON object is needed"),
    ({"attributes": "{"}, "broken attributes: '{' is not JSON"),
    ({"strength": -1}, "strength out of range: -1"),
    ({"strength": "much"}, "no strength: it is 'much', and a number is needed"),
    ({"image_1": None}, "no image: image_1 is empty"),
    ({"image_1": 3}, "no image: image_1 is 3"),
    ({"image_1": "images/9.png"}, "missing image: image_1 'images/9.png' is not there"),
    ({"image_1": "images/\0.png"}, "missing image: image_1 'images/\\x00.png' is not there"),
    ({"image_1": "x" * 5000}, "missing image: image_1 'xxx"),
    ({"image_1": "images"}, "missing image: image_1 'images' is not there"),
    ({"image_1": "../secret.png"}, "path outside: image_1 '../secret.png' leaves the folder"),
    ({"image_1": "images/../../secret.png"}, "path outside: "),
    (
        {"image_1": "https://example.org/1.png"},
        "an address: image_1 is 'https://example.org/1.png'; nothing is downloaded",
    ),
    (
        {"image_1": "notes.txt"},
        "unreadable image: image_1 'notes.txt' is not an image that can be decoded: it is none of PNG, JPEG, WEBP,",
    ),
    ({"image_1": "cut.png"}, "unreadable image: image_1 'cut.png' is not an image that can be decoded"),
    ({"image_1": "bomb.png"}, "unreadable image: image_1 'bomb.png' is not an image that can be decoded"),
    ({"image_1": "drawing.eps"}, "unreadable image: image_1 'drawing.eps' is not an image that can be decoded"),
    ({"image_1": "data:image/png;base64,%%"}, "unreadable image: image_1 is not base64"),
    ({"image_1": "data:image/png;base64,AAAA"}, "unreadable image: image_1 is not an image that can be decoded"),
]


def bomb() -> bytes:
    """A PNG whose header promises 20000 x 20000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS, ids=lambda value: str(value)[:40].replace("\0", "0"))
def test_a_bad_row_is_told_and_the_next_one_is_read(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = tmp_path / "data"
    paths = files.images(folder, 2)
    (tmp_path / "secret.png").write_bytes(files.png(5))
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.png").write_bytes(files.png(0)[:60])
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    row = {"prompt": "a", "image_0": paths[0], "image_1": paths[1], "label": 1}
    found = list(read(files.json_lines(folder / "rows.jsonl", [row, row | change, row])))
    assert [type(item) for item in found] == [Preference, Broken, Preference]
    assert str(found[1]).startswith(f"line 2: {reason}"), found[1]
    assert isinstance(found[1], Broken) and found[1].kind == reason.partition(": ")[0]


def test_images_between_the_limits_of_pillow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow only warns of images up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(InputError, match="8x8 pixels are too many"):
        engine_images.decode(files.png(0))


def test_broken_lines_and_lists(tmp_path: Path) -> None:
    """A bad line costs itself; what follows a syntax error in a JSON list cannot be told apart."""
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    lines = files.json_lines(tmp_path / "rows.jsonl", [row, "{", "", "[1]", '"' + "[" * 10, row])
    lines.write_bytes(lines.read_bytes() + b'{"prompt": "\xff"}\n')
    assert [reason[:24] for reason in broken(lines)] == [
        "line 2: not JSON: Expect", "line 4: not an object: t", "line 5: not JSON: Invali", "line 7: not JSON: 'utf-8"
    ]  # fmt: skip
    assert sum(isinstance(item, Preference) for item in read(lines)) == 2
    text = json.dumps([row, row, 7, row])
    for cut, good_rows, reason in (
        (len(text), 3, "row 2: not an object"),
        (-30, 2, "row 3: not JSON"),
        (90, 1, "row 1: not"),
    ):
        (tmp_path / "rows.json").write_text(text[:cut])
        found = list(read(tmp_path / "rows.json"))
        assert sum(isinstance(item, Preference) for item in found) == good_rows
        assert str([item for item in found if isinstance(item, Broken)][-1]).startswith(reason)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=8), indent=st.none() | st.integers(0, 2))
def test_a_list_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], indent: int | None
) -> None:
    """Rows that are cut by the end of a piece come out whole."""
    monkeypatch.setattr("diffalign.preferences.rows.CHUNK", 7)
    rows = [{"prompt": "a", "chosen": text, "rejected": "]},{"} for text in texts]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent))
    assert [pair.first.text for pair in good(tmp_path / "rows.json")] == texts


def test_damaged_parquet_pages_cost_their_rows(tmp_path: Path) -> None:
    """Three groups of 64 rows; bytes in the middle of the second group's texts are overwritten."""
    asked = Prompt("a")
    pairs = [Preference(asked, Sample(asked, text=f"{i}" * 200), Sample(asked, text="b"), 1) for i in range(192)]
    path = tmp_path / "pairs.parquet"
    write(path, pairs)
    column = pq.ParquetFile(path).metadata.row_group(1).column(4)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found = list(read(path))
    assert sum(isinstance(item, Preference) for item in found) == 128
    assert [item.row for item in found if isinstance(item, Broken)] == [64]
    assert "damaged: rows 64 to 127 cannot be read" in broken(path)[0]
