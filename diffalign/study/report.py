"""What the votes say, and how far to believe it: progress, agreement, each rater, the ranking of the arms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sqlalchemy import RowMapping, func, select

from diffalign.errors import UserError
from diffalign.preferences.agreement import (
    Estimate,
    LeftBias,
    PairAgreement,
    alpha_interval,
    dawid_skene,
    left_bias,
    pairwise_kappa,
    percent_agreement,
    reliability_data,
    share_of,
    time_scores,
)
from diffalign.preferences.ranking import Comparison, Ranking, components, rank
from diffalign.study import database
from diffalign.study.criteria import CriterionStats, criteria
from diffalign.study.export import left_out, live_votes, seconds
from diffalign.study.loading import lacking
from diffalign.study.noted import Flag, flags, simulated_raters
from diffalign.study.protocol import Rules
from diffalign.study.schema import AssignmentRow, ItemRow, PairRow, RaterRow, SampleRow
from diffalign.study.sides import first_preferred

if TYPE_CHECKING:
    from diffalign.study.store import Study

TOO_FAST = -3.5
ANSWERS = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True, slots=True)
class RaterStats:
    """One rater, by pseudonym. Everything about votes that were not undone."""

    rater: str
    votes: int
    cannot_judge: int
    gold: Estimate
    """Share of gold pairs answered as expected."""
    repeats: Estimate
    """Share of repeats answered as the first time, sides undone; the kinds of tie are one."""
    aa_ties: Estimate
    """Share of A/A pairs called a tie."""
    left: LeftBias
    simulated: bool
    """Whether a program judges under this name."""
    adjudications: int
    """Verdicts on pairs on which others disagreed. Nothing else here counts them."""
    median_seconds: float
    """By the rater's own clock; NaN where it was not told."""
    too_fast: int
    """Votes far faster than this rater's own usual."""
    reliability: Estimate
    """Accuracy by Dawid-Skene, gold answers known; NaN where nothing determines it."""


@dataclass(frozen=True, slots=True)
class GroupRanking:
    """The arms of one kind that were compared with each other, directly or through others."""

    kind: str
    """``image`` or ``text``."""
    arms: tuple[str, ...]
    ranking: Ranking | None
    why: str
    """Why there is none; empty where there is one."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A study in numbers."""

    title: str
    protocol: str
    """Name and version of the newest one."""
    pairs: int
    """Ordinary ones that were not flagged."""
    complete: int
    """Of these, how many have as many votes as the protocol wants."""
    flagged: int
    flags: tuple[Flag, ...]
    """Flagged pairs of every kind, with the reasons."""
    votes: int
    """Live votes of every kind."""
    simulated: int
    """How many of these are of simulated raters."""
    states: dict[str, int]
    """Assignments by state."""
    chosen: dict[str, int]
    """Live votes that count, by how their pair was chosen: ``random`` or ``active``."""
    adjudicated: int
    """Live verdicts."""
    left_out: dict[str, int]
    """Votes that an export leaves out, by reason."""
    alpha: Estimate
    """Krippendorff's alpha, nominal, of first, tie and second."""
    alpha_ordinal: Estimate
    """The same with the tie between the two."""
    agreement: Estimate
    """Share of equal answers."""
    kappas: tuple[PairAgreement, ...]
    criteria: tuple[CriterionStats, ...]
    """Overall first."""
    raters: tuple[RaterStats, ...]
    rankings: tuple[GroupRanking, ...]
    """One for each group of arms, and no number across groups: nobody compared these. None before the first vote."""
    disputed: tuple[int, ...]
    """Pairs on which some raters chose the first and some the second, adjudicated or not."""
    notes: tuple[str, ...]
    """What one should know before one believes the rest, in sentences."""

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON types; a number that is not finite is None."""
        made: dict[str, Any] = _plain(asdict(self))
        return made


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def stats(study: Study) -> Stats:
    """Reads one state of the study and computes everything; takes seconds where there are many thousand votes."""
    with database.reading(study.engine) as connection:
        rows = live_votes(connection)
        names = list(connection.scalars(select(RaterRow.pseudonym).order_by(RaterRow.id)))
        states = connection.execute(select(AssignmentRow.state, func.count()).group_by(AssignmentRow.state)).all()
        pairs = connection.execute(select(PairRow.id, PairRow.flagged).where(PairRow.kind == "ordinary")).all()
        gold = connection.scalar(select(func.count()).where(PairRow.kind == "gold")) or 0
        arms = {row.id: row.arm for row in connection.execute(select(SampleRow.id, SampleRow.arm))}
        kinds = {row.id: str(row.kind) for row in connection.execute(select(ItemRow.id, ItemRow.kind))}
        simulated, flagged = simulated_raters(connection), flags(connection)
        rules = study.newest(connection).rules
        missing = lacking(connection, rules)
    kept = [row for row in rows if _counts(row)]
    counted = Counter(row["pair_id"] for row in rows if _ordinary(row))
    data = reliability_data((row["rater"], str(row["pair_id"]), _answer(row)) for row in kept)
    alive = [pair.id for pair in pairs if not pair.flagged]
    rankings = tuple(_rankings(kept, arms, kinds))
    reliability = _reliability(rows)
    made_up = sum(row["rater"] in simulated for row in rows)
    return Stats(
        title=study.title,
        protocol=f"{rules.name}, version {rules.version}",
        pairs=len(alive),
        complete=sum(counted[pair] >= rules.overlap for pair in alive),
        flagged=len(pairs) - len(alive),
        flags=flagged,
        votes=len(rows),
        simulated=made_up,
        states={str(state): int(count) for state, count in states},
        chosen=dict(Counter(row["chosen"] for row in kept)),
        adjudicated=sum(row["adjudication"] for row in rows),
        left_out=dict(Counter(reason for row in rows if (reason := left_out(row)))),
        alpha=alpha_interval(data.values),
        alpha_ordinal=alpha_interval(data.values, "ordinal"),
        agreement=percent_agreement(data.values),
        kappas=tuple(pairwise_kappa(data)),
        criteria=tuple(criteria(rules, kept, arms)),
        raters=tuple(
            _rater(name, [row for row in rows if row["rater"] == name], reliability, name in simulated)
            for name in names
        ),
        rankings=rankings,
        disputed=_disputed(kept),
        notes=(*_notes(rules, gold, kept, rankings, (made_up, len(rows))), *missing),
    )


def _ordinary(row: RowMapping) -> bool:
    return row["kind"] == "ordinary" and not (row["repeat"] or row["adjudication"] or row["flagged"])


def _counts(row: RowMapping) -> bool:
    return _ordinary(row) and row["choice"] != "cannot_judge"


def _answer(row: RowMapping) -> float:
    return first_preferred(row["choice"], row["first_is_left"])


def _rankings(kept: Sequence[RowMapping], arms: dict[int, str], kinds: dict[int, str]) -> Iterator[GroupRanking]:
    """Each group of arms that were compared with each other, of images and of texts apart."""
    of_kind: dict[str, list[Comparison]] = defaultdict(list)
    for row in kept:
        first, second = arms[row["first_id"]], arms[row["second_id"]]
        if first != second:
            answer = Comparison(first, second, _answer(row), row["rater"], str(row["pair_id"]))
            of_kind[kinds[row["item_id"]]].append(answer)
    for kind, rows in sorted(of_kind.items()):
        for group in _groups(rows):
            inside = [row for row in rows if row.first in group]
            try:
                resample: Literal["raters", "units"] = "raters" if len({r.rater for r in inside}) >= 10 else "units"
                yield GroupRanking(kind, group, rank(inside, resample), "")
            except UserError as error:
                yield GroupRanking(kind, group, None, str(error))


def _groups(rows: Sequence[Comparison]) -> list[tuple[str, ...]]:
    names = sorted({name for row in rows for name in (row.first, row.second)})
    places = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for row in rows:
        counts[places[row.first], places[row.second]] += 1
    return [tuple(names[place] for place in group) for group in components(counts)]


def _reliability(rows: Sequence[RowMapping]) -> dict[str, Estimate]:
    """Per rater, of ordinary and gold pairs together; nothing where the overlap is too small."""
    used = [
        row
        for row in rows
        if row["kind"] != "aa"
        and not (row["repeat"] or row["adjudication"] or row["flagged"])
        and row["choice"] != "cannot_judge"
    ]
    known = {str(row["pair_id"]): ANSWERS[row["expected"]] for row in used if row["expected"]}
    data = reliability_data((row["rater"], str(row["pair_id"]), _answer(row)) for row in used)
    truth = np.array([known.get(unit, math.nan) for unit in data.units])
    try:
        found = dawid_skene(data.values, truth)
    except UserError:
        return {}
    return dict(zip(data.raters, found.accuracy, strict=True))


def _rater(name: str, rows: Sequence[RowMapping], reliability: dict[str, Estimate], simulated: bool) -> RaterStats:
    verdicts = sum(row["adjudication"] for row in rows)
    rows = [row for row in rows if not (row["flagged"] or row["adjudication"])]
    judged = [row for row in rows if row["choice"] != "cannot_judge"]
    gold = [_answer(row) == ANSWERS[row["expected"]] for row in judged if row["kind"] == "gold"]
    once = {row["pair_id"]: _answer(row) for row in judged if _ordinary(row)}
    again = [row for row in judged if row["repeat"] and row["pair_id"] in once]
    ties = [_answer(row) == 0.5 for row in judged if row["kind"] == "aa"]
    sides = Counter(row["choice"] for row in judged)
    times = [took for row in rows if (took := seconds(row)) is not None and took > 0]
    return RaterStats(
        rater=name,
        votes=len(rows),
        cannot_judge=len(rows) - len(judged),
        gold=share_of(sum(gold), len(gold)),
        repeats=share_of(sum(_answer(row) == once[row["pair_id"]] for row in again), len(again)),
        aa_ties=share_of(sum(ties), len(ties)),
        left=left_bias(sides["left"], sides["right"]),
        simulated=simulated,
        adjudications=verdicts,
        median_seconds=float(np.median(times)) if times else math.nan,
        too_fast=int((time_scores(times) < TOO_FAST).sum()),
        reliability=reliability.get(name, Estimate(math.nan, math.nan, math.nan, 0)),
    )


def _notes(
    rules: Rules,
    gold: int,
    kept: Sequence[RowMapping],
    rankings: Sequence[GroupRanking],
    simulated: tuple[int, int],
) -> Iterator[str]:
    if simulated[0]:
        yield f"{simulated[0]} of {simulated[1]} votes are simulated: they are no evidence of what people prefer."
    if len(rankings) > 1:
        groups = " | ".join(f"{', '.join(group.arms)} ({group.kind}s)" for group in rankings)
        yield (
            f"The arms fall into {len(rankings)} groups that were never compared with each other, so each is ranked by"
            f" itself, and no strength or rank of one says anything about another: {groups}."
        )
    if not gold:
        yield "No gold pair was given, so no rater is tested by a known answer."
    if rules.overlap == 1:
        yield "Each pair is judged by one rater, so nothing is known of how far raters agree."
    active = sum(row["chosen"] == "active" for row in kept)
    if active:
        yield (
            f"{active} of {len(kept)} votes are on pairs that were chosen for what they would tell. The ranking may use"
            " them all; shares and means per arm are of the pairs in random order alone."
        )


def _disputed(kept: Sequence[RowMapping]) -> tuple[int, ...]:
    seen: dict[int, set[float]] = defaultdict(set)
    for row in kept:
        seen[row["pair_id"]].add(_answer(row))
    return tuple(sorted(pair for pair, answers in seen.items() if {0.0, 1.0} <= answers))
