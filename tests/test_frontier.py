"""The frontier of reward and KL: its arithmetic, its fitted reward, and its page. Nothing long is run here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import frontier, frontier_page, frontier_plot, frontier_points, frontier_proxy
from diffalign.types import Preference, Prompt, Sample
from tests.tiny_language import tiny_language_model

RECORDED = Path(frontier.__file__).parent


def test_the_best_of_n_is_the_mean_over_all_subsets() -> None:
    """Every subset of n of six samples, one by one; of two equal keys either is picked half the time."""
    by = np.array([[0.1, 0.7, 0.4, 0.7, 0.9, 0.2]])
    value = np.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    for n in range(1, 7):
        picked = []
        for subset in itertools.combinations(range(6), n):
            top = max(by[0][i] for i in subset)
            picked.append(np.mean([value[0][i] for i in subset if by[0][i] == top]))
        assert frontier_points.best_of(n, by, value)[0] == pytest.approx(np.mean(picked))
    with pytest.raises(ValueError, match="needs as many"):
        frontier_points.best_of(7, by, value)


def test_the_kl_of_the_best_of_n_is_that_of_its_density() -> None:
    """The best of n of uniform numbers has the density n u^(n - 1): KL is the integral of its product with its log."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 2, 8, 32):
        density = n * u ** (n - 1)
        assert frontier_points.analytic_kl(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)


def curve(*points: tuple[float, float], run: str = "a-1") -> list[frontier_points.Point]:
    """Points of (KL, gold), each the same of three prompts."""
    return [
        frontier_points.Point(np.full(3, kl), np.full(3, gold), np.full(3, gold + 0.1), run, f"epoch {k}", 30.0)
        for k, (kl, gold) in enumerate(points)
    ]


def test_what_is_reached_is_the_best_within_the_budget() -> None:
    """At 2 nats the point at 1.9; at 4 still that one, for the one at 3 is worse; at 10 the one at 9."""
    own = curve((0, 0.5), (1.9, 0.7), (3, 0.6), (9, 0.8))
    rows = frontier_points.resampled(3)
    for budget, expected in {0.1: 0.5, 2: 0.7, 4: 0.7, 10: 0.8}.items():
        assert np.allclose(frontier_points.reached(own, budget, rows), expected)


def test_differences_between_methods_are_paired_by_prompt() -> None:
    """One method is 0.1 better on every prompt, and prompts differ by far more: paired, the interval is a point."""
    gold = np.array([0.1, 0.5, 0.9])
    rows = frontier_points.resampled(3)
    one, other = ([frontier_points.Point(np.ones(3), gold + more, gold, "x", "y")] for more in (0.1, 0.0))
    assert np.ptp(frontier_points.reached(one, 2, rows)) > 0.5
    low, high = frontier_points.interval(
        frontier_points.reached(one, 2, rows) - frontier_points.reached(other, 2, rows)
    )
    assert [low, high] == pytest.approx([0.1, 0.1])


def small_frontier() -> dict[str, Any]:
    """Results of two prompts with four base samples each, and two runs of one measurement."""
    point = {"epoch": 3, "gold": [0.6, 0.8], "fitted": [0.7, 0.9], "kl": [1.0, 3.0], "tokens": [20.0, 22.0]}
    seconds = {"wall": 60.0, "processor": 50.0}
    return {
        "date": "2026-01-01", "machine": {"cpu": "a", "cores": 2, "memory_gb": 8, "system": "b", "threads": 1},
        "versions": {"torch": "1"}, "judgements": {"pairs": 8, "checked": 4, "noise": 0.05},
        "seconds": {"wall": 120.0, "processor": 60.0},
        "proxy": {"accuracy": 0.75, "gold": 0.8},
        "base": {"gold": [[0.1, 0.2, 0.3, 0.4] * 8] * 2, "fitted": [[0.4, 0.3, 0.2, 0.1] * 8] * 2},
        "runs": [
            {"name": "dpo-0.1", "method": "DPO", "knob": 0.1, "seconds": seconds, "points": [point]},
            {
                "name": "ppo-fitted-0.1", "method": "PPO on the fitted reward", "knob": 0.1, "seconds": seconds,
                "points": [point | {"gold": [0.5, 0.7]}],
            },
        ],
    }  # fmt: skip


def test_tables_and_picture_come_from_the_results(tmp_path: Path) -> None:
    """DPO is at a KL of (1 + 3) / 2 = 2 with gold 0.7, PPO 0.1 below; the base is at 0.25.

    A resample is of both prompts, or twice the first (KL 1, gold 0.6), or twice the second (KL 3, gold 0.8): so within
    a KL of 1 there is 0.25 or 0.6, and within 2 there is 0.25, 0.6 or 0.7. Of 8 times four different values the best by
    a reward that ranks them the other way round is the worst.
    """
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    names = ("reached", "versus", "runs", "best of n", "conditions")
    page.write_text("Words.\n\n" + "\n".join(f"<!-- {name} -->\nstale\n<!-- end -->" for name in names) + "\nMore.\n")
    frontier_page.write(small_frontier(), page, picture)
    text = page.read_text()
    assert text.startswith("Words.") and text.endswith("More.\n") and "stale" not in text
    assert "| DPO | 0.250 (0.250 to 0.250) | 0.250 (0.250 to 0.600) | 0.700 (0.250 to 0.700) |" in text
    assert "**+0.100 (+0.100 to +0.100)**" in text
    assert "| DPO, 0.1 | epoch 3 | 2.00 | 0.700 | 0.800 | 2.00 | 0.700 | 0.800 | 21.0 | 50 |" in text
    best = frontier_points.best_of(
        32, np.array(small_frontier()["base"]["fitted"]), np.array([[0.1, 0.2, 0.3, 0.4] * 8] * 2)
    )
    assert best == pytest.approx([0.1, 0.1])
    assert "| 32 | 2.50 | 0.400 | 0.100 | 0.400 |" in text
    with Image.open(picture) as drawn:
        assert drawn.size == (frontier_plot.WIDTH, frontier_plot.HEIGHT)
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20) or []}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table"):
        frontier_page.write(small_frontier(), page, picture)


def test_judges_err_as_bradley_and_terry_say() -> None:
    """A gold difference of one noise: P(first) = sigmoid(1) = 0.731; of 2000 judgements within four standard errors."""
    prompt = Prompt("ab")
    samples = [Sample(prompt, text="a"), Sample(prompt, text="b")]
    labels = [frontier.judged(samples, [0.5 + frontier.NOISE, 0.5], number).label for number in range(2000)]
    assert abs(np.mean(labels) - 1 / (1 + math.exp(-1))) < 4 * (0.731 * 0.269 / 2000) ** 0.5


def fitted() -> frontier_proxy.FittedReward:
    model, tokenizer = tiny_language_model()
    torch.manual_seed(0)
    return frontier_proxy.FittedReward(model.get_decoder().requires_grad_(True), tokenizer, batch_size=3)


def pairs_of_letters(letters: Sequence[str]) -> list[Preference]:
    """The text with more of the letter a is preferred; sides alternate."""
    found = []
    for i, letter in enumerate(letters):
        good, bad = Sample(Prompt("ab"), text="aaa" + letter), Sample(Prompt("ab"), text=letter * 4)
        found.append(Preference(good.prompt, *((good, bad) if i % 2 else (bad, good)), float(i % 2)))
    return found


def test_the_fitted_reward_learns_what_the_pairs_say(tmp_path: Path) -> None:
    reward, told, unseen = fitted(), pairs_of_letters("bcdefg" * 6), pairs_of_letters("h" * 6)
    frontier_proxy.fit(reward, told, epochs=6, rate=3e-3)
    assert frontier_proxy.accuracy(reward, unseen) == 1.0
    samples = [sample for pair in told for sample in (pair.first, pair.second)]
    gold = torch.linspace(0.2, 0.8, len(samples))
    reward.calibrate(samples, gold)
    scores = reward(samples).total
    assert float(scores.mean()) == pytest.approx(float(gold.mean()), abs=1e-5)
    assert float(scores.std()) == pytest.approx(float(gold.std()), abs=1e-5)
    assert float(reward(samples[4:5]).total) == pytest.approx(float(scores[4]), abs=1e-5)  # whatever is beside it
    frontier_proxy.save(reward, tmp_path / "reward.safetensors")
    assert torch.equal(frontier_proxy.load(fitted(), tmp_path / "reward.safetensors")(samples).total, scores)


def test_recorded_tables_of_the_frontier_are_those_of_the_recorded_results() -> None:
    recorded = json.loads((RECORDED / "results" / "frontier.json").read_text())
    page = (RECORDED / "frontier.md").read_text()
    assert all(table in page for table in frontier_page.tables(recorded).values())
