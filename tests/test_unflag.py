"""Taking back a flag: the pair, its votes and its places come back, in whatever order things happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from diffalign.errors import NotFoundError, RefusedError
from diffalign.study import Answer, Study
from diffalign.study.schema import AssignmentRow, EventRow, ItemRow, PairRow
from tests.label_server import LEAN, serving
from tests.studies import Clock, claimed, known_uids, made, rows
from tests.test_study import AnyOrder

__all__ = ["known_uids"]


def states(study: Study) -> list[str]:
    return [row.state for row in rows(study, AssignmentRow)]


def sound(study: Study) -> bool:
    return all(finding.ok for finding in study.inspect())


def flagged(tmp_path: Path, **options: Any) -> tuple[Study, dict[str, str]]:
    """Rater a has voted on the only pair, b has flagged it, c and d had it open."""
    study = made(tmp_path, pairs=1, more="overlap: 4\n", raters="abcd", **options)
    study.vote("a", claimed(study, "a").token, Answer("left"))
    tokens = {rater: claimed(study, rater).token for rater in "bcd"}
    assert study.flag_and_turn("b", tokens["b"], "by accident").now is None
    return study, tokens


def test_who_flags_by_accident_has_the_pair_again_and_so_have_the_others(tmp_path: Path) -> None:
    study, tokens = flagged(tmp_path)
    turn = study.unflag_and_turn("b")
    assert turn.now is not None and turn.now.token == tokens["b"]
    assert states(study) == ["done", "open", "open", "open"]
    assert [(row.taken, row.flagged) for row in rows(study, PairRow)] == [(4, False)]
    events = [(row.kind, row.rater_id, row.assignment_id) for row in rows(study, EventRow)][-3:]
    assert events == [("returned", 3, 3), ("returned", 4, 4), ("unflagged", 2, 2)]
    for rater in "bcd":
        study.vote(rater, tokens[rater], Answer("right"))
    assert sound(study) and len(list(study.export())) == 4


def test_what_was_with_others_longer_than_their_lease_is_free(tmp_path: Path) -> None:
    """Rater c's answer is taken all the same, because the place is still free."""
    clock = Clock()
    study, tokens = flagged(tmp_path, clock=clock)
    clock.time += 10_000
    study.unflag_and_turn("b")
    assert states(study) == ["done", "open", "expired", "expired"]
    assert [row.taken for row in rows(study, PairRow)] == [2]
    study.vote("c", tokens["c"], Answer("left"))
    assert sound(study)


@pytest.mark.parametrize("then", ["vote", "skip", "undo", "unflag"])
def test_a_flag_is_taken_back_at_once_or_not_at_all(tmp_path: Path, then: str) -> None:
    study = made(tmp_path, pairs=4, raters="ab")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.flag("a", claimed(study, "a").token)
    study.vote("b", claimed(study, "b").token, Answer("left"))  # what others do does not matter
    if then == "undo":
        study.undo("a")
    elif then == "unflag":
        study.unflag_and_turn("a")
    else:
        token = claimed(study, "a").token
        study.vote("a", token, Answer("left")) if then == "vote" else study.skip("a", token)
    before = [row.flagged for row in rows(study, PairRow)]
    with pytest.raises(RefusedError, match="the last that you did is no flag"):
        study.unflag_and_turn("a")
    assert [row.flagged for row in rows(study, PairRow)] == before and sound(study)


def test_who_did_nothing_has_no_flag(tmp_path: Path) -> None:
    study, _ = flagged(tmp_path)
    for rater in "acd":
        with pytest.raises(RefusedError, match="is no flag"):
            study.unflag_and_turn(rater)
    with pytest.raises(RefusedError, match="is no flag"):  # of the other queue
        study.unflag_and_turn("b", "disputed")


def test_a_pair_stays_out_when_the_budget_was_spent_without_it(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=3, more="budget: 1\n", raters="ab")
    study.flag("a", claimed(study, "a").token)
    study.vote("b", claimed(study, "b").token, Answer("left"))
    with pytest.raises(RefusedError, match="all the votes that it asked for meanwhile"):
        study.unflag_and_turn("a")
    assert sum(row.flagged for row in rows(study, PairRow)) == 1 and sound(study)
    study.unflag(next(row.id for row in rows(study, PairRow) if row.flagged))
    assert not any(row.flagged for row in rows(study, PairRow)) and study.turn("a").progress.complete and sound(study)


def test_an_administrator_takes_a_pair_in_again(tmp_path: Path) -> None:
    """Nobody's hands hold it then; it comes to raters anew, and the rater's own way back is over."""
    study, tokens = flagged(tmp_path)
    study.unflag(1)
    assert states(study) == ["done", "flagged", "expired", "expired"]
    assert [row.taken for row in rows(study, PairRow)] == [1]
    with pytest.raises(RefusedError, match="was taken back by an administrator"):
        study.unflag_and_turn("b")
    assert claimed(study, "b").token != tokens["b"]
    with pytest.raises(RefusedError, match="pair 1 is in the study"):
        study.unflag(1)
    with pytest.raises(NotFoundError, match="there is no pair 2"):
        study.unflag(2)
    assert sound(study)


def test_what_came_back_once_does_not_come_back_by_a_later_flag(tmp_path: Path) -> None:
    """Rater c's place was given back by the first flag's end; the second flag, by b again, took nothing from c."""
    clock = Clock()
    study, tokens = flagged(tmp_path, clock=clock)
    study.unflag(1)
    study.flag("d", claimed(study, "d").token)
    study.unflag_and_turn("d")
    assert states(study) == ["done", "flagged", "expired", "expired", "open"]
    assert tokens["c"] not in {row.token for row in rows(study, AssignmentRow) if row.state == "open"} and sound(study)


def test_over_http(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=2, more="min_view_seconds: 0\n", raters="")
    with serving(study.folder, code=LEAN) as server:
        client = server.client()
        now = client.get("/api/turn").json()["now"]
        assert client.post("/api/unflag", json={}).status_code == 409
        assert client.post("/api/flag", json={"token": now["token"]}).json()["now"]["token"] != now["token"]
        assert client.post("/api/unflag", json={"more": 1}).status_code == 400
        back = client.post("/api/unflag", json={})
        assert back.status_code == 200 and back.json()["now"]["token"] == now["token"]
        assert client.post("/api/unflag", json={}).status_code == 409
    assert sound(study)


class WithUnflag(AnyOrder):
    """The same raters, who also take flags back; what must hold is what holds without that."""

    def admitted(self, before: dict[int, bool]) -> list[str]:
        """The prompts of the pairs that came back."""
        items = {row.id: row.text for row in rows(self.study, ItemRow)}
        return [items[row.item_id] for row in rows(self.study, PairRow) if before[row.id] and not row.flagged]

    @rule(rater=st.sampled_from("abcd"), which=st.sampled_from(["pairs", "pairs", "disputed"]), flags=st.booleans())
    def unflag(self, rater: str, which: Any, flags: bool) -> None:
        now = self.study.turn(rater, which).now if flags else None
        if now is not None:
            self.keep(rater, which, self.study.turn(rater, which))
            self.study.flag(rater, now.token, queue=which)
            self.flagged.add(now.prompt)
        before = {row.id: row.flagged for row in rows(self.study, PairRow)}
        try:
            turn = self.study.unflag_and_turn(rater, which)
        except RefusedError:
            # Where nothing came between, the budget cannot have been spent.
            assert now is None and not self.admitted(before)
            return
        (prompt,) = self.admitted(before)
        self.flagged.remove(prompt)
        self.keep(rater, which, turn)

    @precondition(lambda self: self.budget is None and self.flagged)
    @rule(data=st.data())
    def admit(self, data: Any) -> None:
        before = {row.id: row.flagged for row in rows(self.study, PairRow)}
        self.study.unflag(data.draw(st.sampled_from([pair for pair, out in before.items() if out])))
        (prompt,) = self.admitted(before)
        self.flagged.remove(prompt)


QUICK = settings(max_examples=6, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
WithUnflag.TestCase.settings = QUICK
TestWithUnflag = WithUnflag.TestCase


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_order_at_length() -> None:
    run_state_machine_as_test(WithUnflag, settings=settings(QUICK, max_examples=30, stateful_step_count=60))
