"""What the server tells a rater, answer by answer: nothing of it says which pairs are tests, or what made a sample."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from sqlalchemy import select

from diffalign.study import Protocol, Study, StudyPair, database, store
from diffalign.study.schema import AssignmentRow, PairRow
from diffalign.types import Prompt, Sample
from tests.label_server import LEAN, image_pairs, made, quick_protocol, serving, text_pairs

ORDINARY, GOLD = 40, 20
RULES = """
name: planned
version: 1
question: Which one?
guideline: Look.
criteria: [{name: tone, question: Which tone}, {name: depth, question: How deep, kind: scale, anchors: [low, high]}]
min_view_seconds: 0
gold_share: 0.15
repeat_share: 0.15
aa_share: 0.2
repeat_after: 3
"""
ABOUT = {"title", "accounts", "rater", "protocol", "sha256", "queues", "disputed"}
PROTOCOL = {
    "question", "guideline", "criteria", "criteria_required", "strength", "points", "min_view_seconds", "lease_minutes",
}  # fmt: skip
TURN = {"now", "ahead", "progress"}
ASSIGNMENT = {"token", "prompt", "kind", "lease_until", "protocol", "answer", "others", "left", "right"}


def planned_pairs() -> Iterator[StudyPair]:
    """Ordinary pairs and gold ones, alike but for what is written in them."""
    for i in range(ORDINARY + GOLD):
        asked = Prompt(f"what was asked {i:02}")
        one, two = (Sample(asked, text=hashlib.sha256(f"{side} {i}".encode()).hexdigest()) for side in "ab")
        expected = ("first", "second", "tie")[i % 3] if i < GOLD else None
        yield StudyPair(asked, one, two, "base", "tuned", expected)  # type: ignore[arg-type]


def shape(value: object) -> object:
    """What of an answer of the server is left without its values: names, types, and how long texts are."""
    if isinstance(value, dict):
        return tuple(sorted((name, shape(one)) for name, one in value.items()))
    if isinstance(value, list):
        return tuple(shape(one) for one in value)
    return (type(value).__name__, len(value)) if isinstance(value, str) else type(value).__name__


def kinds(study: Study) -> dict[str, str]:
    """Of the pair of each token: ordinary, gold, aa or repeat."""
    query = select(AssignmentRow.token, AssignmentRow.repeat, PairRow.kind).join(
        PairRow, PairRow.id == AssignmentRow.pair_id
    )
    with database.reading(study.engine) as connection:
        return {row.token: "repeat" if row.repeat else row.kind for row in connection.execute(query)}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[tuple[float, httpx.Response]]]:
    """All that a rater is told from the first pair to the end of the study, with the times.

    What a claim draws depends on the uid, so that this one draws of every kind, in each run.
    """
    with patch.object(store, "new_uid", lambda: "0" * 32):
        folder = tmp_path_factory.mktemp("planned") / "study"
        study = made(folder, planned_pairs(), Protocol.parse(RULES), title="Planned")
    told = []
    with serving(study.folder, {"ann": "rater"}, code=LEAN) as server, closing(server.client("ann")) as client:
        answer = client.get("/api/turn")
        for number in itertools.count():
            told.append((time.time(), answer))
            now = answer.json()["now"]
            if now is None:
                break
            # Some answers are given twice and some pairs are put aside, which has to tell as little.
            body = {"token": now["token"], "choice": ("left", "right", "tie_good", "tie_bad")[number % 4]}
            answer = client.post("/api/vote", json=body)
            assert answer.status_code == 200, answer.text
            if number % 7 == 3:
                undone = client.post("/api/undo", json={}).json()["now"]
                assert undone["token"] == now["token"]
                assert set(undone) == ASSIGNMENT
                answer = client.post("/api/vote", json=body)
    return study, told


def test_a_session_has_pairs_of_every_kind(session: tuple[Study, list[tuple[float, httpx.Response]]]) -> None:
    """Else the tests below would say nothing. How many there are of each is drawn; about 12 are to be expected."""
    study, told = session
    of = kinds(study)
    seen = [of[answer.json()["now"]["token"]] for _, answer in told[:-1]]
    assert {kind: seen.count(kind) >= 2 for kind in ("ordinary", "gold", "aa", "repeat")} == dict.fromkeys(
        ("ordinary", "gold", "aa", "repeat"), True
    )


def test_no_name_type_or_length_of_an_answer_tells_tests_from_other_pairs(
    session: tuple[Study, list[tuple[float, httpx.Response]]],
) -> None:
    """What the server says of a gold pair, a repeat and a pair of one sample with itself has one form, headers too."""
    study, told = session
    of = kinds(study)
    shapes, headers = defaultdict(set), defaultdict(set)
    for _, answer in told[1:-2]:  # the first one is no vote; at the end nothing is ahead
        body = answer.json()
        kind = of[body["now"]["token"]]
        assert set(body) == {*TURN, "vote"}
        assert set(body["now"]) == ASSIGNMENT
        assert set(body["progress"]) == {"done", "left", "complete", "why"}
        shapes[kind].add((shape(body["now"]), shape(body["ahead"]), body["progress"]["why"]))
        headers[kind].add(tuple(name for name in answer.headers if name != "content-length"))
    assert set(shapes) == {"ordinary", "gold", "aa", "repeat"}
    assert len(set.union(*shapes.values())) == 1
    assert len(set.union(*headers.values())) == 1


def test_the_time_for_a_pair_tells_nothing(session: tuple[Study, list[tuple[float, httpx.Response]]]) -> None:
    """Each pair is kept for as long as the protocol says, 15 minutes where it says nothing, whatever it is."""
    _, told = session
    times = [answer.json()["now"]["lease_until"] - at for at, answer in told[:-1]]
    assert min(times) > 15 * 60 - 30
    assert max(times) < 15 * 60 + 5


def test_progress_adds_up_alike_for_every_kind(session: tuple[Study, list[tuple[float, httpx.Response]]]) -> None:
    """Done rises by one with each answer; left is one count that falls by one with each, rounded up to tens.

    40 ordinary pairs at a share of 0.5 of planned ones make 80: 12 gold, 12 repeats; and 8 pairs of one sample with
    itself, which are all that there are. 40 + 12 + 12 + 8 = 72.
    """
    _, told = session
    progress = [answer.json()["progress"] for _, answer in told]
    assert [one["done"] for one in progress] == list(range(len(told)))
    expected = [10 * max(1, math.ceil((72 - done) / 10)) for done in range(len(told) - 1)]
    assert [one["left"] for one in progress[:-1]] == expected
    assert progress[-1]["left"] == 0


def test_the_study_is_told_in_exactly_these_words(tmp_path: Path) -> None:
    """To a rater nothing of shares, overlap, budget, choice, arms or the protocol's name; an admin gets the same."""
    study = made(tmp_path / "study", planned_pairs(), Protocol.parse(RULES), title="Planned")
    with serving(study.folder, {"ann": "rater", "eve": "admin"}, code=LEAN) as server:
        for name, role in (("ann", "rater"), ("eve", "admin")):
            with closing(server.client(name)) as client:
                answer = client.get("/api/study")
            about: dict[str, Any] = answer.json()
            assert "planned" not in answer.text, "the protocol may be called by what is compared"
            assert set(about) == ABOUT
            assert about["rater"] == {"name": name, "role": role}
            assert set(about["protocol"]) == PROTOCOL
            assert [set(one) for one in about["protocol"]["criteria"]] == [{"name", "question", "kind", "anchors"}] * 2


def test_a_pair_of_texts_has_no_images(tmp_path: Path) -> None:
    """Neither side, nor one that there is not; a pair of images has both, and their turn carries no texts."""
    both = itertools.chain(text_pairs(1), image_pairs(1))
    study = made(tmp_path / "study", both, quick_protocol())
    with serving(study.folder, {"ann": "rater"}, code=LEAN) as server, closing(server.client("ann")) as client:
        turn = client.get("/api/turn").json()
        statuses = {}
        for one in (turn["now"], turn["ahead"]):
            found = [client.get(f"/api/image/{one['token']}/{side}") for side in ("left", "right", "middle")]
            statuses[one["kind"]] = [answer.status_code for answer in found]
            assert ("left" in one) == (one["kind"] == "text")
            if one["kind"] == "text":
                assert found[0].json() == {"error": "this pair has no images; its texts come with the turn"}
        assert statuses == {"text": [404, 404, 404], "image": [200, 200, 404]}


def test_who_may_not_see_the_results_gets_a_sentence_as_they_can_read_it(tmp_path: Path) -> None:
    """A page for a browser, JSON for a program; with a hostile name in it as text."""
    name = "<b>ann</b>"
    study = made(tmp_path / "study", text_pairs(1))
    with serving(study.folder, {name: "rater"}, code=LEAN) as server, closing(server.client(name)) as client:
        program, browser = (client.get("/results", headers={"Accept": kind}) for kind in ("*/*", "text/html,*/*;q=0.8"))
        assert [answer.status_code for answer in (program, browser)] == [403, 403]
        assert program.json() == {"error": "only an admin sees the results"}
        assert browser.headers["content-type"] == "text/html; charset=utf-8"
        assert "Only an admin sees the results." in browser.text
        assert "&lt;b&gt;ann&lt;/b&gt;" in browser.text and "<b>" not in browser.text
        assert "script-src" not in browser.headers["content-security-policy"]
        assert "default-src 'none'" in browser.headers["content-security-policy"]
        posted = client.post("/api/vote", json={}, headers={"Accept": "text/html", "X-Diffalign": "1"})
        assert posted.headers["content-type"] == "application/json"
