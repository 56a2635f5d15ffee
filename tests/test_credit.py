"""Credit rules against hand arithmetic; numpy's statistics module is the independent source."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import credit

Rule = Callable[[Tensor, Sequence[str]], Tensor]
NAN, INF = float("nan"), float("inf")
RULES = {
    "batch": lambda: credit.batch,
    "group": lambda: credit.group,
    "leave-one-out": lambda: credit.leave_one_out,
    "per-prompt": lambda: credit.PerPromptStatistics(buffer_size=32, min_count=2),
    "per-prompt, before its buffers are full": lambda: credit.PerPromptStatistics(buffer_size=32, min_count=16),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


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


@every_rule
@pytest.mark.parametrize("failed", [NAN, INF, -INF])
def test_a_failed_judgement_has_no_advantage_and_changes_no_other(make: Callable[[], Rule], failed: float) -> None:
    with_failed = make()(torch.tensor([1.0, failed, 3.0, 5.0]), ["a", "a", "a", "a"])
    assert with_failed[1] == 0 and with_failed.isfinite().all()
    without = make()(torch.tensor([1.0, 3.0, 5.0]), ["a", "a", "a"])
    assert torch.equal(with_failed[[0, 2, 3]], without) and without.any()


@every_rule
@pytest.mark.parametrize("failed", [NAN, INF])
def test_all_failed(make: Callable[[], Rule], failed: float) -> None:
    assert make()(torch.tensor([failed, failed]), ["a", "b"]).tolist() == [0.0, 0.0]


@every_rule
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), count=st.integers(1, 40))
def test_scores_that_are_all_the_same_teach_nothing(make: Callable[[], Rule], value: float, count: int) -> None:
    """In float32 the mean of eight 987.654 is another number, and the difference over 1e-6 was an advantage of 0.98."""
    assert not make()(torch.full((count,), value), ["a"] * count).any()


@every_rule
def test_one_prompt_of_equals_beside_another(make: Callable[[], Rule]) -> None:
    """Relative to the epoch the equals may be better; within their prompt they never are. float32 comes back."""
    scores, keys = torch.tensor([987.654] * 8 + [0.0, 1.0]), ["a"] * 8 + ["b"] * 2
    rule = make()
    advantages = rule(scores, keys)
    assert advantages.dtype == torch.float32 and advantages[8] != 0
    within = rule in (credit.group, credit.leave_one_out) or getattr(rule, "min_count", 16) < 16
    assert bool(advantages[:8].any()) is not within


@pytest.mark.parametrize("rule", [credit.batch, credit.group, credit.PerPromptStatistics(32, 2)])
def test_the_smallest_difference_is_seen_as_it_is(rule: Rule) -> None:
    """Three of 1000 and one of the next float32 up, u = 2^-14 more: mean u/4, deviation u sqrt(3)/4."""
    u = 2.0**-14
    deviation = u * 3**0.5 / 4 + 1e-6
    expected = torch.tensor([-u / 4, -u / 4, -u / 4, 3 * u / 4]) / deviation
    torch.testing.assert_close(rule(torch.tensor([1000.0, 1000.0, 1000.0, 1000.0 + u]), ["a"] * 4), expected)


def test_the_last_scores_of_a_prompt_are_all_the_same() -> None:
    """A buffer of two forgets the 5, so nothing is known to compare it with."""
    assert not credit.PerPromptStatistics(2, 2)(torch.tensor([5.0, 987.654, 987.654]), ["a"] * 3).any()


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


def test_gae_by_hand() -> None:
    """gamma 0.9, lambda 0.5, rewards 1, 0, 2 and values 0.5, 1, 0.2; the last column is padding.

    d2 = 2 - 0.2 = 1.8; d1 = 0 + 0.9 * 0.2 - 1 = -0.82; d0 = 1 + 0.9 * 1 - 0.5 = 1.4. A2 = 1.8;
    A1 = -0.82 + 0.45 * 1.8 = -0.01; A0 = 1.4 + 0.45 * -0.01 = 1.3955. The second row has one step, with padding that
    holds numbers: A = 3 - 1 = 2.
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 0.2, 7.0], [1.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    advantages, returns = credit.gae(rewards, values, mask, discount=0.9, trace=0.5)
    expected = torch.tensor([[1.3955, -0.01, 1.8, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(advantages, expected)
    assert torch.allclose(returns, (expected + values) * mask)


def test_gae_with_lambda_one_is_what_came_less_what_was_expected() -> None:
    """The sum telescopes: A_s is the sum of the rewards from s on, minus V_s. Gaps are no steps."""
    rewards, values = torch.randn(5, 6), torch.randn(5, 6)
    mask = torch.rand(5, 6) > 0.3
    advantages, _ = credit.gae(rewards, values, mask, discount=1.0, trace=1.0)
    later = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, (later - values) * mask, atol=1e-5)


def test_whitening_by_hand() -> None:
    """1, 2, 3 have mean 2 and unbiased variance 1: -1, 0, 1, or about their mean 1, 2, 3. Padding does not
    count."""
    values = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert torch.allclose(credit.whitened(values, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    kept = credit.whitened(values, mask, shift_mean=False)
    assert torch.allclose(kept, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert not credit.whitened(values, torch.zeros_like(mask)).any()


def test_a_kl_weight_is_steered_within_a_fifth() -> None:
    """Ten times the target over a tenth of the horizon: 1 + 0.2 / 10; at the target nothing; without one never."""
    steered = credit.AdaptiveKL(1.0, 2.0, 100)
    steered.update(20.0, 10)
    assert steered.weight == pytest.approx(1.02)
    steered.update(2.0, 10)
    assert steered.weight == pytest.approx(1.02)
    steered.update(0.0, 100)
    assert steered.weight == pytest.approx(1.02 * 0.8)
    fixed = credit.AdaptiveKL(1.0, None, 100)
    fixed.update(20.0, 100)
    assert fixed.weight == 1.0
