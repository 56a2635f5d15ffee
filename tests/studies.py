"""Small studies for tests: texts as samples, a clock that is set by hand, raters who vote by a rule."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from diffalign.study import Answer, Assignment, Protocol, Study, StudyPair, database, store
from diffalign.study.schema import Base
from diffalign.types import Prompt, Sample

RULES = "name: test\nversion: 1\n"


def text_pair(number: int, prompt: str | None = None, **more: Any) -> StudyPair:
    asked = Prompt(prompt or f"prompt {number}")
    return StudyPair(
        asked, Sample(asked, text=f"one {number}"), Sample(asked, text=f"two {number}"), "base", "tuned", **more
    )


@pytest.fixture(autouse=True)
def known_uids(monkeypatch: pytest.MonkeyPatch) -> None:
    """What claims draw depends on the uid: the same in each run, in modules that import this."""
    numbers = count()
    monkeypatch.setattr(store, "new_uid", lambda: f"{next(numbers):032x}")


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def made(folder: Path, pairs: int = 3, more: str = "", raters: str = "ab", gold: int = 0, **rest: Any) -> Study:
    material = [text_pair(i) for i in range(pairs)] + [text_pair(1000 + i, expected="first") for i in range(gold)]
    study = Study.create(folder / "study", Protocol.parse(RULES + more), material, **rest)
    for rater in raters:
        study.add_rater(rater)
    return study


def claimed(study: Study, rater: str) -> Assignment:
    found = study.claim(rater)
    assert found is not None
    return found


def rows(study: Study, table: type[Base]) -> list[Any]:
    with database.reading(study.engine) as connection:
        return list(connection.execute(select(*table.__table__.c).order_by(table.__table__.c.id)))


def vote_all(study: Study, raters: Iterable[str], choice: Any = "left", **more: Any) -> None:
    """Each rater answers the same to everything that is there for them."""
    for rater in raters:
        while (assignment := study.claim(rater)) is not None:
            study.vote(rater, assignment.token, Answer(choice, **more))


def for_first(study: Study, assignment: Assignment, prefers: bytes = b"one") -> str:
    """The side on which the sample stands that begins so."""
    assert assignment.texts is not None
    return "left" if assignment.texts[0].encode().startswith(prefers) else "right"
