from __future__ import annotations

from pathlib import Path

import pytest

from apps import sources
from diffalign import preferences
from diffalign.config import ObjectiveConfig, parse
from diffalign.held_out_pairs import HeldOutPairs
from diffalign.types import Preference, Prompt, Sample
from tests.test_trainer import PROMPTS, WalkPolicy


def pair(which: int, first: float, second: float, label: float) -> Preference:
    prompt = PROMPTS[which]
    return Preference(prompt, Sample(prompt, text=str(first)), Sample(prompt, text=str(second)), label)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_the_share_of_pairs_in_order(name: str, batch_size: int) -> None:
    """The end x of a walk whose ends have mean m gains ((x - 0)^2 - (x - m)^2) / 1.5 on the base, whose mean is 0.

    Between two ends the gains differ by 2 m (x1 - x2) / 1.5: for m > 0 the larger gains more, and for m = 0 no sample
    gains anything, which counts one half. Of prompt a (m = 1) two of three pairs are in order; prompt b has m = 0.
    """
    pairs = [pair(0, 5, 1, 1.0), pair(0, 5, 1, 0.0), pair(0, 1, 5, 0.2), pair(1, 5, 1, 1.0)]
    policy = WalkPolicy()
    policy.batch_size = batch_size
    policy.mean.data[0] = 1 / 3
    objective = ObjectiveConfig(name=name)  # type: ignore[arg-type]
    held = HeldOutPairs([pair(1, 9, 9, 0.5), *pairs], [1, 2, 3, 4])
    assert held.accuracy(policy, objective, seed=0) == pytest.approx((2 + 0.5) / 4)
    assert policy.mean.grad is None


def test_before_training_every_pair_counts_one_half() -> None:
    held = HeldOutPairs([pair(0, 5, 1, 1.0), pair(1, 5, 1, 1.0)], [0, 1])
    assert held.accuracy(WalkPolicy(), ObjectiveConfig(name="dpo", loser_safety=0.5), seed=3) == 0.5


def test_which_pairs_are_held_out(tmp_path: Path) -> None:
    """Those of held-out prompts, by the criterion that is learned, and no ties: here one of five."""
    texts = ["train", "held", "held", "held", "train"]
    labels, criteria = [1.0, 1.0, 0.5, 0.0, 0.0], ["a", "a", "a", "b", "b"]
    rows = [
        Preference(Prompt(text), Sample(Prompt(text), text="x"), Sample(Prompt(text), text="y"), label, criterion=by)
        for text, label, by in zip(texts, labels, criteria, strict=True)
    ]
    path = tmp_path / "pairs.parquet"
    preferences.write(path, rows)

    def found(objective: str) -> HeldOutPairs | None:
        config = parse(
            {
                "model": "m", "modality": "text", "prompts": {"source": "x"}, "objective": {"name": objective},
                "experience": {"source": "pairs", "path": str(path), "criterion": "a"},
                "evaluation": {"rewards": ["clip"]},
            }
        )  # fmt: skip
        source = sources.recorded_pairs(path, "a", [Prompt("held")], lambda text: None)
        assert source.train == [0]
        return sources.held_out_pairs(config, source, [Prompt("held")])

    held = found("dpo")
    assert held is not None and list(held.rows) == [1] and held[0].prompt.text == "held"
    assert found("sft") is None
