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
from diffalign.study.content import Files, content_of
from diffalign.study.protocol import Rules
from diffalign.study.schema import Base, ContestRow, ItemRow, PairRow, SampleRow
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


def load(connection: Connection, files: Files, pairs: Iterable[StudyPair], rules: Rules, seed: int) -> None:
    """Writes pairs and their files; makes A/A pairs where the protocol wants them.

    ``gold_share`` is of the gold pairs that there are: without any, none is asked, which ``stats`` and ``inspect`` say.
    Raises InputError for what cannot be compared.
    """
    loader = _Loader(connection, files)
    for number, pair in enumerate(pairs):
        try:
            loader.add(pair)
        except InputError as error:
            raise InputError(f"pair {number}: {error}") from None
    rows = loader.pairs
    ordinary = [row for row in rows if row["kind"] == "ordinary"]
    if not ordinary:
        raise InputError("a study needs a pair whose answer is not known")
    chance = random.Random(derive(seed, "order"))
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


class _Loader:
    def __init__(self, connection: Connection, files: Files) -> None:
        self.connection, self.files = connection, files
        self.pairs: list[dict[str, object]] = []
        self._items: dict[tuple[str, ...], int] = {}
        self._samples: dict[tuple[object, ...], int] = {}
        self._contests: dict[tuple[str, str], int] = {}

    def add(self, pair: StudyPair) -> None:
        kinds, hashes = [], []
        for sample in (pair.first, pair.second):
            kind, data = content_of(sample)
            kinds.append(kind)
            hashes.append(self.files.put(data))
        if len(set(kinds)) > 1:
            raise InputError("an image is not compared with a text")
        if not (pair.first_arm and pair.second_arm):
            raise InputError("a sample lacks its arm: say what made it")
        if hashes[0] == hashes[1] and pair.expected != "tie":
            raise InputError("the two samples are the same; A/A pairs are made by aa_share")
        if pair.expected not in ("first", "second", "tie", None):
            raise InputError(
                f"expected is {pair.expected!r}; it is first, second or tie, or None where it is not known"
            )
        item = self._item(pair.prompt, kinds[0])
        sides = (("first", pair.first, pair.first_arm), ("second", pair.second, pair.second_arm))
        ids = [
            self._sample(item, sha256, arm, sample.seed, _mapping(pair.provenance.get(name, {})))
            for sha256, (name, sample, arm) in zip(hashes, sides, strict=True)
        ]
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
                "contest_id": None if pair.expected else self._contest(pair.first_arm, pair.second_arm),
            }
        )

    def _item(self, prompt: Prompt, kind: str) -> int:
        attributes = _mapping(prompt.attributes)
        key = (kind, prompt.text, prompt.id, prompt.negative, json.dumps(attributes, sort_keys=True))
        if key not in self._items:
            self._items[key] = self._insert(
                ItemRow,
                kind=kind,
                text=prompt.text,
                prompt_id=prompt.id,
                negative=prompt.negative,
                attributes=attributes,
            )
        return self._items[key]

    def _sample(self, item: int, sha256: str, arm: str, seed: int, provenance: dict[str, object]) -> int:
        key = (item, sha256, arm, seed, json.dumps(provenance, sort_keys=True))
        if key not in self._samples:
            self._samples[key] = self._insert(
                SampleRow, item_id=item, sha256=sha256, arm=arm, seed=str(seed), provenance=provenance
            )
        return self._samples[key]

    def _contest(self, first: str, second: str) -> int:
        if (first, second) not in self._contests:
            self._contests[first, second] = self._insert(ContestRow, first_arm=first, second_arm=second)
        return self._contests[first, second]

    def _insert(self, row: type[Base], **values: object) -> int:
        added = self.connection.execute(insert(row).values(**values)).inserted_primary_key
        assert added is not None
        return int(added[0])


def _mapping(value: object) -> dict[str, object]:
    """The value as what JSON brings back, so that nothing is lost later without a word."""
    try:
        if not isinstance(value, Mapping):
            raise TypeError(f"{value!r} is no mapping")
        made: dict[str, object] = json.loads(json.dumps(dict(value), allow_nan=False))
        return made
    except (TypeError, ValueError) as error:
        raise InputError(f"attributes and provenance are texts, numbers, lists and mappings: {error}") from None
