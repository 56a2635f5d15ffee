"""Fifty raters at once: how long they wait for the next pair, and that no vote is lost or doubled."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from diffalign.study import Study, database
from diffalign.study.schema import AssignmentRow, VoteRow
from tests.label_server import ROOT, image_pairs, made, quick_protocol, serving
from tests.test_study_processes import postgresql

__all__ = ["postgresql"]


def raters(url: str, names: list[str], votes: int, think: float) -> dict[str, list[float]]:
    """What the raters of a client process saw."""
    command = [sys.executable, "-m", "tests.label_raters", url, str(votes), str(think), *names]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=280)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def check_votes(study: Study, acknowledged: list[float], overlap: int) -> None:
    """Every acknowledged vote is there once, and no other; no pair was given twice to a rater, or to too many."""
    with database.reading(study.engine) as connection:
        votes = list(connection.scalars(select(VoteRow.id)))
        of = connection.execute(
            select(AssignmentRow.pair_id, AssignmentRow.rater_id).join(
                VoteRow, VoteRow.assignment_id == AssignmentRow.id
            )
        ).all()
    assert sorted(acknowledged) == sorted(votes)
    assert max(Counter(tuple(row) for row in of).values()) == 1
    assert max(Counter(pair for pair, _ in of).values()) <= overlap


def load(
    folder: Path, people: int, votes: int, think: float, size: int, url: str | None = None
) -> tuple[float, float, float, float]:
    """Lets the raters loose; returns median and 95th percentile of ``saved``, and the same of ``shown``, in seconds.

    Twice as many places as votes, so that pairs remain until the end.
    """
    names = [f"rater {i}" for i in range(people)]
    study = made(folder, image_pairs(people * votes, size), quick_protocol(overlap=2), database_url=url)
    with serving(folder, dict.fromkeys(names, "rater"), database=url) as server:
        start = time.perf_counter()
        found = raters(server.url, names, votes, think)
        seconds = time.perf_counter() - start
        assert server.stop() == 0
    assert len(found["votes"]) == people * votes
    check_votes(study, found["votes"], 2)
    assert all(finding.ok for finding in study.inspect())
    study.close()
    numbers = [float(np.quantile(found[kind], share)) for kind in ("saved", "shown") for share in (0.5, 0.95)]
    print(
        f"\n{people} raters, {votes} votes each, think time {think} s, images {size}x{size}, {seconds:.0f} s:"
        f" vote saved p50 {1000 * numbers[0]:.0f} ms, p95 {1000 * numbers[1]:.0f} ms;"
        f" next pair with its images p50 {1000 * numbers[2]:.0f} ms, p95 {1000 * numbers[3]:.0f} ms"
    )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def test_ten_raters_at_once(tmp_path: Path) -> None:
    """No vote lost or doubled. The bound is for a machine that does much else; see the slow tests for a real one."""
    assert load(tmp_path / "study", 10, 8, 0.2, 64)[3] < 5


@pytest.mark.slow
def test_fifty_raters_wait_less_than_a_third_of_a_second(tmp_path: Path) -> None:
    """The median of three runs, on an idle machine with two cores. One second per pair is quicker than people are."""
    assert statistics.median(load(tmp_path / f"study-{n}", 50, 20, 1.0, 256)[3] for n in range(3)) < 0.3


@pytest.mark.slow
def test_fifty_raters_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    """The same as above: a vote is about a dozen ways there and back, each waiting for its turn on two cores."""
    assert load(tmp_path / "study", 50, 15, 1.0, 256, postgresql)[3] < 0.3
