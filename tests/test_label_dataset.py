"""A synthetic dataset as a source of pairs for raters."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from apps.cli import main
from apps.label import material
from diffalign.errors import InputError
from diffalign.images import to_rgb
from diffalign.study import Answer, Study
from diffalign.synthesis.journal import Journal
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
    assert part.provenance in [pair.provenance for pair in found]


def test_a_dataset_of_texts_gives_texts(tmp_path: Path) -> None:
    """Each of its texts is asked for by its number; then all are asked for alike."""
    folder = generated(tmp_path / "set", 4, image=lambda number: None).folder
    with pytest.raises(InputError, match=r"no two cases of .*set have the same prompt"):
        gathered(folder)
    journal = Journal(folder / "journal.sqlite", writable=True)
    journal.connection.execute("UPDATE row SET text_prompt = 'row: same'")
    journal.finish()
    found, _ = gathered(folder)
    assert [(pair.first.text, pair.second.text) for pair in found] == [
        (text_of(0), text_of(1)), (text_of(2), text_of(3)),
    ]  # fmt: skip
    assert found[0].prompt.text == "row: same"


def test_votes_on_a_dataset_name_its_cases(tmp_path: Path) -> None:
    """The command makes a study of three pairs; each exported vote says which case and seed is which."""
    (tmp_path / "rules.yaml").write_text(PROTOCOL)
    folder = generated(tmp_path / "set", 6, prompt=lambda number: "one").folder
    command = ["label", "init", str(tmp_path / "study"), "--from", str(folder)]
    done = CliRunner().invoke(main, [*command, "--protocol", str(tmp_path / "rules.yaml")])
    assert done.exit_code == 0 and "3 to judge" in done.output, done.output
    study = Study.open(tmp_path / "study")
    study.add_rater("ann")
    while (now := study.claim("ann")) is not None:
        study.vote("ann", now.token, Answer("left"))
    sides = [vote.provenance[side] for vote in study.export() for side in ("first", "second")]
    study.close()
    named = [(side["case"], side["seed"]) for side in sides if isinstance(side, dict)]
    assert sorted(named) == [(f"syn-5a5a5a5a-{number:06d}", 1000 + number) for number in range(6)]
