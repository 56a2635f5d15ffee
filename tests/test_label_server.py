"""The JSON interface of the labelling app over real HTTP: saved means saved, and one assignment is one vote."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import httpx
import pytest
from sqlalchemy import select

from diffalign.study import Study, StudyPair, database
from diffalign.study.schema import AssignmentRow, EventRow, RaterRow, VoteRow
from diffalign.types import Prompt, Sample
from tests.label_server import LEAN, Server, image_pairs, made, quick_protocol, serving, text_pairs

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}} ${7*7} {%raw%} #{x} <%= x %>",
    "'; DROP TABLE vote; -- \" OR 1=1", "=cmd|' /C calc'!A0", "@SUM(1)", "zero\0byte", "\u202eturned\u2066 round\u2069",
    "broken \ud800 half", "\udfff", "\x1b[31mred\x07", "a\r\nSet-Cookie: x=y", "\ufeffmark", "😀 e\u0301", " \t ",
)  # fmt: skip
PEOPLE = {"ann": "rater", "bob": "rater", "jo": "adjudicator", "eve": "admin"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "study"
    scale = {"name": "real", "question": "How real?", "kind": "scale", "anchors": ["not at all", "a little", "very"]}
    criteria = [{"name": "sharp", "question": "Which is sharper?"}, scale]
    rules = quick_protocol(overlap=2, criteria=json.dumps(criteria), points="[artefact]")
    made(folder, image_pairs(100), rules, title="A study").close()
    with serving(folder, PEOPLE, code=LEAN) as running:
        yield running


def votes_of(folder: Path, token: str) -> list[Any]:
    """The rows of the votes of an assignment, read past the server."""
    study = Study.open(folder)
    with database.reading(study.engine) as connection:
        query = select(VoteRow).join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id)
        found = connection.execute(query.where(AssignmentRow.token == token).order_by(VoteRow.id)).all()
    study.close()
    return list(found)


def fresh(client: httpx.Client) -> dict[str, Any]:
    """The assignment of now."""
    found: dict[str, Any] = client.get("/api/turn").json()["now"]
    return found


def send(client: httpx.Client, route: str, **body: object) -> httpx.Response:
    """A POST whose JSON is in ASCII, as that of a browser is where a text is broken."""
    return client.post(f"/api/{route}", content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_a_vote_arrives_as_it_was_given(server: Server) -> None:
    client = server.client("ann")
    turn = client.get("/api/turn").json()
    assert set(turn) == {"now", "ahead", "progress"} and turn["now"]["token"] != turn["ahead"]["token"]
    assert fresh(client)["token"] == turn["now"]["token"]  # a second tab, or the page loaded anew
    token = turn["now"]["token"]
    given = {
        "token": token, "choice": "left", "strength": 2, "criteria": {"sharp": "tie", "real": {"left": 3, "right": 1}},
        "points": [{"side": "right", "x": 0.25, "y": 1, "label": "artefact"}], "comment": "good",
        "shown_at": 1000.5, "decided_at": 1002.25,
    }  # fmt: skip
    answer = send(client, "vote", **given)
    assert answer.status_code == 200 and set(answer.json()) == {"vote", "now", "ahead", "progress"}
    assert answer.json()["now"]["token"] == turn["ahead"]["token"]
    assert answer.json()["progress"]["done"] == turn["progress"]["done"] + 1
    (row,) = votes_of(server.folder, token)
    assert row.id == answer.json()["vote"]
    assert (row.choice, row.strength, row.answers, row.comment) == ("left", 2, given["criteria"], "good")
    assert row.points == given["points"] and (row.shown_at, row.decided_at) == (1000.5, 1002.25)


def test_undo_skip_and_flag(server: Server) -> None:
    """What was undone comes back with the answer that was given; the record has both."""
    client = server.client("ann")
    token = fresh(client)["token"]
    assert send(client, "vote", token=token, choice="right", comment="oops").status_code == 200
    back = send(client, "undo").json()
    assert back["now"]["token"] == token
    assert (back["now"]["answer"]["choice"], back["now"]["answer"]["comment"]) == ("right", "oops")
    assert send(client, "vote", token=token, choice="left").status_code == 200
    assert [row.choice for row in votes_of(server.folder, token)] == ["right", None, "left"]
    for route, more in (("skip", {}), ("flag", {"reason": "broken"})):
        token = fresh(client)["token"]
        after = send(client, route, token=token, **more)
        assert after.status_code == 200 and after.json()["now"]["token"] != token
        assert send(client, route, token=token, **more).status_code == 409
        assert send(client, "vote", token=token, choice="left").status_code == 409
    nobody = server.client("bob")
    assert send(nobody, "undo").status_code == 409


def at_once(works: list[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """All of them begun in the same moment, from threads with connections of their own."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], httpx.Response]) -> httpx.Response:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


def test_one_assignment_is_one_vote(server: Server) -> None:
    """Double clicks, left and right from two tabs, a replay later and after an undo of another: one vote, said once."""
    tabs = [server.client("ann") for _ in range(6)]
    for _ in range(5):
        token = fresh(tabs[0])["token"]
        assert {fresh(tab)["token"] for tab in tabs} == {token}
        choices = [("left", "right")[number % 2] for number in range(len(tabs))]
        answers = at_once(
            [partial(send, tab, "vote", token=token, choice=c) for tab, c in zip(tabs, choices, strict=True)]
        )
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses == {200: 1, 409: 5}
        assert all("your vote already" in a.json()["error"] for a in answers if a.status_code == 409)
        (row,) = votes_of(server.folder, token)
        said = next(number for number, answer in enumerate(answers) if answer.status_code == 200)
        assert row.choice == ("left", "right")[said % 2]  # the one that was acknowledged
        assert answers[said].json()["vote"] == row.id
    body = {"token": token, "choice": "tie_good"}
    assert [send(tab, "vote", **body).status_code for tab in tabs] == [409] * 6
    assert len(votes_of(server.folder, token)) == 1


def test_anothers_assignment_is_not_there(server: Server) -> None:
    """Neither for votes nor for images, and one does not learn that it exists: a wrong token says the same."""
    ann, bob = server.client("ann"), server.client("bob")
    token = fresh(ann)["token"]
    assert ann.get(f"/api/image/{token}/left").status_code == 200
    for wrong in (token, "0" * 32, token[:-1], token.upper(), token + "0", "x", "", "zero\0", "'--", "ü" * 32):
        said = [
            send(bob, "vote", token=wrong, choice="left"), send(bob, "skip", token=wrong),
            send(bob, "flag", token=wrong),
        ]  # fmt: skip
        if wrong and wrong.isalnum() and wrong.isascii():
            said += [bob.get(f"/api/image/{wrong}/left"), bob.get(f"/api/image/{wrong}/right")]
        assert {answer.status_code for answer in said} == {404}, wrong
        assert {answer.json()["error"] for answer in said} == {"you have no such assignment; ask for the next one"}
    assert votes_of(server.folder, token) == []
    for side in ("middle", "LEFT", "left.png", "0"):
        assert ann.get(f"/api/image/{token}/{side}").status_code == 404


TAMPERED: list[dict[str, object]] = [
    {"choice": "LEFT"}, {"choice": "first"}, {"choice": ""}, {"choice": None}, {"choice": ["left"]}, {"choice": 1},
    {"strength": 0}, {"strength": 4}, {"strength": "2"}, {"strength": 1.5}, {"strength": True}, {"strength": 10**40},
    {"choice": "tie_good", "strength": 1}, {"criteria": {"overall": "left"}}, {"criteria": {"sharp": "first"}},
    {"criteria": {"sharp": {"left": 1}}}, {"criteria": {"real": "left"}}, {"criteria": {"real": {"left": 1}}},
    {"criteria": {"real": {"left": 0, "right": 1}}}, {"criteria": {"real": {"left": 4, "right": 1}}},
    {"criteria": {"real": {"left": 1, "right": 1, "x": 1}}}, {"criteria": []}, {"criteria": None},
    {"points": [{"side": "up", "x": 0, "y": 0, "label": "artefact"}]}, {"points": {}},
    {"points": [{"side": "left", "x": 1.01, "y": 0, "label": "artefact"}]},
    {"points": [{"side": "left", "x": 0, "y": -1, "label": "artefact"}]},
    {"points": [{"side": "left", "x": 0, "y": 0, "label": "other"}]},
    {"points": [{"side": "left", "x": 0, "y": 0, "label": "artefact", "sample": 3}]},
    {"points": [{"side": "left", "x": 0, "y": 0, "label": "artefact"}] * 501}, {"comment": "x" * 20_001},
    {"comment": 3}, {"comment": None}, {"shown_at": 5, "decided_at": 4}, {"shown_at": "now"}, {"shown_at": 1e400},
    {"rater": "bob"}, {"first_is_left": True}, {"winner": 1}, {"pair_id": 2}, {"id": 1}, {"__proto__": {}},
]  # fmt: skip


def test_what_is_no_answer_is_refused(server: Server) -> None:
    """Each in one sentence; nothing is kept; then the right answer is taken."""
    client = server.client("ann")
    token = fresh(client)["token"]
    for change in TAMPERED:
        answer = send(client, "vote", **{"token": token, "choice": "left", **change})
        assert answer.status_code == 400, change
        assert set(answer.json()) == {"error"} and 5 < len(answer.json()["error"]) < 300, answer.text[:500]
    assert send(client, "vote", choice="left").status_code == 400
    assert send(client, "flag", token=token, reason="x" * 20_001).status_code == 400
    assert votes_of(server.folder, token) == []
    assert send(client, "vote", token=token, choice="left").status_code == 200


def test_a_pair_is_looked_at_for_the_least_time(tmp_path: Path) -> None:
    """In process: a vote half a second after the pair was shown is none, where the protocol wants a second."""
    from starlette.testclient import TestClient

    from apps.label.server import create_app
    from apps.label.settings import Settings

    study = made(tmp_path / "study", text_pairs(2), quick_protocol(min_view_seconds=1))
    client = TestClient(create_app(study, None, Settings()), base_url="http://localhost", headers={"X-Diffalign": "1"})
    body = {"token": client.get("/api/turn").json()["now"]["token"], "choice": "left", "shown_at": 100.0}
    assert client.post("/api/vote", json={**body, "decided_at": 100.5}).status_code == 400
    assert client.post("/api/vote", json={**body, "decided_at": 101}).status_code == 200
    study.close()


def test_pairs_in_dispute_go_to_the_adjudicator(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    made(folder, text_pairs(1), quick_protocol(overlap=2)).close()
    with serving(folder, PEOPLE, code=LEAN) as server:
        clients = {name: server.client(name) for name in PEOPLE}
        assert clients["jo"].get("/api/study").json()["disputed"] == 0
        for name, wanted in (("ann", "one 0"), ("bob", "two 0")):
            now = fresh(clients[name])
            assert now["kind"] == "text" and {now["left"], now["right"]} == {"one 0", "two 0"}
            choice = "left" if now["left"] == wanted else "right"
            assert send(clients[name], "vote", token=now["token"], choice=choice, comment=name).status_code == 200
        assert clients["ann"].get("/api/study").json()["disputed"] == 0
        about = clients["jo"].get("/api/study").json()
        assert about["disputed"] == 1 and about["title"] == "" and about["accounts"] is True
        over = clients["jo"].get("/api/turn").json()
        assert over["now"] is None and over["progress"]["why"]
        now = clients["jo"].get("/api/turn", params={"queue": "disputed"}).json()["now"]
        assert {(v["comment"], now[v["choice"]]) for v in now["others"]} == {("ann", "one 0"), ("bob", "two 0")}
        assert not {v["rater"] for v in now["others"]} & set(PEOPLE)
        body = {"token": now["token"], "choice": "left"}
        answer = clients["jo"].post("/api/vote", params={"queue": "disputed"}, json=body)
        assert answer.status_code == 200 and answer.json()["now"] is None
        assert clients["eve"].get("/api/study").json()["disputed"] == 0


def test_any_text_comes_back_as_it_went_in(tmp_path: Path) -> None:
    """As prompt, sample, comment, reason, title and name of a rater; a prompt of a megabyte, too."""
    texts = [*HOSTILE, "long " * 200_000]
    names = [normalize("NFC", text.strip()) for text in HOSTILE if text.strip().isprintable() and text.strip()]
    folder = tmp_path / "study"

    def material() -> Iterator[StudyPair]:
        for text in texts:
            asked = Prompt(text)
            yield StudyPair(asked, Sample(asked, text=text + "1"), Sample(asked, text=text + "2"), "base", "tuned")

    made(folder, material(), title=HOSTILE[0] + HOSTILE[8]).close()
    assert len(names) >= 6
    with serving(folder, {"ann": "rater", **dict.fromkeys(names, "rater")}, code=LEAN) as server:
        client = server.client("ann")
        assert client.get("/api/study").json()["title"] == HOSTILE[0] + HOSTILE[8]
        seen = []
        for text in texts:
            now = fresh(client)
            seen.append(now["prompt"])
            assert {now["left"], now["right"]} == {now["prompt"] + "1", now["prompt"] + "2"}
            comment = text[:20_000]
            answer = send(client, "vote", token=now["token"], choice="left", comment=comment)
            assert answer.status_code == 200, (text[:30], answer.text[:200])
            back = send(client, "undo").json()["now"]
            assert back["answer"]["comment"] == comment
            assert send(client, "vote", token=now["token"], choice="left", comment=comment).status_code == 200
        assert sorted(seen) == sorted(texts)
        for name in names:
            other = server.client(name)
            assert other.get("/api/study").json()["rater"]["name"] == name
            turn = other.get("/api/turn")
            assert turn.status_code == 200, (name, turn.text)
    study = Study.open(folder)
    with database.reading(study.engine) as connection:
        assert set(names) <= set(connection.scalars(select(RaterRow.name)))
        assert set(connection.scalars(select(VoteRow.comment))) >= {text[:20_000] for text in texts}
    assert all(finding.ok for finding in study.inspect())
    study.close()


def test_a_reason_is_kept_as_it_is(server: Server) -> None:
    client = server.client("bob")
    for text in HOSTILE:
        assert send(client, "flag", token=fresh(client)["token"], reason=text).status_code == 200
    study = Study.open(server.folder)
    with database.reading(study.engine) as connection:
        kept = [event["reason"] for event in connection.scalars(select(EventRow.data)) if "reason" in event]
    study.close()
    assert set(HOSTILE) <= set(kept)


def voting(server: Server, name: str, seed: int, acknowledged: list[tuple[int, str]], stop: threading.Event) -> None:
    """Votes until told to stop, through every death of the server; notes down what was said to be saved."""
    chance = random.Random(seed)
    client: httpx.Client | None = None
    while not stop.is_set():
        try:
            client = client or server.client(name)
            turn = client.get("/api/turn").json()
            while not stop.is_set():
                if turn["now"] is None or chance.random() < 0.1:
                    undone = send(client, "undo")
                    turn = undone.json() if undone.status_code == 200 else client.get("/api/turn").json()
                    if turn["now"] is None:
                        return
                token = turn["now"]["token"]
                answer = send(client, "vote", token=token, choice=chance.choice(["left", "right", "tie_good"]))
                assert answer.status_code == 200, answer.text
                turn = answer.json()
                acknowledged.append((turn["vote"], token))
        except httpx.TransportError:
            time.sleep(0.05)


def killed_while_voting(folder: Path, rounds: int) -> None:
    """Kills at random moments while three raters vote. Nobody has to log in again, and everybody goes on."""
    made(folder, text_pairs(400), quick_protocol(overlap=3)).close()
    chance, acknowledged, stop = random.Random(1), list[tuple[int, str]](), threading.Event()
    with serving(folder, PEOPLE, code=LEAN) as server:
        clients = [
            threading.Thread(target=voting, args=(server, name, seed, acknowledged, stop))
            for seed, name in enumerate(("ann", "bob", "jo"))
        ]
        for client in clients:
            client.start()
        for _ in range(rounds):
            before = len(acknowledged)
            while len(acknowledged) < before + 3:  # they are at work again
                assert any(client.is_alive() for client in clients)
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            server.kill()
            said = list(acknowledged)
            check_saved(folder, said)
            server.start()
        stop.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        assert server.stop() == 0
    check_saved(folder, acknowledged)
    study = Study.open(folder)
    assert all(finding.ok for finding in study.inspect())
    study.close()
    assert len(acknowledged) >= 3 * rounds


def check_saved(folder: Path, acknowledged: list[tuple[int, str]]) -> None:
    """Every vote that was said to be saved is there, about the assignment that it was given for."""
    with sqlite3.connect(folder / "study.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT vote.id, token FROM vote JOIN assignment ON assignment.id = assignment_id WHERE undoes IS NULL"
        kept = set(connection.execute(query))
    connection.close()
    assert set(acknowledged) <= kept
    assert len(set(acknowledged)) == len(acknowledged)


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    killed_while_voting(tmp_path / "study", 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_was_acknowledged_survives_fifty_kills(tmp_path: Path) -> None:
    killed_while_voting(tmp_path / "study", 50)
