"""Votes as preferences. Sides are turned back to samples, and raters go by their pseudonyms."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image
from sqlalchemy import Connection, Row, RowMapping, exists, select
from sqlalchemy.orm import aliased

from diffalign.study import database
from diffalign.study.schema import AssignmentRow, ItemRow, PairRow, RaterRow, SampleRow, StudyRow, VoteRow
from diffalign.types import Preference, Prompt, Sample

if TYPE_CHECKING:
    from diffalign.study.store import Study

LABELS = {"left": 1.0, "right": 0.0, "tie": 0.5, "tie_good": 0.5, "tie_bad": 0.5}
"""How far the left one is preferred."""


def live_votes(connection: Connection) -> list[RowMapping]:
    """Every vote that was not undone, in the order in which they came, with its assignment, pair and rater."""
    undo = aliased(VoteRow)
    query = (
        select(
            VoteRow.id, VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.comment, VoteRow.points,
            VoteRow.shown_at, VoteRow.decided_at, VoteRow.received_at, VoteRow.protocol_sha256,
            AssignmentRow.repeat, AssignmentRow.first_is_left, AssignmentRow.pair_id, AssignmentRow.claimed_at,
            PairRow.kind, PairRow.expected, PairRow.flagged, PairRow.item_id, PairRow.first_id, PairRow.second_id,
            RaterRow.pseudonym.label("rater"),
        )
        .join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id)
        .join(PairRow, PairRow.id == AssignmentRow.pair_id)
        .join(RaterRow, RaterRow.id == AssignmentRow.rater_id)
        .where(VoteRow.undoes.is_(None), ~exists().where(undo.undoes == VoteRow.id))
        .order_by(VoteRow.id)
    )  # fmt: skip
    return list(connection.execute(query).mappings())


def first_preferred(row: Mapping[Any, Any], value: str) -> float:
    """How far the first sample is preferred, of a choice in terms of sides: 1, 0, or 0.5 for a tie."""
    left = LABELS[value]
    return left if row["first_is_left"] else 1 - left


class Export:
    """The preferences of a study, to be iterated, and what was left out.

    Each vote on an ordinary pair gives one preference with the criterion ``overall``, and one more per criterion of
    the kind ``prefer`` that was answered. Left out, and counted in ``left_out``: gold and A/A pairs and repeats, pairs
    that were flagged, and ``cannot judge``. A strength of 1 to 3 is the preference's strength; without it that is 1.

    ``provenance`` has the study, pair, vote, arms, shown sides, kind of tie, scores per criterion by sample, comment,
    times and the hash of the protocol. The samples of one pair are the same objects in each of its preferences.
    """

    def __init__(self, study: Study) -> None:
        self._files = study.files
        with database.reading(study.engine) as connection:
            self._uid = connection.scalar(select(StudyRow.uid))
            self._items = {row.id: row for row in connection.execute(select(*ItemRow.__table__.c))}
            self._samples = {row.id: row for row in connection.execute(select(*SampleRow.__table__.c))}
            rows = live_votes(connection)
        self.left_out: Counter[str] = Counter()
        """How many votes were left out, by reason."""
        self._rows = [row for row in rows if self._kept(row)]

    def _kept(self, row: RowMapping) -> bool:
        reason = (
            ("repeat" if row["repeat"] else "")
            or (row["kind"] if row["kind"] != "ordinary" else "")
            or ("flagged" if row["flagged"] else "")
            or ("cannot judge" if row["choice"] == "cannot_judge" else "")
        )
        if reason:
            self.left_out[reason] += 1
        return not reason

    def __iter__(self) -> Iterator[Preference]:
        cached = lru_cache(maxsize=256)(self._sample)
        for row in self._rows:
            item = self._items[row["item_id"]]
            prompt = Prompt(item.text, item.prompt_id, item.attributes, item.negative)
            first, second = (cached(row[name]) for name in ("first_id", "second_id"))
            origin = self._provenance(row)
            answers = {"overall": row["choice"]}
            answers |= {name: value for name, value in row["answers"].items() if isinstance(value, str)}
            for criterion, value in answers.items():
                strength = float(row["strength"] or 1) if criterion == "overall" else 1.0
                label = first_preferred(row, value)
                yield Preference(prompt, first, second, label, strength, criterion, row["rater"], origin)

    def _sample(self, number: int) -> Sample:
        row = self._samples[number]
        item = self._items[row.item_id]
        prompt = Prompt(item.text, item.prompt_id, item.attributes, item.negative)
        data = self._files.get(row.sha256)
        if item.kind == "text":
            return Sample(prompt, text=data.decode("utf-8", "surrogatepass"), seed=int(row.seed))
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
        return Sample(prompt, image=image, seed=int(row.seed))

    def _provenance(self, row: RowMapping) -> dict[str, object]:
        first, second = self._samples[row["first_id"]], self._samples[row["second_id"]]
        names = ("first", "second") if row["first_is_left"] else ("second", "first")
        sides = dict(zip(("left", "right"), names, strict=True))
        scores = {
            criterion: {sides[side]: score for side, score in value.items()}
            for criterion, value in row["answers"].items()
            if isinstance(value, dict)
        }
        known: dict[str, object] = {
            "study": self._uid,
            "pair": row["pair_id"],
            "vote": row["id"],
            "first": _facts(first),
            "second": _facts(second),
            "left": sides["left"],
            "choice": row["choice"],
            "scores": scores,
            "points": [{**point, "side": sides[point["side"]]} for point in row["points"]],
            "comment": row["comment"],
            "received_at": row["received_at"],
            "seconds": seconds(row),
            "protocol_sha256": row["protocol_sha256"],
        }
        return {name: value for name, value in known.items() if value not in (None, "", [], {})}


def _facts(sample: Row[Any]) -> dict[str, object]:
    return {**sample.provenance, "arm": sample.arm, "seed": int(sample.seed), "sha256": sample.sha256}


def seconds(row: Mapping[Any, Any]) -> float | None:
    """How long the rater looked, by their own clock; None where it was not told."""
    if row["shown_at"] is None or row["decided_at"] is None:
        return None
    return float(row["decided_at"] - row["shown_at"])
