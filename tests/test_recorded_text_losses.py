"""Text losses equal TRL's own, as recorded by ``recorded/record_trl_text_losses.py``: values, and gradients with
respect to every log-probability, reward or value.

TRL 1.16.0 says it of GRPO, RLOO, DPO, KTO and the reward model, TRL 0.11.4 of PPO with a critic. All was recorded in
float64. ``EXACT`` is what ours must keep to where it computes in float64, ``ROUNDED`` where a float32 number is part of
the way (advantages, weights, whitening). Where the two agree on a formula only up to a convention, the test says which
and converts; no tolerance hides it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from diffalign import credit
from diffalign.config import CreditConfig, ObjectiveConfig, TrainerConfig
from diffalign.experience import Scored
from diffalign.methods import CriticConfig
from diffalign.objectives import policy_gradient, preference, reward_model
from diffalign.steps import Steps
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Rollout, Sample, Scores, StepLikelihood

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded" / "trl_text_losses.json").read_text())
NEW, PPO = RECORDED["1.16.0"], RECORDED["0.11.4"]["ppo"]
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
ROUNDED: dict[str, float] = {"rtol": 2e-6, "atol": 1e-6}
AGGREGATIONS = {"grpo": "sample-mean", "bnpo": "step-mean", "dr_grpo": "constant", "dapo": "step-mean"}
Found = tuple[float, dict[str, Tensor]]


def numbers(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype)


def close(ours: Tensor | float, theirs: Any, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(numbers(ours), numbers(theirs), **tolerance)


def same(loss: Tensor, leaf: Tensor, case: dict[str, Any], tolerance: dict[str, float] = EXACT) -> None:
    """The loss, and its gradient with respect to the leaf."""
    loss.backward()
    close(loss.detach(), case["loss"], tolerance)
    close(cast(Tensor, leaf.grad), case["gradient"], tolerance)


class Table:
    """A policy of text whose answers are a table: what it says of a token is itself the parameter."""

    name, modality, reduction, steps_at_once, batch_size = "table", "text", "sum", None, 2
    capabilities = frozenset({"step_log_probs", "reference", "values"})
    device = torch.device("cpu")

    def __init__(self, log_probs: Tensor, reference: Tensor, values: Tensor | None = None) -> None:
        self.own = {"log_probs": Parameter(log_probs.clone())}
        self.own |= {} if values is None else {"values": Parameter(values.clone())}
        self.said, self.inside = reference, False

    def trainable(self) -> Mapping[str, Parameter]:
        return self.own

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def step_log_probs(
        self, rollout: Rollout, steps: Tensor, *, kl: bool = False, values: bool = False
    ) -> StepLikelihood:
        assert not kl
        rows = rollout.state["row"]
        found = (self.said if self.inside else self.own["log_probs"])[rows].gather(1, steps)
        return StepLikelihood(found, values=self.own["values"][rows].gather(1, steps) if values else None)


def trainer_of(policy: Table, objective: ObjectiveConfig, credited: CreditConfig | None = None) -> Trainer:
    """It takes micro-batches of two samples, does not clip gradients, and has already made an update: the checks of the
    first one ask for a reference that is the policy."""
    settings = TrainerConfig(
        samples_per_epoch=8, batch_size=8, micro_batch_size=2, max_grad_norm=1e6, learning_rate=1e-12
    )
    source = SimpleNamespace(name="table", modality="text")
    trainer = Trainer(cast(Any, policy), cast(Any, source), settings=settings, objective=objective, credit=credited)
    trainer.updates = 1
    return trainer


def made(old_log_probs: Tensor, mask: Tensor) -> Rollout:
    samples = tuple(Sample(Prompt(f"prompt {row}"), text="a") for row in range(len(mask)))
    return Rollout(samples, old_log_probs, mask, {"row": torch.arange(len(mask))})


def updated(trainer: Trainer, lesson: Any) -> Found:
    """The loss of one update, and its gradients."""
    metrics = trainer.update(lesson)
    return metrics["policy/loss"], {
        name: torch.zeros_like(each) if each.grad is None else each.grad
        for name, each in trainer.policy.trainable().items()
    }


# -- GRPO --------------------------------------------------------------------------------------------------------------


def grpo(case: dict[str, Any], dtype: torch.dtype, rows: slice = slice(None)) -> tuple[float, Tensor]:
    """What a whole update of ours makes of a case: completions are as wide as the most tokens that they can have."""
    given = NEW["grpo"]["given"]
    longest = case["longest"] - len(given["mask"][0])

    def table(name: str) -> Tensor:
        return torch.nn.functional.pad(numbers(given[name], dtype), (0, longest))[rows]

    objective = ObjectiveConfig(
        name="ppo-clip", reduction="sum", clip_range=case["low"], clip_range_high=case["high"],
        kl_coefficient=case["beta"], kl_estimator="k3", aggregation=cast(Any, AGGREGATIONS[case["kind"]]),
    )  # fmt: skip
    policy = Table(table("log_probs"), table("reference"))
    trainer = trainer_of(policy, objective)
    rollout = made(table("log_probs" if case["first"] else "old_log_probs"), table("mask").bool())
    advantages = numbers(given["advantages"], dtype)[rows]
    loss, gradients = updated(trainer, Steps(cast(Any, policy), objective, 0, 0, rollout, advantages))
    assert not gradients["log_probs"][:, -longest:].any()
    return loss, gradients["log_probs"][:, :-longest]


def tolerance(case: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Weights of samples are float32, whatever the log-probabilities are."""
    exact = dtype == torch.float64 and AGGREGATIONS[case["kind"]] == "step-mean"
    return EXACT if exact else {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-7, "atol": 1e-7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", NEW["grpo"]["wholes"], ids=lambda c: f"{c['kind']}-{c['beta']}-{c['first']}")
def test_grpo(case: dict[str, Any], dtype: torch.dtype) -> None:
    """GRPO is our sample-mean, BNPO and DAPO are our step-mean, Dr. GRPO is our constant; the KL in the loss is k3.

    One completion has an advantage of 0, and one no token at all (TRL's ``mask_truncated_completions``): both count."""
    loss, gradient = grpo(case, dtype)
    close(loss, case["loss"], tolerance(case, dtype))
    close(gradient, case["gradient"], tolerance(case, dtype))
    assert (numbers(case["gradient"])[3].any()) == (case["beta"] > 0) and not gradient[4].any()


def test_the_aggregations_differ() -> None:
    """Else the cases above would prove little; DAPO and BNPO are one thing where a batch is not split."""
    losses = {case["kind"]: case["loss"] for case in NEW["grpo"]["wholes"][:8]}
    assert losses["bnpo"] == pytest.approx(losses["dapo"], rel=1e-12)
    kept = [losses[kind] for kind in ("grpo", "dapo", "dr_grpo")]
    assert min(abs(a - b) for i, a in enumerate(kept) for b in kept[:i]) > 1e-2


@pytest.mark.parametrize("halves", NEW["grpo"]["micro_batches"], ids=lambda h: h[0]["kind"])
def test_grpo_in_two_micro_batches(halves: list[dict[str, Any]]) -> None:
    """A split changes nothing in ours, nor in TRL's GRPO, Dr. GRPO and DAPO. TRL's BNPO is the mean of each half's own
    mean over tokens, which is not the mean over all: as two updates of ours, one of each half."""
    dtype = torch.float64
    theirs, close_to = torch.cat([numbers(half["gradient"]) for half in halves]), tolerance(halves[0], dtype)
    loss, gradient = grpo(halves[0], dtype)
    if halves[0]["kind"] == "bnpo":
        assert abs(loss - sum(half["loss"] for half in halves)) > 1e-3
        own = [grpo(half, dtype, slice(*half["rows"])) for half in halves]
        loss, gradient = sum(each for each, _ in own) / 2, torch.cat([each for _, each in own]) / 2
    close(loss, sum(half["loss"] for half in halves), close_to)
    close(gradient, theirs, close_to)


def test_dapo_of_one_update_of_several() -> None:
    """Where a rollout serves several updates, TRL's DAPO divides by the mean number of tokens of an update, and ours by
    the update's own: the longer half of six tokens weighs as much as the other in ours, and more in TRL's."""
    case = NEW["grpo"]["one_update_of_two"]
    lengths = numbers(NEW["grpo"]["given"]["mask"]).sum(1)
    own, mean = lengths[:3].sum(), lengths.sum() / 2
    assert own != mean
    loss, gradient = grpo(case, torch.float64, slice(0, 3))
    close(loss * own / mean, case["loss"], EXACT)
    close(gradient * own / mean, case["gradient"], EXACT)


# -- advantages --------------------------------------------------------------------------------------------------------

ADVANTAGES = NEW["advantages"]
KEYS: list[str] = ADVANTAGES["keys"]
REWARDS = numbers([float("nan") if value is None else value for value in ADVANTAGES["rewards"]])
GROUPS = REWARDS.reshape(5, 4)


def test_advantages_within_a_group() -> None:
    """TRL divides by the unbiased deviation plus 1e-4, and ours by the population's plus 1e-6. A failed reward is left
    out of both, and has advantage 0 in both, as has what stands alone, or among equals."""
    ours, theirs = credit.group(REWARDS, KEYS).reshape(5, 4), numbers(ADVANTAGES["group"]).reshape(5, 4)
    for row in (0, 1):
        known = GROUPS[row][GROUPS[row].isfinite()]
        spread = float(known.std(correction=0))
        unbiased = spread * (len(known) / (len(known) - 1)) ** 0.5
        close(ours[row], theirs[row] * (unbiased + 1e-4) / (spread + 1e-6), ROUNDED)
        assert theirs[row].any()
    close(ours[2:], torch.zeros(3, 4), {"rtol": 0, "atol": 0})
    close(theirs[2:], torch.zeros(3, 4), {"rtol": 0, "atol": 1e-9})


def test_advantages_without_a_deviation() -> None:
    close(credit.group_mean(REWARDS, KEYS), ADVANTAGES["none"], ROUNDED)


def test_leave_one_out() -> None:
    close(credit.leave_one_out(REWARDS, KEYS), ADVANTAGES["rloo"], ROUNDED)


def test_the_trainer_clips_advantages() -> None:
    """At ``credit.clip``, 5 unless told otherwise, in whatever unit the rule leaves them; TRL clips none."""
    nothing = torch.zeros(20, 1)
    samples = tuple(Sample(Prompt(key), text="a") for key in KEYS)
    rollout = Rollout(samples, nothing, nothing == 0, {})
    theirs = numbers(ADVANTAGES["rloo"])
    assert 1 < theirs.abs().max() < 5
    for clip, expected in ((5.0, theirs), (1.0, theirs.clamp(-1, 1))):
        settings = CreditConfig(rule="leave-one-out", clip=clip)
        trainer = trainer_of(Table(nothing, nothing), ObjectiveConfig(reduction="sum"), settings)
        close(trainer.advantages(Scored(rollout, Scores(REWARDS.float()))), expected, ROUNDED)


def test_leave_one_out_of_rewards_less_the_drift() -> None:
    """TRL's RLOO takes the summed k1 off the reward; ours does the same where it is given such rewards."""
    tables = (numbers(ADVANTAGES[name]) for name in ("log_probs", "reference"))
    drift = (policy_gradient.kl_estimate(*tables, "k1") * numbers(ADVANTAGES["mask"])).sum(1)
    assert drift.abs().min() > 1e-3
    ours = credit.leave_one_out(REWARDS - ADVANTAGES["kl_weight"] * drift, KEYS)
    close(ours, ADVANTAGES["rloo_with_kl"], ROUNDED)


# -- RLOO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NEW["rloo"]["cases"], ids=lambda c: "first" if c["first"] else "later")
def test_rloo(case: dict[str, Any]) -> None:
    """RLOO has one ratio for a completion: it is PPO-clip of a single step, whose log-probability is the sum."""
    given = {name: numbers(values) for name, values in NEW["rloo"]["given"].items()}
    new = given["log_probs"].requires_grad_()
    old = given["log_probs"].detach() if case["first"] else given["old_log_probs"]
    sums = ((table * given["mask"]).sum(1, keepdim=True) for table in (new, old))
    loss, _ = policy_gradient.ppo_clip(*sums, given["advantages"], torch.ones(4, 1), clip_range=0.2)
    same(loss.mean(), new, case)


@pytest.mark.parametrize("name", ["reinforce", "ppo-clip"])
def test_the_first_update_of_rloo(name: Any) -> None:
    """By tokens, the gradient of the first update is the same: the sum over a completion's tokens, that is S times our
    constant aggregation, S the most tokens that a completion can have."""
    given = {key: numbers(values) for key, values in NEW["rloo"]["given"].items()}
    objective = ObjectiveConfig(name=name, reduction="sum", aggregation="constant")
    policy = Table(given["log_probs"], given["log_probs"])
    lesson = Steps(
        cast(Any, policy), objective, 0, 0, made(given["log_probs"], given["mask"].bool()), given["advantages"]
    )
    _, gradients = updated(trainer_of(policy, objective), lesson)
    case = next(case for case in NEW["rloo"]["cases"] if case["first"])
    close(gradients["log_probs"] * 5, case["gradient"], {"rtol": 2e-7, "atol": 1e-9})


# -- preferences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NEW["dpo"]["cases"], ids=lambda c: f"{c['kind']}-{c['beta']}-{c['smoothing']}")
def test_dpo(case: dict[str, Any]) -> None:
    """Of sums over the tokens of a completion. TRL 1.16.0's ``sigmoid`` knows no label smoothing (nor does it refuse
    it); its ``ipo`` takes means over tokens, of policy and reference alike; its ``sft`` is a mean over all tokens."""
    given = {name: numbers(values) for name, values in NEW["dpo"]["given"].items()}
    leaf, lengths = given["log_probs"].requires_grad_(), given["mask"].sum(1)
    scale = lengths if case["kind"] == "ipo" else torch.ones_like(lengths)
    sums = (leaf * given["mask"]).sum(1)
    first, second = (sums / scale).chunk(2)
    pair = first, second, *(given["reference"] / scale).chunk(2), torch.ones_like(first)
    match case["kind"]:
        case "robust":
            loss, _ = preference.robust_dpo(*pair, beta=case["beta"], flip_probability=case["smoothing"])
        case "hinge":
            loss, _ = preference.hinge(*pair, beta=case["beta"])
        case "ipo":
            loss, _ = preference.ipo(*pair, beta=case["beta"])
        case _:
            loss, _ = preference.dpo(*pair, beta=case["beta"])
    total = loss.mean()
    if case["kind"] == "sigmoid+sft":
        winners = preference.winner_sft(*sums.chunk(2), torch.ones_like(first))
        total = total + case["sft_weight"] * winners.sum() / lengths[:4].sum()
    same(total, leaf, case)


def test_ipo_of_sums_is_another_loss() -> None:
    """Only where all completions have one length ``T`` is TRL's IPO ours of sums, at ``beta / T`` and over ``T^2``. Of
    the recorded pairs, of 5 and 3 tokens or 4 and 1, it is not."""
    case = next(case for case in NEW["dpo"]["cases"] if case["kind"] == "ipo" and case["beta"] == 0.1)
    given = {name: numbers(values) for name, values in NEW["dpo"]["given"].items()}
    tables = (*given["log_probs"].sum(1).chunk(2), *given["reference"].chunk(2), torch.ones(4))
    of_sums, _ = preference.ipo(*tables, beta=0.1)
    assert abs(float(of_sums.mean()) - case["loss"]) > 1
    of_means, _ = preference.ipo(*(each / 4 for each in tables[:4]), tables[4], beta=0.1)
    close(preference.ipo(*tables, beta=0.1 / 4)[0] / 4**2, of_means, EXACT)


@pytest.mark.parametrize("case", NEW["kto"]["cases"], ids=lambda c: f"{c['beta']}-{c['labels']}-{c['baseline']:.2f}")
def test_kto(case: dict[str, Any]) -> None:
    """The baseline is what mismatched completions gained on the reference, or 0; it has no gradient."""
    given = {name: numbers(values) for name, values in NEW["kto"]["given"].items()}
    leaf = given["log_probs"].requires_grad_()
    baseline = preference.kto_baseline(given["mismatched"].requires_grad_(), numbers(case["mismatched_reference"]))
    assert not baseline.requires_grad
    close(baseline, case["baseline"], EXACT)
    loss, _ = preference.kto(
        (leaf * given["mask"]).sum(1),
        given["reference"],
        torch.tensor(case["labels"]).bool(),
        baseline,
        beta=case["beta"],
        desirable_weight=case["weights"][0],
        undesirable_weight=case["weights"][1],
    )
    same(loss.mean(), leaf, case, {"rtol": 2e-7, "atol": 0})  # the weights are float32


def test_the_recorded_baselines_are_of_both_kinds() -> None:
    found = [case["baseline"] for case in NEW["kto"]["cases"]]
    assert min(found) == 0 and max(found) > 0.4


@pytest.mark.parametrize("case", NEW["reward_model"]["cases"], ids=lambda c: f"{c['margin']}-{c['centring']}")
def test_reward_model(case: dict[str, Any]) -> None:
    given = {name: numbers(values) for name, values in NEW["reward_model"]["given"].items()}
    leaf = given["rewards"].requires_grad_()
    first, second = leaf.chunk(2)
    margin = given["margin"] if case["margin"] else 0.0
    loss, _ = reward_model.bradley_terry(first, second, torch.ones_like(first), margin)
    total = loss.mean() + (case["centring"] or 0.0) * reward_model.centring(first, second).mean()
    same(total, leaf, case)


# -- PPO with a critic -------------------------------------------------------------------------------------------------

GIVEN = {name: numbers(values) for name, values in PPO["given"].items()}
MASKS = {name: torch.tensor(PPO[name]).bool() for name in ("padded", "gaps")}


def ppo(values: Tensor, mask: Tensor, **critic: Any) -> tuple[Trainer, Any]:
    """A trainer with a critic, and what it makes of the recorded scores, in float32."""
    policy = Table(GIVEN["log_probs"].float(), GIVEN["reference"].float(), values.float())
    settings = CriticConfig(kl_coefficient=PPO["given"]["kl_weight"], **critic)
    objective = ObjectiveConfig(name="ppo-clip", reduction="sum", clip_range=0.2)
    trainer = trainer_of(policy, objective, CreditConfig(rule="gae", critic=settings))
    rollout = made(GIVEN["old_log_probs"].float(), mask)
    return trainer, trainer.lesson(Scored(rollout, Scores(GIVEN["scores"].float())))


@pytest.mark.parametrize(("theirs", "ours"), [("kl", "k1"), ("mse", "k2")])
def test_rewards_of_tokens(theirs: str, ours: str) -> None:
    """TRL's ``kl`` is our k1, its ``mse`` our k2. A critic that expects nothing and a trace of 0 make the returns the
    rewards. TRL penalises padding, too, and masks it later."""
    found = numbers(PPO["rewards"][theirs]["rewards"])
    _, lesson = ppo(torch.zeros(5, 6), MASKS["padded"], kl_estimator=ours, trace=0.0)
    close(lesson.returns, found * MASKS["padded"], ROUNDED)
    drift = policy_gradient.kl_estimate(GIVEN["old_log_probs"], GIVEN["reference"], ours)
    close(drift, PPO["rewards"][theirs]["drift"], EXACT)


def test_the_absolute_penalty_is_that_of_k1() -> None:
    """TRL's ``abs`` has no name of its own in ours."""
    drift = policy_gradient.kl_estimate(GIVEN["old_log_probs"], GIVEN["reference"], "k1")
    close(drift.abs(), PPO["rewards"]["abs"]["drift"], EXACT)


def rewards(mask: Tensor) -> Tensor:
    """float64: minus the weighted drift of each token, and the score at the last."""
    drift = policy_gradient.kl_estimate(GIVEN["old_log_probs"], GIVEN["reference"], "k1")
    found = -PPO["given"]["kl_weight"] * drift * mask
    last = torch.arange(6).expand_as(mask).masked_fill(~mask, -1).amax(1)
    found[torch.arange(5), last] += GIVEN["scores"]
    return found


def plain_cases(mask: str) -> list[dict[str, Any]]:
    return [case for case in PPO["advantages"] if case["mask"] == mask and not case["whiten_rewards"]]


@pytest.mark.parametrize("case", plain_cases("padded"), ids=lambda c: f"{c['discount']}-{c['trace']}")
def test_advantages_of_a_critic(case: dict[str, Any]) -> None:
    """GAE behind padding is the same, and so is whitening, with the unbiased variance and once per rollout."""
    mask = MASKS["padded"]
    how = {"discount": case["discount"], "trace": case["trace"]}
    advantages, returns = credit.gae(rewards(mask), GIVEN["values"], mask, **how)
    close(returns, numbers(case["returns"]) * mask, EXACT)
    close(credit.whitened(advantages, mask), numbers(case["advantages"]) * mask, ROUNDED)
    _, lesson = ppo(GIVEN["values"], mask, **how)
    close(lesson.returns, numbers(case["returns"]) * mask, ROUNDED)
    close(lesson.advantages, numbers(case["advantages"]) * mask, ROUNDED)


@pytest.mark.parametrize("case", plain_cases("gaps"), ids=lambda c: f"{c['discount']}-{c['trace']}")
def test_advantages_where_a_completion_has_gaps(case: dict[str, Any]) -> None:
    """TRL takes a gap (such as what a tool said) for a step without reward from which nothing is expected. In ours what
    follows a gap follows what went before it."""
    mask = MASKS["gaps"]
    how = {"discount": case["discount"], "trace": case["trace"]}
    everywhere = torch.ones_like(mask)
    advantages, returns = credit.gae(rewards(mask), GIVEN["values"] * mask, everywhere, **how)
    close(returns, case["returns"], EXACT)
    close(credit.whitened(advantages, mask), numbers(case["advantages"]) * mask, ROUNDED)
    _, ours = credit.gae(rewards(mask), GIVEN["values"], mask, **how)
    differs = ((ours - numbers(case["returns"])).abs() > 1e-6) & mask
    assert differs.any(1).tolist() == [True, False, False, False, True]


def test_whitened_rewards() -> None:
    """TRL whitens rewards without masking them again: its padding gets ``mean (1 - 1 / deviation)``, which GAE carries
    into every token before. Ours is 0 there, so only the completion without padding has the same returns."""
    case = next(case for case in PPO["advantages"] if case["mask"] == "padded" and case["whiten_rewards"])
    mask, how = MASKS["padded"], {"discount": case["discount"], "trace": case["trace"]}
    theirs, plain = numbers(case["returns"]), rewards(MASKS["padded"])
    scaled = credit.whitened(plain, mask, shift_mean=False).double()
    known = plain[mask]
    leaked = known.mean() * (1 - torch.rsqrt(known.var() + 1e-8))
    everywhere = torch.ones_like(mask)
    padded = torch.where(mask, scaled, leaked)
    close(credit.gae(padded, GIVEN["values"] * mask, everywhere, **how)[1], theirs, ROUNDED)
    _, lesson = ppo(GIVEN["values"], mask, whiten_rewards=True, **how)
    close(lesson.returns, credit.gae(scaled, GIVEN["values"], mask, **how)[1], ROUNDED)
    close(lesson.returns[0], theirs[0], ROUNDED)
    assert ((lesson.returns - theirs).abs() * mask)[1:].amax(1).min() > 1e-3


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean: bool) -> None:
    """Where the mask is True; elsewhere ours is 0."""
    theirs = numbers(PPO["whitened"]["shifted" if shift_mean else "kept"])
    ours = credit.whitened(GIVEN["values"], MASKS["gaps"], shift_mean=shift_mean)
    close(ours, theirs * MASKS["gaps"], ROUNDED)


@pytest.mark.parametrize("number", [0, 1])
def test_loss_of_policy_and_critic(number: int) -> None:
    """Means over the tokens of the update, our step-mean, in float64 from the recorded advantages; TRL skips an update
    whose mean ratio is above 10, which ours has not."""
    found, case = PPO["losses"][number], plain_cases("padded")[number]
    mask = MASKS["padded"]
    new, expected = (GIVEN[name].clone().requires_grad_() for name in ("log_probs", "new_values"))
    advantages = numbers(case["advantages"])
    policy, _ = policy_gradient.ppo_clip(new, GIVEN["old_log_probs"], advantages, mask, clip_range=0.2)
    error, _ = policy_gradient.value_clip(expected, GIVEN["values"], numbers(case["returns"]), mask, clip_range=0.2)
    losses = policy.sum() / mask.sum(), 0.1 * error.sum() / mask.sum()
    (losses[0] + losses[1]).backward()
    for ours, name in zip(losses, ("policy", "value"), strict=True):
        close(ours.detach(), found[name], EXACT)
    close(cast(Tensor, new.grad), found["gradients"]["log_probs"], EXACT)
    close(cast(Tensor, expected.grad), found["gradients"]["new_values"], EXACT)


@pytest.mark.parametrize("number", [0, 1])
def test_an_update_of_ppo_from_scores_to_gradients(number: int) -> None:
    """The same through the trainer, in float32 and three micro-batches, with its own rewards, GAE and whitening."""
    found, case = PPO["losses"][number], plain_cases("padded")[number]
    trainer, lesson = ppo(GIVEN["values"], MASKS["padded"], discount=case["discount"], trace=case["trace"])
    with torch.no_grad():
        trainer.policy.trainable()["values"].copy_(GIVEN["new_values"])
    loss, gradients = updated(trainer, lesson)
    close(loss, found["policy"] + found["value"], {"rtol": 1e-5, "atol": 1e-6})
    close(gradients["log_probs"], found["gradients"]["log_probs"], {"rtol": 1e-5, "atol": 1e-6})
    close(gradients["values"], found["gradients"]["new_values"], {"rtol": 1e-5, "atol": 1e-6})


def test_the_weight_of_the_drift_is_steered_alike() -> None:
    found = PPO["controller"]
    ours = credit.AdaptiveKL(found["weight"], found["target"], found["horizon"])
    for kl, weight in found["steps"]:
        ours.update(kl, found["count"])
        assert ours.weight == pytest.approx(weight, rel=1e-12)
