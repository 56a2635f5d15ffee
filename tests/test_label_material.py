"""``label init``: what goes into a study, from every kind of source, and what is refused before anything is written."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from apps import evaluate
from apps.cli import main
from apps.label import generated, image_folders, material, pair_files, pictures
from apps.progress import Status
from diffalign import preferences
from diffalign.errors import ConfigError, InputError, NotFoundError, UserError
from diffalign.study import Answer, Protocol, Study, StudyPair
from diffalign.types import Preference, Prompt, Sample

PROTOCOL = "name: test\nversion: 1\nmin_view_seconds: 0\n"


def png(path: Path, colour: tuple[int, int, int], size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


def arms(folder: Path, names: Sequence[str], stems: Sequence[str]) -> Path:
    for i, arm in enumerate(names):
        for j, stem in enumerate(stems):
            png(folder / arm / f"{stem}.png", (10 + 50 * i, 10 + 20 * j, 0))
    return folder


def gathered(*sources: object, **wanted: object) -> tuple[list[StudyPair], material.Counts]:
    counts = material.Counts()
    with Status() as status:
        request = material.Request([str(source) for source in sources], **wanted)  # type: ignore[arg-type]
        return list(material.gather(request, counts, status)), counts


def colour(sample: Sample) -> tuple[int, int, int]:
    assert sample.image is not None
    found = sample.image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found[0], found[1], found[2]


# --- folders of images ---


def test_every_two_arms_of_a_name_are_a_pair(tmp_path: Path) -> None:
    """Three arms give three pairs for each of two names; colours say that the right files were taken."""
    arms(tmp_path, ["a", "b", "c"], ["one", "two"])
    (tmp_path / "prompts.jsonl").write_text('{"file": "one.png", "prompt": "first"}\n')
    (tmp_path / "two.txt").write_text("second\n")
    found, counts = gathered(tmp_path)
    assert [(p.prompt.text, p.first_arm, p.second_arm) for p in found] == [
        (text, *two) for text in ("first", "second") for two in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    assert colour(found[5].first) == (60, 30, 0) and colour(found[5].second) == (110, 30, 0)
    assert counts.ordinary == 6 and counts.arms == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize("place", ["a/one.png", "one.png", "one"])
def test_a_list_of_prompts_may_name_the_file_in_each_way(tmp_path: Path, place: str) -> None:
    arms(tmp_path, ["a", "b"], ["one"])
    (tmp_path / "prompts.csv").write_text(f'file,prompt\n{place},"what, exactly"\n')
    assert gathered(tmp_path)[0][0].prompt.text == "what, exactly"


def test_a_prompt_may_lie_beside_its_image_and_names_tell_pairs_without_one(tmp_path: Path) -> None:
    arms(tmp_path, ["a", "b"], ["one", "two"])
    (tmp_path / "b" / "one.txt").write_text("beside")
    (tmp_path / "b" / "lone.webp").write_bytes((png(tmp_path / "x.png", (0, 0, 0))).read_bytes())
    found, counts = gathered(tmp_path)
    assert [(pair.prompt.text, pair.prompt.id) for pair in found] == [("beside", ""), ("", "two")]
    assert any("1 file names" in note for note in counts.notes)


def test_arms_that_say_different_prompts_are_no_pair(tmp_path: Path) -> None:
    arms(tmp_path, ["a", "b"], ["one"])
    (tmp_path / "a" / "one.txt").write_text("a cat")
    (tmp_path / "b" / "one.txt").write_text("a dog")
    with pytest.raises(InputError, match="different prompts for one"):
        gathered(tmp_path)


def test_equal_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    arms(tmp_path, ["a", "b"], ["one", "two"])
    (tmp_path / "b" / "one.png").write_bytes((tmp_path / "a" / "one.png").read_bytes())
    found, counts = gathered(tmp_path)
    assert len(found) == counts.ordinary == 1 and counts.equal == 1
    (tmp_path / "b" / "two.png").write_bytes((tmp_path / "a" / "two.png").read_bytes())
    with pytest.raises(InputError, match="both samples of all 2 are equal"):
        gathered(tmp_path)


def bomb(path: Path) -> None:
    """A PNG of 30,000 x 30,000 pixels in a few bytes: its header is all that is needed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 4096)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def large(path: Path) -> None:
    """Between the study's own limit and Pillow's."""
    Image.new("1", (8000, 7000)).save(path)


def truncated(path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    path.write_bytes(whole.getvalue()[:-200])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (bomb, "decompression bomb"),
        (large, "8000x7000 pixels"),
        (truncated, "cannot be decoded|is not an image that can be decoded"),
        (lambda path: path.write_bytes(b"GIF89a" + bytes(20)), "no PNG, JPEG or WebP"),
        (lambda path: path.write_text("<svg onload='alert(1)'/>"), "no PNG, JPEG or WebP"),
        (lambda path: Image.new("RGB", (4, 4)).save(path, "BMP"), "no PNG, JPEG or WebP"),
    ],
)
def test_a_broken_or_hostile_file_is_one_sentence_and_no_study(tmp_path: Path, break_it: object, message: str) -> None:
    arms(tmp_path / "images", ["a", "b"], ["one", "two"])
    path = tmp_path / "images" / "b" / "two.png"
    path.unlink()
    break_it(path)  # type: ignore[operator]
    found = material.gather(material.Request([str(tmp_path / "images")]), material.Counts(), Status())
    with pytest.raises(InputError, match=message) as caught:
        Study.create(tmp_path / "s", Protocol.parse(PROTOCOL), found)
    assert "two.png" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_links_out_of_the_folder_are_refused_and_within_it_read(tmp_path: Path) -> None:
    secret = png(tmp_path / "elsewhere" / "secret.png", (1, 2, 3))
    folder = arms(tmp_path / "images", ["a", "b"], ["one"])
    (folder / "b" / "one.png").unlink()
    (folder / "b" / "one.png").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of"):
        gathered(folder)
    (folder / "b" / "one.png").unlink()
    (folder / "b" / "one.png").symlink_to(png(folder / "kept.png", (9, 9, 9)))
    assert colour(gathered(folder)[0][0].second) == (9, 9, 9)
    (folder / "c").symlink_to(secret.parent)
    with pytest.raises(InputError, match="leads out of"):
        gathered(folder)


def test_an_svg_among_the_images_is_refused(tmp_path: Path) -> None:
    (arms(tmp_path, ["a", "b"], ["one"]) / "a" / "x.svg").write_text("<svg/>")
    with pytest.raises(InputError, match="SVG"):
        gathered(tmp_path)


def test_a_folder_without_arms_says_what_is_expected(tmp_path: Path) -> None:
    png(tmp_path / "a" / "one.png", (0, 0, 0))
    png(tmp_path / "b" / "two.png", (0, 0, 0))
    with pytest.raises(InputError, match="no file name is in two subfolders"):
        gathered(tmp_path)
    with pytest.raises(InputError, match="each subfolder is an arm"):
        image_folders.Arms(tmp_path / "a")


def test_pixels_arrive_unchanged(tmp_path: Path) -> None:
    noise = Image.effect_noise((31, 17), 80).convert("RGB")
    noise.save(tmp_path / "one.png")
    assert pictures.read(tmp_path / "one.png", tmp_path).tobytes() == noise.tobytes()


# --- files of pairs ---


def jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_without_an_answer(tmp_path: Path) -> None:
    png(tmp_path / "x.png", (1, 1, 1))
    png(tmp_path / "y.png", (2, 2, 2))
    images = jsonl(
        tmp_path / "images.jsonl",
        {"prompt": "p", "image_0": "x.png", "image_1": "y.png", "arm_0": "base", "arm_1": "tuned"},
        {"prompt": "q", "image_0": "y.png", "image_1": "x.png", "expected": "second"},
    )
    texts = jsonl(tmp_path / "texts.jsonl", {"prompt": "p", "text_0": "one\0\u202e", "text_1": "=2+2"})
    found, counts = gathered(images, texts)
    assert [(p.first_arm, p.second_arm, p.expected) for p in found] == [
        ("base", "tuned", None), ("images", "images", "second"), ("texts", "texts", None),
    ]  # fmt: skip
    assert colour(found[0].first) == (1, 1, 1) and found[2].first.text == "one\0\u202e"
    assert counts.kinds == {"image": 2, "text": 1} and (counts.ordinary, counts.gold) == (2, 1)


def test_answers_in_a_file_are_not_used_but_its_arms_are(tmp_path: Path) -> None:
    asked = Prompt("p", attributes={"case": 3})
    pairs = [
        Preference(
            asked, Sample(asked, text=f"a{i}"), Sample(asked, text=f"b{i}"), 1.0,
            provenance={"first": {"arm": "base"}, "second": {"arm": "tuned"}},
        )
        for i in range(3)
    ]  # fmt: skip
    preferences.write(tmp_path / "votes.parquet", pairs)
    found, _ = gathered(tmp_path / "votes.parquet")
    assert [(p.first_arm, p.second_arm, p.expected) for p in found] == [("base", "tuned", None)] * 3
    assert found[0].prompt == asked
    rows = jsonl(tmp_path / "trl.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    assert [(p.first_arm, p.second_arm, p.expected) for p in gathered(rows)[0]] == [("chosen", "rejected", None)]


def test_gold_is_what_a_file_knows(tmp_path: Path) -> None:
    asked = Prompt("p")
    preferences.write(
        tmp_path / "known.parquet",
        [Preference(asked, Sample(asked, text=f"a{x}"), Sample(asked, text="b"), x) for x in (1.0, 0.0, 0.5)],
    )
    assert [p.expected for p in pair_files.pairs(tmp_path / "known.parquet", gold=True)] == ["first", "second", "tie"]
    source = jsonl(tmp_path / "s.jsonl", {"prompt": "p", "text_0": "1", "text_1": "2"})
    found, counts = gathered(source, gold=tmp_path / "known.parquet")
    assert len(found) == 4 and (counts.ordinary, counts.gold) == (1, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "text_0": "a", "text_1": "b"}], "has no column expected"),
        ([{"prompt": "p", "text_0": "a", "text_1": "b", "expected": "0"}], "line 1: expected is '0'"),
        (
            [
                {"prompt": "p", "text_0": "a", "text_1": "b", "expected": "tie"},
                {"prompt": "p", "text_0": "a", "text_1": "c"},
            ],
            "line 2: no label",
        ),
        ([{"prompt": "p", "image_0": "x.png", "image_1": "y.png", "label": 0.7}], "missing image|no known answer"),
    ],
)  # fmt: skip
def test_gold_without_a_known_answer_is_refused(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(pair_files.pairs(jsonl(tmp_path / "g.jsonl", *rows), gold=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "image_0": "../../etc/x.png", "image_1": "x.png"}, "leads out of"),
        ({"prompt": "p", "image_0": "none.png", "image_1": "x.png"}, "cannot be read"),
        ({"prompt": "", "image_0": "x.png", "image_1": "x.png"}, "no prompt"),
        ({"prompt": "p", "image_0": "https://host/x.png", "image_1": "x.png"}, "nothing is downloaded"),
        ({"prompt": "p", "image_0": "data:image/svg+xml;base64,PHN2Zy8+", "image_1": "x.png"}, "unreadable"),
    ],
)
def test_the_first_bad_row_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    png(tmp_path / "deep" / "x.png", (1, 1, 1))
    with pytest.raises(InputError, match=message) as caught:
        list(pair_files.pairs(jsonl(tmp_path / "deep" / "rows.jsonl", row)))
    assert "line 1" in str(caught.value)


def test_fewer_pairs_than_there_are_is_a_random_part_of_all_sources(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a.jsonl", *({"prompt": f"a{i}", "text_0": "x", "text_1": "y"} for i in range(30)))
    two = jsonl(tmp_path / "b.jsonl", *({"prompt": f"b{i}", "text_0": "x", "text_1": "y"} for i in range(10)))
    found = [pair.prompt.text for pair in gathered(one, two, count=20)[0]]
    assert len(set(found)) == 20
    assert {text[0] for text in found} == {"a", "b"} and found != sorted(found, key=lambda text: int(text[1:]))
    assert found == [pair.prompt.text for pair in gathered(one, two, count=20)[0]]
    assert found != [pair.prompt.text for pair in gathered(one, two, count=20, seed=1)[0]]
    with pytest.raises(ConfigError, match="asks for 41 pairs, but the sources have 40"):
        gathered(one, two, count=41)


# --- models ---


class Painter:
    """A model that paints in a shade of its own, and its seed's colour."""

    batch_size = 4

    def __init__(self, shade: int) -> None:
        self.shade = shade
        self.asked: list[tuple[str, int]] = []

    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> object:
        assert 0 < len(prompts) <= self.batch_size
        self.asked += zip((prompt.text for prompt in prompts), seeds, strict=True)

        class Rollout:
            samples = tuple(
                Sample(p, image=Image.new("RGB", (4, 4), (self.shade, s % 256, s // 256 % 256)), seed=s)
                for p, s in zip(prompts, seeds, strict=True)
            )

        return Rollout()


@pytest.fixture
def painters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Painter]:
    made: dict[str, Painter] = {}

    def sampler(name: str, config: object) -> Painter:
        return made.setdefault(name, Painter(20 * len(made)))

    monkeypatch.setattr(evaluate, "sampler", sampler)
    return made


def prompts(path: Path, count: int) -> Path:
    path.write_text("".join(f"prompt {i}\n" for i in range(count)))
    return path


def test_one_model_is_compared_with_itself_at_two_seeds(tmp_path: Path, painters: dict[str, Painter]) -> None:
    found, counts = gathered("embedded:emoji", prompts="7", count=10)
    asked = [seed for _, seed in painters["embedded:emoji"].asked]
    assert len(asked) == len(set(asked)) == 20
    assert all(pair.first.seed != pair.second.seed and pair.first.prompt is pair.second.prompt for pair in found)
    assert {pair.first_arm for pair in found} | {pair.second_arm for pair in found} == {"embedded:emoji"}
    each = Counter(pair.prompt.text for pair in found)
    assert len(each) == 7 and sorted(each.values()) == [1, 1, 1, 1, 2, 2, 2]
    assert any("7 train prompts of emoji" in note for note in counts.notes)


def test_models_are_compared_on_the_same_prompts_and_seeds(tmp_path: Path, painters: dict[str, Painter]) -> None:
    asked = prompts(tmp_path / "p.txt", 5)
    found, _ = gathered("me/one", "me/two", against="embedded:emoji", prompts=str(asked))
    assert len(found) == 15
    assert all(pair.first.seed == pair.second.seed and pair.first_arm != pair.second_arm for pair in found)
    assert all(sorted(model.asked) == sorted(painters["me/one"].asked) for model in painters.values())
    assert len(painters["me/one"].asked) == 5


def test_a_run_is_compared_with_its_base_on_held_out_prompts(tmp_path: Path, painters: dict[str, Painter]) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: embedded:brain-mr\nrewards: [clip]\nprompts: {source: brain-mr, task: lesion, train: 5, held_out: 4}\n"
    )
    found, _ = gathered(run)
    assert {(pair.first_arm, pair.second_arm) for pair in found} == {("my-run", "embedded:brain-mr")}
    assert len(found) == 4 and set(painters) == {str(run), "embedded:brain-mr"}
    from diffalign.worlds import brain_mr

    assert all(brain_mr.is_held_out(pair.prompt.attributes) for pair in found)
    trained, _ = gathered(run, split="train", prompts="3")
    assert len(trained) == 3 and not any(brain_mr.is_held_out(pair.prompt.attributes) for pair in trained)
    assert str(tmp_path) not in json.dumps([dict(pair.provenance) for pair in found])


def test_the_pairs_wanted_are_spread_over_prompts_and_arms() -> None:
    """2 prompts x 3 couples: six are all of them once, eight are a round and two more, four a part without repeats."""
    every = {((prompt, 0), couple) for prompt in range(2) for couple in ((0, 1), (0, 2), (1, 2))}
    assert set(generated._pairs(2, 3, None, 0)) == set(generated._pairs(2, 3, 6, 0)) == every
    eight = generated._pairs(2, 3, 8, 0)
    assert set(eight[:6]) == every and len(set(eight)) == 8 and all(key[1] == 1 for key, _ in eight[6:])
    four = generated._pairs(2, 3, 4, 0)
    assert set(four) < every and len(set(four)) == 4


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        (["me/one"], {}, ConfigError, "--prompts FILE"),
        (["me/one"], {"prompts": "5"}, ConfigError, "--prompts FILE"),
        (["embedded:emoji", "embedded:emoji"], {}, ConfigError, "given twice"),
        (["embedded:emoji"], {"against": "embedded:emoji"}, ConfigError, "one name"),
        (["nowhere.parquet"], {}, NotFoundError, "there is no nowhere.parquet"),
        (["./nowhere"], {}, NotFoundError, "subfolder of images per arm"),
    ],
)
def test_what_cannot_be_sampled_is_said_first(
    painters: dict[str, Painter], sources: list[str], options: dict[str, object], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        gathered(*sources, **options)
    assert not painters


def test_options_of_models_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="about models and runs"):
        gathered(arms(tmp_path, ["a", "b"], ["one"]), prompts="3")


# --- the command ---


def test_the_help_says_what_set_is_about() -> None:
    said = " ".join(CliRunner().invoke(main, ["label", "init", "--help"]).output.split())
    assert "--set A.B=C Change one field of how models and runs sample" in said


def test_the_command_makes_a_study_and_says_what_is_in_it(tmp_path: Path) -> None:
    folder = arms(tmp_path / "images", ["base", "tuned"], ["one", "two", "three"])
    texts = jsonl(tmp_path / "t.jsonl", {"prompt": "p", "text_0": "a", "text_1": "b"})
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    command = ["label", "init", str(tmp_path / "s"), "--protocol", str(tmp_path / "protocol.yaml"), "--title", "T\0<b>"]
    done = CliRunner().invoke(main, [*command, "--from", str(folder), "--from", str(texts)])
    assert done.exit_code == 0, done.output
    assert "4 to judge, 0 gold (3 of images, 1 of texts)" in done.output and "base (3)" in done.output
    study = Study.open(tmp_path / "s")
    assert study.title == "T\0<b>" and study.stats().pairs == 4
    study.close()
    again = CliRunner().invoke(main, [*command, "--from", str(folder)])
    assert again.exit_code == 2 and "is there already" in again.output


def test_which_sample_is_the_first_says_nothing(tmp_path: Path) -> None:
    """Half of 200 pairs are turned round, give or take four standard deviations of 7.1, with all that is theirs."""
    asked = Prompt("p")
    known = {"first": {"by": "base"}, "second": {"by": "tuned"}}
    given = [
        StudyPair(
            asked, Sample(asked, text=f"base {i}"), Sample(asked, text=f"tuned {i}"), "base", "tuned", gold, known
        )
        for i in range(200)
        for gold in [("first", "tie", None)[i % 3]]
    ]
    found = list(material.in_random_order(iter(given), 0))
    for i, pair in enumerate(found):
        assert (pair.first.text, pair.second.text) == (f"{pair.first_arm} {i}", f"{pair.second_arm} {i}")
        assert pair.provenance["first"] == {"by": pair.first_arm} and pair.provenance["second"] != {
            "by": pair.first_arm
        }
        better = "first" if pair.first_arm == "base" else "second"
        assert pair.expected == {"first": better}.get(str(given[i].expected), given[i].expected)
    assert 72 <= sum(pair.first_arm == "base" for pair in found) <= 128
    assert found == list(material.in_random_order(iter(given), 0)) != list(material.in_random_order(iter(given), 1))


def test_names_of_arms_do_not_command_the_terminal(tmp_path: Path) -> None:
    arm = "\x1b[2Jevil[bold]"
    rows = jsonl(tmp_path / "t.jsonl", {"prompt": "p", "text_0": "a", "text_1": "b", "arm_0": arm, "arm_1": "x"})
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    command = ["label", "init", str(tmp_path / "s"), "--protocol", str(tmp_path / "protocol.yaml"), "--from", str(rows)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "\ufffd[2Jevil" in done.output and "\x1b" not in done.output
    study = Study.open(tmp_path / "s")
    study.add_rater("ann")
    now = study.claim("ann")
    assert now is not None
    study.vote("ann", now.token, Answer("left"))
    study.close()
    shown = CliRunner().invoke(main, ["label", "stats", str(tmp_path / "s")])
    assert shown.exit_code == 0 and "\x1b" not in shown.output


def test_a_file_or_folder_has_no_seeds_and_a_model_has(tmp_path: Path, painters: dict[str, Painter]) -> None:
    """A seed of 0 is a seed: where none is known, exports say null, and a cell of CSV is empty."""
    found, _ = gathered(arms(tmp_path / "arms", ("x", "y"), ("1", "2")))
    rows, _ = gathered(jsonl(tmp_path / "t.jsonl", {"prompt": "p", "text_0": "a", "text_1": "b"}))
    made, _ = gathered("embedded:emoji", prompts="2")
    scale = "criteria: [{name: q, question: q, kind: scale, anchors: [x, y]}]\n"
    study = Study.create(tmp_path / "s", Protocol.parse(PROTOCOL + scale), found + rows + made)
    study.add_rater("ann")
    while (now := study.claim("ann")) is not None:
        study.vote("ann", now.token, Answer("left", None, {"q": {"left": 1, "right": 2}}))
    kept = [p.provenance[side] for p in study.export() for side in ("first", "second")]
    study.close()
    asked = sorted(seed for _, seed in painters["embedded:emoji"].asked)
    by_arm = [(side["arm"], side["seed"]) for side in kept if isinstance(side, dict)]
    assert len(by_arm) == 2 * (2 + 1 + 2)
    assert sorted(seed for arm, seed in by_arm if arm == "embedded:emoji") == asked
    assert {seed for arm, seed in by_arm if arm != "embedded:emoji"} == {None}
    out = tmp_path / "s.csv"
    done = CliRunner().invoke(main, ["label", "export", str(tmp_path / "s"), "--out", str(out), "--format", "scores"])
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        cells = [(row["arm"], row["seed"]) for row in csv.DictReader(file)]
    assert sorted(seed for _, seed in cells) == sorted([""] * 6 + [str(seed) for seed in asked])


def test_an_unknown_protocol_lists_those_that_ship(tmp_path: Path) -> None:
    folder = arms(tmp_path / "images", ["a", "b"], ["one"])
    done = CliRunner().invoke(main, ["label", "init", str(tmp_path / "s"), "--from", str(folder), "--protocol", "x"])
    assert done.exit_code == 2 and not (tmp_path / "s").exists()
    assert all(name in done.output for name in Protocol.shipped())
    for name in Protocol.shipped():
        command = ["label", "init", str(tmp_path / name), "--from", str(folder), "--protocol", name]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == (0 if name != "report_pair" else 2), done.output
    assert "text" in done.output and not (tmp_path / "report_pair").exists()


@pytest.mark.slow
def test_embedded_models_give_real_pairs(tmp_path: Path) -> None:
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    command = ["label", "init", str(tmp_path / "s"), "--protocol", str(tmp_path / "protocol.yaml"), "--prompts", "3"]
    command += ["--from", "embedded:emoji", "--against", "embedded:brain-mr", "--set", "sampler.steps=2"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "embedded:brain-mr (3), embedded:emoji (3)" in done.output


def test_a_flat_folder_and_an_unknown_embedded_model_get_a_helpful_sentence(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(InputError, match="give each arm a subfolder of its own, such as flat/base/7"):
        material.kind_of(str(tmp_path / "flat"))
    with pytest.raises(NotFoundError, match="there is no embedded:nothing; there are embedded:"):
        material._check_embedded("embedded:nothing")
