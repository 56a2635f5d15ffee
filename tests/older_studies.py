"""Studies as older releases left them: the tables of an older version of the schema, with rows written by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from diffalign.study import database
from diffalign.study.content import Files

PROTOCOL = "name: old\nversion: 1\noverlap: 2\n"
COMMENT = 'zero\0, \ud800 and "quotes"'


def older(folder: Path, revision: str, url: str | None = None) -> Path:
    """Two ordinary pairs and a gold one, two raters.

    Rater a: left on pair 1 (the first sample stood left); right on pair 2, undone, then a tie; right on the gold pair.
    Rater b: left on pair 1 with the first sample right, so the two disagree; cannot judge pair 2. And a repeat of pair
    1 for a, sides turned.
    """
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"study": "u" * 32, "database": "postgresql" if url else "sqlite"}))
    engine = database.connect(url or folder / "study.sqlite")
    try:
        with database.writing(engine) as connection:
            database.upgrade(connection, revision)
            _fill(connection, Files(folder / "files"))
    finally:
        engine.dispose()
    return folder


def _fill(connection: Connection, files: Files) -> None:
    def add(table: str, **values: Any) -> None:
        names = ", ".join(values)
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES (:{', :'.join(values)})"), values)

    add("study", uid="u" * 32, title=json.dumps("an old one"), seed="7", created_at=100.0)
    sha256 = hashlib.sha256(PROTOCOL.encode()).hexdigest()
    add("protocol", sha256=sha256, text=json.dumps(PROTOCOL), created_at=100.0)
    for name in "ab":
        add("rater", name=json.dumps(name), pseudonym=f"r-{name}", created_at=101.0)
    for pair, (kind, expected) in enumerate((("ordinary", None), ("ordinary", None), ("gold", "first")), 1):
        add(
            "item", kind="text", text=json.dumps(f"prompt {pair}"), prompt_id='""', negative='""', attributes="{}",
        )  # fmt: skip
        for arm in ("base", "tuned"):
            content = files.put(f"{arm} {pair}".encode())
            add("sample", item_id=pair, sha256=content, arm=json.dumps(arm), seed="0", provenance="{}")
        add(
            "pair", item_id=pair, first_id=2 * pair - 1, second_id=2 * pair, kind=kind, expected=expected, place=pair,
            taken=1 if kind == "gold" else 2, flagged=False,
        )  # fmt: skip
    event: dict[str, Any] = {"data": "{}"}
    given = ((1, 1, False, True), (2, 1, False, False), (3, 1, False, True), (1, 2, False, False), (2, 2, False, True))
    for number, (pair, rater, repeat, first_is_left) in enumerate((*given, (1, 1, True, False)), 1):
        add(
            "assignment", token=f"{number:032x}", pair_id=pair, rater_id=rater, protocol_id=1, repeat=repeat,
            first_is_left=first_is_left, state="done", claimed_at=200.0 + number, lease_until=900.0,
        )  # fmt: skip
        add("event", at=200.0 + number, kind="claimed", rater_id=rater, assignment_id=number, **event)
    rows = ((1, 0, "left", 1), (2, 0, "right", 1), (2, 0, None, 1), (2, 1, "tie_good", 1), (3, 0, "right", 1))
    more = ((4, 0, "left", 2), (5, 0, "cannot_judge", 2), (6, 0, "left", 1))
    for votes, (assignment, revision, choice, rater) in enumerate((*rows, *more), 1):
        add(
            "vote", assignment_id=assignment, revision=revision, undoes=None if choice else 2, choice=choice,
            strength=2 if choice == "left" else None, answers="{}", points="[]", comment=json.dumps(COMMENT),
            shown_at=None, decided_at=None, received_at=300.0 + votes, protocol_sha256=sha256,
        )  # fmt: skip
        kind, about = ("voted", votes) if choice else ("undone", 2)
        data = json.dumps({"vote": about})
        add("event", at=300.0 + votes, kind=kind, rater_id=rater, assignment_id=assignment, data=data)
