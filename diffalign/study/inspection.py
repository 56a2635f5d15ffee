"""Whether a study is as it was written: the database, the files, the chain of events, the counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, RowMapping, exists, func, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import aliased

from diffalign.errors import UserError
from diffalign.study import database
from diffalign.study.chain import START, digest
from diffalign.study.export import live_votes
from diffalign.study.loading import lacking, material
from diffalign.study.protocol import Rules
from diffalign.study.schema import (
    AssignmentRow,
    Base,
    ContestRow,
    EventRow,
    PairRow,
    ProtocolRow,
    SampleRow,
    VoteRow,
)
from diffalign.study.sides import outcome

if TYPE_CHECKING:
    from diffalign.study.store import Study

MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str
    """A sentence."""


def inspect(study: Study) -> list[Finding]:
    """Looks at everything, in one state of the study. Changes nothing."""
    found: list[Finding] = []
    try:
        with database.reading(study.engine) as connection:
            found.append(_database(connection))
            hashes = sorted(connection.scalars(select(SampleRow.sha256).distinct()))
            checks = (_events, _material, _protocols, _counts, _votes, _gold)
            found += [check(connection) for check in checks]
            found.append(_wanted(connection, study.newest(connection).rules))
    except DatabaseError:
        if not found or found[0].ok:
            raise
        return found[:1]  # what cannot be read cannot be looked at
    found.insert(1, _files(study, hashes))
    return found


def _named(wrong: list[Any]) -> str:
    shown = ", ".join(str(one) for one in wrong[:MOST_NAMED])
    return shown + (f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else "")


def _database(connection: Connection) -> Finding:
    what = "database"
    if connection.dialect.name != "sqlite":
        count = connection.scalar(select(func.count()).select_from(VoteRow))
        return Finding(what, True, f"The server answers; it keeps {count} rows of votes. It checks itself.")
    try:
        said = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    except OperationalError:  # a lock, a disk
        raise
    except DatabaseError as error:  # some damage ends the check itself
        said = [str(error.orig)]
    if said != ["ok"]:
        return Finding(what, False, f"SQLite finds damage: {_named(said)}. Bring the study back from a backup.")
    broken = [tuple(row) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")]  # fails on damage
    if broken:
        return Finding(what, False, f"Rows refer to rows that are gone: {_named(broken)}.")
    return Finding(what, True, "SQLite finds no damage.")


def _files(study: Study, hashes: list[str]) -> Finding:
    wrong = []
    for sha256 in hashes:
        try:
            study.files.get(sha256)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        return Finding("files", False, f"{len(wrong)} of {len(hashes)} are missing or changed: {_named(wrong)}")
    return Finding("files", True, f"All {len(hashes)} are there and unchanged.")


# --- the chain ---


def _rows(connection: Connection, table: type[Base]) -> Iterator[RowMapping]:
    columns = table.__table__.c
    result = connection.execution_options(yield_per=1000).execute(select(*columns).order_by(columns.id))
    yield from result.mappings()


def _events(connection: Connection) -> Finding:
    """Every event follows from its predecessor; every vote and every assignment has its event."""
    what = "event chain"
    votes = {row["id"]: row for row in _rows(connection, VoteRow)}
    assignments = {row["id"]: row for row in _rows(connection, AssignmentRow)}
    undoing = {row["undoes"]: row for row in votes.values() if row["undoes"] is not None}
    last, number, since = START, 0, ""
    seen: Counter[tuple[str, int]] = Counter()
    for row in _rows(connection, EventRow):
        vote, given = _about(row, votes, undoing, assignments)
        if row["hash"] != digest(last, row, vote, given):
            detail = f"It breaks at event {row['id']} ({row['kind']}): that event, the vote or assignment that it tells"
            return Finding(what, False, f"{detail} of, or an event before it was changed or removed.")
        seen.update((name, one["id"]) for name, one in (("vote", vote), ("assignment", given)) if one)
        last, number = row["hash"], row["id"]
        if row["kind"] == "chained":
            since = f" Events up to {row['data']['until']} were chained when the study was migrated, not when written."
    untold = [
        f"{name} {one}"
        for name, rows in (("vote", votes), ("assignment", assignments))
        for one in rows
        if seen[name, one] != 1
    ]
    if untold:
        return Finding(what, False, f"No event, or more than one, tells of {_named(untold)}: events were removed.")
    return Finding(what, True, f"Unbroken up to event {number}, whose hash is {last}.{since}")


def _about(
    event: Mapping[Any, Any],
    votes: Mapping[int, RowMapping],
    undoing: Mapping[int, RowMapping],
    assignments: Mapping[int, RowMapping],
) -> tuple[Mapping[Any, Any] | None, Mapping[Any, Any] | None]:
    """The row of the vote that an event added, and the assignment that it gave out."""
    about = event["data"].get("vote")
    vote = {"voted": votes, "undone": undoing}.get(event["kind"], {}).get(about)
    return vote, assignments.get(event["assignment_id"]) if event["kind"] == "claimed" else None


def _material(connection: Connection) -> Finding:
    """The pairs are those that the study began with. Their hash stands in the first event."""
    created = connection.execute(select(EventRow.data).where(EventRow.kind == "created")).one_or_none()
    if created is None:
        return Finding("pairs", True, "The study is older than the hash over its pairs, so nothing is known of them.")
    same = created.data.get("material") == material(connection)
    return Finding("pairs", same, "They are as they were loaded." if same else "They were changed after loading.")


def _protocols(connection: Connection) -> Finding:
    """Versions of the protocol hash to what the votes say."""
    rows = connection.execute(select(ProtocolRow.sha256, ProtocolRow.text)).all()
    wrong = [row.sha256 for row in rows if hashlib.sha256(row.text.encode()).hexdigest() != row.sha256]
    known = {row.sha256 for row in rows}
    unknown = set(connection.scalars(select(VoteRow.protocol_sha256).distinct())) - known
    if wrong or unknown:
        return Finding("protocols", False, f"Changed or missing: {_named([*wrong, *sorted(unknown)])}.")
    return Finding("protocols", True, f"{len(rows)} version{'s' * (len(rows) != 1)}, unchanged.")


# --- counts ---


def _counts(connection: Connection) -> Finding:
    """What is kept of pairs and contests is what assignments and votes say."""
    taken = Counter(
        connection.scalars(
            select(AssignmentRow.pair_id).where(
                AssignmentRow.state.in_(("open", "done")),
                AssignmentRow.repeat.is_(False),
                AssignmentRow.adjudication.is_(False),
            )
        )
    )
    outcomes = Counter(
        (row["pair_id"], outcome(row["choice"], row["first_is_left"]))
        for row in live_votes(connection)
        if _counted(row)
    )
    contests: Counter[tuple[int, str]] = Counter()
    wrong = []
    names = ("for_first", "for_second", "ties")
    for row in connection.execute(select(*PairRow.__table__.c)).mappings():
        counted = {"taken": taken[row["id"]], **{name: outcomes[row["id"], name] for name in names}}
        wrong += [f"pair {row['id']}" for name, value in counted.items() if row[name] != value]
        if row["contest_id"] is not None and not row["flagged"]:
            contests.update({(row["contest_id"], name): value for name, value in counted.items()})
    for row in connection.execute(select(*ContestRow.__table__.c)).mappings():
        kept = {"taken": row["given"], **{name: row[name] for name in names}}
        wrong += [f"contest {row['id']}" for name, value in kept.items() if contests[row["id"], name] != value]
    if wrong:
        return Finding("counts", False, f"Not what assignments and votes say: {_named(wrong)}.")
    return Finding("counts", True, "Those of pairs and contests are what assignments and votes say.")


def _counted(row: Mapping[Any, Any]) -> bool:
    special = row["repeat"] or row["adjudication"] or row["kind"] != "ordinary"
    return not special and row["choice"] != "cannot_judge"


def _votes(connection: Connection) -> Finding:
    """An assignment that is done has one live vote, and no other has one."""
    undo = aliased(VoteRow)
    query = (
        select(AssignmentRow.id, AssignmentRow.state, func.count(VoteRow.id))
        .outerjoin(
            VoteRow,
            (VoteRow.assignment_id == AssignmentRow.id)
            & VoteRow.undoes.is_(None)
            & ~exists().where(undo.undoes == VoteRow.id),
        )
        .group_by(AssignmentRow.id, AssignmentRow.state)
    )
    rows = connection.execute(query).all()
    wrong = [row[0] for row in rows if row[2] != (row[1] == "done")]
    if wrong:
        return Finding(
            "votes", False, f"Assignments without their one live vote, or with one too many: {_named(wrong)}."
        )
    return Finding("votes", True, f"{sum(row[2] for row in rows)} live ones, one for each assignment that is done.")


def _gold(connection: Connection) -> Finding:
    count = connection.scalar(select(func.count()).where(PairRow.kind == "gold")) or 0
    if count:
        return Finding("gold pairs", True, f"{count} pairs with a known answer test the raters.")
    return Finding("gold pairs", True, "None was given, so no rater is tested by a known answer.")


def _wanted(connection: Connection, rules: Rules) -> Finding:
    missing = lacking(connection, rules)
    return Finding("shares", True, " ".join(missing) or "There are pairs of every kind that the protocol asks for.")
