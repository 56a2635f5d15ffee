"""Turns and queues: one transaction per act, what an adjudicator sees, final verdicts, budgets, scores and points."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.study import Answer, Point, Progress, Protocol, Study, StudyPair, Turn
from diffalign.study.schema import AssignmentRow, ContestRow, PairRow, VoteRow
from diffalign.types import Prompt, Sample
from tests.studies import RULES, Clock, claimed, for_first, known_uids, made, rows, vote_all

__all__ = ["known_uids"]

QUESTIONS = """criteria:
- {name: anatomy, question: "Which is more plausible?"}
- {name: quality, question: "How good is it?", kind: scale, anchors: [bad, fair, good]}
"""


def disputed(folder: Path, pairs: int = 3, raters: str = "abc", more: str = "") -> Study:
    """A study where a is always for the left and b, who sees each pair the other way round, too: all disagree."""
    study = made(folder, pairs, f"overlap: 2\n{more}", raters)
    for rater in "ab":
        while (now := study.turn(rater).now) is not None:
            study.vote(rater, now.token, Answer("left", 2, comment=f"says {rater}"))
    return study


def judged(turn: Turn) -> str:
    assert turn.now is not None
    return turn.now.token


# --- turns ---


def test_a_turn_has_the_pair_the_next_one_and_the_progress(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=3, title="on trial", clock=Clock())
    turn = study.turn("a")
    assert study.title == "on trial"
    assert turn.now is not None and turn.ahead is not None and turn.now.token != turn.ahead.token
    assert turn.now == claimed(study, "a") and turn.ahead == study.claim("a", ahead=1)
    assert turn.progress == Progress(done=0, left=10, complete=False, why="")
    assert turn.now.texts is not None and {text.split()[0] for text in turn.now.texts} == {"one", "two"}
    for side, text in zip(("left", "right"), turn.now.texts, strict=True):
        assert study.content("a", turn.now.token, side) == text.encode()  # type: ignore[arg-type]
    number, after = study.vote_and_turn("a", turn.now.token, Answer("left"))
    assert number == 1 and judged(after) == turn.ahead.token
    assert (after.progress.done, after.progress.left) == (1, 10)
    last = study.vote_and_turn("a", judged(after), Answer("left"))[1]
    assert last.ahead is None and last.progress.left == 10
    end = study.vote_and_turn("a", judged(last), Answer("left"))[1]
    assert end.now is None and end.progress.complete and end.progress.done == 3
    assert end.progress.why == "Every pair has been judged by as many raters as the study wants."


def test_a_turn_after_a_refused_vote_never_comes(tmp_path: Path) -> None:
    """Vote and turn are one transaction: nothing of it remains where the vote is refused."""
    study = made(tmp_path, pairs=3)
    token = judged(study.turn("a"))
    before = rows(study, AssignmentRow)
    with pytest.raises(InputError, match="no choice"):
        study.vote_and_turn("a", token, Answer("best"))  # type: ignore[arg-type]
    assert rows(study, AssignmentRow) == before and not rows(study, VoteRow)


def test_why_nothing_is_left(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=1, more="overlap: 2\n", raters="ab")
    vote_all(study, "a")
    alone = study.turn("a").progress
    assert not alone.complete and alone.why.endswith("wait for other raters.")
    token = judged(study.turn("b"))
    assert "with other raters now" in study.turn("a").progress.why
    study.vote("b", token, Answer("left"))
    assert study.turn("a").progress.complete


def test_an_undone_answer_comes_back_to_fill_the_form(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=2, more=QUESTIONS)
    token = judged(study.turn("a"))
    said = Answer("left", 3, {"anatomy": "tie", "quality": {"left": 3, "right": 1}}, (), "b\0\ud800", 10.0, 12.5)
    study.vote("a", token, said)
    back = study.undo_and_turn("a").now
    assert back is not None and back.token == token and back.answer == said
    study.vote("a", token, Answer("tie_bad"))
    again = study.undo_and_turn("a").now
    assert again is not None and again.answer is not None and again.answer.choice == "tie_bad"
    assert study.claim("a", ahead=1).answer is None  # type: ignore[union-attr]


def test_skip_and_flag_bring_the_next_turn(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=3)
    first = study.turn("a")
    second = study.skip_and_turn("a", judged(first))
    assert first.ahead is not None and judged(second) == first.ahead.token and second.progress.left == 10
    third = study.flag_and_turn("a", judged(second), "torn")
    assert third.progress.left == 10 and third.progress.done == 0


# --- adjudication ---


def test_an_adjudicator_decides_where_raters_disagree(tmp_path: Path) -> None:
    study = disputed(tmp_path)
    assert study.disputes() == 3
    turn = study.turn("c", "disputed")
    assert turn.now is not None and turn.progress == Progress(0, 10, False, "")
    names = {study.add_rater(rater): rater for rater in "ab"}
    said = {names[other.rater]: other for other in turn.now.others}
    assert {rater: other.comment for rater, other in said.items()} == {"a": "says a", "b": "says b"}
    assert {other.choice for other in said.values()} == {"left", "right"} and said["a"].strength == 2
    after = study.vote_and_turn("c", judged(turn), Answer(for_first(study, turn.now)), "disputed")[1]  # type: ignore[arg-type]
    assert (after.progress.done, after.progress.left, study.disputes()) == (1, 10, 2)
    while after.now is not None:
        after = study.vote_and_turn("c", after.now.token, Answer("left"), "disputed")[1]
    assert after.progress == Progress(3, 0, True, "There is no pair on which raters disagree.")
    assert [row.taken for row in rows(study, PairRow)] == [2, 2, 2]
    assert study.turn("c").progress.why.startswith("Every pair has been judged")


def test_others_are_shown_in_terms_of_the_sides_of_now(tmp_path: Path) -> None:
    """Rater a was for the first sample: an adjudicator is told the side where it stands now, criteria too."""
    study = made(tmp_path, pairs=8, more=f"overlap: 2\n{QUESTIONS}", raters="abc")
    for rater, prefers in (("a", b"one"), ("b", b"two")):
        while (now := study.turn(rater).now) is not None:
            side = for_first(study, now, prefers)
            other = "right" if side == "left" else "left"
            criteria = {"anatomy": side, "quality": {side: 3, other: 1}}
            study.vote(rater, now.token, Answer(side, criteria=criteria))  # type: ignore[arg-type]
    sides = set()
    while (now := study.turn("c", "disputed").now) is not None:
        one, two = for_first(study, now), for_first(study, now, b"two")
        by_rater = {other.rater: other for other in now.others}
        for rater, side in (("a", one), ("b", two)):
            said = by_rater[study.add_rater(rater)]
            assert said.choice == said.criteria["anatomy"] == side and said.criteria["quality"][side] == 3
        sides.add(one)
        study.vote("c", now.token, Answer("left"), "disputed")
    assert sides == {"left", "right"}


def test_one_verdict_a_pair_and_not_by_who_judged_it(tmp_path: Path) -> None:
    study = disputed(tmp_path, pairs=1, raters="abcd")
    for rater in "ab":
        assert study.turn(rater, "disputed").progress.why == (
            "The disputed pairs that are left you have judged yourself; others decide them."
        )
    token = judged(study.turn("c", "disputed"))
    assert study.turn("d", "disputed").progress.why == "The last disputed pairs are with other adjudicators now."
    with pytest.raises(NotFoundError, match="in the queue pairs"):
        study.vote("c", token, Answer("left"))
    with pytest.raises(InputError, match="no queue 'x'"):
        study.turn("c", "x")  # type: ignore[arg-type]
    study.vote("c", token, Answer("left"), "disputed")
    assert study.turn("d", "disputed").progress.complete


def test_undo_stays_in_its_queue(tmp_path: Path) -> None:
    """Rater c judges a pair, and then adjudicates another: each undo takes back the last vote of its own queue."""
    study = made(tmp_path, pairs=3, more="overlap: 2\n", raters="abc")
    own = claimed(study, "c")
    study.vote("c", own.token, Answer("left"))
    vote_all(study, "ab")
    with pytest.raises(RefusedError, match="no vote of yours"):
        study.undo("c", "disputed")
    token = judged(study.turn("c", "disputed"))
    study.vote("c", token, Answer("right", comment="mine"), "disputed")
    assert study.undo("c").token == own.token
    left = study.disputes()
    with pytest.raises(RefusedError, match="no vote of yours"):
        study.undo("c")
    back = study.undo_and_turn("c", "disputed").now
    assert back is not None and back.token == token and back.answer is not None and back.answer.comment == "mine"
    assert len(back.others) == 2 and study.disputes() == left + 1


def test_a_dispute_ends_when_a_rater_changes_their_mind(tmp_path: Path) -> None:
    study = disputed(tmp_path, pairs=1)
    back = study.undo("b")
    assert study.disputes() == 0 and study.turn("c", "disputed").now is None
    study.vote("b", back.token, Answer("right"))
    assert study.disputes() == 0
    study.undo("b")
    study.vote("b", back.token, Answer("left"))
    assert study.disputes() == 1


def test_a_verdict_that_is_too_late(tmp_path: Path) -> None:
    clock = Clock()
    study = disputed(tmp_path, pairs=1, raters="abcd", more="lease_minutes: 5\n")
    study._now = clock
    clock.time = 2e9
    late = judged(study.turn("c", "disputed"))
    clock.time += 301
    other = judged(study.turn("d", "disputed"))
    study.vote("d", other, Answer("left"), "disputed")
    with pytest.raises(RefusedError, match="others have judged it"):
        study.vote("c", late, Answer("left"), "disputed")


def test_who_looks_into_the_other_queue_keeps_what_they_have_in_this_one(tmp_path: Path) -> None:
    clock = Clock()
    study = disputed(tmp_path, pairs=1, raters="abcd", more="lease_minutes: 5\n")
    study._now = clock
    clock.time = 2e9
    token = judged(study.turn("c", "disputed"))
    clock.time += 301
    assert study.turn("c").now is None
    assert judged(study.turn("c", "disputed")) == token
    clock.time += 301
    assert judged(study.turn("d", "disputed")) != token


def test_a_late_vote_on_a_pair_that_was_given_again_is_refused_in_words(tmp_path: Path) -> None:
    clock = Clock()
    study = made(tmp_path, pairs=1, clock=clock)
    late = claimed(study, "a")
    clock.time += 10_000
    study.turn("b", "disputed")  # which takes it back from a
    again = claimed(study, "a")
    with pytest.raises(RefusedError, match="you have been given it again"):
        study.vote("a", late.token, Answer("left"))
    study.vote("a", again.token, Answer("left"))


# --- what comes out ---


def test_an_export_leaves_adjudications_out_and_a_final_one_follows_them(tmp_path: Path) -> None:
    """Three pairs with one vote each way: a verdict on one, a verdict that it cannot be judged, none on the last."""
    study = disputed(tmp_path)
    shown = study.turn("c", "disputed").now
    assert shown is not None
    study.vote("c", shown.token, Answer(for_first(study, shown), 3), "disputed")  # type: ignore[arg-type]
    unsure = study.turn("c", "disputed").now
    assert unsure is not None
    study.vote("c", unsure.token, Answer("cannot_judge"), "disputed")
    plain, final = study.export(), study.export(final=True)
    assert len(list(plain)) == 6 and plain.left_out == {"adjudication": 2}
    found = {preference.prompt.text: preference for preference in final}
    assert final.left_out == {"adjudicated": 4, "cannot judge": 1} and unsure.prompt not in found
    decided = found.pop(shown.prompt)
    assert (decided.label, decided.strength, decided.rater) == (1.0, 3.0, "")
    assert decided.provenance["adjudicated"] is True
    (soft,) = found.values()
    assert (soft.label, soft.strength, soft.rater) == (0.5, 2.0, "")
    assert soft.provenance["votes"] == 2 and soft.provenance["adjudicated"] is False
    assert study.stats().adjudicated == 2 and len(study.stats().disputed) == 3


def test_a_final_label_is_the_mean_of_the_votes_per_criterion(tmp_path: Path) -> None:
    """Three raters: two for the first and a tie, (1 + 1 + 0.5) / 3; on anatomy one for the second, one tie: 0.25."""
    study = made(tmp_path, pairs=1, more=f"overlap: 3\n{QUESTIONS}", raters="abc")
    for rater, choice, anatomy in (("a", "one", None), ("b", "one", "two"), ("c", "tie_good", "tie")):
        now = claimed(study, rater)
        sides = {"one": for_first(study, now), "two": for_first(study, now, b"two")}
        criteria = {"anatomy": sides.get(anatomy, anatomy)} if anatomy else {}
        study.vote(rater, now.token, Answer(sides.get(choice, choice), criteria=criteria))  # type: ignore[arg-type]
    overall, by_anatomy = study.export(final=True)
    assert overall.criterion == "overall" and overall.label == pytest.approx(2.5 / 3)
    assert by_anatomy.criterion == "anatomy" and by_anatomy.label == 0.25
    assert by_anatomy.provenance["votes"] == 2


def test_scores_and_points_name_the_sample_that_stood_there(tmp_path: Path) -> None:
    asked = Prompt("p", id="7")
    grey = [Sample(asked, image=Image.new("RGB", (4, 4), (value,) * 3), seed=value) for value in (10, 200)]
    study = Study.create(
        tmp_path / "study", Protocol.parse(f"{RULES}{QUESTIONS}points: [ghost]\n"),
        [StudyPair(asked, grey[0], grey[1], "dark", "light")],
    )  # fmt: skip
    pseudonym = study.add_rater("a")
    now = claimed(study, "a")
    dark_side, light_side = ("left", "right") if rows(study, AssignmentRow)[0].first_is_left else ("right", "left")
    answer = Answer(
        "tie_bad", None, {"quality": {dark_side: 1, light_side: 3}}, [Point(light_side, 0.25, 0.75, "ghost")]  # type: ignore[arg-type]
    )  # fmt: skip
    study.vote("a", now.token, answer)
    found = {row["arm"]: row for row in study.scores()}
    assert {arm: row["score"] for arm, row in found.items()} == {"dark": 1, "light": 3}
    sha256 = rows(study, PairRow)[0]
    assert found["light"] == {
        "prompt": "p", "prompt_id": "7", "arm": "light", "seed": 200, "criterion": "quality", "score": 3, "points": 3,
        "rater": pseudonym, "pair": sha256.id, "vote": 1, "sample": found["light"]["sample"],
        "simulated": False,
    }  # fmt: skip
    assert found["light"]["sample"] != found["dark"]["sample"]
    (point,) = study.points()
    assert (point["arm"], point["x"], point["y"], point["label"]) == ("light", 0.25, 0.75, "ghost")
    assert point["sample"] == found["light"]["sample"] and point["rater"] == pseudonym


def test_points_are_for_images_and_of_the_protocol(tmp_path: Path) -> None:
    study = made(tmp_path, more="points: [ghost]\n")
    token = claimed(study, "a").token
    with pytest.raises(InputError, match="marked in images"):
        study.vote("a", token, Answer("left", points=[Point("left", 0, 0, "ghost")]))
    with pytest.raises(InputError, match="one of what the protocol names, ghost; got 'blur'"):
        study.vote("a", token, Answer("left", points=[Point("left", 0, 0, "blur")]))


# --- budgets ---


def test_a_budget_ends_the_study_after_so_many_votes(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=20, more="budget: 7\ngold_share: 0.2\n", gold=10, raters="ab")
    while study.turn("a").now or study.turn("b").now:
        for rater in "ab":
            if (now := study.turn(rater).now) is not None:
                study.vote(rater, now.token, Answer("left"))
    kinds = {row.id: row.kind for row in rows(study, PairRow)}
    voted = Counter(kinds[row.pair_id] for row in rows(study, AssignmentRow) if row.state == "done")
    assert voted["ordinary"] == 7
    for rater in "ab":
        assert study.turn(rater).progress.complete
        assert study.turn(rater).progress.why == "The study has the 7 votes that it asked for."
    undone = study.undo("a")  # what is taken back is free again, for whoever had it
    assert not study.turn("b").progress.complete and study.turn("b").now is None
    study.vote("a", undone.token, Answer("left"))
    assert study.turn("b").progress.complete


def test_a_late_vote_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    clock = Clock()
    study = made(tmp_path, pairs=5, more="budget: 1\n", clock=clock)
    late = claimed(study, "a")
    clock.time += 10_000
    study.vote("b", claimed(study, "b").token, Answer("left"))
    with pytest.raises(RefusedError, match="others have judged it"):
        study.vote("a", late.token, Answer("left"))


def test_a_flagged_pair_gives_its_votes_back_to_the_budget(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=5, more="overlap: 2\nbudget: 4\n", raters="ab")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.flag("b", claimed(study, "b").token)  # the pair that a has begun
    assert [(row.given, row.for_first + row.for_second) for row in rows(study, ContestRow)] == [(0, 0)]
    vote_all(study, "ab")
    assert sum(row.given for row in rows(study, ContestRow)) == 4
    assert all(finding.ok for finding in study.inspect())


def test_a_study_that_ends_early_has_disputes_of_what_was_judged_twice(tmp_path: Path) -> None:
    """Overlap 3, but the budget is spent after two votes on one pair: they disagree, and nobody else will judge it."""
    study = made(tmp_path, pairs=3, more="overlap: 3\nbudget: 2\n", raters="abc")
    for rater in "ab":
        study.vote(rater, claimed(study, rater).token, Answer("left"))
    assert study.disputes() == 1 and study.turn("c", "disputed").now is not None


def test_a_precision_ends_the_study(tmp_path: Path) -> None:
    """Two arms, 25 votes each way: the difference has variance 1 / (50 / 4) and a strength half of that deviation.

    1.96 * sqrt(0.08) / 2 = 0.277; at 48 votes it is 0.283, and the prior of deviation 5 changes it by less than 1 %.
    """
    study = made(tmp_path, pairs=100, more="precision: 0.28\n", raters="a")
    votes = 0
    while (now := study.turn("a").now) is not None:
        side = for_first(study, now) if votes % 2 else for_first(study, now, b"two")
        study.vote("a", now.token, Answer(side))  # type: ignore[arg-type]
        votes += 1
    assert 48 <= votes <= 52
    assert study.turn("a").progress.complete and "0.28" in study.turn("a").progress.why


def test_a_precision_ends_no_study_before_each_arm_was_compared(tmp_path: Path) -> None:
    """Without a vote a strength is known to 1.96 * 5 = 9.8 from the prior, which is no reason to ask nobody."""
    asked = Prompt("p")
    pairs = [
        StudyPair(asked, Sample(asked, text=f"{first}{i}"), Sample(asked, text=f"{second}{i}"), first, second)
        for i in range(3)
        for first, second in (("x", "y"), ("y", "z"))
    ]
    study = Study.create(tmp_path / "study", Protocol.parse(RULES + "precision: 50\n"), pairs)
    study.add_rater("a")
    arms = {row.id: {row.first_arm, row.second_arm} for row in rows(study, ContestRow)}
    compared: set[str] = set()
    while (now := study.claim("a")) is not None:
        assert compared < {"x", "y", "z"}
        study.vote("a", now.token, Answer("tie_good"))
        voted = {row.pair_id for row in rows(study, AssignmentRow) if row.state == "done"}
        compared = set().union(*(arms[row.contest_id] for row in rows(study, PairRow) if row.id in voted))
    assert compared == {"x", "y", "z"} and "50" in study.turn("a").progress.why


def test_rules_about_strength_criteria_and_time(tmp_path: Path) -> None:
    def refused(rules: str, answer: Answer) -> str:
        with pytest.raises(InputError) as error:
            answer.check(Protocol.parse(RULES + rules).rules)
        return str(error.value)

    assert "does not ask for a strength" in refused("strength: false\n", Answer("left", 1))
    required = f"{QUESTIONS}criteria_required: true\n"
    assert "quality is not yet" in refused(required, Answer("left", criteria={"anatomy": "tie"}))
    Answer("cannot_judge").check(Protocol.parse(RULES + required).rules)
    assert "for 2 s at least" in refused("min_view_seconds: 2\n", Answer("left", shown_at=10, decided_at=11.94))
    Answer("left", shown_at=10, decided_at=11.96).check(Protocol.parse(RULES + "min_view_seconds: 2\n").rules)
    Answer("left", shown_at=10).check(Protocol.parse(RULES).rules)


def test_a_megabyte_of_text_comes_back(tmp_path: Path) -> None:
    long = "\u202ea\0\ud800" * 250_000
    asked = Prompt(long)
    study = Study.create(
        tmp_path / "study", Protocol.parse(RULES),
        [StudyPair(asked, Sample(asked, text=long), Sample(asked, text="b"), "x", "y")], title=long,
    )  # fmt: skip
    study.add_rater("a")
    turn = study.turn("a")
    assert turn.now is not None and turn.now.prompt == long and turn.now.texts is not None
    assert long in turn.now.texts and study.title == long
    study.vote("a", turn.now.token, Answer("left", comment=long[:20_000]))
    assert [row.comment for row in rows(study, VoteRow)] == [long[:20_000]]
    assert all(finding.ok for finding in study.inspect())


# --- statistics ---


def test_statistics_per_question_and_as_json(tmp_path: Path) -> None:
    """Two raters, four pairs: always for the first, with anatomy a tie and the first scored 3, the second 1 or 2."""
    study = made(tmp_path, pairs=4, more=f"overlap: 2\n{QUESTIONS}", raters="ab", title="t")
    for rater, low in (("a", 1), ("b", 2)):
        while (now := study.turn(rater).now) is not None:
            side, other = for_first(study, now), for_first(study, now, b"two")
            criteria = {"anatomy": "tie", "quality": {side: 3, other: low}}
            study.vote(rater, now.token, Answer(side, criteria=criteria))  # type: ignore[arg-type]
    found = study.stats()
    overall, anatomy, quality = found.criteria
    assert [one.criterion for one in found.criteria] == ["overall", "anatomy", "quality"]
    assert {arm: (one.value, one.n) for arm, one in overall.arms.items()} == {"base": (1.0, 8), "tuned": (0.0, 8)}
    assert {arm: one.value for arm, one in anatomy.arms.items()} == {"base": 0.5, "tuned": 0.5}
    assert {arm: (one.value, one.n) for arm, one in quality.arms.items()} == {"base": (3.0, 8), "tuned": (1.5, 8)}
    assert (quality.kind, quality.answers, overall.answers) == ("scale", 16, 8)
    assert quality.alpha.n == 8 and 0 < quality.alpha.value < 1
    assert found.chosen == {"random": 8} and (found.title, found.protocol) == ("t", "test, version 1")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["criteria"][2]["arms"]["tuned"]["value"] == 1.5 and plain["alpha"]["value"] is None
    assert plain["raters"][0]["gold"]["value"] is None and plain["notes"] == list(found.notes)
    assert any("No gold pair" in note for note in found.notes)


def test_a_verdict_is_in_no_statistic_of_raters(tmp_path: Path) -> None:
    study = disputed(tmp_path, pairs=4)
    before = study.stats()
    while (now := study.turn("c", "disputed").now) is not None:
        study.vote("c", now.token, Answer("left"), "disputed")
    after = study.stats()
    assert (after.alpha, after.criteria, after.kappas) == (before.alpha, before.criteria, before.kappas)
    assert after.adjudicated == after.raters[2].adjudications == 4 and after.raters[2].votes == 0
    assert after.raters[2].left.left.n == 0 and after.left_out == {"adjudication": 4}
