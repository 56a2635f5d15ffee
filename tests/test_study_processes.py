"""The study store under several processes, under kill -9, and on a real PostgreSQL server."""

from __future__ import annotations

import getpass
import importlib.util
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import func, select

from diffalign.errors import NotFoundError, RefusedError
from diffalign.study import Answer, Protocol, Study, StudyPair, database
from diffalign.study.schema import AssignmentRow, PairRow, VoteRow
from diffalign.types import Prompt, Sample

ROOT = Path(__file__).resolve().parent.parent
WORKER = """
import random, sys
from diffalign.errors import RefusedError
from diffalign.study import Answer, Study
folder, rater, seed, url, ends = sys.argv[1:]
study = Study.open(folder, url or None)
chance = random.Random(int(seed))
print("ready", flush=True)
misses = 0
while misses < 3:
    assignment = study.claim(rater)
    if assignment is None:
        if ends == "yes":
            break
        study.undo(rater)
        continue
    try:
        if chance.random() < 0.1:
            study.skip(rater, assignment.token)
        else:
            print(study.vote(rater, assignment.token, Answer(chance.choice(["left", "right", "tie_good"]))), flush=True)
    except RefusedError:
        print("refused", flush=True)
"""


def start(study: Path, rater: str, seed: int, url: str = "", ends: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(study), rater, str(seed), url, "yes" if ends else "no"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def material(count: int) -> Iterator[StudyPair]:
    for i in range(count):
        asked = Prompt(f"prompt {i}")
        yield StudyPair(asked, Sample(asked, text=f"one {i}"), Sample(asked, text=f"two {i}"), "base", "tuned")


def made(folder: Path, pairs: int, overlap: int, raters: str, url: str | None = None) -> Study:
    rules = Protocol.parse(f"name: test\nversion: 1\noverlap: {overlap}\n")
    study = Study.create(folder, rules, material(pairs), database_url=url)
    for rater in raters:
        study.add_rater(rater)
    return study


def check_nothing_lost_or_doubled(study: Study, acknowledged: list[int], overlap: int) -> None:
    with database.reading(study.engine) as connection:
        votes = set(connection.scalars(select(VoteRow.id).where(VoteRow.undoes.is_(None))))
        active = select(AssignmentRow.pair_id, AssignmentRow.rater_id).where(AssignmentRow.state.in_(("open", "done")))
        given = Counter(tuple(row) for row in connection.execute(active))
        taken = dict(tuple(row) for row in connection.execute(select(PairRow.id, PairRow.taken)))  # type: ignore[misc]
    assert len(acknowledged) == len(set(acknowledged))
    assert set(acknowledged) <= votes
    assert max(given.values()) == 1
    per_pair = Counter(pair for pair, _ in given)
    assert all(taken[pair] == per_pair[pair] <= overlap for pair in taken)


def hammer(study: Study, raters: str, url: str = "") -> list[list[str]]:
    """One process per letter; a letter that stands twice is a rater with two windows."""
    workers = [start(study.folder, rater, seed, url) for seed, rater in enumerate(raters)]
    said = [worker.communicate(timeout=240)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return said


def check_hammered(study: Study, said: list[list[str]], pairs: int) -> None:
    numbers = [int(word) for words in said for word in words if word.isdigit()]
    check_nothing_lost_or_doubled(study, numbers, overlap=2)
    assert len(numbers) == 2 * pairs
    assert len(list(study.export())) == 2 * pairs


def test_processes_at_once_share_the_work_exactly(tmp_path: Path) -> None:
    """Four raters, one of them in two windows, 20 pairs of overlap 2: 40 votes, no more and no less."""
    study = made(tmp_path / "study", 20, 2, "abcd")
    said = hammer(study, "abcdd")
    check_hammered(study, said, 20)


def killed_while_voting(folder: Path, rounds: int) -> None:
    study = made(folder, 4, 2, "ab")
    study.close()
    chance = random.Random(0)
    acknowledged: list[int] = []
    for number in range(rounds):
        worker = start(folder, "ab"[number % 2], number, ends=False)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.4))
        worker.send_signal(signal.SIGKILL)
        # A line that the kill cut short was not read by anybody.
        lines = worker.stdout.read().split("\n")[:-1]
        worker.wait()
        acknowledged += [int(line) for line in lines if line.isdigit()]
        with sqlite3.connect(folder / "study.sqlite") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        again = Study.open(folder)
        check_nothing_lost_or_doubled(again, acknowledged, overlap=2)
        again.close()
    assert len(acknowledged) > rounds


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_kill_loses_no_acknowledged_vote(tmp_path: Path) -> None:
    killed_while_voting(tmp_path / "study", 4)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_fifty_kills_lose_no_acknowledged_vote(tmp_path: Path) -> None:
    killed_while_voting(tmp_path / "study", 50)


def test_left_and_right_in_the_same_moment_are_one_vote(tmp_path: Path) -> None:
    """Ten threads with the same assignment: one vote, nine refusals."""
    study = made(tmp_path / "study", 3, 1, "a")
    assignment = study.claim("a")
    assert assignment is not None
    barrier, results = threading.Barrier(10), list[str]()

    def press(choice: str) -> None:
        barrier.wait()
        try:
            study.vote("a", assignment.token, Answer(choice))  # type: ignore[arg-type]
            results.append("kept")
        except RefusedError:
            results.append("refused")

    threads = [threading.Thread(target=press, args=(choice,)) for choice in ["left", "right"] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(results) == {"kept": 1, "refused": 9}
    with database.reading(study.engine) as connection:
        assert connection.scalar(select(func.count()).select_from(VoteRow)) == 1


def test_the_command_line_does_not_import_the_database_library() -> None:
    code = "import sys, apps.cli; sys.exit(bool({'sqlalchemy', 'alembic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_process_that_serves_a_study_loads_no_large_library() -> None:
    """Who claims a pair, and who starts again after a crash, waits for none."""
    code = "import sys, diffalign.study; sys.exit(bool({'torch', 'pyarrow', 'pandas', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- PostgreSQL ---


def server_programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian keeps out of the path."""
    found = shutil.which("pg_ctl")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or ([Path(found).resolve().parent] if found else [])
    return folders[-1] if folders else None


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database of a server that is started for these tests."""
    programs = server_programs()
    missing = "PostgreSQL is not installed (Debian: apt-get install postgresql)" if programs is None else ""
    if importlib.util.find_spec("psycopg") is None:
        missing = "the package psycopg is not installed (pip install 'diffalign[postgresql]')"
    if missing or programs is None:
        if "postgresql" in os.environ.get("DIFFALIGN_TEST_REQUIRE", ""):
            pytest.fail(f"{missing}, and DIFFALIGN_TEST_REQUIRE asks for its tests")
        pytest.skip(missing)
    # The server refuses to run as root; Debian's package brings a user for it.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path("/tmp") / f"diffalign-pg-{os.getpid()}"
    folder.mkdir(mode=0o700)
    if user:
        shutil.chown(folder, user)
    run = lambda *words: subprocess.run(  # noqa: E731
        words, user=user, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
    )
    data, name = folder / "data", user or getpass.getuser()
    try:
        run(str(programs / "initdb"), "-D", str(data), "-U", name, "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
        run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://{name}@/postgres?host={folder}"
        finally:
            run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def another_database(url: str, *settings: str) -> Iterator[str]:
    """The URL of one more database of that server, with defaults of its own."""
    name = f"d{random.getrandbits(40):x}"
    admin = database.connect(url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        for setting in settings:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET {setting}")
    try:
        yield url.replace("/postgres?", f"/{name}?")
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        admin.dispose()


def test_a_server_with_lax_defaults(postgresql: str, tmp_path: Path) -> None:
    """Commits that need not be on the disk, and a level by which all but one of those who waited would fail."""
    lax = ("default_transaction_isolation = 'repeatable read'", "synchronous_commit = off")
    with another_database(postgresql, *lax) as url:
        study = made(tmp_path / "study", 16, 2, "abcd", url)
        with database.writing(study.engine) as connection:
            for name, wanted in (("transaction_isolation", "read committed"), ("synchronous_commit", "on")):
                assert connection.exec_driver_sql(f"SHOW {name}").scalar_one() == wanted
        with database.reading(study.engine) as connection:
            assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "repeatable read"
        with database.writing(study.engine) as connection:  # after the rollback that a returned connection gets
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
        with ThreadPoolExecutor(4) as pool:
            numbers = [number for done in pool.map(lambda rater: voted(study, rater), "abcd") for number in done]
        check_nothing_lost_or_doubled(study, numbers, overlap=2)
        assert len(numbers) == 32
        study.close()


def voted(study: Study, rater: str) -> list[int]:
    """The numbers of all votes of a rater, from one turn to the next."""
    turn, numbers = study.turn(rater), list[int]()
    while turn.now is not None:
        number, turn = study.vote_and_turn(rater, turn.now.token, Answer("left"))
        numbers.append(number)
    return numbers


def test_stricter_settings_of_a_server_stay(postgresql: str) -> None:
    with another_database(postgresql, "synchronous_commit = remote_apply") as url:
        engine = database.connect(url)
        with database.writing(engine) as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "remote_apply"
        engine.dispose()


def test_a_study_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    """A study that cannot start leaves nothing behind; then the same hammering as on SQLite; the record is closed."""
    with pytest.raises(Exception, match="a study needs a pair"):
        made(tmp_path / "study", 0, 2, "", postgresql)
    study = made(tmp_path / "study", 20, 2, "abcd", postgresql)
    with pytest.raises(NotFoundError, match="give its URL"):
        Study.open(tmp_path / "study")
    with pytest.raises(RefusedError, match=r"has a study already .* was never made, .*DROP SCHEMA"):
        made(tmp_path / "other", 1, 1, "", postgresql)
    with pytest.raises(RefusedError, match="pg_dump"):
        study.backup(tmp_path / "copy")
    said = hammer(study, "abcdd", postgresql)
    check_hammered(study, said, 20)
    undone = study.undo("a")
    study.vote("a", undone.token, Answer("left", comment="zero\0 and broken \ud800"))
    assert any(p.provenance.get("comment") == "zero\0 and broken \ud800" for p in study.export())
    found = study.stats()
    assert found.complete == 20 and found.rankings[0].ranking is not None
    with study.engine.connect() as connection, pytest.raises(Exception, match="only added"):
        connection.exec_driver_sql("DELETE FROM vote")
    study.close()
