"""Where batches come from, and that every objective learns from what it is given: one loop for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign import images
from diffalign.config import AdapterConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.experience import (
    BestOfN,
    Chosen,
    JudgedPairs,
    OnlinePairs,
    Paired,
    Recorded,
    RecordedPairs,
    Rollouts,
    Source,
    judged,
    winners,
)
from diffalign.lessons import Comparisons, Examples, Verdicts
from diffalign.methods import BACKPROP, FIELDS, LEARNS_FROM
from diffalign.objectives.supervised import exponential_weights
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Preference, Prompt, Sample, Scores
from pipelines.diffusion import DiffusionPolicy
from tests.test_trainer import CONFIG, PROMPTS, Brightness, Target, WalkPolicy


def walks(count: int, seed: int = 0) -> list[Sample]:
    """Samples of the untrained walk."""
    policy = WalkPolicy()
    return list(policy.rollout([PROMPTS[i % 2] for i in range(count)], range(seed, seed + count)).samples)


def compare(pairs: Sequence[tuple[Sample, Sample]], seed: int) -> list[Preference]:
    """The sample that ends nearer to its target is better."""
    scores = [Target()(pair).total for pair in pairs]
    return [Preference(a.prompt, a, b, float(s[0] > s[1])) for (a, b), s in zip(pairs, scores, strict=True)]


def recorded(count: int = 256) -> list[Preference]:
    samples = walks(2 * count)
    return compare([(samples[i], samples[i + 2]) for i in range(0, 2 * count - 2, 4) for i in (i, i + 1)], 0)


def good_and_bad() -> Recorded:
    samples = walks(256)
    scores = Target()(samples).total
    return Recorded(samples, [bool(score > scores.median()) for score in scores], "text")


SOURCES: dict[str, Callable[[], Source]] = {
    "rollouts": lambda: Rollouts(Target(), PROMPTS),  # type: ignore[arg-type]
    "best-of-n": lambda: BestOfN(Target(), PROMPTS, [0.25]),  # type: ignore[arg-type]
    "online-pairs": lambda: OnlinePairs(Target(), PROMPTS),  # type: ignore[arg-type]
    "pairs": lambda: RecordedPairs(recorded(), range(250), "text"),
    "labels": good_and_bad,
    "demonstrations": lambda: Recorded(
        [s for s in walks(2000) if float(Target()([s]).total) > -1.5], modality="text"
    ),
}  # fmt: skip
OWN = {
    "dpo": {"beta": 1.0}, "robust-dpo": {"beta": 1.0, "flip_probability": 0.05}, "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.3}, "kto": {"beta": 1.0}, "reward-weighted": {"temperature": 0.5}, "sft": {},
    "ppo-clip": {"clip_range": 0.2}, "reinforce": {},
    "elbo-reinforce": {}, "elbo-ppo-clip": {"clip_range": 0.2}, "nft": {},
}  # fmt: skip
EVERY_PAIR = [
    (objective, source)
    for objective, sources in LEARNS_FROM.items()
    for source in sources
    if objective not in BACKPROP  # images only: tests/test_backprop.py
]


def trainer(objective: str, source: Source, policy: WalkPolicy | None = None, **changes: object) -> Trainer:
    settings = {
        "epochs": 40, "samples_per_epoch": 64, "samples_per_prompt": 8, "batch_size": 32, "learning_rate": 0.03,
        "weight_decay": 0.0,
    }  # fmt: skip
    own = OWN[objective] | {name: value for name, value in changes.items() if name in FIELDS[objective]}
    rest = {name: value for name, value in changes.items() if name not in own}
    return Trainer(
        policy or WalkPolicy(),
        source,
        settings=TrainerConfig(**(settings | rest)),  # type: ignore[arg-type]
        objective=ObjectiveConfig(name=objective, **own),  # type: ignore[arg-type]
    )


def quality(policy: WalkPolicy) -> float:
    """Mean score of 400 fresh samples: about -3 untrained, -0.7 at best."""
    return float(Target()(policy.rollout([PROMPTS[i % 2] for i in range(400)], range(9000, 9400)).samples).total.mean())


@pytest.mark.parametrize(("objective", "source"), EVERY_PAIR)
def test_every_objective_learns_from_each_of_its_sources(objective: str, source: str) -> None:
    """The walk's ends lie 3 away from where they should be: each method brings them nearer by a clear step.

    Imitation goes no further than what it is shown, so it is held to less: the better of two samples, above all.
    """
    policy = WalkPolicy()
    before = quality(policy)
    trainer(objective, SOURCES[source](), policy).train()
    gain = quality(policy) - before
    imitates = objective in ("sft", "reward-weighted")
    assert gain > (0.3 if imitates and source == "pairs" else 0.7 if imitates or source == "labels" else 1.0), gain


def test_a_sample_of_weight_0_is_left_out_exactly() -> None:
    """Of 8 samples 3 failed to be judged: the other 5 alone go through the model, and the gradient, a mean over all 8,
    is what asking about all of them would have made it."""
    policy, samples = WalkPolicy(), walks(8)
    advantages = torch.tensor([1.0, math.nan, -1.0, 0.5, math.nan, 0.0, 2.0, math.nan])
    lesson = Examples(policy, ObjectiveConfig(name="reward-weighted"), 0, 0, samples, advantages=advantages)  # type: ignore[arg-type]
    rows = lesson.rows(torch.arange(8), 0)
    assert sorted(rows.items.tolist()) == [0, 2, 3, 5, 6] and rows.count == 8
    weights = exponential_weights(advantages, temperature=lesson.objective.temperature or 1.0)
    loss, metrics = lesson.loss(lesson.inputs(rows))
    whole = -weights * policy.log_likelihood(samples, rows.draw())
    (found,) = torch.autograd.grad(loss.sum(), policy.mean)
    (expected,) = torch.autograd.grad(whole.sum(), policy.mean)
    torch.testing.assert_close(found, expected)
    assert float(metrics["effective_samples"]) == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()))


def test_swapping_every_pair_and_its_label_changes_nothing() -> None:
    pairs = recorded(32)
    swapped = [Preference(p.prompt, p.second, p.first, 1 - p.label) for p in pairs]
    one, other = WalkPolicy(), WalkPolicy()
    trainer("dpo", RecordedPairs(pairs, range(30), "text"), one, epochs=3).train()
    trainer("dpo", RecordedPairs(swapped, range(30), "text"), other, epochs=3).train()
    torch.testing.assert_close(one.mean, other.mean)


def test_swapped_labels_teach_the_opposite() -> None:
    """From the same start the first step goes the opposite way."""
    pairs = recorded(32)
    swapped = [Preference(p.prompt, p.first, p.second, 1 - p.label) for p in pairs]
    one, other = WalkPolicy(), WalkPolicy()
    for policy, given in ((one, pairs), (other, swapped)):
        trainer("dpo", RecordedPairs(given, range(30), "text"), policy, epochs=1, batch_size=64).train()
    assert one.mean.abs().max() > 0
    torch.testing.assert_close(one.mean, -other.mean, rtol=1e-4, atol=1e-5)


def test_the_loss_starts_at_ln_2_with_no_margin() -> None:
    """Before any update the policy is the reference: margin 0, accuracy one half, drifts 0, whatever the pairs."""
    job = trainer("dpo", SOURCES["pairs"](), epochs=1, batch_size=64)
    metrics = job.update(job.lesson(job.gather().experience))
    assert metrics["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["policy/margin"] == 0 and metrics["policy/accuracy"] == 0.5
    assert metrics["policy/winner_drift"] == 0 and metrics["policy/loser_drift"] == 0


@pytest.mark.parametrize(
    ("objective", "source"), [("dpo", "pairs"), ("kto", "labels"), ("reward-weighted", "rollouts"), ("sft", "pairs")]
)
@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_change_nothing_but_memory(objective: str, source: str, size: int) -> None:
    """Weights, and metrics too: KTO's baseline and the weights of samples are taken over the whole update."""
    results = []
    for micro_batch_size in (256, size):
        job = trainer(objective, SOURCES[source](), epochs=2, micro_batch_size=micro_batch_size, draws=2)
        job.train()
        results.append((job.policy.mean, job.update(job.lesson(job.gather().experience))))  # type: ignore[attr-defined]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3, abs=1e-4)


def test_an_sft_term_holds_up_the_winner() -> None:
    """Both sides of a pair may lose likelihood while the margin grows; the term keeps the winners'."""
    free, held = (trainer("dpo", SOURCES["pairs"](), epochs=30, sft_weight=weight) for weight in (0.0, 1.0))
    drifts = []
    for job in (free, held):
        job.train()
        drifts.append(job.update(job.lesson(job.gather().experience))["policy/winner_drift"])
    assert drifts[1] > drifts[0]


def test_the_guard_against_losers_leaves_the_values_and_cuts_the_gradient() -> None:
    """Two samples beyond the same mean: to push the loser away would push the winner, too, so less of it is done."""
    ends = [replace(sample, text=text) for sample, text in zip(walks(3)[::2], ("2.0", "3.0"), strict=True)]
    pairs = [Preference(ends[0].prompt, *ends, 1.0)] * 8
    jobs = [trainer("dpo", RecordedPairs(pairs, range(8), "text"), loser_safety=safety) for safety in (None, 0.9)]
    losses, gradients = [], []
    for job in jobs:
        lesson = job.lesson(job.gather().experience)
        loss, _ = lesson.loss(lesson.inputs(lesson.rows(torch.arange(8), 0)))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), job.policy.mean)[0])  # type: ignore[attr-defined]
    torch.testing.assert_close(losses[0], losses[1])
    # The residuals are -2 and -3 deviations: free, the loser's pull of 3 beats the winner's 2, and the step goes the
    # wrong way; guarded it is scaled to (1 - 0.9) 2 x 2 / (2 x 3) = 1/15, which leaves 2 - 3 / 15 = 1.8.
    own, free, held = PROMPTS.index(ends[0].prompt), gradients[0], gradients[1]
    assert free[own, 0] > 0 > held[own, 0]
    assert float(held[own, 0] / free[own, 0]) == pytest.approx(-1.8, rel=1e-4)


def test_best_of_n_keeps_the_best_of_each_prompt() -> None:
    """Eight of each prompt: the best four, then the best two, and those are among the four."""
    job = trainer("sft", BestOfN(Target(), PROMPTS, [0.5, 0.25]), samples_per_epoch=16, batch_size=16)  # type: ignore[arg-type]
    found = job.gather()
    assert isinstance(found.experience, Chosen)
    samples = found.experience.rollout.samples
    scores = Target()(samples).total
    first, second = (set(kept.tolist()) for kept in found.experience.passes)
    assert len(first) == 8 and len(second) == 4 and second < first
    for prompt in PROMPTS:
        own = [i for i, sample in enumerate(samples) if sample.prompt == prompt]
        best = sorted(own, key=lambda i: -float(scores[i]))
        assert set(best[:4]) == first & set(own) and set(best[:2]) == second & set(own)
    assert found.metrics["experience/kept"] == 0.5
    for objective in ("sft", "ppo-clip", "reinforce"):
        job.objective = job.teacher.objective = ObjectiveConfig(name=objective)  # type: ignore[arg-type]
        lesson = job.lesson(found.experience)
        assert set(lesson.items(0).tolist()) == first and set(lesson.items(1).tolist()) == second
        assert lesson.items(5).tolist() == lesson.items(1).tolist()


def test_the_steps_of_the_best_are_made_likelier() -> None:
    """The gradient is that of the mean log-density of the kept samples' own steps, and of no other's."""
    job = trainer("reinforce", BestOfN(Target(), PROMPTS, [0.25]), samples_per_epoch=16, batch_size=16)  # type: ignore[arg-type]
    chosen = job.gather().experience
    assert isinstance(chosen, Chosen) and len(chosen.passes[0]) == 4
    lesson = job.lesson(chosen)
    rows = lesson.rows(lesson.items(0), 0)
    loss, _ = lesson.loss(lesson.inputs(rows))
    mean: torch.Tensor = job.policy.mean  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad(loss.sum() / rows.count, mean)
    kept = chosen.rollout.take(chosen.passes[0])
    every = torch.arange(kept.log_probs.shape[1]).expand(4, -1)
    (expected,) = torch.autograd.grad(-job.policy.step_log_probs(kept, every).log_probs.mean(), mean)
    torch.testing.assert_close(found, expected)
    assert float(found.abs().max()) > 0


class Steps(Target):
    """The same score for all of prompt a; for prompt b two values; one judgement fails."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        seen: dict[str, int] = {}
        total = []
        for sample in samples:
            place = seen[sample.prompt.text] = seen.get(sample.prompt.text, -1) + 1
            total.append(1.0 if sample.prompt.text == "a" else float("nan") if place == 0 else float(place % 2))
        return Scores(torch.tensor(total))


def test_samples_that_score_the_same_teach_nothing() -> None:
    job = trainer("sft", BestOfN(Steps(), PROMPTS, [0.25]), samples_per_epoch=16, batch_size=16)  # type: ignore[arg-type]
    chosen = job.gather().experience
    assert isinstance(chosen, Chosen)
    kept = [chosen.rollout.samples[i].prompt.text for i in chosen.passes[0].tolist()]
    assert kept == ["b"] * 4  # all four that share the best score; the failed one and the others are left out
    pairs = trainer("dpo", OnlinePairs(Steps(), PROMPTS), samples_per_epoch=16, batch_size=16).gather().experience  # type: ignore[arg-type]
    assert isinstance(pairs, Paired) and [pair.prompt.text for pair in pairs.preferences] == ["b"]


class Lower(Target):
    """The same as a cost: less is better."""

    higher_is_better = False

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(-super().__call__(samples).total)


@pytest.mark.parametrize(("objective", "source"), [("ppo-clip", Rollouts), ("sft", BestOfN), ("dpo", OnlinePairs)])
def test_a_reward_of_which_less_is_better_is_made_less(objective: str, source: type[Rollouts]) -> None:
    policy = WalkPolicy()
    before = quality(policy)
    trainer(objective, source(Lower(), PROMPTS), policy, epochs=20).train()  # type: ignore[arg-type]
    assert quality(policy) > before + 0.4


def test_judges_see_pairs_of_one_prompt() -> None:
    seen: list[tuple[Sample, Sample]] = []

    def judge(pairs: Sequence[tuple[Sample, Sample]], seed: int) -> list[Preference]:
        seen.extend(pairs)
        return compare(pairs, seed)

    policy = WalkPolicy()
    before = quality(policy)
    trainer("dpo", JudgedPairs(judge, PROMPTS, "text"), policy, epochs=20).train()
    assert all(a.prompt == b.prompt and a is not b for a, b in seen) and len(seen) == 20 * 32
    assert quality(policy) > before + 1


def test_a_tie_has_no_winner() -> None:
    a, b = walks(4)[::2]
    tie, won = Preference(a.prompt, a, b, 0.5), Preference(a.prompt, a, b, 0.2)
    assert list(winners([tie, won]).samples) == [b]
    found = judged([tie, won])
    assert list(found.samples) == [a, b] and found.good.tolist() == [False, True]


def test_epochs_go_through_all_recorded_pairs() -> None:
    """10 pairs, 4 an epoch: five epochs see each pair exactly twice, in an order that the seed decides."""
    source = RecordedPairs(recorded(16), range(10), "text")
    job = trainer("dpo", source, samples_per_epoch=4, samples_per_prompt=1, batch_size=4)
    table, seen = source.table, []
    for job.epoch in range(5):
        found = job.gather().experience
        assert isinstance(found, Paired)
        seen += [next(i for i in range(10) if table[i] is pair) for pair in found.preferences]
    assert sorted(seen) == sorted([*range(10), *range(10)]) and seen[:10] != sorted(seen[:10])


def test_each_pair_is_asked_about_at_its_own_draw() -> None:
    """Times lie in [0, 1), one in each of n equal parts; seeds differ; both sides of a pair share both."""
    job = trainer("dpo", SOURCES["pairs"](), draws=4)
    lesson = job.lesson(job.gather().experience)
    rows = lesson.rows(torch.arange(8), 0)
    assert rows.time is not None and len(rows) == 32 == len(set(rows.seeds))
    assert sorted((rows.time * 32).floor().int().tolist()) == list(range(32))
    again, other = lesson.rows(torch.arange(8), 0), lesson.rows(torch.arange(8), 1)
    assert again.time is not None and torch.equal(rows.time, again.time) and rows.seeds != other.seeds


@pytest.mark.parametrize(("objective", "source"), [("dpo", "pairs"), ("elbo-reinforce", "rollouts")])
def test_draws_lie_in_the_range_that_is_asked_for(objective: str, source: str) -> None:
    """The share u of the whole range becomes 0.4 + (0.9 - 0.4) u, at the same noise."""
    rows = []
    for given in ({}, {"noise_range": [0.4, 0.9]}):
        job = trainer(objective, SOURCES[source](), draws=4, **given)
        rows.append(job.lesson(job.gather().experience).rows(torch.arange(8), 0))
    whole, part = rows
    assert whole.time is not None and part.time is not None and whole.seeds == part.seeds
    assert float(whole.time.min()) < 0.3 and float(whole.time.max()) > 0.75
    torch.testing.assert_close(part.time, 0.4 + 0.5 * whole.time)


def test_what_cannot_be_learned_from_is_refused() -> None:
    samples = walks(4)
    with pytest.raises(InputError, match="all 4 labels are good: there is nothing to tell apart"):
        Recorded(samples, [True] * 4, "text")
    with pytest.raises(InputError, match="no preference to train on"):
        RecordedPairs(recorded(4), [], "text")
    with pytest.raises(InputError, match="no sample to train on"):
        Recorded([])
    job = trainer("dpo", SOURCES["rollouts"]())
    with pytest.raises(ConfigError, match="objective dpo cannot learn from source rollouts"):
        job.train()
    one = [sample for sample in samples if sample.prompt == PROMPTS[0]]
    alone = trainer("kto", Recorded(one, [True, False], "text"), samples_per_epoch=8, batch_size=8)
    with pytest.raises(ConfigError, match="needs two prompts in an epoch at least"):
        alone.train()


def test_ties_alone_teach_nothing_and_are_refused() -> None:
    """At the start the policy is the reference, so a tie has gradient 0."""
    a, b = walks(4)[::2]
    with pytest.raises(RefusedError, match="gradient of every trainable parameter is zero"):
        trainer("dpo", RecordedPairs([Preference(a.prompt, a, b, 0.5)] * 4, range(4), "text")).train()


# -- images -----------------------------------------------------------------------------------------------------------


def shades(count: int, seed: int = 0) -> list[Preference]:
    """Pairs of a bright and a dark noisy picture, now one first and now the other; the bright one is preferred."""
    prompts = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]
    noise = torch.rand(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) / 4
    pairs = []
    for i in range(count):
        bright, dark = images.to_pil(noise[i] + torch.tensor([0.6, 0.1])[:, None, None, None])
        shown = (bright, dark) if i % 2 else (dark, bright)
        first, second = (Sample(prompts[i % 3], image=image) for image in shown)
        pairs.append(Preference(prompts[i % 3], first, second, float(i % 2)))
    return pairs


def image_job(make: Callable[..., DiffusionPolicy], run: Run | None, **own: object) -> Trainer:
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=3))
    return Trainer(
        policy,
        RecordedPairs(shades(12), range(12)),
        settings=TrainerConfig(epochs=4, samples_per_epoch=8, batch_size=4, learning_rate=1e-2, micro_batch_size=8),
        objective=ObjectiveConfig(name="dpo", **own),  # type: ignore[arg-type]
        run=run,
    )


@pytest.mark.parametrize("own", [{}, {"loser_safety": 0.5}, {"sft_weight": 1e-4}])
def test_a_diffusion_model_learns_preferences(make: Callable[..., DiffusionPolicy], own: dict[str, float]) -> None:
    """Taught by twelve pairs that bright is better than dark, it finds so in new pairs; the base model stays.

    The network is random, so winner and loser ask almost the same of it at first: the guard against losers then holds
    them back until it denoises, and keeps what it is for: the winners' likelihood does not fall.
    """
    policy = make(full=True, sampler=SamplerConfig(steps=3))
    job = Trainer(
        policy,
        RecordedPairs(shades(12), range(12)),
        settings=TrainerConfig(samples_per_epoch=8, batch_size=4, learning_rate=3e-3),
        objective=ObjectiveConfig(name="dpo", **own),  # type: ignore[arg-type]
    )
    lesson = job.lesson(job.gather().experience)
    with policy.reference():
        before = lesson.fingerprint()
    job.train(12)
    with policy.reference():
        assert torch.equal(before, lesson.fingerprint())
    fresh = Comparisons(policy, job.objective, 0, 0, shades(12, seed=5))
    with torch.no_grad():
        _, metrics = fresh.loss(fresh.inputs(fresh.rows(torch.arange(12).repeat(4), 0)))
    if "loser_safety" in own:
        assert metrics["winner_drift"] > 0.1, metrics
    else:
        assert metrics["accuracy"] > 0.8 and metrics["margin"] > 1, metrics


def test_preference_runs_resume_bit_for_bit(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    straight = image_job(make, None)
    straight.train()
    run = Run.create(tmp_path / "run", parse(CONFIG))
    image_job(make, run).train(2)
    resumed = image_job(make, run)
    assert resumed.resume() and resumed.epoch == 2
    resumed.train()
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in straight.parameters.items())
    said = []
    for job in (image_job(make, None), straight, resumed):  # untrained, trained, and resumed: one reference
        with job.policy.reference():
            said.append(Comparisons(job.policy, job.objective, 0, 0, shades(4)).fingerprint())
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


def test_labels_resume_bit_for_bit_whatever_was_encoded_before(
    make: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    """25 samples and 24 of them an epoch: a resumed run meets new images in other numbers than one that went on."""
    pairs = shades(13)
    samples = [sample for pair in pairs for sample in (pair.first, pair.second)][:25]

    def job(run: Run | None) -> Trainer:
        policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=3))
        return Trainer(
            policy,
            Recorded(samples, [i % 3 == 0 for i in range(25)]),
            settings=TrainerConfig(epochs=4, samples_per_epoch=24, batch_size=6, learning_rate=1e-2),
            objective=ObjectiveConfig(name="kto"),
            run=run,
        )

    straight, run = job(None), Run.create(tmp_path / "run", parse(CONFIG))
    straight.train()
    job(run).train(2)
    resumed = job(run)
    assert resumed.resume()
    resumed.train()
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in straight.parameters.items())


def test_an_epoch_without_experience_is_passed_over(make: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    """Where all samples of every prompt score alike there is no pair: nothing is learned, and nothing breaks."""
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=3))

    class Settled(Brightness):
        calls = 0

        def __call__(self, samples: Sequence[Sample]) -> Scores:
            self.calls += 1
            return super().__call__(samples) if self.calls != 2 else Scores(torch.ones(len(samples)))

    job = Trainer(
        policy,
        OnlinePairs(Settled(), [Prompt("a red ball")]),  # type: ignore[arg-type]
        settings=TrainerConfig(epochs=3, samples_per_epoch=4, samples_per_prompt=4, batch_size=4),
        objective=ObjectiveConfig(name="dpo"),
        run=Run.create(tmp_path / "run", parse(CONFIG)),
    )
    job.train()
    assert job.epoch == 3 and job.updates == 2


def test_an_image_is_encoded_once(make: Callable[..., DiffusionPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    job = image_job(make, None)
    policy = job.policy
    assert isinstance(policy, DiffusionPolicy)
    encoded, original = [], policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda images: encoded.append(len(images)) or original(images))
    job.train(3)
    assert sum(encoded) == 24


@pytest.mark.parametrize("kind", [Comparisons, Verdicts, Examples])
def test_lessons_are_told_apart_by_their_objective(kind: type) -> None:
    objective, source = {Comparisons: ("dpo", "pairs"), Verdicts: ("kto", "pairs"), Examples: ("sft", "pairs")}[kind]
    job = trainer(objective, SOURCES[source]())
    assert isinstance(job.lesson(job.gather().experience), kind)
