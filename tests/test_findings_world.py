"""The findings world: rows of brain-mr as prompts, and texts about them, right or wrong as they should be."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from diffalign.errors import ConfigError
from diffalign.worlds import brain_mr, findings, findings_words
from diffalign.worlds.findings import Flaw, Style

LEFT = {"plane": "axial", "contrast": "T2", "level": "ventricles", "lesion": "present", "side": "left", "size": "large"}
NONE = {"plane": "coronal", "contrast": "FLAIR", "level": "thalamus", "lesion": "none"}


def test_a_prompt_is_a_row_and_a_task() -> None:
    asked = findings.prompt(LEFT, "findings")
    row = "row: plane=axial; contrast=T2; level=ventricles; lesion=present; side=left; size=large"
    assert asked.text == f"{row}\ntask: findings\n"
    assert asked.id == "findings-axial-t2-ventricles-large-left"
    assert asked.attributes == {**LEFT, "task": "findings"}
    assert findings.prompt(NONE, "explain").id == "explain-coronal-flair-thalamus-no-lesion"


def test_prompts_are_parsed_back() -> None:
    for row in brain_mr.combinations():
        for task in findings.TASKS:
            asked = findings.prompt(row, task)
            assert findings.parse(asked.text) == asked.attributes
            assert findings.parse(f"  {asked.text.replace('; ', ' ;  ').strip()}") == asked.attributes
    brief = {name: value for name, value in NONE.items() if name != "level"}
    assert findings.parse(findings.prompt(brief, "explain").text) == {**brief, "task": "explain"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "axial T2 brain MRI",
        "row: plane=axial\ntask: findings",
        "row: plane=axial; contrast=T1; lesion=none\ntask: sing",
        "row: plane=axial; contrast=T1; lesion=none\n",
        "row: plane=axial; plane=axial; contrast=T1; lesion=none\ntask: findings",
        "row: plane=axial; contrast=T1; lesion=none; side=left\ntask: findings",
        "row: plane; contrast=T1; lesion=none\ntask: findings",
    ],
)
def test_other_texts_are_not_understood(text: str) -> None:
    assert findings.parse(text) is None


def test_the_split_is_that_of_brain_mr() -> None:
    """102 and 33 rows, two tasks of each: 204 and 66 prompts; both tasks of a row are on its side."""
    train, held_out = findings.prompts("train", 204), findings.prompts("held-out", 66)
    assert len({one.id for one in [*train, *held_out]}) == 270
    assert all(findings.is_held_out(one.attributes) for one in held_out)
    rows = {brain_mr.slug({k: v for k, v in one.attributes.items() if k != "task"}) for one in held_out}
    assert rows == {one.id for one in brain_mr.prompts("held-out", 33)}
    assert [one.id for one in findings.prompts("train", 5)] == [one.id for one in train[:5]]
    assert [one.id for one in findings.prompts("train", 5, seed=1)] != [one.id for one in train[:5]]
    explained = findings.prompts("held-out", 33, task="explain")
    assert {one.attributes["task"] for one in explained} == {"explain"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: findings.prompts("held-out", 67), "has 66"),
        (lambda: findings.prompts("test", 1), "unknown split"),
        (lambda: findings.prompts("train", 1, task="sing"), "unknown task"),
        (lambda: findings.validate({**LEFT, "task": "sing"}), "there are findings, explain"),
        (lambda: findings.validate({"plane": "axial", "task": "explain"}), "lack contrast, lesion"),
        (lambda: Style(jargon=1.5), "jargon is 1.5"),
    ],
)
def test_wrong_questions_are_refused(wrong: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong()  # type: ignore[operator]


def test_texts_are_repeatable_and_many() -> None:
    """1000 draws of each row and task give more than 900 different texts."""
    for row in (LEFT, NONE):
        for task in findings.TASKS:
            facts = {**row, "task": task}
            rng = np.random.default_rng(0)
            styles = [Style(*rng.random(2).tolist()) for _ in range(1000)]
            texts = [findings.realise(facts, seed, style) for seed, style in enumerate(styles)]
            assert len(set(texts)) > 900
            assert texts[7] == findings.realise(facts, 7, styles[7])


def test_style_decides_length_and_words_and_not_what_is_said() -> None:
    """Means over 400 texts: verbosity adds words, jargon adds letters to them, and every right text names the level."""

    def texts(jargon: float, verbosity: float) -> list[str]:
        return [findings.realise({**LEFT, "task": "findings"}, i, Style(jargon, verbosity)) for i in range(400)]

    def length(found: list[str]) -> float:
        return float(np.mean([len(text.split()) for text in found]))

    def letters(found: list[str]) -> float:
        return float(np.mean([len(text) / len(text.split()) for text in found]))

    assert length(texts(0.5, 1.0)) > length(texts(0.5, 0.0)) + 5
    assert letters(texts(1.0, 0.5)) > letters(texts(0.0, 0.5)) + 1
    for jargon in (0.0, 1.0):
        assert all("ventric" in text for text in texts(jargon, 0.5))


@pytest.fixture(scope="module")
def drawn() -> list[findings.Example]:
    return [findings.example(i) for i in range(4000)]


def test_training_texts_are_flawed_as_often_as_stated(drawn: list[findings.Example]) -> None:
    """Of 4000: 10 % twice (deviation 0.47 %), 35 % once (0.75 %); four deviations are allowed."""
    counts = Counter(len(one.flaws) for one in drawn)
    assert abs(counts[1] / 4000 - findings.FLAWED["once"]) < 0.031
    assert abs(counts[2] / 4000 - findings.FLAWED["twice"]) < 0.019
    kinds = Counter(one.flaws[0].kind for one in drawn if len(one.flaws) == 1)
    for kind, share in zip(findings.KINDS, findings.KIND_SHARES, strict=True):
        assert abs(kinds[kind] / counts[1] - share) < 0.06
    assert {one.prompt.attributes["task"] for one in drawn} == set(findings.TASKS)
    assert abs(np.mean([one.prompt.attributes["lesion"] == "present" for one in drawn]) - 0.65) < 0.031
    assert drawn[3] == findings.example(3)
    assert all(not findings.is_held_out(findings.example(i, held_out=False).prompt.attributes) for i in range(50))
    assert all(findings.is_held_out(findings.example(i, held_out=True).prompt.attributes) for i in range(50))


def test_flaws_do_not_depend_on_style(drawn: list[findings.Example]) -> None:
    """Else consistency could only be learned together with a style: means differ by less than 4 of their deviations."""
    for name in ("jargon", "verbosity"):
        clean = [getattr(one.style, name) for one in drawn if not one.flaws]
        flawed = [getattr(one.style, name) for one in drawn if one.flaws]
        spread = 4 * np.sqrt(1 / 12) * np.sqrt(1 / len(clean) + 1 / len(flawed))
        assert abs(np.mean(clean) - np.mean(flawed)) < spread


def test_a_flaw_changes_what_it_is_about() -> None:
    facts = {**LEFT, "task": "findings"}
    plain = Style(0.0, 0.0)
    for seed in range(40):
        assert " left" in findings.realise(facts, seed, plain).lower()
        assert re.search(r"\bright", findings.realise(facts, seed, plain, [Flaw("wrong", "side")]).lower())
        missing = findings.realise(facts, seed, plain, [Flaw("missing", "side")]).lower()
        assert not re.search(r"\b(left|right)", missing)
        dark = findings.realise(facts, seed, plain, [Flaw("wrong", "signal")]).lower()
        assert any(word in dark for word in findings_words.SIGNAL["dark"][0])
        invented = findings.realise(facts, seed, plain, [Flaw("invented")])
        assert any(sentence in invented for sentence in findings_words.INVENTED[0])


def test_the_reference_length_is_that_of_right_texts() -> None:
    """Means of 32 texts: explanations are longer than reports, and a lesion takes words; 5 to 50 words in all."""
    lengths = {
        (row["lesion"], task): findings.reference_words({**row, "task": task})
        for row in (LEFT, NONE)
        for task in findings.TASKS
    }
    assert all(5 < length < 50 for length in lengths.values())
    assert lengths["present", "explain"] > lengths["present", "findings"] > lengths["none", "findings"]
