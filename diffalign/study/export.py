"""Votes as preferences. Sides are turned back to samples, and raters go by their pseudonyms."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from sqlalchemy import Connection, Row, RowMapping, exists, select
from sqlalchemy.orm import aliased

from diffalign.study import database
from diffalign.study.noted import simulated_raters
from diffalign.study.protocol import Protocol
from diffalign.study.schema import AssignmentRow, ItemRow, PairRow, ProtocolRow, RaterRow, SampleRow, VoteRow
from diffalign.study.sides import Side, first_preferred, standing
from diffalign.types import Preference, Prompt, Sample

if TYPE_CHECKING:
    from diffalign.study.store import Study


def live_votes(connection: Connection) -> list[RowMapping]:
    """Every vote that was not undone, in the order in which they came, with its assignment, pair and rater."""
    undo = aliased(VoteRow)
    query = (
        select(
            VoteRow.id, VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.comment, VoteRow.points,
            VoteRow.shown_at, VoteRow.decided_at, VoteRow.received_at, VoteRow.protocol_sha256,
            AssignmentRow.id.label("assignment"), AssignmentRow.repeat, AssignmentRow.adjudication,
            AssignmentRow.chosen, AssignmentRow.first_is_left, AssignmentRow.pair_id, AssignmentRow.claimed_at,
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


def left_out(row: Mapping[Any, Any]) -> str:
    """Why a vote is in no plain export; empty where it is in one."""
    return (
        ("repeat" if row["repeat"] else "")
        or ("adjudication" if row["adjudication"] else "")
        or (row["kind"] if row["kind"] != "ordinary" else "")
        or ("flagged" if row["flagged"] else "")
        or ("cannot judge" if row["choice"] == "cannot_judge" else "")
    )


class Export:
    """The preferences of a study, to be iterated, and what was left out.

    Each vote on an ordinary pair gives one preference with the criterion ``overall``, and one more per criterion of
    the kind ``prefer`` that was answered. Left out, and counted in ``left_out``: gold and A/A pairs and repeats, pairs
    that were flagged, ``cannot judge``, and adjudications. A strength of 1 to 3 is the preference's strength; without
    it that is 1.

    ``provenance`` has the study, pair, vote, arms, shown sides, kind of tie, scores per criterion by sample, comment,
    times, the hash of the protocol, and ``chosen``: ``random``, or ``active`` where the pair was chosen for what it
    would tell; and ``"simulated": true`` where a program gave the vote, or one of the votes. The samples of one pair
    are the same objects in each of its preferences.

    ``final`` gives one preference per pair and criterion instead, of no rater: the adjudicator's verdict where there is
    one, else the mean label and strength of the votes. Then votes that a verdict replaces are left out as
    ``adjudicated``, and so is a pair that the adjudicator cannot judge.
    """

    def __init__(self, study: Study, final: bool = False) -> None:
        self._files, self._uid, self._final = study.files, study.uid, final
        with database.reading(study.engine) as connection:
            self._items = {row.id: row for row in connection.execute(select(*ItemRow.__table__.c))}
            self._samples = {row.id: row for row in connection.execute(select(*SampleRow.__table__.c))}
            rows = live_votes(connection)
            self._simulated = simulated_raters(connection)
        self.left_out: Counter[str] = Counter()
        """How many votes were left out, by reason."""
        self._verdicts = {row["pair_id"]: row for row in rows if row["adjudication"]} if final else {}
        self.rows = [row for row in rows if self._kept(row)]
        """The votes that are kept."""
        self.simulated = sum(self.is_simulated(row) for row in self.rows)
        """How many of these are of simulated raters."""

    def is_simulated(self, row: Mapping[Any, Any]) -> bool:
        """Whether a program gave the vote."""
        return row["rater"] in self._simulated

    def _kept(self, row: RowMapping) -> bool:
        verdict = self._verdicts.get(row["pair_id"])
        reason = left_out({**row, "adjudication": row["adjudication"] and not self._final})
        if not reason and verdict and verdict["id"] != row["id"] and not _adds(row, verdict):
            reason = "adjudicated"
        if reason:
            self.left_out[reason] += 1
        return not reason

    def kind(self, row: Mapping[Any, Any]) -> Literal["image", "text"]:
        """What a vote compares."""
        found: Literal["image", "text"] = self._items[row["item_id"]].kind
        return found

    def answers(self, row: RowMapping, criterion: str) -> bool:
        """Whether a vote says something of a criterion of the kind ``prefer``, or of ``overall``."""
        return criterion in _preferred(row)

    def replaced(self, row: RowMapping, criterion: str) -> bool:
        """With ``final``: whether a verdict of another stands for a kept vote in this criterion."""
        verdict = self._verdicts.get(row["pair_id"])
        return verdict is not None and verdict["id"] != row["id"] and criterion in _preferred(verdict)

    def __iter__(self) -> Iterator[Preference]:
        cached = lru_cache(maxsize=256)(self.sample)
        if self._final:
            yield from self._finals(cached)
            return
        for row in self.rows:
            first, second = (cached(row[name]) for name in ("first_id", "second_id"))
            origin = self._provenance(row)
            for criterion, value in _preferred(row).items():
                strength = float(row["strength"] or 1) if criterion == "overall" else 1.0
                label = first_preferred(value, row["first_is_left"])
                yield Preference(first.prompt, first, second, label, strength, criterion, row["rater"], origin)

    def _finals(self, sample: Callable[[int], Sample]) -> Iterator[Preference]:
        pairs: dict[int, list[RowMapping]] = defaultdict(list)
        for row in self.rows:
            pairs[row["pair_id"]].append(row)
        for rows in pairs.values():
            first, second = (sample(rows[0][name]) for name in ("first_id", "second_id"))
            for criterion in dict.fromkeys(name for row in rows for name in _preferred(row)):
                said = [row for row in rows if criterion in _preferred(row)]
                used = [row for row in said if row["adjudication"]] or said
                labels = [first_preferred(_preferred(row)[criterion], row["first_is_left"]) for row in used]
                strengths = [float(row["strength"] or 1) if criterion == "overall" else 1.0 for row in used]
                origin = self._origin(rows[0]) | {
                    "votes": len([row for row in said if not row["adjudication"]]),
                    "adjudicated": used[0]["adjudication"],
                    **({"simulated": True} if any(map(self.is_simulated, used)) else {}),
                }
                label, strength = fmean(labels), fmean(strengths)
                yield Preference(first.prompt, first, second, label, strength, criterion, "", origin)

    def sample(self, number: int) -> Sample:
        """A sample with its content."""
        row = self._samples[number]
        item = self._items[row.item_id]
        prompt = Prompt(item.text, item.prompt_id, item.attributes, item.negative)
        data = self._files.get(row.sha256)
        if item.kind == "text":
            return Sample(prompt, text=data.decode("utf-8", "surrogatepass"), seed=int(row.seed))
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
        return Sample(prompt, image=image, seed=int(row.seed))

    def about(self, row: Mapping[Any, Any], side: Side) -> dict[str, object]:
        """What stood on that side: its prompt, hash, arm and seed."""
        sample = self._samples[row[f"{standing(row['first_is_left'])[side]}_id"]]
        item = self._items[row["item_id"]]
        known = {"prompt": item.text, "prompt_id": item.prompt_id, "sample": sample.sha256, "arm": sample.arm}
        return {**known, "seed": _seed(sample)}

    def _origin(self, row: RowMapping) -> dict[str, object]:
        first, second = self._samples[row["first_id"]], self._samples[row["second_id"]]
        return {"study": self._uid, "pair": row["pair_id"], "first": _facts(first), "second": _facts(second)}

    def _provenance(self, row: RowMapping) -> dict[str, object]:
        sides = standing(row["first_is_left"])
        scores = {
            criterion: {sides[side]: score for side, score in value.items()}
            for criterion, value in row["answers"].items()
            if isinstance(value, dict)
        }
        known: dict[str, object] = {
            **self._origin(row),
            "vote": row["id"],
            "left": sides["left"],
            "chosen": row["chosen"],
            "choice": row["choice"],
            "scores": scores,
            "points": [{**point, "side": sides[point["side"]]} for point in row["points"]],
            "comment": row["comment"],
            "received_at": row["received_at"],
            "seconds": seconds(row),
            "protocol_sha256": row["protocol_sha256"],
            "simulated": self.is_simulated(row) or None,
        }
        return {name: value for name, value in known.items() if value not in (None, "", [], {})}


def _preferred(row: RowMapping) -> dict[str, str]:
    """What was answered by a side or a tie, overall and per criterion."""
    return {"overall": row["choice"]} | {
        name: value for name, value in row["answers"].items() if isinstance(value, str)
    }


def _adds(row: RowMapping, verdict: RowMapping) -> bool:
    """Whether a vote answers what the verdict on its pair leaves open."""
    return verdict["choice"] != "cannot_judge" and not _preferred(row).keys() <= _preferred(verdict).keys()


def scores(study: Study, export: Export | None = None) -> Iterator[dict[str, object]]:
    """One row per vote, sample and criterion of the kind ``scale``, of the votes that an export keeps.

    ``score`` is from 1, the lowest anchor, to ``points``, the highest; ``sample`` is the SHA-256 of the content;
    ``seed`` is None where it is not known. ``export`` is one of this study, where it was read already.
    """
    export = export or Export(study)
    anchors = _anchors(study)
    for row in export.rows:
        for criterion, value in row["answers"].items():
            if not isinstance(value, dict):
                continue
            points = anchors[row["protocol_sha256"]][criterion]
            for side, score in value.items():
                about = {"criterion": criterion, "score": score, "points": points}
                yield export.about(row, side) | about | _by(row, export)


def points(study: Study, export: Export | None = None) -> Iterator[dict[str, object]]:
    """One row per place that was marked in an image, of the votes that an export keeps.

    ``x`` and ``y`` are from 0, left and top, to 1. ``export`` is one of this study, where it was read already.
    """
    export = export or Export(study)
    for row in export.rows:
        for point in row["points"]:
            place = {name: point[name] for name in ("x", "y", "label")}
            yield export.about(row, point["side"]) | place | _by(row, export)


def _by(row: Mapping[Any, Any], export: Export) -> dict[str, object]:
    by = {"rater": row["rater"], "pair": row["pair_id"], "vote": row["id"]}
    return {**by, "simulated": export.is_simulated(row)}


def asked(study: Study, kind: Literal["prefer", "scale"]) -> list[str]:
    """The criteria of a kind in any version of the protocol, in their order; ``overall`` is the first to prefer by."""
    names = ["overall"] if kind == "prefer" else []
    found = [one.name for version in _versions(study) for one in version.rules.criteria if one.kind == kind]
    return list(dict.fromkeys(names + found))


def _anchors(study: Study) -> dict[str, dict[str, int]]:
    """Of every version of the protocol: how many points each scale has."""
    return {one.sha256: {c.name: len(c.anchors) for c in one.rules.criteria} for one in _versions(study)}


def _versions(study: Study) -> list[Protocol]:
    with database.reading(study.engine) as connection:
        return [Protocol.parse(text) for text in connection.scalars(select(ProtocolRow.text))]


def _facts(sample: Row[Any]) -> dict[str, object]:
    return {**sample.provenance, "arm": sample.arm, "seed": _seed(sample), "sha256": sample.sha256}


def _seed(sample: Row[Any]) -> int | None:
    """None where the provenance says that it is not known."""
    return None if sample.provenance.get("seed", sample.seed) is None else int(sample.seed)


def seconds(row: Mapping[Any, Any]) -> float | None:
    """How long the rater looked, by their own clock; None where it was not told."""
    if row["shown_at"] is None or row["decided_at"] is None:
        return None
    return float(row["decided_at"] - row["shown_at"])
