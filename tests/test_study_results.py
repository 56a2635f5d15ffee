"""What a study says of its votes beside agreement: who is simulated, which pairs are flagged, who can be ranked."""

from __future__ import annotations

import io
import json
import stat
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, update

from diffalign.errors import InputError, RefusedError
from diffalign.study import Answer, Protocol, Study, StudyPair, database, store
from diffalign.study.content import one_range
from diffalign.study.schema import EventRow, PairRow
from diffalign.types import Prompt, Sample
from tests.studies import RULES, claimed, known_uids, made, rows, text_pair, vote_all

__all__ = ["known_uids"]


def between(number: int, first: str, second: str, image: bool = False) -> StudyPair:
    """A pair of two arms."""
    asked = Prompt(f"prompt {number}")
    if image:
        one, two = (Sample(asked, image=Image.new("RGB", (4, 4), (number, v, 0))) for v in (1, 2))
    else:
        one, two = (Sample(asked, text=f"{side} {number}") for side in ("one", "two"))
    return StudyPair(asked, one, two, first, second)


# --- simulated raters ---


def test_votes_of_simulated_raters_are_marked_everywhere(tmp_path: Path) -> None:
    """Two raters vote on three pairs each, one of them a program: 3 of 6 votes."""
    more = "overlap: 2\ncriteria: [{name: q, question: q, kind: scale, anchors: [x, y]}]\n"
    study = made(tmp_path, pairs=3, more=more, raters="")
    person, program = study.add_rater("a"), study.add_rater("sim", simulated=True)
    vote_all(study, ("a", "sim"), criteria={"q": {"left": 1, "right": 2}})
    found = study.stats()
    assert found.votes == 6 and found.simulated == 3
    assert {row.rater: row.simulated for row in found.raters} == {person: False, program: True}
    assert found.notes[0].startswith("3 of 6 votes are simulated")
    assert found.as_dict()["simulated"] == 3
    export = study.export()
    marks = {(p.rater, p.provenance.get("simulated")) for p in export}
    assert marks == {(person, None), (program, True)} and export.simulated == 3
    assert all(p.provenance["simulated"] is True for p in study.export(final=True)), "each has a simulated vote"
    assert {(row["rater"], row["simulated"]) for row in study.scores()} == {(person, False), (program, True)}
    assert all(finding.ok for finding in study.inspect())
    assert [(e.kind, e.data.get("simulated")) for e in rows(study, EventRow)][1:3] == [
        ("joined", None),
        ("joined", True),
    ]


def test_without_simulated_raters_nothing_is_said_of_them(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=1, raters="a")
    vote_all(study, "a")
    assert study.stats().simulated == 0 and "simulated" not in str(study.stats().notes)
    assert all("simulated" not in p.provenance for p in study.export(final=True))


def test_a_person_is_not_made_simulated_afterwards(tmp_path: Path) -> None:
    """Who has voted as a person stays one; who has not may be marked, once, and it stays."""
    study = made(tmp_path, pairs=2, raters="ab")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    with pytest.raises(RefusedError, match="votes of a person"):
        study.add_rater("a", simulated=True)
    before = len(rows(study, EventRow))
    pseudonym = study.add_rater("b")
    assert study.add_rater("b", simulated=True) == study.add_rater("b", simulated=True) == study.add_rater("b")
    assert [e.kind for e in rows(study, EventRow)[before:]] == ["simulated"]
    assert [r.rater for r in study.stats().raters if r.simulated] == [pseudonym]
    assert all(finding.ok for finding in study.inspect())


# --- flags ---


def test_flagged_pairs_are_listed_with_their_reasons(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=3, raters="ab")
    token = claimed(study, "a").token
    study.flag("a", token, "two heads")
    (flag,) = study.stats().flags
    assert (flag.kind, flag.reason) == ("ordinary", "two heads") and flag.rater.startswith("r-")
    assert [row.id for row in rows(study, PairRow) if row.flagged] == [flag.pair]
    assert json.loads(json.dumps(study.stats().as_dict()))["flags"][0]["reason"] == "two heads"
    with database.writing(study.engine) as connection:  # what taking it back does to the pair
        connection.execute(update(PairRow).values(flagged=False))
    assert study.stats().flags == ()


# --- rankings ---


def test_images_and_texts_are_ranked_apart(tmp_path: Path) -> None:
    """Arms of the same names: the first always wins among images, the second among texts."""
    pairs = [between(i, "base", "tuned", image=i % 2 == 0) for i in range(24)]
    study = Study.create(tmp_path / "study", Protocol.parse(RULES), pairs)
    study.add_rater("a")
    while (now := study.claim("a")) is not None:
        if now.kind == "text":
            assert now.texts is not None
            first_left = now.texts[0].startswith("one")
            study.vote("a", now.token, Answer("right" if first_left else "left"))
        else:
            one = Image.open(io.BytesIO(study.content("a", now.token, "left"))).getpixel((0, 0))
            assert isinstance(one, tuple)
            study.vote("a", now.token, Answer("left" if one[1] == 1 else "right"))
    found = study.stats()
    best = {group.kind: group.ranking.standings[0].arm for group in found.rankings if group.ranking}
    assert best == {"image": "base", "text": "tuned"}
    assert "base, tuned (images) | base, tuned (texts)" in " ".join(found.notes)


def test_groups_that_were_never_compared_are_ranked_each_by_itself(tmp_path: Path) -> None:
    """a-b and b-c are one group, d-e another, f-g has no votes: two rankings, and no arm in both."""
    pairs = [between(i, *(("a", "b"), ("b", "c"), ("d", "e"))[i % 3]) for i in range(30)]
    study = Study.create(tmp_path / "study", Protocol.parse(RULES), pairs)
    study.add_rater("r")
    while (now := study.claim("r")) is not None:
        assert now.texts is not None
        study.vote("r", now.token, Answer("left" if now.texts[0].startswith("one") else "right"))
    found = study.stats()
    assert [(g.kind, g.arms) for g in found.rankings] == [("text", ("a", "b", "c")), ("text", ("d", "e"))]
    assert all(group.ranking is not None and not group.why for group in found.rankings)
    assert [s.arm for g in found.rankings if g.ranking for s in g.ranking.standings] == ["a", "b", "c", "d", "e"]
    (note,) = [note for note in found.notes if "never compared with each other" in note]
    assert "2 groups" in note and "a, b, c (texts) | d, e (texts)" in note


# --- how a study is made ---


def test_the_order_of_pairs_is_not_known_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, two studies: other orders. One seed and one uid: the same."""

    def places(name: str, uid: str) -> list[int]:
        monkeypatch.setattr(store, "new_uid", lambda: uid)
        study = Study.create(tmp_path / name, Protocol.parse(RULES), [text_pair(i) for i in range(30)], seed=5)
        found = [row.place for row in rows(study, PairRow)]
        study.close()
        return found

    assert places("one", "0" * 32) == places("again", "0" * 32) != places("other", "1" * 32)


def test_a_study_is_made_by_few_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 pairs are 300 prompts, 600 samples, 300 pairs: statements grow by the thousand rows, not by the row."""
    seen = count()
    real = database.connect

    def counting(where: str | Path) -> Engine:
        from sqlalchemy import event

        engine = real(where)
        event.listen(engine, "before_cursor_execute", lambda *_: next(seen))
        return engine

    monkeypatch.setattr(database, "connect", counting)
    study = made(tmp_path, pairs=3, raters="")
    few = next(seen)
    study.close()
    made(tmp_path / "more", pairs=300, raters="").close()
    assert next(seen) - few < few + 20


def test_only_the_owner_reads_a_study(tmp_path: Path) -> None:
    study = made(tmp_path, pairs=2, raters="a")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    study.backup(tmp_path / "copy")
    for folder in (study.folder, tmp_path / "copy"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("study.sqlite*")}
        assert set(modes.values()) == {0o600}, modes
    study.close()


# --- greyscale of more than 8 bits ---


def test_both_sides_of_a_pair_get_one_range(tmp_path: Path) -> None:
    """1000 to 2000, and 1500 to 3000: the range is 1000 to 3000, so 2000 is 127.5, to even 128, and 1500 is 63.75."""
    asked = Prompt("grey")
    one, two = (Image.fromarray(np.array([values], dtype=np.uint16)) for values in ([1000, 2000], [1500, 3000]))
    assert one.mode == "I;16"
    protocol = Protocol.parse(RULES)
    pair = StudyPair(asked, Sample(asked, image=one), Sample(asked, image=two), "dark", "bright")
    study = Study.create(tmp_path / "study", protocol, [pair])
    study.add_rater("a")
    study.vote("a", claimed(study, "a").token, Answer("left"))
    (kept,) = study.export()
    assert kept.first.image is not None and kept.second.image is not None
    shown = [
        [p[0] for p in np.asarray(s.image.convert("RGB")).reshape(-1, 3)] for s in (kept.first, kept.second) if s.image
    ]
    assert shown == [[0, 128], [64, 255]]


def test_flat_and_broken_grey_images() -> None:
    """Two flat ones keep their place in the 16-bit range: 32768 of 65535 is 127.5. What is no number is refused."""
    flat = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert {one.getpixel((0, 0)) for one in one_range(flat, flat)} == {128}
    with pytest.raises(InputError, match="NaN"):
        one_range(flat, Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))
