"""The findings checker reads any text: right ones score 1, and nothing is gained by saying everything."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import pytest
import torch

from diffalign.errors import InputError
from diffalign.types import Prompt, Reward, Sample
from diffalign.worlds import brain_mr, findings
from rewards.findings_checker import FindingsChecker
from rewards.findings_lexicon import INVENTED, PHRASES
from rewards.registry import load

LEFT = {"plane": "axial", "contrast": "T2", "level": "ventricles", "lesion": "present", "side": "left", "size": "large"}
BACK = {**LEFT, "plane": "sagittal", "contrast": "T1", "level": "midline", "side": "posterior", "size": "small"}
NONE = {"plane": "coronal", "contrast": "FLAIR", "level": "thalamus", "lesion": "none"}
FRONT = {**LEFT, "plane": "coronal", "level": "frontal lobes", "side": "right", "size": "small"}


def score(row: dict[str, str], text: str | None, task: str = "findings") -> tuple[float, dict[str, float]]:
    scores = FindingsChecker()([Sample(Prompt("", attributes={**row, "task": task}), text=text)])
    return float(scores.total[0]), {name: float(part[0]) for name, part in scores.parts.items()}


RIGHT = [
    (LEFT, "findings", "Axial T2 at the ventricles: large left lesion."),
    (LEFT, "findings", "Transverse T2w, ventricular level. Sizeable hyperintensity, left hemisphere. No mass effect."),
    (LEFT, "findings", "At the lateral ventricles an axial T2-weighted slice shows a bulky left-sided lesion."),
    (LEFT, "findings", "AXIAL T2 VENTRICLES LARGE LEFT LESION"),
    (LEFT, "findings", "Axial T2 at the ventricles. There is a lesion. It is large, and on the left, not the right."),
    (LEFT, "findings", "Axial T2, ventricles. Large lesion on the left. The right hemisphere is normal."),
    (LEFT, "findings", "Axial T2, ventricles. Large lesion on the left; no lesion on the right."),
    (LEFT, "findings", "Axial T2, ventricles: large left focus of abnormal signal without oedema, shift or bleeding."),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. No other lesion. Otherwise unremarkable."),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. No evidence of shift, mass effect, or bleeding."),
    (LEFT, "findings", "Axial T2, ventricles. On the left, there is a huge bright spot."),
    (LEFT, "explain", "Near the fluid spaces of your brain there is a big white spot on the left side."),
    (LEFT, "explain", "A spot is by the fluid-filled chambers. It's a large one in the left half. It isn't a tumour."),
    (LEFT, "explain", "At the ventricles we see a large mark on the left. This does not mean that you had a stroke."),
    (BACK, "findings", "Sagittal T1 midline. Tiny hypointense lesion posteriorly."),
    (BACK, "explain", "In the middle of the brain there is a little dark patch towards the back."),
    (BACK, "explain", "From the side, middle of the head. A small area that looks different is in the rear half."),
    (NONE, "findings", "Coronal FLAIR through the thalamus. No lesion."),
    (NONE, "findings", "Coronal FLAIR, thalamic level: no focal lesion, haemorrhage or mass effect."),
    (NONE, "findings", "Coronal fluid-attenuated inversion recovery image of the thalami. Within normal limits."),
    (NONE, "findings", "Coronal FLAIR, thalamus. A lesion is not seen."),
    (NONE, "findings", "Coronal FLAIR, thalamus. No lesion in the left or right hemisphere."),
    (NONE, "explain", "Deep in your head, at the thalamus, nothing unusual was found. All looks as it should."),
    (NONE, "explain", "We looked at the thalamus. There isn't any abnormal spot."),
    (FRONT, "explain", "In the front part of the brain there is a small spot on the right."),
    (FRONT, "explain", "Behind the forehead, a tiny bright lesion was found in the right half of the brain."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "task", "text"), RIGHT, ids=[text[:40] for _, _, text in RIGHT])
def test_right_texts_score_one_in_any_words(row: dict[str, str], task: str, text: str) -> None:
    assert score(row, text, task)[0] == 1.0


# Six facts are asked of a report with a lesion (four without), four of an explanation with one (two without). What is
# invented counts as one more wrong fact: 6 right and 1 invented is 6/7.
WRONG = [
    (LEFT, "findings", "", "0/6"),
    (LEFT, "findings", "   \n", "0/6"),
    (LEFT, "findings", "the the the the the the", "0/6"),
    (LEFT, "findings", "left right large small", "0/6"),
    (LEFT, "findings", "lesion left right large small axial coronal sagittal T1 T2 FLAIR ventricles vertex", "1/6"),
    (LEFT, "findings", "plane=axial; contrast=T2; level=ventricles; lesion=present; side=left; size=large", "0/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large lesion on the left and on the right.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large or small lesion on the left.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. No lesion.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. The brain is normal.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. There may be a large lesion on the left.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. Is there a large lesion on the left?", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. If there were a large left lesion it would be seen.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. A large left lesion cannot be excluded.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. A large left lesion is absent.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. No large left lesion.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. Without a large lesion on the left.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. The left hemisphere is unremarkable.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large lesion, not on the left.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. Lesion on the left. It is not large.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. A medium-sized lesion on the left.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles. A moderate-sized large lesion on the left.", "5/6"),
    (LEFT, "findings", "Axial T2 and FLAIR, ventricles. Large left lesion.", "5/6"),
    (LEFT, "findings", "Axial and coronal T2, ventricles. Large left lesion.", "5/6"),
    (LEFT, "findings", "Axial T2, ventricles and vertex. Large left lesion.", "5/6"),
    (LEFT, "findings", "Axial T2, not at the ventricles. Large left lesion.", "5/6"),
    (LEFT, "findings", "T2 image at the ventricles. Large left lesion.", "5/6"),
    (LEFT, "findings", "Large left lesion.", "3/6"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion with mass effect.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion with swelling and bleeding, likely a tumour.", "6/9"),
    (LEFT, "findings", "Axial T2, ventricles. Large left tumour.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion and a second lesion.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Two large lesions on the left.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesions.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion of 12 mm.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large dark left lesion.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large bright and dark left lesion.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left anterior lesion.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large lesions on both sides.", "5/8"),
    (LEFT, "findings", "Axial T2, ventricles. A 65-year-old man with a large left lesion.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. Large left lesion. Large left lesion. Large left lesion.", "6/8"),
    (LEFT, "findings", "Axial T2, ventricles: large left lesion. The ventricles are normal.", "6/7"),
    (LEFT, "findings", "Axial T2, ventricles. No oedema. No swelling, a large lesion on the right.", "5/6"),
    (LEFT, "explain", "A coronal slice of the fluid spaces shows a large spot on the left.", "4/5"),
    (LEFT, "explain", "There is something on your scan.", "0/4"),
    (LEFT, "explain", "Near the fluid spaces there is a little spot on the right.", "2/4"),
    (BACK, "findings", "Sagittal T1 midline. Small lesion on the left.", "5/7"),
    (BACK, "findings", "Sagittal T1 midline. Small lesion at the front and at the back.", "5/6"),
    (NONE, "findings", "Coronal FLAIR, thalamus.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. Large lesion on the left.", "3/6"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No lesion. A lesion is seen.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No lesion on the left.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No large lesion.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. The brain is not normal.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No lesion, but mild atrophy.", "4/5"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No doubt there is a lesion.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. Possible lesion.", "3/4"),
    (NONE, "findings", "Coronal FLAIR, thalamus. No lesion and no haemorrhage, however there is oedema.", "4/5"),
    (NONE, "explain", "lesion no lesion lesion no lesion thalamus", "1/2"),
    (FRONT, "explain", "In the back part of the brain there is a small spot on the right.", "3/4"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "task", "text", "total"), WRONG, ids=[text[:50] for _, _, text, _ in WRONG])
def test_wrong_missing_and_contradictory_statements_cost(row: dict[str, str], task: str, text: str, total: str) -> None:
    assert score(row, text, task)[0] == pytest.approx(float(Fraction(total)))


def test_it_is_a_reward() -> None:
    checker = load("findings-checker")
    assert isinstance(checker, Reward)
    assert (checker.name, checker.modality, checker.unit, checker.range) == (
        "findings-checker",
        "text",
        "fraction",
        (0.0, 1.0),
    )
    assert checker.higher_is_better
    assert checker([]).total.shape == (0,)


def test_the_parts_say_what_is_wrong() -> None:
    total, parts = score(LEFT, "Axial FLAIR, ventricles. Large lesion on the right with swelling.")
    assert parts == {
        "plane": 1, "contrast": 0, "level": 1, "lesion": 1, "side": 0, "size": 1, "invented": 1, "everything": 0
    }  # fmt: skip
    assert score(LEFT, RIGHT[0][2])[1]["everything"] == 1
    assert total == pytest.approx(4 / 7)


def test_what_need_not_be_said_gains_nothing() -> None:
    """One of four facts is wrong; a right plane and contrast besides leave it at 3/4."""
    plain, _ = score(LEFT, "Near the fluid spaces there is a small spot on the left.", "explain")
    padded, parts = score(
        LEFT, "On this axial T2 slice near the fluid spaces there is a small spot on the left.", "explain"
    )
    assert plain == padded == 0.75
    assert parts["plane"] == parts["contrast"] == 1.0
    _, parts = score(LEFT, "There is a spot.", "explain")
    assert torch.tensor([parts["plane"], parts["contrast"]]).isnan().all()


def test_no_text_is_not_judged_and_the_batch_plays_no_part() -> None:
    prompt = Prompt("", attributes={**LEFT, "task": "findings"})
    texts = [None, "", "Axial T2, ventricles: large left lesion.", "Large left lesion."]
    samples = [Sample(prompt, text=text) for text in texts]
    together = FindingsChecker()(samples).total
    assert together[0].isnan()
    alone = torch.cat([FindingsChecker()([sample]).total for sample in samples])
    assert torch.equal(together.nan_to_num(-1), alone.nan_to_num(-1))
    assert together.dtype == torch.float32


def test_the_row_comes_from_the_attributes_or_from_the_text() -> None:
    asked = findings.prompt(NONE, "findings")
    text = "Coronal FLAIR, thalamus: no lesion."
    for prompt in (asked, Prompt(asked.text), Prompt("", attributes=NONE), Prompt("", attributes={**NONE, "case": 3})):
        assert float(FindingsChecker()([Sample(prompt, text=text)]).total[0]) == 1.0


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt("write something"), "lacks plane, contrast, lesion"),
        (Prompt("x", attributes={"plane": "axial", "contrast": "T1", "lesion": "present"}), "lacks side, size"),
        (Prompt("x", attributes={**LEFT, "plane": "oblique"}), "cannot be checked: plane is 'oblique'"),
    ],
)
def test_a_prompt_without_a_row_is_an_error(prompt: Prompt, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FindingsChecker()([Sample(prompt, text="No lesion.")])


def test_a_row_without_a_level_asks_for_none() -> None:
    row = {name: value for name, value in NONE.items() if name != "level"}
    assert score(row, "Coronal FLAIR. No lesion.")[0] == 1.0
    assert score(row, "Coronal FLAIR at the thalamus. No lesion.")[0] == 0.75


def test_flawless_texts_of_the_grammar_score_one() -> None:
    """All of 800, drawn over rows, tasks and styles."""
    drawn = [findings.example(7 * 10**9 + i) for i in range(800)]
    samples = [
        Sample(one.prompt, text=findings.realise(one.prompt.attributes, i, one.style)) for i, one in enumerate(drawn)
    ]
    scores = FindingsChecker()(samples)
    missed = [sample.text for sample, total in zip(samples, scores.total, strict=True) if total < 1]
    assert not missed


def test_every_flaw_of_the_grammar_is_found_where_it_is() -> None:
    """A text with one flaw loses the part that the flaw is about and, but for a wrong lesion, no other."""
    drawn = [findings.example(8 * 10**9 + i) for i in range(1500)]
    flawed = [one for one in drawn if len(one.flaws) == 1]
    scores = FindingsChecker()([Sample(one.prompt, text=one.text) for one in flawed])
    seen = Counter[str]()
    for i, one in enumerate(flawed):
        flaw = one.flaws[0]
        seen[flaw.kind] += 1
        assert scores.total[i] < 1, (flaw, one.text)
        lost = {name for name in brain_mr.FIELDS if scores.parts[name][i] == 0}
        invented = float(scores.parts["invented"][i])
        if flaw.kind == "invented" or flaw.field == "signal":
            assert invented >= 1, (flaw, one.text)
        elif flaw.field == "lesion":
            assert "lesion" in lost, (flaw, one.text)
        else:
            assert lost == {flaw.field} and invented == 0, (flaw, one.text)
    assert min(seen.values()) > 100 and len(seen) == 3


def test_every_phrase_of_the_lexicon_is_an_expression() -> None:
    """Each alone finds no empty word, and all stand in small letters."""
    for phrases in [*PHRASES.values(), *INVENTED.values()]:
        for phrase in phrases:
            assert re.compile(phrase).fullmatch("") is None
            assert re.sub(r"\\.", "", phrase) == re.sub(r"\\.", "", phrase).lower()
