"""Which arms to compare next, and whether enough is known of them.

Both rest on the counts of the contests, a few rows whatever the number of votes, so that a claim reads them anew: all
processes choose by the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, Text, bindparam, select, type_coerce

from diffalign.study.posterior import Array, posterior
from diffalign.study.schema import AssignmentRow, ContestRow, PairRow

# The arms as they are kept, since only who equals whom matters: to decode hundreds of names takes a millisecond.
_ARMS = (
    ContestRow.id,
    type_coerce(ContestRow.first_arm, Text).label("first_arm"),
    type_coerce(ContestRow.second_arm, Text).label("second_arm"),
)
_COUNTS = (ContestRow.given, ContestRow.for_first, ContestRow.for_second, ContestRow.ties)
_CONTESTS = select(*_ARMS, *_COUNTS).order_by(ContestRow.id)
_SKIPPED = select(AssignmentRow.pair_id).where(
    AssignmentRow.rater_id == bindparam("rater"), AssignmentRow.state == "skipped"
)
# One step into an index per contest; to group all pairs that are left would read each of them.
_FIRST_FRESH = (
    select(PairRow.id)
    .where(
        PairRow.contest_id == ContestRow.id,
        PairRow.flagged.is_(False),
        PairRow.taken == 0,
        PairRow.id.not_in(_SKIPPED),
    )
    .order_by(PairRow.place)
    .limit(1)
    .correlate(ContestRow)
    .scalar_subquery()
)
_CONTESTS_AND_PAIRS = select(*_ARMS, *_COUNTS, _FIRST_FRESH.label("pair")).order_by(ContestRow.id)


def most_telling(connection: Connection, rater: int) -> int | None:
    """Of the pairs that nobody has begun and this rater did not skip, the one that would tell most of the arms.

    None where no pair would tell anything: none is left, or each compares an arm with itself.
    """
    rows = connection.execute(_CONTESTS_AND_PAIRS, {"rater": rater}).all()
    open_ones = [row for row in rows if row.pair is not None and row.first_arm != row.second_arm]
    if not open_ones:
        return None
    arms = _arms(rows)
    wins, ties, given = _counts(rows, arms)
    # What was given out and cannot be judged counts as pending for good: the next one would be no better.
    pending = np.maximum(given - wins - wins.T - ties, 0)
    # Rounded, so that equal gains are equal on every machine; then the older contest goes first.
    gain = posterior(wins + ties / 2, pending).information().round(12)
    best = max(open_ones, key=lambda row: gain[arms[row.first_arm], arms[row.second_arm]])
    return int(best.pair)


def precise(connection: Connection, wanted: float) -> bool:
    """Whether the 95 % half width of every arm's strength, in log-odds against the mean, is at most this.

    Not before every arm was compared with another: until then the width is the prior's. By the votes that prefer one:
    given that two arms do not tie, Davidson's model is Bradley-Terry.
    """
    rows = connection.execute(_CONTESTS).all()
    arms = _arms(rows)
    if len(arms) < 2:
        return False
    wins, ties, _ = _counts(rows, arms)
    if not (wins + wins.T + ties).any(axis=1).all():
        return False
    return bool(posterior(wins).half_widths().max() <= wanted)


def _arms(rows: Sequence[Row[*tuple[Any, ...]]]) -> dict[str, int]:
    return {arm: i for i, arm in enumerate(sorted({arm for row in rows for arm in (row.first_arm, row.second_arm)}))}


def _counts(rows: Sequence[Row[*tuple[Any, ...]]], arms: dict[str, int]) -> tuple[Array, Array, Array]:
    """Wins, ties and what was given out, ``(A, A)`` each, the last two symmetric. An arm against itself is nothing."""
    wins, ties, given = np.zeros((3, len(arms), len(arms)))
    for row in rows:
        first, second = arms[row.first_arm], arms[row.second_arm]
        if first != second:
            wins[first, second] += row.for_first
            wins[second, first] += row.for_second
            for table, count in ((ties, row.ties), (given, row.given)):
                table[first, second] += count
                table[second, first] += count
    return wins, ties, given
