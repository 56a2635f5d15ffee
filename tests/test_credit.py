"""Credit rules against hand arithmetic; numpy's statistics module is the independent source."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import credit

NAN = float("nan")


def test_batch_standardises_over_the_epoch() -> None:
    """Mean 3, population deviation sqrt(2)."""
    result = credit.batch(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "abcde")
    torch.testing.assert_close(result, torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) / 2**0.5, rtol=1e-5, atol=1e-5)


def test_group_standardises_within_a_prompt_and_ignores_the_others() -> None:
    """Prompt a: 0, 2 -> -1, 1. Prompt b: 10, 10 -> 0, 0 (nothing to learn from equals)."""
    result = credit.group(torch.tensor([0.0, 10.0, 2.0, 10.0]), ["a", "b", "a", "b"])
    torch.testing.assert_close(result, torch.tensor([-1.0, 0.0, 1.0, 0.0]), rtol=1e-5, atol=1e-5)


def test_leave_one_out_compares_with_the_others() -> None:
    """1, 2, 6 of one prompt: 1 - 4, 2 - 3.5, 6 - 1.5; a lone prompt learns nothing."""
    result = credit.leave_one_out(torch.tensor([1.0, 2.0, 6.0, 9.0]), ["a", "a", "a", "b"])
    torch.testing.assert_close(result, torch.tensor([-3.0, -1.5, 4.5, 0.0]))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12))
def test_leave_one_out_sums_to_zero(values: list[float]) -> None:
    result = credit.leave_one_out(torch.tensor(values), ["a"] * len(values))
    assert float(result.sum()) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("rule", [credit.batch, credit.group, credit.leave_one_out, credit.PerPromptStatistics()])
def test_a_failed_judgement_has_no_advantage_and_changes_no_other(rule: object) -> None:
    keys = ["a", "a", "a", "a"]
    with_nan = rule(torch.tensor([1.0, NAN, 3.0, 5.0]), keys)  # type: ignore[operator]
    assert with_nan[1] == 0 and with_nan.isfinite().all()
    without = rule(torch.tensor([1.0, 3.0, 5.0]), keys[:3])  # type: ignore[operator]
    torch.testing.assert_close(with_nan[[0, 2, 3]], without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [credit.batch, credit.group, credit.leave_one_out, credit.PerPromptStatistics()])
def test_all_failed(rule: object) -> None:
    assert rule(torch.tensor([NAN, NAN]), ["a", "b"]).tolist() == [0.0, 0.0]  # type: ignore[operator]


def test_per_prompt_statistics_fall_back_then_take_over() -> None:
    """min_count 3: two scores of a prompt use the epoch's statistics, four use the prompt's own last three."""
    tracker = credit.PerPromptStatistics(buffer_size=3, min_count=3)
    first = tracker(torch.tensor([1.0, 3.0, 10.0]), ["a", "a", "b"])
    deviation = statistics.pstdev([1.0, 3.0, 10.0])
    expected = [(value - 14 / 3) / deviation for value in (1.0, 3.0, 10.0)]
    torch.testing.assert_close(first, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    second = tracker(torch.tensor([5.0, 7.0]), ["a", "a"])
    own = [3.0, 5.0, 7.0]
    expected = [(value - statistics.mean(own)) / statistics.pstdev(own) for value in (5.0, 7.0)]
    torch.testing.assert_close(second, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_per_prompt_statistics_survive_a_checkpoint() -> None:
    first, second = credit.PerPromptStatistics(4, 2), credit.PerPromptStatistics(4, 2)
    first(torch.tensor([1.0, 2.0, 4.0]), ["a", "a", "b"])
    second.load_state_dict(first.state_dict())
    scores = torch.tensor([3.0, 8.0])
    assert torch.equal(first(scores, ["a", "b"]), second(scores, ["a", "b"]))
