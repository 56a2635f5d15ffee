"""Studies that older releases wrote: migrated with all that is in them, after a backup."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from click.testing import CliRunner, Result

from apps.cli import main
from diffalign.errors import InputError, RefusedError
from diffalign.study import Answer, Study, database
from diffalign.study.schema import AssignmentRow, Base, ContestRow, EventRow, PairRow, VoteRow
from tests.older_studies import COMMENT, older
from tests.studies import made, rows
from tests.test_study_processes import another_database, postgresql

__all__ = ["postgresql"]


def check_migrated(study: Study) -> None:
    """By hand from ``older``: pair 1 has one vote each way, pair 2 a tie and a vote that judges nothing."""
    assert database.revision(study.engine) == database.revisions()[-1]
    with database.reading(study.engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert study.title == "an old one"
    pairs = [(p.taken, p.for_first, p.for_second, p.ties, p.contest_id) for p in rows(study, PairRow)]
    assert pairs == [(2, 1, 1, 0, 1), (2, 0, 0, 1, 1), (1, 0, 0, 0, None)]
    (contest,) = rows(study, ContestRow)
    assert (contest.first_arm, contest.second_arm) == ("base", "tuned")
    assert (contest.given, contest.for_first, contest.for_second, contest.ties) == (4, 1, 1, 1)
    ways = [(a.chosen, a.adjudication) for a in rows(study, AssignmentRow)]
    assert ways == [("random", False)] * 2 + [("planned", False)] + [("random", False)] * 2 + [("planned", False)]
    assert {vote.comment for vote in rows(study, VoteRow)} == {COMMENT}
    found = {finding.what: finding for finding in study.inspect()}
    assert all(finding.ok for finding in found.values()), found
    assert "Events up to 14 were chained when the study was migrated" in found["event chain"].detail
    assert len(list(study.export())) == 3 and study.stats().disputed == (1,)
    undone = study.undo("a")  # work goes on, and the new events continue the chain
    study.vote("a", undone.token, Answer("right"))
    assert all(finding.ok for finding in study.inspect())
    assert [event.kind for event in rows(study, EventRow)][-3:] == ["chained", "undone", "voted"]


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_an_older_study_is_migrated_after_a_backup(tmp_path: Path, revision: str) -> None:
    folder = older(tmp_path / "study", revision)
    study = Study.open(folder)
    check_migrated(study)
    study.close()
    (kept,) = (folder / "backups").iterdir()
    with sqlite3.connect(kept) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
        assert connection.execute("SELECT count(*) FROM vote").fetchone() == (8,)
    connection.close()
    with sqlite3.connect(folder / "study.sqlite") as connection:
        for change in ("UPDATE event SET kind = 'x'", "DELETE FROM event", "UPDATE vote SET choice = 'left'"):
            with pytest.raises(sqlite3.IntegrityError, match="only added"):
                connection.execute(change)
    connection.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    """A table that is in the way: the migration stops in the middle, and the study is as it was."""
    folder = older(tmp_path / "study", "0002")
    with sqlite3.connect(folder / "study.sqlite") as connection:
        connection.execute("CREATE TABLE contest (id INTEGER)")
    connection.close()
    with pytest.raises(Exception, match="contest already exists"):
        Study.open(folder)
    with sqlite3.connect(folder / "study.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'session'").fetchall()
        connection.execute("DROP TABLE contest")
    connection.close()
    check_migrated(Study.open(folder))


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    study = made(tmp_path)
    with database.reading(study.engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert database.revision(study.engine) == database.revisions()[-1]


def test_a_newer_study_is_refused_and_left_alone(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.close()
    path = study.folder / "study.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="newer release"):
        Study.open(study.folder)
    assert path.read_bytes() == before


def diffalign(*words: str) -> Result:
    return CliRunner().invoke(main, ["label", *words])


def test_the_command_upgrades_a_study_in_its_folder(tmp_path: Path) -> None:
    folder = older(tmp_path / "study", "0002")
    done = diffalign("upgrade", str(folder))
    assert done.exit_code == 0, done.output
    (kept,) = (folder / "backups").iterdir()
    newest = database.revisions()[-1]
    assert f"has the schema {newest} now (before: 0002)" in done.output and str(kept) in done.output
    again = diffalign("upgrade", str(folder))
    assert again.exit_code == 0 and f"has the schema {newest} already" in again.output
    assert len(list((folder / "backups").iterdir())) == 1
    check_migrated(Study.open(folder))


def test_the_study_of_another_folder_is_not_migrated(tmp_path: Path) -> None:
    """Whose database it is must be known before anything is changed in it."""
    folder = older(tmp_path / "study", "0002")
    known = (folder / "study.json").read_text()
    (folder / "study.json").write_text(known.replace("u" * 32, "v" * 32))
    with pytest.raises(InputError, match="belongs to another study"):
        Study.open(folder)
    assert not (folder / "backups").exists()
    with sqlite3.connect(folder / "study.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
    connection.close()
    (folder / "study.json").write_text(known)
    check_migrated(Study.open(folder))


@pytest.fixture
def empty_database(postgresql: str) -> Iterator[str]:
    """A database of its own, since the others in this file's server hold studies already."""
    with another_database(postgresql) as url:
        yield url


def test_the_command_upgrades_a_study_on_postgresql_once(empty_database: str, tmp_path: Path) -> None:
    """Only after a backup; two who do it at once wait for each other, and the second finds nothing to do."""
    folder = older(tmp_path / "study", "0002", empty_database)
    refused = diffalign("stats", str(folder), "--database", empty_database)
    assert refused.exit_code == 2 and f"label upgrade {folder} --backed-up" in " ".join(refused.output.split())
    assert diffalign("upgrade", str(folder), "--database", empty_database).exit_code == 2
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: Study.upgrade(folder, empty_database, backed_up=True), range(2)))
    assert {one.after for one in done} == {database.revisions()[-1]} and done[0].backup is None
    again = diffalign("upgrade", str(folder), "--database", empty_database, "--backed-up")
    assert again.exit_code == 0 and "nothing was changed" in again.output
    study = Study.open(folder, empty_database)
    check_migrated(study)
    study.close()


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_an_older_study_on_postgresql(empty_database: str, tmp_path: Path, revision: str) -> None:
    folder = older(tmp_path / "study", revision, empty_database)
    command = re.escape(f"pg_dump, and then run `diffalign label upgrade {folder} --backed-up`")
    with pytest.raises(RefusedError, match=command):
        Study.open(folder, empty_database)
    study = Study.open(folder, empty_database, backed_up=True)
    check_migrated(study)
    study.close()
