"""The event log as a hash chain: each event carries the SHA-256 over its predecessor's hash and its own content.

The content of an event includes the vote that it added and the assignment that it gave out, so that an edit of a vote,
of the sides that were shown, or of an event breaks the chain. Who can write to the database can also compute a new
chain: against that helps only the last hash, noted somewhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from sqlalchemy import Connection, insert, select

from diffalign.study.schema import EventRow

START = "0" * 64
"""What stands before the first event."""
VOTE = (
    "id", "assignment_id", "revision", "undoes", "choice", "strength", "answers", "points", "comment", "shown_at",
    "decided_at", "received_at", "protocol_sha256",
)  # fmt: skip
ASSIGNMENT = (
    "id", "token", "pair_id", "rater_id", "protocol_id", "repeat", "adjudication", "chosen", "first_is_left",
    "claimed_at",
)  # fmt: skip
"""What never changes of an assignment."""
_TIMES = {"at", "shown_at", "decided_at", "received_at", "claimed_at"}

LAST = select(EventRow.id, EventRow.hash).order_by(EventRow.id.desc()).limit(1)
_ADD = insert(EventRow)


def digest(
    previous: str, event: Mapping[Any, Any], vote: Mapping[Any, Any] | None, assignment: Mapping[Any, Any] | None
) -> str:
    """The hash of an event, of the row of the vote that it added, and of the assignment that it gave out."""
    content = [
        previous,
        _chosen(event, ("id", "at", "kind", "rater_id", "assignment_id", "data")),
        vote and _chosen(vote, VOTE),
        assignment and _chosen(assignment, ASSIGNMENT),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _chosen(row: Mapping[Any, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """As the database brings it back: a time is a float there, whatever it was."""
    return {name: float(row[name]) if name in _TIMES and row[name] is not None else row[name] for name in names}


class Chain:
    """What a transaction adds to the event log while it holds the lock of the study: written at its end, at once."""

    def __init__(self, last: tuple[int, str] | None) -> None:
        """``last`` is the number and the hash of the last event there is, None before the first."""
        self._number, self._hash = last or (0, START)
        self._rows: list[dict[str, Any]] = []

    @classmethod
    def of(cls, connection: Connection) -> Self:
        """What comes after the last event there is."""
        last = connection.execute(LAST).one_or_none()
        return cls(last and (last.id, last.hash))

    def note(
        self,
        at: float,
        kind: str,
        rater: int | None = None,
        assignment: int | None = None,
        *,
        vote: Mapping[str, Any] | None = None,
        given: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """One more event. ``vote`` and ``given`` are the rows that were just added."""
        event: dict[str, Any] = {
            "id": self._number + 1,
            "at": at,
            "kind": kind,
            "rater_id": rater,
            "assignment_id": assignment,
            "data": dict(data or {}),
        }
        self._number, self._hash = event["id"], digest(self._hash, event, vote, given)
        self._rows.append({**event, "hash": self._hash})

    def write(self, connection: Connection) -> None:
        """Adds them to the log."""
        if self._rows:
            connection.execute(_ADD, self._rows)
            self._rows = []


def note(
    connection: Connection,
    at: float,
    kind: str,
    rater: int | None = None,
    *,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Adds one event to the log, under the lock of the study."""
    chain = Chain.of(connection)
    chain.note(at, kind, rater, data=data)
    chain.write(connection)
