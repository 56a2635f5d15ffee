"""Protocols: for which pairs they are, what is said of mistakes, and that their page says what the model does."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import ConfigError, InputError
from diffalign.study import Protocol, Study, StudyPair
from diffalign.study.protocol import Criterion, Rules
from diffalign.study.protocol_faults import allowed
from diffalign.types import Prompt, Sample
from tests.studies import RULES, text_pair

PAGE = Path(__file__).parent.parent / "docs" / "protocols.md"


def image_pair(number: int = 0) -> StudyPair:
    asked = Prompt(f"picture {number}")
    one, two = (Sample(asked, image=Image.new("RGB", (8, 8), (number, value, 0))) for value in (1, 2))
    return StudyPair(asked, one, two, "base", "tuned")


# --- what they are for ---


@pytest.mark.parametrize(
    ("kind", "pairs", "wrong"),
    [
        ("image", [image_pair(0), text_pair(1)], "pair 2: this is a pair of texts, and the protocol is for pairs of"),
        ("text", [text_pair(0), image_pair(1)], "pair 2: this is a pair of images, and the protocol is for pairs of"),
    ],
)
def test_a_study_of_other_pairs_is_refused(tmp_path: Path, kind: str, pairs: list[StudyPair], wrong: str) -> None:
    protocol = Protocol.parse(RULES + f"kind: {kind}\n")
    with pytest.raises(InputError, match=wrong):
        Study.create(tmp_path / "study", protocol, pairs)
    assert not (tmp_path / "study").exists()
    study = Study.create(tmp_path / "study", protocol, pairs[:1])
    other = "image" if kind == "text" else "text"
    with pytest.raises(InputError, match=f"is for pairs of {other}s"):
        study.revise(Protocol.parse(RULES.replace("1", "2") + f"kind: {other}\n"))
    assert study.protocol() == protocol
    both = Study.create(tmp_path / "both", Protocol.parse(RULES), pairs)
    assert both.stats().pairs == 2
    for one in (study, both):
        one.close()


def test_shipped_protocols_say_what_they_are_for() -> None:
    kinds = {name: Protocol.load(name).rules.kind for name in Protocol.shipped()}
    assert kinds == {"general": "both", "realness": "image", "brain_mr_plausibility": "image", "report_pair": "text"}


def test_a_protocol_from_before_there_were_kinds_is_the_same_one(tmp_path: Path) -> None:
    """Its hash is that of its text, whatever fields have come since: votes point to it."""
    text = "name: old\nversion: 1\noverlap: 2\n"
    known = hashlib.sha256(text.encode()).hexdigest()
    assert Protocol.parse(text).sha256 == known and Protocol.parse(text).rules.kind == "both"
    study = Study.create(tmp_path / "study", Protocol.parse(text), [text_pair(0)])
    study.close()
    assert Study.open(tmp_path / "study").protocol().sha256 == known


# --- what is said of mistakes ---


def test_every_mistake_gets_a_sentence_with_the_file_the_field_and_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: ''\nversion: one\nkind: video\noverlap: 0\ngold_share: 0.9\nstrength: perhaps\nguidline: x\n"
        "points: [1]\ncriteria:\n  - {name: a}\n  - {name: b, question: q, kind: scale}\n  - 7\n"
    )
    with pytest.raises(ConfigError) as caught:
        Protocol.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert set(said.removeprefix(f"{path}: ").split("; ")) == {
        "name is empty", "it is a text that is not empty",
        "version is 'one'", "it is a whole number from 1",
        "kind is 'video'", "it is image, text or both",
        "overlap is 0",
        "gold_share is 0.9", "it is a number from 0 up to 0.5",
        "strength is 'perhaps'", "it is true or false",
        "there is no field guidline", "did you mean guideline?",
        "points[1] is 1", "it is a text",
        "the field criteria[1].question is missing",
        "criteria[2]: a scale has two anchors or more, and only a scale has anchors",
        "criteria[3] is 7", "it is made of the fields name, question, kind, anchors",
    }  # fmt: skip
    for jargon in ("Input should", "valid", "pydantic", "type=", "Value error"):
        assert jargon not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no fields"),
        ("- a\n", "holds no fields"),
        ("name: x\n", "the field version is missing; it is a whole number from 1"),
        (RULES + "3: x\n", "3 is no name of a field"),
        (RULES + "zzz: x\n", "there is no field zzz; there are name, version, kind, "),
        (RULES + "criteria: all\n", "criteria is 'all'; it is a list of questions, each with a name"),
        (RULES + "budget: many\n", "budget is 'many'; it is a whole number from 1"),
        (RULES + "gold_share: 0.3\nrepeat_share: 0.3\n", "p.yaml: gold_share, repeat_share and aa_share leave"),
    ],
)
def test_mistakes_in_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Protocol.parse(text, "p.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "name: x\nversion: [1\n",
            "line 3, column 1: expected ',' or ']', but got the end of the file"
            " (while parsing a flow sequence that begins in line 2)",
        ),
        ("name: x\nversion: 1: 2\n", "line 2, column 11: mapping values are not allowed here"),
        ("name: x\n\tversion: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("name: x\nversion: \0\n", "line 2, column 10: the character U+0000 may not stand there"),
        ("name: 2024-13-45\n", "month must be in 1..12"),
    ],
)
def test_what_is_no_yaml_is_one_line_with_the_place_and_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    """Lines and columns are counted by hand, from 1, as editors do."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Protocol.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path} is no YAML: {reason}") and "unicode string" not in said and "\n" not in said
    assert " ^" not in said


# --- the page ---


def _table(heading: str) -> list[tuple[str, str, str]]:
    """Field, what may stand there, default: of the table below a heading."""
    text = PAGE.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    found = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", text.split("\n## ")[0].split("\n### ")[0], re.M)
    return [(name, what.strip(), default.strip()) for name, what, default in found]


@pytest.mark.parametrize(("heading", "model"), [("## Fields", Rules), ("### Criteria", Criterion)])
def test_the_page_lists_every_field_with_what_is_allowed_and_its_default(
    heading: str, model: type[Rules] | type[Criterion]
) -> None:
    rows = []
    for name, field in model.model_fields.items():
        default = field.default
        shown = "required" if field.is_required() else "none" if default in ((), None, "") else str(default)
        rows.append((name, allowed(model, name), shown.lower() if isinstance(default, bool) else shown))
    assert _table(heading) == rows


def test_the_worked_example_of_the_page_is_a_protocol_that_uses_every_field() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    rules = Protocol.parse(text).rules
    assert set(Rules.model_fields) - rules.model_fields_set == set()
    assert {criterion.kind for criterion in rules.criteria} == {"prefer", "scale"}
