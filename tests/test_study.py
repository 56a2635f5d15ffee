"""The study store: what goes in, who gets what, what is kept, what comes out."""

from __future__ import annotations

import math
import shutil
import sqlite3
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from PIL import Image, PngImagePlugin

from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.preferences import Table, write
from diffalign.study import Answer, Point, Protocol, Study, StudyPair, Turn, report, store
from diffalign.study.export import live_votes
from diffalign.study.schema import AssignmentRow, EventRow, ItemRow, PairRow, SampleRow, VoteRow
from diffalign.types import Prompt, Sample
from tests.studies import RULES, Clock, claimed, known_uids, made, rows, text_pair

__all__ = ["known_uids"]

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{constructor}} ${value}",
    "'; DROP TABLE vote; --",
    "=cmd|' /C calc'!A0",
    "zero\0byte",
    "\u202eturned round",
    "broken \ud800 surrogate",
    "x" * 20_000,
    "  spaces\r\nand lines \n",
)


# --- what goes in ---


def test_every_pair_is_judged_by_the_raters_wanted(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=5, more="overlap: 2\n", raters="abc")
    seen: dict[str, list[str]] = {rater: [] for rater in "abc"}
    for _ in range(5):
        for rater in "abc":
            if (assignment := study.claim(rater)) is not None:
                seen[rater].append(assignment.prompt)
                study.vote(rater, assignment.token, Answer("left"))
    assert Counter(prompt for prompts in seen.values() for prompt in prompts) == {f"prompt {i}": 2 for i in range(5)}
    assert all(len(set(prompts)) == len(prompts) for prompts in seen.values())
    assert all(study.claim(rater) is None for rater in "abc")


def test_a_study_does_not_start_from_what_cannot_be_compared(tmp_path: Path) -> None:
    rules = Protocol.parse(RULES)
    same = Prompt("p")
    image, text = Sample(same, image=Image.new("RGB", (4, 4))), Sample(same, text="t")
    bad: list[tuple[list[StudyPair], str]] = [
        ([], "a study needs a pair"),
        ([text_pair(0, expected="first")], "a study needs a pair"),
        ([StudyPair(same, image, text, "a", "b")], "pair 1: an image is not compared"),
        ([text_pair(0), StudyPair(same, text, text, "a", "b")], "pair 2: the two samples are the same"),
        ([StudyPair(same, image, Sample(same, text="u"), "", "b")], "an image is not"),
        ([StudyPair(same, text, Sample(same, text="u"), "", "b")], "lacks its arm"),
        ([StudyPair(same, text, Sample(same, text="u"), "a", "b", "left")], "expected is 'left'"),  # type: ignore[arg-type]
        ([text_pair(0, provenance={"first": {"x": object()}})], "provenance are texts"),
        ([text_pair(0, provenance={"first": {"x": math.nan}})], "provenance are texts"),
    ]
    for pairs, message in bad:
        with pytest.raises(InputError, match=message):
            Study.create(tmp_path / "bad", rules, pairs)
        assert not (tmp_path / "bad").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(RefusedError, match="not empty"):
        Study.create(tmp_path / "full", rules, [text_pair(0)])
    with pytest.raises(ConfigError, match="not supported"):
        Study.create(tmp_path / "bad", rules, [text_pair(0)], database_url="mysql://x/y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("", "holds no fields"),
        ("name: x\nversion: 0\n", "version is 0; it is a whole number from 1"),
        (RULES + "ovelap: 3\n", "there is no field ovelap; did you mean overlap"),
        (RULES + "gold_share: 0.3\nrepeat_share: 0.3\n", "less than half"),
        (RULES + "criteria: [{name: a, question: b, kind: scale, anchors: [x]}]\n", "two anchors"),
        (RULES + "criteria: [{name: overall, question: b}]\n", "none is called overall"),
    ],
)
def test_a_bad_protocol_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Protocol.parse(text)


def test_images_lose_their_metadata_and_keep_their_pixels(tmp_path: Path) -> None:
    """What a rater gets is a PNG of the pixels: no text chunk, no name, nothing of the model."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "model=secret")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png", pnginfo=info)
    asked = Prompt("p")
    pair = StudyPair(
        asked, Sample(asked, image=Image.open(tmp_path / "in.png")), Sample(asked, image=Image.new("RGB", (8, 8))),
        "secret-a", "secret-b", provenance={"first": {"file": "secret.png"}},
    )  # fmt: skip
    study = Study.create(tmp_path / "study", Protocol.parse(RULES), [pair])
    study.add_rater("a")
    assignment = claimed(study, "a")
    shown = [study.content("a", assignment.token, side) for side in ("left", "right")]
    assert assignment.kind == "image" and not any(b"secret" in data for data in shown)
    assert "secret" not in repr(assignment)
    study.vote("a", assignment.token, Answer("left"))
    (preference,) = study.export()
    assert preference.first.image is not None
    assert np.array_equal(np.asarray(preference.first.image), pixels)
    assert preference.provenance["first"] == {
        "file": "secret.png", "arm": "secret-a", "seed": 0, "sha256": rows(study, SampleRow)[0].sha256,
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_comes_back_as_it_was(tmp_path: Path, text: str) -> None:
    """In prompt, sample, arm, title, rater name and comment, byte for byte."""
    asked = Prompt(text, id=text, attributes={"note": text}, negative=text)
    pair = StudyPair(asked, Sample(asked, text=text), Sample(asked, text="other"), text, f"{text}2")
    study = Study.create(tmp_path / "study", Protocol.parse(RULES), [pair], title=text)
    name = text[:200]
    pseudonym = study.add_rater(name)
    assert study.add_rater(name) == pseudonym
    assignment = claimed(study, name)
    assert assignment.prompt == text
    shown = {study.content(name, assignment.token, side) for side in ("left", "right")}
    assert shown == {text.encode("utf-8", "surrogatepass"), b"other"}
    study.vote(name, assignment.token, Answer("left", comment=text))
    (preference,) = study.export()
    assert preference.prompt == asked and preference.first.text == text
    assert preference.provenance["comment"] == text and preference.rater == pseudonym
    assert preference.provenance["first"]["arm"] == text  # type: ignore[index]


# --- who gets what ---


def test_a_rater_gets_the_same_pair_until_it_is_judged(tmp_path: Path) -> None:
    study = made(tmp_path)
    first = claimed(study, "a")
    assert claimed(study, "a").token == first.token
    ahead = study.claim("a", ahead=1)
    assert ahead is not None and ahead.token != first.token
    study.vote("a", first.token, Answer("left"))
    assert claimed(study, "a").token == ahead.token
    with pytest.raises(InputError, match="ahead is 4"):
        study.claim("a", ahead=4)


def test_only_the_rater_who_has_it_sees_and_judges_it(tmp_path: Path) -> None:
    study = made(tmp_path)
    token = claimed(study, "a").token
    for act in (
        lambda: study.vote("b", token, Answer("left")),
        lambda: study.content("b", token, "left"),
        lambda: study.skip("b", token),
        lambda: study.flag("b", token),
        lambda: study.vote("a", "0" * 32, Answer("left")),
    ):
        with pytest.raises(NotFoundError, match="no such assignment"):
            act()
    with pytest.raises(NotFoundError, match="no rater 'z'"):
        study.claim("z")
    with pytest.raises(InputError, match="no side"):
        study.content("a", token, "up")  # type: ignore[arg-type]
    assert not rows(study, VoteRow)


def test_a_lease_ends_and_the_pair_goes_to_another(tmp_path: Path) -> None:
    clock = Clock()
    study = made(tmp_path, pairs=1, more="lease_minutes: 5\n", clock=clock)
    late = claimed(study, "a")
    assert late.lease_until == 1300
    assert study.claim("b") is None
    clock.time = 1301
    other = claimed(study, "b")
    study.vote("b", other.token, Answer("right"))
    with pytest.raises(RefusedError, match="others have judged it"):
        study.vote("a", late.token, Answer("left"))
    assert [row.choice for row in rows(study, VoteRow)] == ["right"]


def test_a_late_vote_counts_while_its_place_is_free(tmp_path: Path) -> None:
    clock = Clock()
    study = made(tmp_path, pairs=1, clock=clock)
    late = claimed(study, "a")
    clock.time += 10_000
    assert study.turn("b", "disputed").now is None  # whoever asks for anything takes back what others left lying
    assert rows(study, AssignmentRow)[0].state == "expired" and rows(study, PairRow)[0].taken == 0
    study.vote("a", late.token, Answer("left"))
    assert study.claim("b") is None
    assert rows(study, PairRow)[0].taken == 1


def test_who_comes_back_late_finds_what_they_had(tmp_path: Path) -> None:
    """Nobody asked for it meanwhile, so the pair, its token and with it the draft of the answer are still theirs."""
    clock = Clock()
    study = made(tmp_path, pairs=4, more="lease_minutes: 5\n", clock=clock)
    before, verdicts = study.turn("a"), study.turn("a", "disputed")
    assert before.now is not None and before.ahead is not None and verdicts.now is None
    clock.time += 10_000
    after = study.turn("a")
    assert after.now is not None and after.ahead is not None
    assert [after.now.token, after.ahead.token] == [before.now.token, before.ahead.token]
    assert after.now.lease_until == clock.time + 300
    clock.time += 10_000
    study.turn("b")  # others get them, since nobody knows whether a will come back
    assert [row.state for row in rows(study, AssignmentRow)][:2] == ["expired"] * 2


def test_a_flagged_pair_is_taken_from_everybody(tmp_path: Path) -> None:
    """Rater a has voted on it, b has flagged it, c and d have it open; its repeat or verdict would go the same way."""
    study = made(tmp_path, pairs=1, more="overlap: 4\n", raters="abcd")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    tokens = {rater: claimed(study, rater).token for rater in "bcd"}
    study.flag("b", tokens["b"], "a name is on it")
    assert [row.state for row in rows(study, AssignmentRow)] == ["done", "flagged", "flagged", "flagged"]
    events = [(row.kind, row.rater_id, row.assignment_id) for row in rows(study, EventRow)][-3:]
    assert events == [("flagged", 2, 2), ("withdrawn", 3, 3), ("withdrawn", 4, 4)]
    for rater in "cd":
        assert study.turn(rater).now is None
        with pytest.raises(RefusedError, match="this pair was flagged and is out of the study"):
            study.vote(rater, tokens[rater], Answer("left"))
        with pytest.raises(RefusedError, match="this pair was flagged and is out of the study"):
            study.content(rater, tokens[rater], "left")
    with pytest.raises(RefusedError, match="the pair of your last vote was flagged"):
        study.undo("a")
    assert all(finding.ok for finding in study.inspect()) and not list(study.export())


def test_a_late_vote_on_a_flagged_pair_is_refused(tmp_path: Path) -> None:
    clock = Clock()
    study = made(tmp_path, pairs=1, clock=clock)
    late = claimed(study, "a").token
    clock.time += 10_000
    study.flag("b", claimed(study, "b").token)
    with pytest.raises(RefusedError, match="this pair was flagged"):
        study.vote("a", late, Answer("left"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")], ids=["missing", "changed"])
def test_a_text_that_cannot_be_read_stops_nobody(tmp_path: Path, damage: Any) -> None:
    """Its pair comes without texts, and is skipped or flagged; what comes before it and after it goes on."""
    study = made(tmp_path, pairs=3, raters="a")
    turn = study.turn("a")
    assert turn.now is not None and turn.ahead is not None and turn.ahead.texts is not None
    for path in [path for path in (study.folder / "files").rglob("*") if path.is_file()]:
        if path.read_text() in turn.ahead.texts:
            damage(path)
    number, turn = study.vote_and_turn("a", turn.now.token, Answer("left"))
    assert number == 1 and turn.now is not None and turn.now.kind == "text" and turn.now.texts is None
    assert turn.ahead is not None and turn.ahead.texts is not None
    broken = turn.now.token
    assert claimed(study, "a").texts is None
    assert study.undo_and_turn("a").now is not None
    turn = study.vote_and_turn("a", claimed(study, "a").token, Answer("right"))[1]
    turn = study.skip_and_turn("a", broken)
    assert turn.now is not None and turn.now.texts is not None
    turn = study.vote_and_turn("a", turn.now.token, Answer("left"))[1]
    assert turn.now is not None and turn.now.texts is None
    assert study.flag_and_turn("a", turn.now.token, "cannot be shown").progress.complete


def test_skip_comes_back_last_and_flag_never(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=3, more="overlap: 2\n")
    skipped, flagged = claimed(study, "a"), study.claim("a", ahead=1)
    assert flagged is not None
    study.skip("a", skipped.token)
    study.flag("a", flagged.token, "<b>broken</b>")
    with pytest.raises(RefusedError, match="was skipped by you"):
        study.vote("a", skipped.token, Answer("left"))
    with pytest.raises(RefusedError, match="cannot be skipped"):
        study.skip("a", flagged.token)
    order = []
    while (assignment := study.claim("a")) is not None:
        order.append(assignment.prompt)
        study.vote("a", assignment.token, Answer("left"))
    assert len(order) == 2 and order[1] == skipped.prompt and flagged.prompt not in order
    assert {claimed(study, "b").prompt} <= set(order)
    assert study.stats().flagged == 1


def test_undo_keeps_the_old_vote_and_asks_again(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=2)
    one = claimed(study, "a")
    study.vote("a", one.token, Answer("left"))
    two = claimed(study, "a")
    study.vote("a", two.token, Answer("right"))
    assert study.undo("a").token == two.token
    assert claimed(study, "a").token == two.token
    study.vote("a", two.token, Answer("tie_bad"))
    assert study.undo("a").token == two.token
    assert study.undo("a").token == one.token
    with pytest.raises(RefusedError, match="no vote of yours"):
        study.undo("a")
    assert not list(study.export())
    study.vote("a", one.token, Answer("left"))
    votes = rows(study, VoteRow)
    assert [(v.choice, v.undoes, v.revision) for v in votes] == [
        ("left", None, 0), ("right", None, 0), (None, 2, 0), ("tie_bad", None, 1), (None, 4, 1), (None, 1, 0),
        ("left", None, 1),
    ]  # fmt: skip
    assert len(list(study.export())) == 1


def test_the_database_refuses_to_change_what_happened(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.close()
    with sqlite3.connect(study.folder / "study.sqlite") as connection:
        for change in ("UPDATE vote SET choice = 'right'", "DELETE FROM vote", "DELETE FROM event"):
            with pytest.raises(sqlite3.IntegrityError, match="only added"):
                connection.execute(change)


def test_one_assignment_one_vote(tmp_path: Path) -> None:
    study = made(tmp_path)
    token = claimed(study, "a").token
    study.vote("a", token, Answer("left"))
    for again in ("left", "right"):
        with pytest.raises(RefusedError, match="has your vote already"):
            study.vote("a", token, Answer(again))  # type: ignore[arg-type]
    assert [row.choice for row in rows(study, VoteRow)] == ["left"]


CRITERIA = """points: [artefact]
criteria:
- {name: anatomy, question: "Which is more plausible?"}
- {name: quality, question: "How good is it?", kind: scale, anchors: [bad, fair, good]}
"""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer("best"), "no choice 'best'"),  # type: ignore[arg-type]
        (Answer("left", strength=4), "1, 2 or 3"),
        (Answer("left", strength=True), "1, 2 or 3"),
        (Answer("tie_good", strength=1), "strength goes with"),
        (Answer("left", criteria={"taste": "left"}), "there are anatomy, quality"),
        (Answer("left", criteria={"anatomy": "up"}), "left, right or tie"),
        (Answer("left", criteria={"anatomy": ["left"]}), "left, right or tie"),
        (Answer("left", criteria={"quality": 2}), "from 1 to 3"),
        (Answer("left", criteria={"quality": {"left": 0, "right": 1}}), "from 1 to 3"),
        (Answer("left", points=[Point("left", 1.1, 0)]), "x and y from 0 to 1"),
        (Answer("left", points=[Point("left", math.nan, 0)]), "x and y from 0 to 1"),
        (Answer("left", points=[Point("left", 0, 0)] * 501), "too many"),
        (Answer("left", comment="x" * 20_001), "20001 characters"),
        (Answer("left", shown_at=2, decided_at=1), "not before"),
        (Answer("left", shown_at=math.inf), "are times"),
    ],
)
def test_an_answer_to_something_else_is_refused(tmp_path: Path, answer: Answer, message: str) -> None:
    study = made(tmp_path, more=CRITERIA)
    token = claimed(study, "a").token
    with pytest.raises(InputError, match=message):
        study.vote("a", token, answer)
    assert not rows(study, VoteRow)
    study.vote("a", token, Answer("left"))


def test_sides_are_balanced_recorded_and_no_mere_alternation(tmp_path: Path) -> None:
    """100 pairs of one rater: the biased coin stays within 10 of even, and switches in about 2/3 of the steps."""
    study = made(tmp_path, pairs=100, raters="a")
    shown = []
    while (assignment := study.claim("a")) is not None:
        shown.append(study.content("a", assignment.token, "left").startswith(b"one"))
        study.vote("a", assignment.token, Answer("left"))
    assert shown == [row.first_is_left for row in rows(study, AssignmentRow)]
    assert abs(2 * sum(shown) - 100) <= 10
    switches = sum(a != b for a, b in pairwise(shown))
    assert 45 < switches < 85


def test_two_raters_of_a_pair_see_it_both_ways(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=20, more="overlap: 2\n")
    for rater in "ab":
        while (assignment := study.claim(rater)) is not None:
            study.vote(rater, assignment.token, Answer("left"))
    ways: dict[int, set[bool]] = {}
    for row in rows(study, AssignmentRow):
        ways.setdefault(row.pair_id, set()).add(row.first_is_left)
    assert all(way == {True, False} for way in ways.values())


def test_gold_repeats_and_aa_pairs_come_at_their_rates(tmp_path: Path) -> None:
    """60 ordinary pairs and some 50 others: each kind 0.15 +- 3 standard errors of 0.034."""
    study = made(
        tmp_path, pairs=60, gold=40, raters="a",
        more="gold_share: 0.15\nrepeat_share: 0.15\naa_share: 0.2\nrepeat_after: 5\n",
    )  # fmt: skip
    while (assignment := study.claim("a")) is not None:
        study.vote("a", assignment.token, Answer("left"))
    given = rows(study, AssignmentRow)
    kinds = {row.id: row.kind for row in rows(study, PairRow)}
    counts = Counter("repeat" if row.repeat else kinds[row.pair_id] for row in given)
    assert counts["ordinary"] == 60
    for kind, share in (("gold", 0.15), ("repeat", 0.15)):
        assert counts[kind] / len(given) == pytest.approx(share, abs=3 * 0.034)
    assert counts["aa"] == 12  # all there are: 0.2 of the ordinary ones
    first = {row.pair_id: row for row in given if not row.repeat}
    for row in given:
        if row.repeat:
            assert row.first_is_left != first[row.pair_id].first_is_left
            assert row.id - first[row.pair_id].id > 5 - 1
            assert kinds[row.pair_id] == "ordinary"


PLANNED = "gold_share: 0.15\nrepeat_share: 0.15\naa_share: 0.2\nrepeat_after: 3\n"


def worked_through(folder: Path, uid: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[str]]:
    """What a rater who answers everything is told, done and left, and of what kind each answer's pair was."""
    monkeypatch.setattr(store, "new_uid", lambda: uid)
    study = made(folder, pairs=40, gold=20, raters="a", more=PLANNED)
    turn, told = study.turn("a"), []
    while turn.now is not None:
        told.append((turn.progress.done, turn.progress.left))
        turn = study.vote_and_turn("a", turn.now.token, Answer("left"))[1]
    assert turn.progress.left == 0 and turn.progress.complete
    kinds = {row.id: row.kind for row in rows(study, PairRow)}
    return told, ["repeat" if row.repeat else kinds[row.pair_id] for row in rows(study, AssignmentRow)]


def test_the_progress_says_nothing_of_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers turn by turn, although gold, A/A pairs and repeats come at other turns, until the study ends.

    40 ordinary pairs at a share of 0.5 of planned ones: 80 in all, of these 0.15 gold, 0.15 repeats, and 8 A/A pairs.
    40 + 12 + 12 + 8 = 72, so 80 at first; at done 2 it is 70 and from done 62 on 10 for as long as there is any.
    """
    runs = [worked_through(tmp_path / uid, uid, monkeypatch) for uid in ("a", "b", "c")]
    for told, kinds in runs:
        assert set(kinds) == {"ordinary", "gold", "aa", "repeat"}
        assert told == [(done, 10 * max(1, math.ceil((72 - done) / 10))) for done in range(len(kinds))]
    assert len({tuple(kinds[:30]) for _, kinds in runs}) == 3


def test_nobody_can_work_out_what_a_claim_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies of the same pairs and seed draw differently, since each has a uid that no rater is told."""
    sides = set()
    for name in "xy":
        monkeypatch.setattr(store, "new_uid", lambda name=name: name * 32)
        study = made(tmp_path / name, pairs=30, raters="a", more="repeat_share: 0.3\nrepeat_after: 2\n")
        for _ in range(30):
            study.vote("a", claimed(study, "a").token, Answer("left"))
        sides.add(tuple((row.repeat, row.first_is_left) for row in rows(study, AssignmentRow)))
        turn = study.turn("a")
        assert study.uid not in repr(turn) and study.uid == name * 32
    assert len(sides) == 2


# --- what comes out ---


def voted_by_rule(study: Study, rater: str, prefers: bytes, **more: Any) -> None:
    """A rater who likes samples that begin in one way, and calls A/A pairs a tie."""
    while (assignment := study.claim(rater)) is not None:
        left, right = (study.content(rater, assignment.token, side).startswith(prefers) for side in ("left", "right"))
        choice = "tie_good" if left == right else "left" if left else "right"
        study.vote(rater, assignment.token, Answer(choice, **more))  # type: ignore[arg-type]


def test_an_export_undoes_the_sides_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=30, gold=5, more="gold_share: 0.2\nrepeat_share: 0.2\naa_share: 0.1\n", raters="ab")
    for rater in "a":
        voted_by_rule(study, rater, b"two")
    export = study.export()
    found = list(export)
    assert len(found) == 30 and all(preference.label == 0 for preference in found)
    kinds = Counter(row.choice for row in rows(study, VoteRow))
    assert min(kinds["left"], kinds["right"]) > 5  # both sides were chosen; the label is about the sample
    votes = len(rows(study, VoteRow))
    assert sum(export.left_out.values()) == votes - 30
    assert set(export.left_out) == {"gold", "repeat", "aa"}
    one = found[0].provenance
    assert one["first"]["arm"] == "base" and one["second"]["arm"] == "tuned"  # type: ignore[index]
    assert one["protocol_sha256"] == study.protocol().sha256
    assert "a" not in {preference.rater for preference in found}


def test_an_export_is_the_native_form(tmp_path: Path) -> None:
    """Through a Parquet file and back, criteria, strength and ties included; cannot judge is left out."""
    study = made(tmp_path, pairs=3, raters="a", more=CRITERIA)
    answers = [
        Answer("left", 3, {"anatomy": "tie", "quality": {"left": 3, "right": 1}}, shown_at=5.0, decided_at=7.5),
        Answer("tie_bad", comment="both = bad"),
        Answer("cannot_judge"),
    ]
    sides = []
    for answer in answers:
        assignment = claimed(study, "a")
        sides.append(study.content("a", assignment.token, "left")[:3].decode())
        study.vote("a", assignment.token, answer)
    export = study.export()
    assert write(tmp_path / "pairs.parquet", export) == 3
    overall, anatomy, tie = Table(tmp_path / "pairs.parquet")
    assert overall.label == (1 if sides[0] == "one" else 0) and overall.strength == 3
    assert (anatomy.criterion, anatomy.label, anatomy.strength) == ("anatomy", 0.5, 1)
    assert (tie.label, tie.provenance["choice"], tie.provenance["comment"]) == (0.5, "tie_bad", "both = bad")
    assert overall.provenance["seconds"] == 2.5
    expected = {"first": 3, "second": 1} if sides[0] == "one" else {"first": 1, "second": 3}
    assert overall.provenance["scores"] == {"quality": expected}
    assert export.left_out == {"cannot judge": 1}


def test_stats_know_good_raters_from_one_who_looks_at_sides(tmp_path: Path) -> None:
    study = made(
        tmp_path, pairs=20, gold=8, raters="abcd",
        more="overlap: 4\ngold_share: 0.15\nrepeat_share: 0.15\naa_share: 0.1\n",
    )  # fmt: skip
    for rater in "abc":
        voted_by_rule(study, rater, b"one", shown_at=10.0, decided_at=14.0)
    while (assignment := study.claim("d")) is not None:
        study.vote("d", assignment.token, Answer("left"))
    found = study.stats()
    assert (found.pairs, found.complete, found.flagged) == (20, 20, 0)
    assert found.votes == len(rows(study, VoteRow)) and found.states == {"done": found.votes}
    good, bad = found.raters[:3], found.raters[3]
    assert all(r.gold.value == 1 and r.repeats.value == 1 and r.aa_ties.value == 1 for r in good)
    assert all(r.left.p_value > 0.05 and r.median_seconds == 4 and r.too_fast == 0 for r in good)
    assert bad.left.left.value == 1 and bad.left.p_value < 1e-3
    assert bad.repeats.value == 0 and bad.aa_ties.value == 0 and math.isnan(bad.median_seconds)
    assert min(r.reliability.value for r in good) > 0.95 and bad.reliability.value < 0.7
    assert found.agreement.value < 1 and len(found.kappas) == 6
    (group,) = found.rankings
    assert group.ranking is not None and [s.arm for s in group.ranking.standings] == ["base", "tuned"]
    assert len(found.disputed) == sum(
        not row.first_is_left and not row.repeat
        for row in rows(study, AssignmentRow)
        if row.rater_id == 4 and row.pair_id <= 20
    )


def test_stats_are_of_one_state_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote on a pair, its flagging and a new protocol come while the statistics are made: none of them is in."""
    study = made(tmp_path, pairs=2, more="overlap: 2\n")
    study.vote("a", claimed(study, "a").token, Answer("left"))

    def slow(connection: Any) -> Any:
        found = live_votes(connection)
        study.vote("b", claimed(study, "b").token, Answer("cannot_judge"))
        study.revise(Protocol.parse(RULES.replace("version: 1", "version: 2")))
        return found

    monkeypatch.setattr(report, "live_votes", slow)
    found = study.stats()
    assert found.votes == 1 and found.left_out == {} and found.complete == 0
    assert found.protocol == "test, version 1"


def test_stats_of_a_fresh_study(tmp_path: Path) -> None:
    found = made(tmp_path).stats()
    assert found.votes == 0 and found.pairs == 3 and found.complete == 0
    assert found.rankings == () and found.flags == () and found.simulated == 0
    assert math.isnan(found.alpha.value) and math.isnan(found.raters[0].reliability.value)


# --- the folder and its versions ---


def test_a_study_opens_again_with_everything(tmp_path: Path) -> None:
    study = made(tmp_path)
    token = claimed(study, "a").token
    study.close()
    again = Study.open(tmp_path / "study")
    assert claimed(again, "a").token == token
    assert sorted(path.name for path in (tmp_path / "study").iterdir() if "-" not in path.name) == [
        "files", "study.json", "study.sqlite",
    ]  # fmt: skip


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no study"):
        Study.open(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        Study.open(tmp_path)
    study = made(tmp_path)
    other = Study.create(tmp_path / "other", Protocol.parse(RULES), [text_pair(0)])
    study.close()
    other.close()
    with pytest.raises(InputError, match="open it without a URL"):
        Study.open(study.folder, "postgresql://somewhere/else")
    shutil.copy(other.folder / "study.sqlite", study.folder / "study.sqlite")
    with pytest.raises(InputError, match="belongs to another study"):
        Study.open(study.folder)
    (study.folder / "study.sqlite").unlink()
    with pytest.raises(NotFoundError, match="no study database"):
        Study.open(study.folder)


def test_a_damaged_or_missing_file_is_named_to_who_looks_after_the_study(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = made(tmp_path, pairs=1)
    token = claimed(study, "a").token
    damage = [lambda path: path.write_bytes(b"something else"), Path.unlink]
    for act, said in zip(damage, ("was changed, or is damaged", "lacks its file"), strict=True):
        for path in [path for path in (study.folder / "files").rglob("*") if path.is_file()]:
            act(path)
        caplog.clear()
        with pytest.raises(NotFoundError) as error:
            study.content("a", token, "left")
        assert str(error.value) == "this pair cannot be shown: flag it, or skip it"  # no hash: it tells equal samples
        assert said in caplog.text
        assert any(row.sha256 in caplog.text for row in rows(study, SampleRow))
    with pytest.raises(InputError, match="is no SHA-256"):
        study.files.path("../../etc/passwd")


def test_a_backup_opens_as_a_study(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.backup(tmp_path / "copy")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    copy = Study.open(tmp_path / "copy")
    assert len(rows(copy, VoteRow)) == 1 and len(list(copy.export())) == 1
    with pytest.raises(RefusedError, match="there already"):
        study.backup(tmp_path / "copy")


def test_a_new_version_of_the_protocol_holds_from_now_on(tmp_path: Path) -> None:
    study = made(tmp_path)
    old = claimed(study, "a")
    new = Protocol.parse(RULES.replace("version: 1", "version: 2"))
    assert study.revise(new) == ()
    study.vote("a", old.token, Answer("left"))
    assert claimed(study, "a").protocol == new
    study.vote("a", claimed(study, "a").token, Answer("left"))
    assert [row.protocol_sha256 for row in rows(study, VoteRow)] == [old.protocol.sha256, new.sha256]
    with pytest.raises(RefusedError, match="had this protocol before"):
        study.revise(new)


def test_a_protocol_that_asks_for_pairs_that_are_not_there_says_so(tmp_path: Path) -> None:
    """A/A pairs are made when a study starts, so a later version that wants some gets none; the same with gold."""
    study = made(tmp_path)
    found = study.revise(Protocol.parse("name: test\nversion: 2\ngold_share: 0.1\naa_share: 0.05\n"))
    assert found == (
        "The protocol has gold_share 0.1, but the study has no gold pairs, so none is asked.",
        "The protocol has aa_share 0.05, but the study has no pairs of a sample with itself, which are made when it"
        " starts, so none is asked.",
    )
    assert study.stats().notes[-2:] == found
    (shares,) = [finding for finding in study.inspect() if finding.what == "shares"]
    assert shares.ok and shares.detail == " ".join(found)
    assert study.revise(Protocol.parse("name: test\nversion: 3\n")) == ()


# --- any order of events ---


class AnyOrder(RuleBasedStateMachine):
    """Raters claim, vote, undo, skip, flag, decide and fall asleep in any order; a plain model says what must hold."""

    @initialize(overlap=st.integers(1, 3), active=st.booleans(), budget=st.sampled_from([None, 5]))
    def start(self, overlap: int, active: bool, budget: int | None) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.overlap, self.budget = overlap, budget
        more = f"overlap: {overlap}\ngold_share: 0.2\nrepeat_share: 0.2\nrepeat_after: 1\n"
        more += f"random_share: {0.3 if active else 1}\n" + (f"budget: {budget}\n" if budget else "")
        with patch.object(store, "new_uid", lambda: "0" * 32):  # the same draws whenever an example is run again
            self.study = made(Path(self.place.name), pairs=4, gold=2, more=more, raters="abcd", clock=self.clock)
        self.live: dict[str, tuple[str, str, Any]] = {}
        self.flagged: set[str] = set()
        self.tokens: dict[tuple[str, Any], list[str]] = {(r, q): [] for r in "abcd" for q in ("pairs", "disputed")}

    def keep(self, rater: str, which: Any, turn: Turn, voted: int = 0) -> None:
        mine = self.tokens[rater, which]
        mine += [one.token for one in (turn.now, turn.ahead) if one is not None and one.token not in mine]
        assert not {one.prompt for one in (turn.now, turn.ahead) if one is not None} & self.flagged
        before = sum((who, queue) == (rater, which) for who, _, queue in self.live.values())
        assert turn.progress.done == before + voted
        assert (turn.now is None) == bool(turn.progress.why) == (turn.progress.left == 0)
        assert turn.progress.left % 10 == 0

    @rule(rater=st.sampled_from("abcd"), which=st.sampled_from(["pairs", "disputed"]))
    def turn(self, rater: str, which: Any) -> None:
        self.keep(rater, which, self.study.turn(rater, which))

    @rule(
        rater=st.sampled_from("abcd"), which=st.sampled_from(["pairs", "disputed"]),
        choice=st.sampled_from(["left", "right", "left", "right", "tie_good", "cannot_judge"]), data=st.data(),
    )  # fmt: skip
    def vote(self, rater: str, which: Any, choice: Any, data: Any) -> None:
        self.keep(rater, which, self.study.turn(rater, which))
        if not self.tokens[rater, which]:
            return
        token = data.draw(st.sampled_from(self.tokens[rater, which][::-1]))
        try:
            self.study.vote(rater, token, Answer(choice), which)
        except RefusedError:
            return
        assert token not in self.live and self.prompts()[token] not in self.flagged
        self.live[token] = rater, choice, which

    @rule(
        rater=st.sampled_from("abcd"),
        which=st.sampled_from(["pairs", "disputed"]),
        choice=st.sampled_from(["left", "right"]),
    )
    def finish(self, rater: str, which: Any, choice: Any) -> None:
        """A rater who answers all that is there: pairs become complete, and raters disagree."""
        while (now := self.study.turn(rater, which).now) is not None:
            self.keep(rater, which, self.study.vote_and_turn(rater, now.token, Answer(choice), which)[1], voted=1)
            self.live[now.token] = rater, choice, which

    @rule(rater=st.sampled_from("abcd"), which=st.sampled_from(["pairs", "disputed"]))
    def undo(self, rater: str, which: Any) -> None:
        mine = [token for token, (who, _, queue) in self.live.items() if (who, queue) == (rater, which)]
        try:
            back = self.study.undo(rater, which)
        except RefusedError:
            assert not mine or self.prompts()[mine[-1]] in self.flagged
            return
        assert back.token == mine[-1] and back.prompt not in self.flagged  # dictionaries keep the order of insertion
        assert back.answer is not None and back.answer.choice == self.live[back.token][1]
        del self.live[back.token]

    @rule(
        rater=st.sampled_from("abcd"),
        which=st.sampled_from(["pairs", "disputed"]),
        flag=st.integers(0, 3),
        data=st.data(),
    )
    def put_back(self, rater: str, which: Any, flag: int, data: Any) -> None:
        if not self.tokens[rater, which]:
            return
        token = data.draw(st.sampled_from(self.tokens[rater, which]))
        try:
            if flag == 0:
                self.study.flag(rater, token, queue=which)
            else:
                self.study.skip(rater, token, which)
        except RefusedError:
            return
        assert token not in self.live
        if flag == 0:
            self.flagged.add(self.prompts()[token])

    @rule(rater=st.sampled_from("abcd"))
    def flag_what_others_have(self, rater: str) -> None:
        for one in "abcd":
            self.keep(one, "pairs", self.study.turn(one))
        if (now := self.study.turn(rater).now) is not None and len(self.flagged) < 3:
            self.study.flag(rater, now.token)
            self.flagged.add(now.prompt)

    def prompts(self) -> dict[str, str]:
        """By token. Each pair has a prompt of its own."""
        items = {row.id: row.text for row in rows(self.study, ItemRow)}
        pairs = {row.id: items[row.item_id] for row in rows(self.study, PairRow)}
        return {row.token: pairs[row.pair_id] for row in rows(self.study, AssignmentRow)}

    @invariant()
    def what_was_flagged_is_shown_to_nobody(self) -> None:
        shown = self.prompts()
        for row in rows(self.study, AssignmentRow):
            if shown[row.token] in self.flagged:
                assert row.state != "open"
                with pytest.raises(RefusedError, match="was flagged"):
                    self.study.content("abcd"[row.rater_id - 1], row.token, "left")

    @rule(minutes=st.sampled_from([1, 20]))
    def wait(self, minutes: int) -> None:
        self.clock.time += 60 * minutes

    @invariant()
    def the_record_is_right(self) -> None:
        given = [row for row in rows(self.study, AssignmentRow) if row.state in ("open", "done")]
        per_pair = Counter(row.pair_id for row in given if not (row.repeat or row.adjudication))
        verdicts = Counter(row.pair_id for row in given if row.adjudication)
        judged = {(row.pair_id, row.rater_id) for row in given if not row.adjudication}
        assert max(verdicts.values(), default=0) <= 1
        pairs = {row.id: row for row in rows(self.study, PairRow)}
        for row in pairs.values():
            assert row.taken == per_pair.get(row.id, 0)
            assert row.kind != "ordinary" or row.taken <= self.overlap
        alive = sum(row.taken for row in pairs.values() if row.kind == "ordinary" and not row.flagged)
        assert self.budget is None or alive <= self.budget
        for row in given:
            if row.adjudication:
                assert pairs[row.pair_id].kind == "ordinary" and (row.pair_id, row.rater_id) not in judged
        votes = rows(self.study, VoteRow)
        undone = {row.undoes for row in votes}
        tokens = {row.id: row.token for row in rows(self.study, AssignmentRow)}
        live = {tokens[v.assignment_id]: v.choice for v in votes if v.undoes is None and v.id not in undone}
        assert live == {token: choice for token, (_, choice, _) in self.live.items()}

    def teardown(self) -> None:
        if hasattr(self, "study"):
            assert all(finding.ok for finding in self.study.inspect()), self.study.inspect()
            final = {preference.provenance["pair"]: preference for preference in self.study.export(final=True)}
            assert all(0 <= preference.label <= 1 for preference in final.values())
            self.study.close()
            self.place.cleanup()


QUICK = settings(max_examples=5, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
AnyOrder.TestCase.settings = QUICK
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_order_at_length() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(QUICK, max_examples=30, stateful_step_count=60))


def test_events_tell_the_whole_story(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.undo("a")
    study.skip("a", claimed(study, "a").token)
    assert [row.kind for row in rows(study, EventRow)] == [
        "created", "joined", "joined", "claimed", "voted", "undone", "skipped",
    ]  # fmt: skip


def test_a_damaged_database_is_told_in_one_sentence(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.close()
    for log in (tmp_path / "study").glob("study.sqlite-*"):
        log.unlink()
    (tmp_path / "study" / "study.sqlite").write_bytes(bytes(8192))
    with pytest.raises(InputError, match=r"damaged .*not a database.*backup"):
        Study.open(tmp_path / "study")
