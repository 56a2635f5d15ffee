"""The commands that make, serve, and look after a study: what they hand on, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from apps.cli import main
from diffalign.study import Study
from tests.studies import made


def diffalign(*words: object) -> Result:
    return CliRunner().invoke(main, ["label", *map(str, words)])


def protocol(folder: Path, more: str) -> Path:
    path = folder / "protocol.yaml"
    path.write_text(f"name: test\nversion: 2\n{more}")
    return path


def pairs(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "text_0": "a", "text_1": "b"}) + "\n" for i in range(3)))
    return path


def test_a_revision_says_what_the_study_does_not_have(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.close()
    done = diffalign("revise", study.folder, "--protocol", protocol(tmp_path, "aa_share: 0.1\n"))
    assert done.exit_code == 0 and "note: The protocol has aa_share 0.1, but the study has no pairs" in done.output
    said = diffalign("stats", study.folder)
    assert "The protocol has aa_share 0.1" in said.output
    assert "The protocol has aa_share 0.1" in diffalign("doctor", study.folder).output


@pytest.mark.parametrize(("share", "said"), [(0.1, True), (0, False)])
def test_init_says_that_gold_is_wanted_and_none_was_given(tmp_path: Path, share: float, said: bool) -> None:
    rules = protocol(tmp_path, f"gold_share: {share}\n")
    done = diffalign("init", tmp_path / "study", "--from", pairs(tmp_path), "--protocol", rules)
    assert done.exit_code == 0, done.output
    assert ("gold_share 0.1, but there are no gold pairs: none is asked" in done.output) == said


def test_the_name_of_the_folder_is_not_shown_to_raters(tmp_path: Path) -> None:
    """It may say what is compared."""
    done = diffalign(
        "init", tmp_path / "dpo-beats-base", "--from", pairs(tmp_path), "--protocol", protocol(tmp_path, "")
    )
    assert done.exit_code == 0, done.output
    study = Study.open(tmp_path / "dpo-beats-base")
    assert study.title == ""
    study.close()


@pytest.mark.parametrize(
    ("words", "hours"), [((), (12, 2)), (("--hours", 8), (8, 2)), (("--hours", 3, "--idle-hours", 1), (3, 1))]
)
def test_how_long_a_login_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], hours: tuple[int, int]
) -> None:
    from apps.label import serve

    given: dict[str, Any] = {}
    monkeypatch.setattr(serve, "run", lambda *_, **options: given.update(options))
    done = diffalign("serve", tmp_path, *words)
    assert done.exit_code == 0, done.output
    assert given["hours"] == hours
    assert diffalign("serve", tmp_path, "--hours", 0).exit_code == 2
