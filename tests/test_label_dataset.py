"""A synthetic dataset as a source of pairs for raters."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.label import material
from diffalign.errors import InputError
from diffalign.images import to_rgb
from diffalign.study import Protocol, Study
from tests.synthetic import drawn, generated, text_of
from tests.test_label_material import gathered

PROTOCOL = "name: test\nversion: 1\nmin_view_seconds: 0\n"


def test_two_cases_of_a_prompt_are_a_pair(tmp_path: Path) -> None:
    """Prompts A B A B A, A B: A pairs cases 0 2 and 4 5, B pairs 1 3, and case 6 is left without a partner."""
    folder = generated(tmp_path / "set", 7, prompt=lambda number: "ABABAAB"[number]).folder
    found, counts = gathered(folder)
    assert material.kind_of(str(folder)) == "dataset"
    assert [pair.prompt.text for pair in found] == ["A", "B", "A"] and counts.arms == {"drawn": 3}
    first, second, third = found
    for pair, numbers in ((first, (0, 2)), (second, (1, 3)), (third, (4, 5))):
        for side, number in zip((pair.first, pair.second), numbers, strict=True):
            assert side.image is not None and side.image.tobytes() == to_rgb(drawn(number)).tobytes()
            assert side.seed == 1000 + number and side.prompt.attributes["age"] == 20 + number
    assert first.provenance["second"] == {"seed": 1002, "case": "syn-5a5a5a5a-000002"}
    (part,), _ = gathered(folder, count=1)
    assert part in found or part.provenance in [pair.provenance for pair in found]


def test_a_dataset_of_texts_gives_texts(tmp_path: Path) -> None:
    """The stub's texts are asked for by their number, so that no two have a prompt in common, unless it is the same."""
    folder = generated(tmp_path / "set", 4, image=lambda number: None).folder
    with pytest.raises(InputError, match="no two cases of .*set have the same prompt"):
        gathered(folder)
    from diffalign.synthesis.journal import Journal

    journal = Journal(folder / "journal.sqlite", writable=True)
    journal.connection.execute("UPDATE row SET text_prompt = 'row: same'")
    journal.finish()
    found, _ = gathered(folder)
    assert [(pair.first.text, pair.second.text) for pair in found] == [
        (text_of(0), text_of(1)), (text_of(2), text_of(3)),
    ]  # fmt: skip
    assert found[0].prompt.text == "row: same"


def test_a_study_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(PROTOCOL)
    folder = generated(tmp_path / "set", 6, prompt=lambda number: "one").folder
    rules = str(tmp_path / "rules.yaml")
    material.run(tmp_path / "study", rules, "", None, material.Request([str(folder)]))
    study = Study.open(tmp_path / "study")
    try:
        assert Protocol.load(rules).name == "test" and sum(1 for _ in study.pairs()) == 3
    finally:
        study.close()
