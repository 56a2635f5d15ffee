"""Prompts: what a file may say, and that nothing that is evaluated on was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.config import PromptsConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.prompts import load, of_images, read


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def written(folder: Path, *rows: object, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_a_row_in_full(tmp_path: Path) -> None:
    row = {"prompt": "a cat", "id": 7, "attributes": {"n": 1}, "negative_prompt": "blur"}
    (prompt,) = read(written(tmp_path, row, ""))
    assert (prompt.text, prompt.id, prompt.attributes, prompt.negative) == ("a cat", "7", {"n": 1}, "blur")


def test_null_is_as_good_as_absent(tmp_path: Path) -> None:
    """Two rows without an id are two prompts, each its own key; they were one prompt called None."""
    nulls = {"id": None, "attributes": None, "negative_prompt": None}
    prompts = read(written(tmp_path, {"prompt": "a cat", **nulls}, {"prompt": "a dog", **nulls}))
    assert [(p.key, p.id, p.attributes, p.negative) for p in prompts] == [
        ("a cat", "", {}, ""),
        ("a dog", "", {}, ""),
    ]


def test_the_same_text_twice_is_one_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the ids, spaces and capitals; it is said where a row that said something else is left out."""
    rows = [{"prompt": "a cat", "id": "x"}, {"prompt": "A  cat ", "id": "y"}, {"prompt": "a dog"}]
    assert [prompt.id for prompt in read(written(tmp_path, *rows))] == ["x", ""]
    assert not caplog.records
    read(written(tmp_path, *rows, {"prompt": "a dog", "attributes": {"n": 2}}))
    assert "prompts.jsonl:4: left out" in caplog.text


def test_a_line_of_text_may_hold_any_sign(tmp_path: Path) -> None:
    """A byte order mark is no part of the first prompt, and a line separator inside a text ends no line."""
    assert [p.text for p in read(written(tmp_path, "\ufeffa cat", "a dog", name="p.txt"))] == ["a cat", "a dog"]
    assert [p.text for p in read(written(tmp_path, '{"prompt": "a\u2028cat"}'))] == ["a\u2028cat"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a dog", "id": "x"}, "id 'x' stands for another text in line 1"),
        ({"prompt": "x"}, "id 'x' stands for another text in line 1"),
        ({"prompt": "a dog", "id": ["x"]}, "\"id\" is a text or a whole number; got ['x']"),
        ({"prompt": "a dog", "id": True}, '"id" is a text or a whole number; got True'),
        ({"prompt": "a dog", "attributes": "red"}, '"attributes" is a mapping'),
        ({"prompt": "a dog", "attributes": []}, '"attributes" is a mapping'),
        ({"prompt": "a dog", "negative_prompt": 3}, '"negative_prompt" is a text; got 3'),
        ({"prompt": 3}, 'a row needs a text under "prompt"'),
        (["a dog"], 'a row needs a text under "prompt"'),
        ("a dog", "not valid JSON"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = written(tmp_path, {"prompt": "a cat", "id": "x"}, row)
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"picture\.txt is not UTF-8 text"):
        read(tmp_path / "picture.txt")
    with pytest.raises(InputError, match="no prompt in it"):
        read(written(tmp_path, " "))
    known = r"one of emoji, brain-mr, findings, animals, explanations, stories, or a \.txt"
    with pytest.raises(NotFoundError, match=known):
        read(tmp_path / "missing.txt")


words = st.sampled_from(["a cat", "A cat", "a  cat", "a dog", "a cow", "a hen", "ein Hund"])
rows = st.lists(st.tuples(words, st.sampled_from([None, "1", "2", 3])), min_size=1, max_size=12)


@given(rows=rows, seed=st.integers(0, 9), share=st.floats(0, 1))
def test_training_and_held_out_share_no_text_and_no_id(
    shelf: Path, rows: list[tuple[str, str | int | None]], seed: int, share: float
) -> None:
    path = written(shelf, *({"prompt": text, "id": name} for text, name in rows))
    named: dict[str, set[str]] = {}
    for text, name in rows:
        named.setdefault(text if name is None else str(name), set()).add(plain(text))
    if any(len(texts) > 1 for texts in named.values()):
        with pytest.raises(InputError, match="stands for another text"):
            read(path)
        return
    count = len({plain(text) for text, _ in rows})
    assert len(read(path)) == count
    if count < 2:
        return
    train = 1 + int(share * (count - 2))
    sides = load(PromptsConfig(source=str(path), train=train, held_out=count - train), seed)
    assert [len(side) for side in sides] == [train, count - train]
    texts, ids = ([{f(p) for p in side} for side in sides] for f in (lambda p: plain(p.text), lambda p: p.key))
    assert not texts[0] & texts[1] and not ids[0] & ids[1]


def plain(text: str) -> str:
    return text.replace(" ", "").lower()


@pytest.mark.parametrize(("source", "train", "held_out"), [("emoji", 400, 100), ("brain-mr", 100, 32)])
def test_worlds_share_no_text_either(source: str, train: int, held_out: int) -> None:
    first, second = load(PromptsConfig(source=source, train=train, held_out=held_out), 0)
    assert len(first) == train and len(second) == held_out
    assert not {plain(p.text) for p in first} & {plain(p.text) for p in second}


def test_what_a_list_cannot_give() -> None:
    with pytest.raises(ConfigError, match="animals has 61 different prompts"):
        load(PromptsConfig(source="animals", train=60, held_out=2), 0)
    with pytest.raises(ConfigError, match="is for worlds"):
        load(PromptsConfig(source="animals", task="counting", train=2, held_out=2), 0)


def test_training_prompts_that_nobody_asks_for_may_be_few() -> None:
    """Of 61 animals the same 2 are held out whatever the other number is."""
    wanted = PromptsConfig(source="animals", train=100, held_out=2)
    train, held_out = load(wanted, 0, training=False)
    assert len(train) == 59 and held_out == load(PromptsConfig(source="animals", train=5, held_out=2), 0)[1]
    assert load(PromptsConfig(source="animals", held_out=61), 0, training=False)[0] == []
    with pytest.raises(ConfigError, match=r"61 different prompts, but prompts.held_out 62 asks for more"):
        load(PromptsConfig(source="animals", held_out=62), 0, training=False)


def test_attributes_of_images_are_mappings(tmp_path: Path) -> None:
    path = written(tmp_path, {"file": "a.png", "prompt": "a cat", "attributes": {"n": 1}})
    assert of_images(tmp_path)["a.png"].attributes == {"n": 1}
    written(tmp_path, {"file": "a.png", "prompt": "a cat", "attributes": "one"})
    with pytest.raises(InputError) as caught:
        of_images(tmp_path)
    assert f'{path}:1: "attributes" is a mapping' in str(caught.value)
