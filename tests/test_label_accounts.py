"""Accounts, sessions and throttles by themselves, with a clock that the test turns."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, select, update

from apps.label.accounts import Account, Accounts
from apps.label.limits import Throttle, network
from apps.label.login import local
from apps.label.sessions import TRUSTED_SECONDS, Sessions
from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.study import database
from diffalign.study.schema import SessionRow
from tests.label_server import made, text_pairs

GOOD = "correct horse battery"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_file_of_accounts_goes_round(tmp_path: Path) -> None:
    """Names in Unicode's composed form, argon2id, mode 0600, and nothing of the password in the file."""
    path = tmp_path / "users.json"
    accounts = Accounts.load(path)
    accounts.add("Zoe\u0308 <b>", "rater", GOOD)
    accounts.add("eve", "admin", "e\u0301" * 10)
    accounts.save()
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text(encoding="utf-8")
    assert GOOD not in text and text.count("$argon2id$") == 2
    again = Accounts.load(path)
    assert [(found.name, found.role) for found in again.list()] == [("Zo\u00eb <b>", "rater"), ("eve", "admin")]
    for name in ("Zoe\u0308 <b>", "Zo\u00eb <b>", " Zo\u00eb <b> "):
        found = again.verify(name, GOOD)
        assert found is not None and found.role == "rater"
    assert again.verify("eve", "\u00e9" * 10) is not None  # another keyboard's way to write the same
    for name, password in (("eve", GOOD), ("nobody", GOOD), ("eve", ""), ("", ""), ("eve", "x" * 2000)):
        assert again.verify(name, password) is None
    assert os.listdir(tmp_path) == ["users.json"]


def test_a_change_of_the_file_holds_at_once(tmp_path: Path) -> None:
    """Another process removes and adds; the one that serves sees it without being told."""
    path = tmp_path / "users.json"
    mine = Accounts.load(path)
    mine.add("ann", "rater", GOOD)
    mine.save()
    before = mine.get("ann")
    other = Accounts.load(path)
    other.add("ann", "adjudicator", GOOD)
    other.save()
    after = mine.get("ann")
    assert before is not None and after is not None and after.role == "adjudicator"
    assert before.fingerprint != after.fingerprint
    other.remove("ann")
    other.save()
    assert mine.get("ann") is None and mine.verify("ann", GOOD) is None


def test_two_writers_do_not_lose_each_others_accounts(tmp_path: Path) -> None:
    one, two = Accounts.load(tmp_path / "u"), Accounts.load(tmp_path / "u")
    one.add("ann", "rater", GOOD)
    two.add("bob", "rater", GOOD)
    one.save()
    with pytest.raises(RefusedError, match="somebody else"):
        two.save()
    assert [account.name for account in Accounts.load(tmp_path / "u").list()] == ["ann"]


@pytest.mark.parametrize(
    ("name", "role", "password", "says"),
    [
        ("", "rater", GOOD, "1 to 200"),
        ("x" * 201, "rater", GOOD, "1 to 200"),
        ("a\0b", "rater", GOOD, "control"),
        ("a\nb", "rater", GOOD, "control"),
        ("a\ud800", "rater", GOOD, "halves"),
        ("ann", "boss", GOOD, "rater, adjudicator, admin"),
        ("ann", "rater", "ninechars", "10 to 1024"),
        ("ann", "rater", "x" * 1025, "10 to 1024"),
        ("Annabella Long", "rater", "annabella long", "is the name"),
    ],
)
def test_bad_accounts_are_refused(tmp_path: Path, name: str, role: str, password: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Accounts.load(tmp_path / "u").add(name, role, password)  # type: ignore[arg-type]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "u"
    accounts = Accounts.load(path)
    with pytest.raises(NotFoundError, match="no account 'ann'"):
        accounts.remove("ann")
    accounts.add("ann", "rater", GOOD)
    accounts.save()
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        with pytest.raises(RefusedError, match="others can write"):
            Accounts.load(path)
    path.chmod(0o600)
    good = json.loads(path.read_text())
    for text in ("", "[]", "{}", '{"users": 3}', '{"users": {"a": {"role": "rater"}}}', '{"users": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="no file of accounts"):
            Accounts.load(path)
    good["users"]["ann"]["role"] = "root"
    path.write_text(json.dumps(good))
    with pytest.raises(InputError, match="the role of 'ann'"):
        Accounts.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot read"):
        Accounts.load(path)


def test_an_unknown_name_takes_as_long_as_a_wrong_password(tmp_path: Path) -> None:
    """Both hash once. A name that is answered without hashing would be a hundred times quicker."""
    accounts = Accounts.load(tmp_path / "u")
    accounts.add("ann", "rater", GOOD)
    accounts.save()
    accounts.verify("nobody", "wrong password")  # makes the hash that stands for nobody

    def fastest(name: str) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            accounts.verify(name, "wrong password")
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert 0.5 < fastest("nobody") / fastest("ann") < 2


def test_waiting_grows_is_bounded_and_forgotten() -> None:
    """Three free failures, then 1, 2, 4, 8 and never more than 8 s; after the hour nothing of it is left."""
    clock = Clock()
    throttle = Throttle(3, 8, forget=3600, clock=clock)
    waits = []
    for _ in range(9):
        throttle.failed("k")
        waits.append(throttle.wait("k"))
        clock.now += throttle.wait("k")
        assert throttle.wait("k") == 0
    assert waits == [0, 0, 1, 2, 4, 8, 8, 8, 8]
    assert throttle.wait("another") == 0
    throttle.failed("k")
    clock.now += 3601
    assert throttle.wait("k") == 0
    throttle.failed("k")
    assert throttle.wait("k") == 0
    for _ in range(5):
        throttle.failed("k")
    throttle.succeeded("k")
    assert throttle.wait("k") == 0


def test_a_throttle_does_not_grow_without_end() -> None:
    throttle = Throttle(1, 8, keys=100, clock=Clock())
    for i in range(1000):
        throttle.failed(str(i))
    assert sum(throttle.wait(str(i)) > 0 for i in range(1000)) == 100
    for _ in range(5000):  # two to the power of that would be no number
        throttle.failed("k")
    assert throttle.wait("k") == 8


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("not an address", "not an address"),
    ],
)
def test_whom_an_address_stands_for(address: str, key: str) -> None:
    assert network(address) == key


def test_sessions_end_by_age_by_idleness_and_by_logging_out(tmp_path: Path) -> None:
    """Ten hours at most, one hour without a request. The secret itself is nowhere in the database."""
    study, clock = made(tmp_path / "study", text_pairs(1)), Clock()
    hour = 3600.0
    sessions = Sessions(study.engine, 10 * hour, hour, clock)
    ann = Account("ann", "rater", "f" * 64)
    secret = sessions.begin(ann)
    assert len(secret) == 43  # 256 bits
    with database.reading(study.engine) as connection:
        assert secret not in str(connection.execute(select(SessionRow)).all())

    assert sessions.known(secret) is None
    found = sessions.find(secret)
    assert found is not None and (found.name, found.role) == ("ann", "rater") and sessions.known(secret) == found
    assert sessions.find(secret + "x") is None and sessions.find("") is None
    clock.now += hour + 1
    assert sessions.known(secret) is None and sessions.find(secret) is None

    secret, began = sessions.begin(ann), clock.now
    while clock.now - began < 10 * hour - 1:
        found = sessions.find(secret)
        assert found is not None
        if sessions.stale(found):
            sessions.extend(found)
        clock.now += 0.5 * hour
    assert sessions.find(secret) is None and clock.now - began == 10 * hour

    secret = sessions.begin(ann)
    with database.reading(study.engine) as connection:  # what was over is cleared away
        assert len(connection.execute(select(SessionRow)).all()) == 1
    assert sessions.find(secret) is not None
    sessions.end(secret)
    assert sessions.known(secret) is None and sessions.find(secret) is None
    study.close()


def test_what_another_server_ends_is_noticed_soon(tmp_path: Path) -> None:
    study, clock = made(tmp_path / "study", text_pairs(1)), Clock()
    here, there = (Sessions(study.engine, 9999, 9999, clock) for _ in "ab")
    secret = here.begin(Account("ann", "rater", "f" * 64))
    assert here.find(secret) is not None and there.find(secret) is not None
    there.end(secret)
    clock.now += TRUSTED_SECONDS + 0.1
    assert here.known(secret) is None and here.find(secret) is None
    # An extension that comes late brings nothing back.
    secret = here.begin(Account("ann", "rater", "f" * 64))
    found = here.find(secret)
    assert found is not None
    here.end(secret)
    here.extend(found)
    assert here.known(secret) is None and here.find(secret) is None
    with database.writing(study.engine) as connection:
        assert connection.execute(update(SessionRow).values(role="admin")).rowcount == 0
    study.close()


@pytest.mark.parametrize(
    ("target", "goes_to"),
    [
        ("/results", "/results"),
        ("/rate?queue=disputed", "/rate?queue=disputed"),
        ("/rate/", "/rate/"),
        ("//evil.example/rate", "/rate"),
        ("https://evil.example/rate", "/rate"),
        ("https:/rate", "/rate"),
        ("/\\evil.example", "/rate"),
        ("/rate/../../x", "/rate"),
        ("/logout", "/rate"),
        ("javascript:alert(1)", "/rate"),
        ("/rate?a=\r\nSet-Cookie: x=y", "/rate"),
        ('/rate?"><script>', "/rate"),
        ("http://[", "/rate"),
        ("", "/rate"),
        (None, "/rate"),
    ],
)
def test_after_the_login_one_goes_to_our_own_pages_only(target: object, goes_to: str) -> None:
    assert local(target) == goes_to


def test_a_logout_while_a_slow_find_is_under_way_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The find has read the row, then the logout happens, then the find goes on: it may not bring the session back.

    Nobody asked for the session before, so that nothing but the end itself is noted of it.
    """
    study = made(tmp_path / "s", text_pairs(1))
    sessions = Sessions(study.engine, 9999, 9999, lambda: 1000.0)
    secret = sessions.begin(Account("ann", "rater", "f"))
    real = database.reading

    @contextmanager
    def slow(engine: Engine) -> Iterator[Connection]:
        with real(engine) as connection:
            yield connection
        sessions.end(secret)

    monkeypatch.setattr(database, "reading", slow)
    assert sessions.find(secret) is None
    monkeypatch.undo()
    assert sessions.known(secret) is None and sessions.find(secret) is None
    study.close()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"users": []}', '{"users": {"ann": {}}}', '{"users": {"ann": {"role": "rater"}}}', "\x00"]
)
def test_a_damaged_file_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "users.json").write_text(text)
    (tmp_path / "users.json").chmod(0o600)
    with pytest.raises(InputError, match="is no file of accounts, or is damaged: bring it back from a copy") as caught:
        Accounts.load(tmp_path / "users.json")
    assert "Error" not in str(caught.value) and "'password'" not in str(caught.value)
