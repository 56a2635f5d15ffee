"""Preference data: the word, the native form, the split, and what the summary counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.preferences import Summary, Table, group, read, split, write
from diffalign.preferences import table as native
from diffalign.types import Preference, Prompt, Sample
from tests import preference_files as files
from tests.preference_files import good, seeds

ROOT = Path(__file__).resolve().parent.parent


# --- the word ---


@pytest.mark.parametrize("label", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_label_is_a_probability(label: float) -> None:
    with pytest.raises(InputError, match="label out of range"):
        files.pair("a", label)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_is_finite_and_not_negative(strength: float) -> None:
    with pytest.raises(InputError, match="strength out of range"):
        files.pair("a", 1, strength=strength)


# --- the native form ---

TEXT = st.text(max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXT, PLAIN, max_size=3)
RECORDS = st.builds(
    dict, text=TEXT.filter(str.strip), id=TEXT, attributes=OBJECTS, negative=TEXT, label=st.floats(0, 1),
    strength=st.floats(0, 1e6), criterion=TEXT.filter(bool), rater=TEXT, provenance=OBJECTS,
)  # fmt: skip


def built(record: dict[str, Any], first: Any, second: Any, kind: str) -> Preference:
    asked = Prompt(record["text"], record["id"], record["attributes"], record["negative"])
    sides = (Sample(asked, **{kind: value}) for value in (first, second))
    names = ("label", "strength", "criterion", "rater", "provenance")
    return Preference(asked, *sides, **{name: record[name] for name in names})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, min_size=1, max_size=4), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_what_is_written_is_read_again(tmp_path: Path, records: list[dict[str, Any]], sizes: list[int]) -> None:
    """All fields and every pixel, through the table and through the reader of all formats."""
    wanted = [
        built(record, files.picture(i, (sizes[0], 3)), files.picture(i + 99, (2, sizes[1])), "image")
        for i, record in enumerate(records)
    ]
    path = tmp_path / "pairs.parquet"
    assert write(path, iter(wanted)) == len(wanted)
    table = Table(path)
    assert len(table) == len(wanted) and table.modality == "image"
    assert table.groups() == [group(preference.prompt) for preference in wanted]
    for found in (list(table), good(path), [table[i - len(wanted)] for i in range(len(wanted))]):
        for one, other in zip(wanted, found, strict=True):
            for side in ("first", "second"):
                assert getattr(one, side).image.tobytes() == getattr(other, side).image.tobytes()
                assert getattr(one, side).image.size == getattr(other, side).image.size
            for name in ("prompt", "label", "strength", "criterion", "rater", "provenance"):
                assert getattr(one, name) == getattr(other, name), name


def test_texts_have_a_form_too(tmp_path: Path) -> None:
    asked = Prompt("why?")
    pairs = [Preference(asked, Sample(asked, text=f"a{i} 雪"), Sample(asked, text=""), 0.25) for i in range(200)]
    write(tmp_path / "texts.parquet", pairs)
    assert list(Table(tmp_path / "texts.parquet")) == pairs == good(tmp_path / "texts.parquet")
    assert read(tmp_path / "texts.parquet").format == "diffalign texts"


def test_images_are_plain_png_that_datasets_shows(tmp_path: Path) -> None:
    """The feature description that `datasets` writes itself, and files without metadata."""
    pair = files.pair("a", 1)
    assert pair.first.image is not None
    pair.first.image.info["patient"] = "somebody"
    write(tmp_path / "pairs.parquet", [pair])
    file = pq.ParquetFile(tmp_path / "pairs.parquet")
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["first"] == features["second"] == {"_type": "Image"}
    assert features["label"] == {"dtype": "float64", "_type": "Value"}
    assert list(features) == file.schema_arrow.names
    row = file.read().to_pylist()[0]
    assert row["first"]["bytes"][:8] == b"\x89PNG\r\n\x1a\n" and row["first"]["path"] is None
    assert b"somebody" not in row["first"]["bytes"]


def test_a_shared_image_is_stored_once_in_a_group(tmp_path: Path) -> None:
    """64 pairs of two 96x96 images of noise, 28 kB each as PNG: 56 kB, not 3.5 MB."""
    asked = Prompt("a")
    first, second = (Sample(asked, image=files.picture(seed, (96, 96))) for seed in (0, 1))
    write(tmp_path / "pairs.parquet", [Preference(asked, first, second, 1)] * 64)
    assert 50_000 < (tmp_path / "pairs.parquet").stat().st_size < 80_000


def test_groups_of_rows_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 rows are groups of 64, 64 and 22; with a limit of 1 byte every row is its own."""
    pairs = [files.pair(str(i), 1) for i in range(150)]
    for limit, groups in ((native.GROUP_BYTES, [64, 64, 22]), (1, [1] * 150)):
        monkeypatch.setattr(native, "GROUP_BYTES", limit)
        write(tmp_path / "pairs.parquet", pairs)
        metadata = pq.ParquetFile(tmp_path / "pairs.parquet").metadata
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == groups
        assert [Table(tmp_path / "pairs.parquet")[i].prompt.text for i in (0, 63, 64, 149)] == ["0", "63", "64", "149"]


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from [files.pair("a", 1)] * 100
        raise KeyboardInterrupt

    path = tmp_path / "pairs.parquet"
    write(path, [files.pair("before", 1)])
    with pytest.raises(KeyboardInterrupt):
        write(path, failing())
    assert [item.name for item in tmp_path.iterdir()] == ["pairs.parquet"]
    assert Table(path)[0].prompt.text == "before"


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    asked = Prompt("a")
    text = Preference(asked, Sample(asked, text="x"), Sample(asked, text="y"), 1)
    half = Prompt("\ud800")
    for pairs, message in (
        ([], "there is no preference to write"),
        ([files.pair("a", 1), text], "preference 1 lacks its image"),
        ([text, files.pair("a", 1)], "preference 1 lacks its text"),
        ([files.pair("a", 1, provenance={"when": object()})], "provenance cannot be written as JSON"),
        ([Preference(half, text.first, text.second, 1)], "no Unicode text"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / "pairs.parquet", pairs)
    assert not list(tmp_path.iterdir())


def test_a_table_refuses_another_form(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no Parquet file .*nothing"):
        Table(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(InputError, match="not a Parquet file"):
        Table(tmp_path / "text.parquet")
    files.parquet(tmp_path / "other.parquet", [{"prompt": "a", "label": 1, "first": png_struct(0)}])
    with pytest.raises(InputError, match=r"columns prompt, label, first, and lacks second"):
        Table(tmp_path / "other.parquet")
    files.parquet(tmp_path / "words.parquet", [{"prompt": "a", "label": "left", "first": b"", "second": b""}])
    with pytest.raises(InputError, match=r"column label of .* is string; it has to be double"):
        Table(tmp_path / "words.parquet")


def png_struct(seed: int) -> dict[str, Any]:
    return {"bytes": files.png(seed), "path": None}


def test_a_table_made_elsewhere(tmp_path: Path) -> None:
    """Only prompt, label and the sides are needed; a bad row is told when it is asked for, and the others stay good."""
    rows = [{"prompt": "a", "label": 1, "first": png_struct(0), "second": png_struct(1)} for _ in range(3)]
    rows[1]["second"] = {"bytes": b"no image", "path": None}
    table = Table(files.parquet(tmp_path / "pairs.parquet", rows))
    assert seeds(table[0]) == seeds(table[2]) == [0, 1]
    assert (table[0].strength, table[0].criterion, table[0].rater, table[0].provenance) == (1, "overall", "", {})
    with pytest.raises(InputError, match=r"row 1 of .*: unreadable image: second is not an image"):
        table[1]
    with pytest.raises(IndexError, match="has 3 preferences"):
        table[3]


# --- the split ---

KEYS = st.lists(st.text(min_size=1, max_size=5), min_size=60, max_size=120)


@settings(max_examples=50, deadline=None)
@given(keys=KEYS, more=st.lists(st.text(min_size=1, max_size=5), max_size=20), seed=st.integers(0, 9))
def test_a_split_keeps_groups_whole_and_stays(keys: list[str], more: list[str], seed: int) -> None:
    keys = [*keys, *(str(i) for i in range(60))]  # so many groups that neither side is empty
    train, held_out = split(keys, 0.3, seed)
    assert sorted(train + held_out) == list(range(len(keys)))
    assert not {keys[i] for i in train} & {keys[i] for i in held_out}
    again_train, again_held_out = split([*keys, *more], 0.3, seed)
    assert again_train[: len(train)] == train and again_held_out[: len(held_out)] == held_out


def test_a_split_has_the_share_that_was_asked_for() -> None:
    """10 000 prompts at 0.2: 2000, with a standard deviation of sqrt(10 000 * 0.2 * 0.8) = 40; four of them are 160."""
    keys = [f"prompt {i}" for i in range(10_000)]
    assert abs(len(split(keys, 0.2)[1]) - 2000) < 160
    assert split(keys, 0.2, 1) != split(keys, 0.2, 2)
    assert split(keys, 0.0)[1] == []


def test_a_case_is_a_group() -> None:
    assert group(Prompt("lesion left", attributes={"case": 3})) == group(Prompt("lesion right", attributes={"case": 3}))
    assert (
        group(Prompt("A  b", id="p1")) == group(Prompt("a b", id="p2")) == "a b" and group(Prompt("", id="p1")) == "p1"
    )


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 different prompts or cases with held_out 0\.1 and seed 0 leave none to"):
        split(["a", "a"], 0.1)
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="it is a share"):
            split(["a", "b"], share)


# --- the summary ---


def counted(*pairs: Preference) -> Summary:
    summary = Summary()
    for pair in pairs:
        summary.add(pair)
    return summary


def test_counts() -> None:
    summary = counted(
        files.pair("a", 1, (0, 1), rater="r1"), files.pair("a", 0.8, (2, 3), rater="r2"),
        files.pair("b", 0.5, (4, 5), criterion="anatomy"), files.pair("b", 0, (6, 7)),
    )  # fmt: skip
    data = summary.to_json()
    assert data["pairs"] == 4
    assert data["labels"] == {"first": 2, "second": 1, "ties": 1, "soft": 1, "mean": pytest.approx(0.575)}
    assert data["prompts"] == {"different": 2, "pairs_each": {"min": 2, "median": 2, "max": 2}}
    assert data["criteria"] == {"overall": 3, "anatomy": 1}
    assert data["raters"] == {"different": 2, "unknown": 2, "most": {"r1": 1, "r2": 1}}
    assert data["sizes"] == {"different": 1, "most": {"8x8": 8}, "unequal_pairs": 0}
    assert data["warnings"] == []
    assert json.loads(json.dumps(data)) == data


def test_repeats_and_contradictions() -> None:
    """The pair (0, 1) is judged by r1 three times: again, then swapped with the same winner; r2 contradicts."""
    summary = counted(
        files.pair("a", 1, (0, 1), rater="r1"), files.pair("a", 1, (0, 1), rater="r1"),
        files.pair("a", 0, (1, 0), rater="r1"), files.pair("a", 0.5, (0, 1), rater="r2"),
    )  # fmt: skip
    assert (summary.repeated, summary.swapped, summary.contradictory) == (2, 1, 0)
    summary.add(files.pair("a", 1, (1, 0), rater="r3"))
    summary.add(files.pair("a", 1, (1, 0), rater="r4"))
    assert (summary.repeated, summary.contradictory) == (2, 1)
    summary.add(files.pair("a", 0, (0, 1), criterion="anatomy", rater="r1"))  # another question
    summary.add(files.pair("b", 0, (0, 1), rater="r1"))  # another prompt
    assert (summary.repeated, summary.contradictory) == (2, 1)
    summary.add(files.pair("a", 1, (0, 1), criterion="anatomy", rater="r2"))  # torn in two questions, and one pair
    assert (summary.repeated, summary.contradictory, summary.different()) == (2, 1, 2)
    assert summary.to_json()["prompts"]["pairs_each"] == {"min": 1, "median": 1, "max": 1}
    assert (
        "1 pairs have labels that contradict each other in one question, by one rater or several." in summary.warnings()
    )


def test_identical_and_unequal_samples() -> None:
    asked = Prompt("a")
    wide = Preference(asked, Sample(asked, image=files.picture(0)), Sample(asked, image=files.picture(1, (9, 8))), 0)
    summary = counted(files.pair("a", 1, (3, 3)), files.pair("b", 0.5, (4, 4)), wide)
    assert (summary.identical, summary.identical_decided, summary.unequal_sizes) == (2, 1, 1)
    text = " ".join(summary.warnings())
    assert "1 pairs prefer one of two identical samples" in text and "1 pairs have images of different sizes" in text


@pytest.mark.parametrize(
    ("label", "sentence"),
    [(1, "Every label prefers the first"), (0, "Every label prefers the second"), (0.5, "Every label is a tie")],
)
def test_one_class_only(label: float, sentence: str) -> None:
    summary = counted(*(files.pair(str(i), label, (i, i + 1)) for i in range(3)))
    assert [text for text in summary.warnings() if text.startswith(sentence)]


def test_position_bias() -> None:
    """Of 100 decided pairs 65 prefer the first: Wilson's interval is 0.553 to 0.736; ties do not count. 55 of 100
    reach down to 0.452, which is no bias."""
    prompt = Prompt("a")
    samples = [Sample(prompt, text=str(i)) for i in range(400)]

    def share(first: int) -> Summary:
        labels = [1.0] * first + [0.0] * (100 - first) + [0.5] * 50
        return counted(
            *(Preference(prompt, samples[2 * i], samples[2 * i + 1], label) for i, label in enumerate(labels))
        )

    value, interval, decided = share(65).position()
    assert (value, decided) == (0.65, 100) and interval == pytest.approx((0.5525, 0.7364), abs=1e-4)
    assert any("The first is preferred in 65.0%" in text for text in share(65).warnings())
    assert not any("The first is preferred" in text for text in share(55).warnings())


# --- size ---

MANY = """
import itertools, json, resource, sys
sys.path.insert(0, sys.argv[3])
from diffalign.preferences import Summary, Table, read, split, write
from diffalign.types import Preference, Prompt, Sample
from tests.preference_files import picture
def pairs(count):
    pictures = [picture(seed) for seed in range(64)]
    for i, (a, b) in zip(range(count), itertools.cycle(itertools.permutations(range(64), 2))):
        asked = Prompt(f"prompt {i // 4}")
        yield Preference(asked, Sample(asked, image=pictures[a]), Sample(asked, image=pictures[b]), (1, 0, 0.5)[i % 3])
def run(path, count):
    assert write(path, pairs(count)) == count
    summary = Summary()
    for item in read(path):
        summary.add(item)
    table = Table(path)
    assert len(table) == summary.pairs == count and not summary.broken
    table[count - 1], table[0], split(table.groups(), 0.1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = run(sys.argv[1] + "/small.parquet", 1000)
print(run(sys.argv[1] + "/large.parquet", int(sys.argv[2])) - small)
"""


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, count: int) -> None:
    """Writing, summarising and splitting: the peak grows by the hashes, some 250 bytes a row, not by the images."""
    command = [sys.executable, "-c", MANY, str(tmp_path), str(count), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 150_000 * max(count, 20_000) / 100_000
