"""Pairs on their way into a study."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from sqlalchemy import Connection, insert, select

from diffalign.errors import InputError
from diffalign.seeds import derive
from diffalign.study.content import Files, contents_of
from diffalign.study.protocol import Rules
from diffalign.study.schema import ContestRow, ItemRow, PairRow, SampleRow
from diffalign.types import Prompt, Sample

NAMES = {"gold": "gold pairs", "aa": "pairs of a sample with itself, which are made when it starts"}


@dataclass(frozen=True, slots=True)
class StudyPair:
    """Two samples of one prompt, for raters to compare."""

    prompt: Prompt
    first: Sample
    second: Sample
    first_arm: str
    """What made the first: a model, a run. Hidden from raters."""
    second_arm: str
    expected: Literal["first", "second", "tie"] | None = None
    """The known answer, which makes it a gold pair: it tests raters, and is left out of exports."""
    provenance: Mapping[str, object] = field(default_factory=dict)
    """What else is known of the two, as ``{"first": {...}, "second": {...}}``."""


def load(connection: Connection, files: Files, pairs: Iterable[StudyPair], rules: Rules, seed: int, uid: str) -> None:
    """Writes pairs and their files into a study that has none; makes A/A pairs where the protocol wants them.

    ``gold_share`` is of the gold pairs that there are: without any, none is asked, which ``stats`` and ``inspect`` say.
    The order in which pairs are given out comes from the seed and the ``uid``, which no rater knows: the seed alone may
    be known. Raises InputError for what cannot be compared, and for what the protocol is not about.
    """
    loader = _Loader(files, rules.kind)
    for number, pair in enumerate(pairs, 1):
        try:
            loader.add(pair)
        except InputError as error:
            raise InputError(f"pair {number}: {error}") from None
    loader.write(connection)
    rows = loader.pairs
    ordinary = [row for row in rows if row["kind"] == "ordinary"]
    if not ordinary:
        raise InputError("a study needs a pair whose answer is not known")
    chance = random.Random(derive(seed, "order", uid))
    if rules.aa_share:
        for row in chance.sample(ordinary, ceil(rules.aa_share * len(ordinary))):
            one = chance.choice((row["first_id"], row["second_id"]))
            rows.append({**row, "first_id": one, "second_id": one, "kind": "aa", "contest_id": None})
    for place, row in enumerate(chance.sample(rows, len(rows))):
        row["place"] = place
    connection.execute(insert(PairRow), rows)


def lacking(connection: Connection, rules: Rules) -> tuple[str, ...]:
    """What rules ask for and the study has no pairs for, in sentences."""
    there = set(connection.scalars(select(PairRow.kind).distinct()))
    asked = (("gold", "gold_share", rules.gold_share), ("aa", "aa_share", rules.aa_share))
    return tuple(
        f"The protocol has {name} {share:g}, but the study has no {NAMES[kind]}, so none is asked."
        for kind, name, share in asked
        if share and kind not in there
    )


def check_kind(wanted: str, kind: str) -> None:
    """Raises InputError where a protocol is about another kind of pairs than ``kind``, image or text."""
    if wanted not in ("both", kind):
        raise InputError(
            f"this is a pair of {kind}s, and the protocol is for pairs of {wanted}s (kind: {wanted}); take another"
            " protocol, or leave its kind out"
        )


def fits(connection: Connection, rules: Rules) -> None:
    """Raises InputError where the study has pairs that the rules are not about."""
    for kind in connection.scalars(select(ItemRow.kind).distinct().order_by(ItemRow.kind)):
        check_kind(rules.kind, kind)


def material(connection: Connection) -> str:
    """SHA-256 of all that the study is about: which samples each pair has, what made them, what is known of them."""
    rows = [
        [
            list(row)
            for row in connection.execute(select(*(table.__table__.c[name] for name in names)).order_by(table.id))
        ]
        for table, names in _MATERIAL.items()
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


_MATERIAL: dict[type[ItemRow | SampleRow | PairRow], tuple[str, ...]] = {
    ItemRow: ("id", "kind", "text", "prompt_id", "negative", "attributes"),
    SampleRow: ("id", "item_id", "sha256", "arm", "seed", "provenance"),
    PairRow: ("id", "item_id", "first_id", "second_id", "kind", "expected", "place"),
}


class _Table:
    """Rows of a new table that are different, numbered from 1 as they come, and written all at once."""

    def __init__(self, table: type[ItemRow | SampleRow | ContestRow]) -> None:
        self._table = table
        self._ids: dict[tuple[object, ...], int] = {}
        self._rows: list[dict[str, object]] = []

    def add(self, key: tuple[object, ...], **row: object) -> int:
        """The id of the row of that key."""
        number = self._ids.setdefault(key, len(self._rows) + 1)
        if number > len(self._rows):
            self._rows.append({"id": number, **row})
        return number

    def write(self, connection: Connection) -> None:
        if self._rows:
            connection.execute(insert(self._table), self._rows)


class _Loader:
    def __init__(self, files: Files, wanted: str) -> None:
        self._files, self._wanted = files, wanted
        self._items, self._samples, self._contests = _Table(ItemRow), _Table(SampleRow), _Table(ContestRow)
        self.pairs: list[dict[str, object]] = []

    def add(self, pair: StudyPair) -> None:
        (kind, one), (other, two) = contents_of(pair.first, pair.second)
        if kind != other:
            raise InputError("an image is not compared with a text")
        check_kind(self._wanted, kind)
        if not (pair.first_arm and pair.second_arm):
            raise InputError("a sample lacks its arm: say what made it")
        hashes = [self._files.put(data) for data in (one, two)]
        if hashes[0] == hashes[1] and pair.expected != "tie":
            raise InputError("the two samples are the same; A/A pairs are made by aa_share")
        if pair.expected not in ("first", "second", "tie", None):
            raise InputError(
                f"expected is {pair.expected!r}; it is first, second or tie, or None where it is not known"
            )
        item = self._item(pair.prompt, kind)
        sides = (("first", pair.first, pair.first_arm), ("second", pair.second, pair.second_arm))
        ids = [
            self._sample(item, sha256, arm, sample.seed, _mapping(pair.provenance.get(name, {})))
            for sha256, (name, sample, arm) in zip(hashes, sides, strict=True)
        ]
        arms = (pair.first_arm, pair.second_arm)
        self.pairs.append(
            {
                "item_id": item,
                "first_id": ids[0],
                "second_id": ids[1],
                "kind": "ordinary" if pair.expected is None else "gold",
                "expected": pair.expected,
                "place": 0,
                "taken": 0,
                "flagged": False,
                "contest_id": (
                    None if pair.expected else self._contests.add(arms, first_arm=arms[0], second_arm=arms[1])
                ),
            }
        )

    def write(self, connection: Connection) -> None:
        """All that the pairs refer to."""
        for table in (self._items, self._samples, self._contests):
            table.write(connection)

    def _item(self, prompt: Prompt, kind: str) -> int:
        attributes = _mapping(prompt.attributes)
        return self._items.add(
            (kind, prompt.text, prompt.id, prompt.negative, json.dumps(attributes, sort_keys=True)),
            kind=kind,
            text=prompt.text,
            prompt_id=prompt.id,
            negative=prompt.negative,
            attributes=attributes,
        )

    def _sample(self, item: int, sha256: str, arm: str, seed: int, provenance: dict[str, object]) -> int:
        key = (item, sha256, arm, seed, json.dumps(provenance, sort_keys=True))
        row = {"item_id": item, "sha256": sha256, "arm": arm, "seed": str(seed), "provenance": provenance}
        return self._samples.add(key, **row)


def _mapping(value: object) -> dict[str, object]:
    """The value as what JSON brings back, so that nothing is lost later without a word."""
    try:
        if not isinstance(value, Mapping):
            raise TypeError(f"{value!r} is no mapping")
        made: dict[str, object] = json.loads(json.dumps(dict(value), allow_nan=False))
        return made
    except (TypeError, ValueError) as error:
        raise InputError(f"attributes and provenance are texts, numbers, lists and mappings: {error}") from None
