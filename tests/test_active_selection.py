"""Pairs chosen for what they would tell, and statistics that recover raters of known reliability and bias.

Raters are simulated, and the study is a real one. The seeds are fixed, and every margin is stated with what was seen.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from diffalign.preferences.ranking import components
from diffalign.study import Answer, Protocol, Study, StudyPair
from diffalign.study.posterior import posterior
from diffalign.study.schema import AssignmentRow, ContestRow, PairRow
from diffalign.types import Prompt, Sample
from tests.studies import RULES, Clock, claimed, for_first, known_uids, made, rows, vote_all

__all__ = ["known_uids"]

ARMS = [f"arm {i:02}" for i in range(12)]
CHECKED = (25, 50, 75, 100, 125, 150, 175, 200)
SEEDS = 6


def round_robin(pairs_a_contest: int, arms: list[str] = ARMS) -> Iterator[StudyPair]:
    """Every two arms, so often. A text is the name of its arm, so there are few files."""
    for number in range(pairs_a_contest):
        asked = Prompt(f"prompt {number}")
        for first, second in combinations(arms, 2):
            yield StudyPair(asked, Sample(asked, text=first), Sample(asked, text=second), first, second)


def answered(texts: tuple[str, str], strengths: Mapping[str, float], chance: np.random.Generator) -> Any:
    """Left, right or a tie by Davidson's model with v = 0.5: equals tie with probability 0.5 / 2.5 = 0.2."""
    gap = strengths[texts[0]] - strengths[texts[1]]
    odds = np.array([np.exp(gap / 2), 0.5, np.exp(-gap / 2)])
    return ("left", "tie_good", "right")[chance.choice(3, p=odds / odds.sum())]


def found_order(study: Study) -> list[float]:
    """The strengths that the counts of the study give, by arm."""
    wins = np.zeros((len(ARMS), len(ARMS)))
    for row in rows(study, ContestRow):
        first, second = ARMS.index(row.first_arm), ARMS.index(row.second_arm)
        wins[first, second] += row.for_first + row.ties / 2
        wins[second, first] += row.for_second + row.ties / 2
    return [float(value) for value in posterior(wins).mean]


def learned(base: Path, folder: Path, seed: int) -> list[float]:
    """Kendall's tau with the truth after so many votes of three raters, from a copy of a fresh study."""
    shutil.copytree(base, folder)
    study = Study.open(folder)
    chance = np.random.default_rng(seed)
    truth = chance.permutation(np.linspace(-4, 4, len(ARMS)))
    strengths = dict(zip(ARMS, truth, strict=True))
    taus = []
    for number in range(1, CHECKED[-1] + 1):
        rater = "abc"[number % 3]
        now = claimed(study, rater)
        assert now.texts is not None
        study.vote(rater, now.token, Answer(answered(now.texts, strengths, chance)))
        if number in CHECKED:
            taus.append(float(kendalltau(found_order(study), truth).statistic))
    counts = np.zeros((len(ARMS), len(ARMS)))
    for row in rows(study, ContestRow):
        counts[ARMS.index(row.first_arm), ARMS.index(row.second_arm)] += row.given
    assert len(components(counts)) == 1
    study.close()
    shutil.rmtree(folder)
    return taus


def fresh(folder: Path, share: float) -> Path:
    study = Study.create(folder, Protocol.parse(f"{RULES}random_share: {share}\n"), round_robin(6))
    for rater in "abc":
        study.add_rater(rater)
    study.close()
    return folder


@pytest.mark.slow
def test_active_selection_needs_fewer_votes_for_the_same_order(tmp_path: Path) -> None:
    """12 arms from -4 to 4, a fifth of near equals tied, 30 % of the pairs in random order.

    Mean tau over six seeds: 125 votes that are chosen reach what 200 in random order do, and at every number of votes
    from 50 on they are ahead. Seen: tau 0.944 after 125 chosen votes, 0.929 after 200 random ones.
    """
    taus = {
        share: np.mean(
            [learned(base, tmp_path / "run", seed) for base in [fresh(tmp_path / f"base {share}", share)]
             for seed in range(SEEDS)], axis=0,
        )
        for share in (0.3, 1.0)
    }  # fmt: skip
    chosen, random = (dict(zip(CHECKED, taus[share], strict=True)) for share in (0.3, 1.0))
    assert chosen[125] >= random[200]
    assert all(chosen[number] > random[number] for number in CHECKED[1:])


def test_active_selection_asks_where_the_order_is_open(tmp_path: Path) -> None:
    """Three arms, one far below: the other two, which are equal, are compared more often than a third of the times.

    In random order that would be 80 / 3, with a standard deviation of sqrt(80 * 2 / 9) = 4.2; seen: 38.
    """
    study = Study.create(
        tmp_path / "study", Protocol.parse(f"{RULES}random_share: 0.3\n"), round_robin(60, ["x", "y", "z"]),
    )  # fmt: skip
    study.add_rater("a")
    chance = np.random.default_rng(0)
    for _ in range(80):
        now = claimed(study, "a")
        assert now.texts is not None
        choice = answered(now.texts, {"x": 2, "y": 2, "z": -4}, chance)
        study.vote("a", now.token, Answer(choice))
    given = {(row.first_arm, row.second_arm): row.given for row in rows(study, ContestRow)}
    assert given["x", "y"] > 80 / 3 + 2 * 4.2 and sum(given.values()) == 80
    ways = Counter(row.chosen for row in rows(study, AssignmentRow))
    assert ways["random"] / 80 == pytest.approx(0.3, abs=3 * sqrt(0.3 * 0.7 / 80))
    found = study.stats()
    assert sum(found.chosen.values()) == 80 and found.chosen["active"] == ways["active"]
    assert any("chosen for what they would tell" in note for note in found.notes)
    shares = {arm: share.n for arm, share in found.criteria[0].arms.items()}
    assert sum(shares.values()) == 2 * found.chosen["random"]


def test_raters_who_ask_at_once_are_not_all_sent_to_the_same_contest(tmp_path: Path) -> None:
    """What is given out counts as told: six raters without a vote cast get pairs that connect the four arms."""
    study = Study.create(
        tmp_path / "study", Protocol.parse(f"{RULES}random_share: 0.3\n"), round_robin(20, ["w", "x", "y", "z"]),
    )  # fmt: skip
    for number in range(12):
        study.add_rater(f"r{number}")
        claimed(study, f"r{number}")
    assert sum(row.given > 0 for row in rows(study, ContestRow)) >= 5


def test_a_begun_pair_is_finished_and_keeps_how_it_was_chosen(tmp_path: Path) -> None:
    study = Study.create(
        tmp_path / "study", Protocol.parse(f"{RULES}random_share: 0.3\noverlap: 2\n"), round_robin(4, ["x", "y", "z"]),
    )  # fmt: skip
    for rater in "ab":
        study.add_rater(rater)
        while (now := study.turn(rater).now) is not None:
            study.vote(rater, now.token, Answer("left"))
    ways: dict[int, set[str]] = {}
    for row in rows(study, AssignmentRow):
        ways.setdefault(row.pair_id, set()).add(row.chosen)
    assert len(ways) == 12 and all(len(way) == 1 for way in ways.values())
    assert {"random", "active"} == set().union(*ways.values())


def test_a_repeat_does_not_say_how_its_pair_was_chosen(tmp_path: Path) -> None:
    """Rater a votes, gets the repeat, undoes the vote and skips the pair: for b and c it begins anew, at random.

    How a pair was chosen is what its first ordinary assignment says, and the repeat comes before theirs.
    """
    study = made(tmp_path, pairs=8, more="overlap: 3\nrepeat_share: 0.5\nrepeat_after: 1\n", raters="abc")
    token = claimed(study, "a").token
    while not rows(study, AssignmentRow)[-1].repeat:
        study.vote("a", token, Answer("left"))
        token = claimed(study, "a").token
    again = rows(study, AssignmentRow)[-1]
    first = next(row for row in rows(study, AssignmentRow) if row.pair_id == again.pair_id)
    while study.undo("a").token != first.token:
        pass
    study.skip("a", first.token)
    vote_all(study, "bc")
    ways = {row.chosen for row in rows(study, AssignmentRow) if row.pair_id == first.pair_id and not row.repeat}
    assert ways == {"random"}


def test_pairs_of_one_arm_are_never_chosen_for_what_they_tell(tmp_path: Path) -> None:
    """Two seeds of one model tell nothing of models: they come in random order only, and come all the same."""
    asked = Prompt("p")
    pairs = [
        StudyPair(asked, Sample(asked, text=f"a{i}"), Sample(asked, text=f"b{i}"), "x", "x" if i % 2 else "y")
        for i in range(40)
    ]
    study = Study.create(tmp_path / "study", Protocol.parse(f"{RULES}random_share: 0.3\n"), pairs)
    study.add_rater("a")
    while (now := study.claim("a")) is not None:
        study.vote("a", now.token, Answer("tie_good"))
    own = {row.id for row in rows(study, PairRow) if row.contest_id == 2}
    assert len(own) == 20
    ways = Counter((row.pair_id in own, row.chosen) for row in rows(study, AssignmentRow))
    assert ways[True, "active"] == 0 and ways[True, "random"] == 20 and ways[False, "active"] > 5


def test_what_was_skipped_is_not_chosen_again_while_there_is_more(tmp_path: Path) -> None:
    study = Study.create(
        tmp_path / "study", Protocol.parse(f"{RULES}random_share: 0.3\n"), round_robin(3, ["x", "y"]), clock=Clock(),
    )  # fmt: skip
    study.add_rater("a")
    prompts = []
    for _ in range(3):
        now = claimed(study, "a")
        prompts.append(now.prompt)
        study.skip("a", now.token)
    assert len(set(prompts)) == 3
    assert claimed(study, "a").prompt in prompts


# --- raters of known reliability and bias ---

RELIABILITY = {"a": 0.95, "b": 0.8, "c": 0.65}
LEFT = 0.8
"""Rater d does not look: left with this chance."""


def simulated(folder: Path, seed: int) -> Study:
    """60 pairs of which the first sample is better in half, judged by all four; no gold."""
    study = made(folder, pairs=60, more="overlap: 4\n", raters="abcd", seed=seed)
    chance = np.random.default_rng(seed)
    for rater in "abcd":
        while (now := study.claim(rater)) is not None:
            assert now.texts is not None
            better = b"one" if int(now.prompt.split()[1]) % 2 else b"two"
            right_answer = for_first(study, now, better)
            wrong = "left" if right_answer == "right" else "right"
            if rater == "d":
                choice = "left" if chance.random() < LEFT else "right"
            else:
                choice = right_answer if chance.random() < RELIABILITY[rater] else wrong
            study.vote(rater, now.token, Answer(choice))  # type: ignore[arg-type]
    return study


@pytest.mark.slow
def test_statistics_recover_raters_within_their_intervals(tmp_path: Path) -> None:
    """Coverage over 12 seeds, not one lucky one. 95 % intervals of three raters: 36 in all, 12 for the left bias.

    A true coverage of 0.95 would give 30 of 36 or fewer with chance 0.006, and 8 of 12 or fewer with chance 0.002.
    Bootstrap intervals of Dawid-Skene on 60 pairs are a little narrow, so 29 of 36 are asked for.
    Seen: 31 of 36 and 11 of 12; no left bias was found in 35 of 36 raters without one.
    """
    reliable = biased = fair = 0
    for seed in range(12):
        study = simulated(tmp_path / str(seed), seed)
        found = dict(zip("abcd", study.stats().raters, strict=True))
        for rater, true in RELIABILITY.items():
            estimate = found[rater].reliability
            reliable += estimate.low <= true <= estimate.high
            fair += found[rater].left.left.low <= 0.5 <= found[rater].left.left.high
        left = found["d"].left.left
        biased += left.low <= LEFT <= left.high
        assert found["d"].left.p_value < 0.05 and found["d"].reliability.value < found["b"].reliability.value
        study.close()
    assert reliable >= 29 and biased >= 9 and fair >= 30
