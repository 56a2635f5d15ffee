"""What ``inspect`` sees when somebody went behind the study's back; files; shipped protocols."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.preferences import Table, write
from diffalign.study import Answer, Protocol, Study, StudyPair
from diffalign.study.schema import EventRow
from diffalign.types import Prompt, Sample
from tests.studies import RULES, claimed, made, rows, text_pair, vote_all


def worked(folder: Path) -> Study:
    """A study with votes, an undo, a skip, a verdict."""
    study = made(folder, pairs=3, more="overlap: 2\ngold_share: 0.3\n", gold=2, raters="abc")
    study.skip("a", claimed(study, "a").token)
    vote_all(study, "ab")
    back = study.undo("a")
    study.vote("a", back.token, Answer("left", comment="after all"))
    verdict = study.turn("c", "disputed").now
    assert verdict is not None
    study.vote("c", verdict.token, Answer("tie_good"), "disputed")
    return study


def failures(study: Study) -> dict[str, str]:
    return {finding.what: finding.detail for finding in study.inspect() if not finding.ok}


def behind(study: Study, *statements: str) -> None:
    """As somebody does who has the file: the triggers are dropped first."""
    with sqlite3.connect(study.folder / "study.sqlite") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount > 0
    connection.close()


def test_a_study_that_was_left_alone_is_in_order(tmp_path: Path) -> None:
    study = worked(tmp_path)
    assert not failures(study)
    found = {finding.what: finding.detail for finding in study.inspect()}
    last = rows(study, EventRow)[-1]
    assert found["event chain"] == f"Unbroken up to event {last.id}, whose hash is {last.hash}."
    assert found["gold pairs"].startswith("2 pairs")


TAMPERING: dict[str, tuple[str, str]] = {
    "choice": ("UPDATE vote SET choice = 'tie_bad' WHERE id = 1", "event chain"),
    "comment": ("UPDATE vote SET comment = '\"\"' WHERE comment LIKE '%after all%'", "event chain"),
    "time": ("UPDATE vote SET received_at = received_at - 1 WHERE id = 2", "event chain"),
    "side": ("UPDATE assignment SET first_is_left = NOT first_is_left WHERE id = 2", "event chain"),
    "rater": ("UPDATE assignment SET rater_id = 3 WHERE id = 1", "event chain"),
    "event": ("UPDATE event SET at = at + 1 WHERE id = 6", "event chain"),
    "reason": ("UPDATE event SET data = '{\"reason\": \"x\"}' WHERE kind = 'skipped'", "event chain"),
    "removed event": ("DELETE FROM event WHERE id = 6", "event chain"),
    "last event": ("DELETE FROM event WHERE id = (SELECT max(id) FROM event)", "event chain"),
    "arm": ("UPDATE sample SET arm = '\"other\"' WHERE id = 1", "pairs"),
    "turned pair": ("UPDATE pair SET first_id = second_id, second_id = first_id WHERE id = 1", "pairs"),
    "protocol": ("UPDATE protocol SET text = replace(text, 'overlap: 2', 'overlap: 3')", "protocols"),
    "taken": ("UPDATE pair SET taken = taken + 1 WHERE id = 1", "counts"),
    "tally": ("UPDATE pair SET for_first = 5 WHERE id = 1", "counts"),
    "contest": ("UPDATE contest SET given = given - 1", "counts"),
    "state": ("UPDATE assignment SET state = 'skipped' WHERE id = 2", "votes"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_inspect_finds(tmp_path: Path, name: str) -> None:
    statement, where = TAMPERING[name]
    study = worked(tmp_path)
    behind(study, statement)
    assert where in failures(study)


def test_inspect_finds_a_vote_that_no_event_tells_of(tmp_path: Path) -> None:
    """A whole row slipped in."""
    study = worked(tmp_path)
    columns = "choice, strength, answers, points, comment, shown_at, decided_at, received_at, protocol_sha256"
    behind(
        study,
        f"INSERT INTO vote (assignment_id, revision, {columns}) SELECT id, 0, {columns} FROM"
        f" (SELECT {columns} FROM vote WHERE id = 1), (SELECT id FROM assignment WHERE state = 'skipped' LIMIT 1)",
    )
    assert "No event" in failures(study)["event chain"]


def test_inspect_finds_a_damaged_database_page(tmp_path: Path) -> None:
    study = worked(tmp_path)
    study.close()
    with sqlite3.connect(study.folder / "study.sqlite") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pair_queue'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (study.folder / "study.sqlite").open("r+b") as file:
        file.seek((root - 1) * size + size - 16)
        file.write(b"\xff" * 16)
    assert "SQLite finds damage" in failures(Study.open(study.folder))["database"]


def changed(path: Path) -> None:
    path.write_bytes(b"something else")


def linked(path: Path) -> None:
    """To a copy of the same content: what is behind a link can change any time."""
    path.rename(path.with_name("kept"))
    path.symlink_to(path.with_name("kept"))


def folder_linked(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))


def piped(path: Path) -> None:
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "lacks its file"),
        (changed, "was changed, or is damaged"),
        (linked, "links are not followed"),
        (folder_linked, "links are not followed"),
        (piped, "is no file"),
    ],
)
def test_inspect_finds_a_file(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    study = made(tmp_path, pairs=1)
    paths = [path for path in (study.folder / "files").rglob("*") if path.is_file()]
    damage(paths[0])
    assert message in failures(study)["files"]
    with pytest.raises((InputError, NotFoundError), match=message):
        study.files.get(paths[0].name)


def test_the_files_may_lie_on_another_disk(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=1)
    (study.folder / "files").rename(tmp_path / "disk")
    (study.folder / "files").symlink_to(tmp_path / "disk")
    assert not failures(study)


# --- protocols ---


@pytest.mark.parametrize("name", ["brain_mr_plausibility", "general", "realness", "report_pair"])
def test_a_shipped_protocol_starts_a_study_without_gold(tmp_path: Path, name: str) -> None:
    """Its shares of gold, repeats and A/A pairs are small and not 0; without gold pairs none is asked."""
    protocol = Protocol.load(name)
    rules = protocol.rules
    assert rules.name == name and len(rules.guideline) > 500 and rules.overlap >= 2
    assert all(0 < share <= 0.1 for share in (rules.gold_share, rules.repeat_share, rules.aa_share))
    for word in ('"both good"', '"both bad"', '"cannot judge"'):
        assert word in rules.guideline
    pairs = [text_pair(i) for i in range(20)] if rules.kind == "text" else material(20)
    study = Study.create(tmp_path / "study", protocol, pairs)
    study.add_rater("a")
    while (now := study.turn("a").now) is not None:
        criteria = {c.name: "tie" if c.kind == "prefer" else {"left": 1, "right": 2} for c in rules.criteria}
        study.vote("a", now.token, Answer("left", criteria=criteria))
    found = {finding.what: finding for finding in study.inspect()}
    assert all(finding.ok for finding in found.values())
    assert found["gold pairs"].detail.startswith("None was given")
    assert found["shares"].detail.startswith(f"The protocol has gold_share {rules.gold_share:g}, but")
    assert any("gold_share" in note for note in study.stats().notes)


def material(count: int) -> list[StudyPair]:
    def sample(asked: Prompt, value: int) -> Sample:
        return Sample(asked, image=Image.new("RGB", (8, 8), (value, value, 0)))

    prompts = [Prompt(f"prompt {i}") for i in range(count)]
    return [StudyPair(p, sample(p, i), sample(p, 100 + i), "base", "tuned") for i, p in enumerate(prompts)]


def test_the_clinicians_protocol_asks_what_the_clinician_reward_is_fitted_to(tmp_path: Path) -> None:
    """The names of the recipe's criteria, as preferences, so that an export feeds `reward fit` as it is."""
    import yaml

    recipe = Path(__file__).parent.parent / "apps" / "recipes" / "brain-mr-clinician.yaml"
    wanted = yaml.safe_load(recipe.read_text())["fit"]["criteria"]
    rules = Protocol.load("brain_mr_plausibility").rules
    assert [(c.name, c.kind) for c in rules.criteria] == [(name, "prefer") for name in wanted]
    study = Study.create(tmp_path / "study", Protocol.load("brain_mr_plausibility"), material(6))
    study.add_rater("a")
    vote_all(study, "a", criteria=dict.fromkeys(wanted, "right"), shown_at=1.0, decided_at=9.0)
    write(tmp_path / "pairs.parquet", study.export())
    assert {p.criterion for p in Table(tmp_path / "pairs.parquet")} == {"overall", *wanted}


def test_a_protocol_is_loaded_by_name_or_file(tmp_path: Path) -> None:
    assert set(Protocol.shipped()) == {"brain_mr_plausibility", "general", "realness", "report_pair"}
    (tmp_path / "mine.yaml").write_text(RULES)
    assert Protocol.load(tmp_path / "mine.yaml") == Protocol.load(str(tmp_path / "mine.yaml")) == Protocol.parse(RULES)
    with pytest.raises(NotFoundError, match="there is no protocol nothing; give a file, or one of brain_mr"):
        Protocol.load("nothing")
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        Protocol.load(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="longer than"):
        Protocol.load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random_share: 0.2\n", "random_share is 0.2; it is a number from 0.3 up to 1"),
        ("budget: 0\n", "budget is 0"),
        ("precision: 0\n", "precision is 0; it is a number above 0"),
        ("points: [a, a]\n", "points have different labels"),
        ("points: ['']\n", "none is empty"),
        ("criteria_required: true\n", "there are no criteria"),
        ("min_view_seconds: -1\n", "min_view_seconds is -1; it is a number from 0 up to 60"),
    ],
)
def test_rules_that_cannot_be_kept(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Protocol.parse(RULES + text)
