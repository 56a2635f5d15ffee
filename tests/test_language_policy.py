"""The policy over causal language models: what it samples, and how likely it says that was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffalign import checks
from diffalign.actor_critic import ActorCritic
from diffalign.config import AdapterConfig, CreditConfig, GenerationConfig, ObjectiveConfig, TrainerConfig
from diffalign.errors import ConfigError, InputError
from diffalign.experience import BestOfN, OnlinePairs, Recorded, RecordedPairs, Rollouts, Scored, Source
from diffalign.runs import Run
from diffalign.steps import Steps
from diffalign.trainer import Trainer
from diffalign.types import Draw, Preference, Prompt, Rollout, Sample, Scores
from pipelines.language import LanguagePolicy
from pipelines.loading import load_adapter
from tests.tiny_language import LETTERS, tiny_language_model

PROMPTS = [Prompt("ab"), Prompt("c"), Prompt("ddd dddd"), Prompt("h g")]
NOTHING = Draw(torch.zeros(4), (0, 1, 2, 3))


def made(seed: int = 0, *, lora: bool = True, full: bool = False, scale: float = 1.0, **options: Any) -> LanguagePolicy:
    generation = GenerationConfig(**({"max_new_tokens": 8} | options))
    adapter = AdapterConfig(rank=2) if lora and not full else None
    model, tokenizer = tiny_language_model(seed, scale=scale)
    return LanguagePolicy(model, tokenizer, name="tiny", adapter=adapter, full=full, generation=generation)


def moved(policy: LanguagePolicy, amount: float = 0.3) -> LanguagePolicy:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in policy.trainable().values():
            parameter.add_(amount * torch.randn_like(parameter))
    return policy


def every(rollout: Rollout) -> Tensor:
    return torch.arange(rollout.log_probs.shape[1]).expand(len(rollout), -1)


def by_hand(policy: LanguagePolicy, prompt: str, completion: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities of the completion's tokens: one text alone, without padding, cache or mask."""
    tokens = [*policy.tokenizer(prompt).input_ids, *completion]
    with torch.no_grad():
        logits = policy.model(torch.tensor([tokens])).logits[0].double() / temperature
    start = len(tokens) - len(completion)
    return torch.stack([logits[start + i - 1].log_softmax(-1)[token] for i, token in enumerate(completion)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_text_alone(temperature: float) -> None:
    policy = moved(made(temperature=temperature))
    rollout = policy.rollout(PROMPTS, [1, 2, 3, 4])
    for row, prompt in enumerate(PROMPTS):
        own = rollout.mask[row]
        expected = by_hand(policy, prompt.text, rollout.state["tokens"][row][own].tolist(), temperature)
        assert torch.allclose(rollout.log_probs[row][own].double(), expected, atol=1e-5)
        assert not rollout.log_probs[row][~own].isfinite().logical_not().any()


def test_the_ratio_is_exactly_one_on_policy_and_after_an_update_it_is_not() -> None:
    policy = made()
    rollout = policy.rollout(PROMPTS, [1, 2, 3, 4])
    assert checks.ratio_is_one(policy, rollout, "fp32") == 0
    assert not torch.equal(moved(policy).step_log_probs(rollout, every(rollout)).log_probs, rollout.log_probs)


def test_a_sample_depends_on_its_prompt_and_seed_alone() -> None:
    policy = made()
    together = policy.rollout(PROMPTS, [5, 6, 7, 8])
    for i, prompt in enumerate(PROMPTS):
        alone = policy.rollout([prompt], [5 + i])
        assert alone.samples[0].text == together.samples[i].text
        assert torch.allclose(alone.log_probs[0], together.log_probs[i], atol=1e-5)
    assert len({sample.text for sample in policy.rollout([PROMPTS[0]] * 4, [1, 2, 3, 4]).samples}) > 1


def test_sampling_follows_the_model() -> None:
    """4000 first tokens of a sharp model against its own probabilities: chi-squared with 11 degrees of freedom, whose
    0.999 quantile is 31.3; tokens expected fewer than 5 times are pooled, which only lowers the degrees."""
    policy = made(lora=False, scale=3.0, max_new_tokens=1, batch_size=500)
    prompt = Prompt("abc")
    rollouts = [policy.rollout([prompt] * 500, range(start, start + 500)) for start in range(0, 4000, 500)]
    counts = Counter(int(token) for rollout in rollouts for token in rollout.state["tokens"][:, 0])
    with torch.no_grad():
        tokens = torch.tensor([policy.tokenizer(prompt.text).input_ids])
        expected = 4000 * policy.model(tokens).logits[0, -1].double().softmax(-1)
    rare = expected < 5
    pairs = [(counts[i], float(expected[i])) for i in range(len(expected)) if not rare[i]]
    pooled = (sum(counts[i] for i in range(len(expected)) if rare[i]), float(expected[rare].sum()))
    assert expected.max() < 0.9 * 4000
    assert sum((seen - wanted) ** 2 / wanted for seen, wanted in [*pairs, pooled] if wanted > 0) < 31.3


def test_texts_end_where_they_say_so() -> None:
    """A sample that ends has its end among the steps; one that was cut off does not, and says so."""
    policy = made(max_new_tokens=4, batch_size=64)
    rollout = policy.rollout([Prompt("ab")] * 64, range(64))
    finished = [bool(sample.evidence["finished"]) for sample in rollout.samples]
    assert 0 < sum(finished) < 64
    for row, (sample, ended) in enumerate(zip(rollout.samples, finished, strict=True)):
        own = rollout.state["tokens"][row][rollout.mask[row]].tolist()
        assert (own[-1] == policy.end) == ended and own.count(policy.end) == int(ended)
        assert len(own) == 4 or ended
        assert sample.evidence["tokens"] == len(own)


def test_log_likelihood_is_the_sum_over_the_tokens_and_the_end() -> None:
    policy = moved(made(temperature=0.5))
    texts = ["abc", "h", "", "dd ee"]
    samples = [Sample(prompt, text=text) for prompt, text in zip(PROMPTS, texts, strict=True)]
    found = policy.log_likelihood(samples, NOTHING).detach()
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        tokens = [*(3 + LETTERS.index(letter) for letter in text), 2]
        assert math.isclose(float(found[row]), float(by_hand(policy, prompt.text, tokens, 1.0).sum()), abs_tol=1e-4)
    cut = replace(samples[0], evidence={"finished": False})
    assert float(policy.log_likelihood([cut], NOTHING).detach()) > float(found[0])


def test_a_probability_sums_to_one_over_all_texts_of_two_tokens() -> None:
    """P(end) + sum of P(x, end) + sum of P(x, y without an end) over everything that can follow is 1."""
    policy = made(lora=False)
    prompt = Prompt("a")
    total = 0.0
    vocabulary = [i for i in range(len(policy.tokenizer)) if i != policy.end]
    total += float(by_hand(policy, "a", [policy.end], 1.0).exp())
    for first in vocabulary:
        total += float(by_hand(policy, "a", [first, policy.end], 1.0).sum().exp())
        total += sum(float(by_hand(policy, "a", [first, second], 1.0).sum().exp()) for second in vocabulary)
    assert math.isclose(total, 1, abs_tol=1e-6)
    letters = [Sample(prompt, text=text) for text in ("", *LETTERS)]
    assert float(policy.log_likelihood(letters, NOTHING).exp().sum()) < 1


def test_the_kl_is_exact_and_zero_at_the_start() -> None:
    policy = made()
    rollout = policy.rollout(PROMPTS, [1, 2, 3, 4])
    answer = policy.step_log_probs(rollout, every(rollout), kl=True)
    assert answer.kl is not None and float(answer.kl[rollout.mask].detach().abs().max()) == 0
    moved(policy)
    kl = policy.step_log_probs(rollout, every(rollout), kl=True).kl
    assert kl is not None
    prompt = policy.tokenizer(PROMPTS[0].text).input_ids
    with torch.no_grad():
        own = policy.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        with policy.reference():
            reference = policy.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    assert math.isclose(float(kl[0, 0].detach()), float((own.exp() * (own - reference)).sum()), rel_tol=1e-4)
    assert bool((kl[rollout.mask] > 0).all())


def test_an_adapter_and_a_full_model_load_by_their_libraries(tmp_path: Path) -> None:
    samples = [Sample(prompt, text="abba") for prompt in PROMPTS]
    adapted = moved(made())
    folder = adapted.save(tmp_path / "lora")
    assert folder.name == "adapter"
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    base, _ = tiny_language_model()
    again = made(lora=False)
    again.model = PeftModel.from_pretrained(base, folder).eval()
    expected = adapted.log_likelihood(samples, NOTHING)
    assert torch.allclose(again.log_likelihood(samples, NOTHING), expected, atol=1e-5)
    ours = made()
    load_adapter(ours, folder)
    assert torch.equal(ours.log_likelihood(samples, NOTHING), expected)

    full = moved(made(full=True), 0.01)
    place = full.save(tmp_path / "full")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    loaded = LanguagePolicy(model, tokenizer, generation=GenerationConfig(max_new_tokens=8))
    assert torch.allclose(loaded.log_likelihood(samples, NOTHING), full.log_likelihood(samples, NOTHING), atol=1e-5)
    with full.reference():
        before = full.log_likelihood(samples, NOTHING)
    assert torch.equal(before, made(lora=False).log_likelihood(samples, NOTHING))


def test_a_chat_template_is_respected() -> None:
    model, tokenizer = tiny_language_model()
    tokenizer.chat_template = (
        "{% for m in messages %}a{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    policy = LanguagePolicy(model, tokenizer, generation=GenerationConfig(max_new_tokens=4))
    assert policy._prompt(Prompt("bc")) == [3 + LETTERS.index(letter) for letter in "abch"]
    plain = LanguagePolicy(model, tokenizer, generation=GenerationConfig(max_new_tokens=4, chat="never"))
    assert plain._prompt(Prompt("bc")) == [3 + LETTERS.index(letter) for letter in "bc"]


def test_a_long_prompt_beside_a_long_completion_is_no_reason_to_refuse() -> None:
    """Each fits into the context of 64; only the padding of both together would not."""
    samples = [Sample(Prompt("ab" * 25), text="c"), Sample(Prompt("d"), text="ef" * 25)]
    policy = made()
    alone = [policy.log_likelihood([sample], NOTHING) for sample in samples]
    torch.testing.assert_close(policy.log_likelihood(samples, NOTHING), torch.cat(alone), atol=1e-4, rtol=1e-5)


def test_the_letters_of_a_special_token_are_letters() -> None:
    model, tokenizer = tiny_language_model()
    policy = LanguagePolicy(model, tokenizer, generation=GenerationConfig(max_new_tokens=4))
    found = policy._tokens(Sample(Prompt("a"), text="b</s>c"))
    assert found.count(policy.end) == 1 and found[-1] == policy.end


def test_models_and_texts_that_cannot_be_used_are_refused() -> None:
    model, tokenizer = tiny_language_model()
    with pytest.raises(ConfigError, match="no chat template"):
        LanguagePolicy(model, tokenizer, generation=GenerationConfig(chat="always"))
    with pytest.raises(ConfigError, match=r"no known attention|not found"):
        LanguagePolicy(model, tokenizer, adapter=AdapterConfig(targets=["nothing_like_this"]))
    policy = made(max_new_tokens=60)
    with pytest.raises(InputError, match=r"has 8 tokens.*more than the 64"):
        policy.rollout([Prompt("abcdefgh")], [0])
    with pytest.raises(InputError, match="is empty"):
        made().log_likelihood([Sample(Prompt("a"), text="", evidence={"finished": False})], NOTHING)
    with pytest.raises(InputError, match="no text"):
        made().log_likelihood([Sample(Prompt("a"))], NOTHING)
    with pytest.raises(InputError, match=r"does not fit|can read"):
        made().log_likelihood([Sample(Prompt("a"), text="a" * 64)], NOTHING)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        LanguagePolicy(model, tokenizer)


class Letters:
    """Share of the letters that are a."""

    name, modality, unit, range, higher_is_better = "letters", "text", "fraction", (0.0, 1.0), True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.tensor([(s.text or " ").count("a") / max(1, len(s.text or " ")) for s in samples]))


def pairs() -> list[Preference]:
    found = []
    for i in range(16):
        prompt = PROMPTS[i % 4]
        good, bad = Sample(prompt, text="a" * (1 + i % 5)), Sample(prompt, text="bcdefgh"[i % 7] * (1 + i % 5))
        found.append(Preference(prompt, good, bad, 1.0) if i % 2 else Preference(prompt, bad, good, 0.0))
    return found


def labels() -> Recorded:
    samples = [sample for pair in pairs() for sample in (pair.first, pair.second)]
    return Recorded(samples, [set(sample.text or "") == {"a"} for sample in samples], modality="text")


SOURCES: dict[str, Source] = {
    "rollouts": Rollouts(Letters(), PROMPTS),
    "best-of-n": BestOfN(Letters(), PROMPTS, keep=[0.5]),
    "online-pairs": OnlinePairs(Letters(), PROMPTS),
    "pairs": RecordedPairs(pairs(), range(16), modality="text"),
    "labels": labels(),
    "demonstrations": Recorded([Sample(p, text="aaa") for p in PROMPTS], modality="text"),
}


@pytest.mark.parametrize(
    ("objective", "source", "rule"),
    [
        ("ppo-clip", "rollouts", "group"),
        ("reinforce", "rollouts", "leave-one-out"),
        ("reinforce", "rollouts", "batch"),
        ("reward-weighted", "rollouts", "group"),
        ("sft", "best-of-n", "group"),
        ("dpo", "online-pairs", "group"),
        ("dpo", "pairs", "group"),
        ("ipo", "pairs", "group"),
        ("hinge", "pairs", "group"),
        ("robust-dpo", "pairs", "group"),
        ("kto", "labels", "group"),
        ("sft", "demonstrations", "group"),
    ],
)
def test_every_algorithm_learns_to_write_the_letter_a(objective: str, source: str, rule: str) -> None:
    """From one letter in nine to most of them, in a few updates. IPO's aim is a margin of 1 / (2 beta), no more."""
    policy = made(full=True, max_new_tokens=5, batch_size=64)
    trainer = Trainer(
        policy,
        SOURCES[source],
        settings=TrainerConfig(
            epochs=8, samples_per_epoch=64, samples_per_prompt=8, batch_size=32, learning_rate=1e-2, weight_decay=0.0
        ),
        objective=ObjectiveConfig(name=objective, reduction="sum", beta=0.02 if objective == "ipo" else None),  # type: ignore[arg-type]
        credit=CreditConfig(rule=rule),  # type: ignore[arg-type]
    )
    asked, seeds = PROMPTS * 16, range(1000, 1064)
    before = float(Letters()(policy.rollout(asked, seeds).samples).total.mean())
    trainer.train()
    after = float(Letters()(policy.rollout(asked, seeds).samples).total.mean())
    assert before < 0.3
    assert after > 0.6, f"{before:.2f} -> {after:.2f}"


def test_aggregations_by_hand() -> None:
    """Two samples of 3 and 1 steps with advantages 1 and -2, on policy, where a step's loss is -A.

    step-mean (3 * -1 + 1 * 2) / 4; sample-mean (-1 + 2) / 2; constant with at most 5 steps (3 * -1 + 2) / 10.
    """
    policy = made(max_new_tokens=5)
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    tokens = torch.tensor([[4, 5, 2, 2, 2], [2, 2, 2, 2, 2]])
    samples = (Sample(PROMPTS[0], text="bc"), Sample(PROMPTS[1], text=""))
    blank = Rollout(samples, torch.zeros(2, 5), mask, {"tokens": tokens})
    with torch.no_grad():
        rollout = replace(blank, log_probs=policy.step_log_probs(blank, every(blank)).log_probs)
    for aggregation, expected in {"step-mean": -1 / 4, "sample-mean": 1 / 2, "constant": -1 / 10}.items():
        objective = ObjectiveConfig(name="ppo-clip", reduction="sum", aggregation=aggregation)  # type: ignore[arg-type]
        lesson = Steps(policy, objective, 0, 0, rollout, torch.tensor([1.0, -2.0]))
        rows = lesson.rows(torch.arange(2), 0)
        loss, _ = lesson.loss(lesson.inputs(rows))
        assert math.isclose(float(loss.sum().detach()) / rows.count, expected, abs_tol=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_a_kl_in_the_loss_holds_the_policy_back(estimator: str) -> None:
    """With a large weight the policy stays near its reference while one without moves on."""
    distances = {}
    for weight in (0.0, 10.0):
        policy = made(full=True, max_new_tokens=5, batch_size=64)
        objective = ObjectiveConfig(
            name="ppo-clip",
            reduction="sum",
            kl_coefficient=weight,
            kl_estimator=estimator,  # type: ignore[arg-type]
        )
        settings = TrainerConfig(
            epochs=4, samples_per_epoch=64, samples_per_prompt=8, batch_size=32, inner_epochs=2, learning_rate=5e-3
        )
        Trainer(
            policy, SOURCES["rollouts"], settings=settings, objective=objective, credit=CreditConfig(rule="group")
        ).train()
        rollout = policy.rollout(PROMPTS * 8, range(32))
        with torch.no_grad():
            kl = policy.step_log_probs(rollout, every(rollout), kl=True).kl
        assert kl is not None
        distances[weight] = float(kl[rollout.mask].mean())
    assert distances[10.0] < 0.3 * distances[0.0]


def test_micro_batches_do_not_change_an_update() -> None:
    """One sample at a time or all at once: the same weights to float tolerance."""
    weights = []
    for size in (1, 64):
        policy = made(full=True)
        settings = TrainerConfig(
            epochs=2,
            samples_per_epoch=16,
            samples_per_prompt=4,
            batch_size=16,
            micro_batch_size=size,
            learning_rate=1e-3,
        )
        objective = ObjectiveConfig(name="ppo-clip", reduction="sum", kl_coefficient=0.1, aggregation="sample-mean")
        Trainer(policy, SOURCES["rollouts"], settings=settings, objective=objective).train()
        weights.append(torch.cat([p.detach().flatten() for p in policy.trainable().values()]))
    # Adam divides a gradient by its own size: rounding of a tiny one shows.
    assert float((weights[0] - weights[1]).abs().mean()) < 1e-6


def critic(**changes: Any) -> CreditConfig:
    return CreditConfig(rule="gae", critic=changes)  # type: ignore[arg-type]


def with_critic(run: Run | None = None, epochs: int = 8, **changes: Any) -> Trainer:
    model, tokenizer = tiny_language_model()
    generation = GenerationConfig(max_new_tokens=5, batch_size=64)
    policy = LanguagePolicy(model, tokenizer, name="tiny", full=True, critic=True, generation=generation)
    settings = TrainerConfig(
        epochs=epochs, samples_per_epoch=64, batch_size=32, inner_epochs=2, learning_rate=1e-2, weight_decay=0.0
    )
    objective = ObjectiveConfig(name="ppo-clip", reduction="sum")
    return Trainer(
        policy, SOURCES["rollouts"], settings=settings, objective=objective, credit=critic(**changes), run=run
    )


def test_ppo_with_a_critic_learns_and_its_critic_explains_the_returns() -> None:
    seen: list[Mapping[str, float]] = []
    trainer = with_critic(kl_coefficient=0.01)
    trainer.on_epoch = lambda _, epoch, metrics: seen.append(metrics)
    policy = trainer.policy
    asked, seeds = PROMPTS * 16, range(1000, 1064)
    trainer.train()
    after = float(Letters()(policy.rollout(asked, seeds).samples).total.mean())
    assert after > 0.6
    assert seen[0]["critic/kl"] == 0 and seen[-1]["critic/kl"] > 0
    assert seen[-1]["policy/value_error"] < 0.5 * seen[0]["policy/value_error"]


def test_a_kl_weight_holds_the_policy_back_and_can_be_steered() -> None:
    """The same run with a weight of 5 drifts less; with a target below what it drifts, the weight rises."""
    drifts = {}
    for weight in (0.01, 5.0):
        trainer = with_critic(kl_coefficient=weight, epochs=5)
        trainer.train()
        _, metrics = trainer.lesson(gathered(trainer)), trainer.notes
        drifts[weight] = metrics["critic/kl"]
    assert drifts[5.0] < 0.3 * drifts[0.01]
    steered = with_critic(kl_coefficient=0.01, target_kl=1e-3, horizon=64, epochs=3)
    steered.train()
    # No drift in the first epoch (times 0.8), then far above the target (times 1.2, twice).
    assert steered.notes["critic/kl_weight"] == pytest.approx(0.01 * 0.8 * 1.2)
    assert steered.state_dict()["credit"]["weight"] == pytest.approx(0.01 * 0.8 * 1.2 * 1.2)


def gathered(trainer: Trainer) -> Scored:
    found = trainer.gather().experience
    assert isinstance(found, Scored)
    return found


def test_rewards_of_tokens_are_the_score_at_the_end_and_the_drift() -> None:
    """With lambda and gamma 1 and a critic that expects nothing, a step's return is the sum of what follows: of the
    drift of each later step, times minus the weight, and of the score less the penalty for having no end."""
    trainer = with_critic(kl_coefficient=0.5, trace=1.0, whiten_advantages=False, missing_end_penalty=0.25)
    moved(trainer.policy, 0.05)  # type: ignore[arg-type]
    policy = trainer.policy
    assert isinstance(policy, LanguagePolicy) and policy.value_head is not None
    with torch.no_grad():
        policy.value_head.weight.zero_()
        policy.value_head.bias.zero_()
    scored = gathered(trainer)
    lesson = trainer.lesson(scored)
    assert isinstance(lesson, ActorCritic)
    rollout = scored.rollout
    with torch.no_grad(), policy.reference():
        drift = rollout.log_probs - policy.step_log_probs(rollout, every(rollout)).log_probs
    for row in range(8):
        length = int(rollout.mask[row].sum())
        score = float(scored.scores.total[row]) - 0.25 * (not rollout.samples[row].evidence["finished"])
        for step in range(length):
            expected = score - 0.5 * float(drift[row, step:length].sum())
            assert float(lesson.returns[row, step]) == pytest.approx(expected, abs=1e-4)
        assert not lesson.returns[row, length:].any()


def test_a_critic_resumes_bit_for_bit(tmp_path: Path) -> None:
    through = with_critic(epochs=4, target_kl=0.1, horizon=64)
    through.train()
    (tmp_path / "run").mkdir()
    first = with_critic(Run(tmp_path / "run"), epochs=4, target_kl=0.1, horizon=64)
    first.train(2)
    second = with_critic(Run(tmp_path / "run"), epochs=4, target_kl=0.1, horizon=64)
    assert second.resume() and second.epoch == 2
    second.train()
    for name, parameter in through.policy.trainable().items():
        assert torch.equal(parameter, second.policy.trainable()[name]), name
    assert through.state_dict()["credit"] == second.state_dict()["credit"]


def test_only_a_model_with_a_critic_can_be_credited_by_one() -> None:
    with pytest.raises(ConfigError, match=r"gae needs values, which tiny does not offer"):
        Trainer(
            made(), SOURCES["rollouts"], objective=ObjectiveConfig(name="ppo-clip", reduction="sum"), credit=critic()
        )
    with pytest.raises(ConfigError, match=r"reduction is mean, but tiny answers with a sum"):
        Trainer(made(), SOURCES["rollouts"], objective=ObjectiveConfig(name="ppo-clip", reduction="mean"))


def with_demonstrations(weight: float, samples_per_epoch: int = 64, micro_batch_size: int = 64) -> Trainer:
    objective = ObjectiveConfig(name="ppo-clip", reduction="sum", ptx_coefficient=weight)
    settings = TrainerConfig(
        epochs=6, samples_per_epoch=samples_per_epoch, samples_per_prompt=8, batch_size=32, learning_rate=1e-2,
        micro_batch_size=micro_batch_size, weight_decay=0.0,
    )  # fmt: skip
    shown = Recorded([Sample(prompt, text="hhh") for prompt in PROMPTS], modality="text")
    return Trainer(
        made(full=True, max_new_tokens=5, batch_size=64), SOURCES["rollouts"], beside=shown if weight else None,
        settings=settings, objective=objective, credit=CreditConfig(rule="group"),
    )  # fmt: skip


def test_a_supervised_term_keeps_demonstrations_likely_beside_a_policy_gradient() -> None:
    """The reward is for the letter a; what is shown is hhh, which training for a alone makes less likely."""
    shown = [Sample(prompt, text="hhh") for prompt in PROMPTS]
    likely = {}
    for weight in (0.0, 1.0):
        trainer = with_demonstrations(weight)
        before = float(trainer.policy.log_likelihood(shown, NOTHING).detach().mean())  # type: ignore[attr-defined]
        trainer.train()
        likely[weight] = float(trainer.policy.log_likelihood(shown, NOTHING).detach().mean()) - before  # type: ignore[attr-defined]
    assert likely[0.0] < 0 < likely[1.0]


def test_the_supervised_gradient_is_the_weighted_mean_whatever_the_micro_batch() -> None:
    """Its gradient equals that of weight times the mean of -log p over the batch, computed in one piece."""
    for size in (1, 64):
        trainer = with_demonstrations(0.5, samples_per_epoch=32, micro_batch_size=size)
        lesson = trainer._shown()
        assert lesson is not None
        trainer._supervise(lesson)
        found = {name: p.grad.clone() for name, p in trainer.policy.trainable().items() if p.grad is not None}
        for parameter in trainer.policy.trainable().values():
            parameter.grad = None
        samples = [lesson.samples[i] for i in range(len(lesson))]
        likelihood = trainer.policy.log_likelihood(samples, NOTHING)  # type: ignore[attr-defined]
        (0.5 * -likelihood.mean()).backward()
        for name, parameter in trainer.policy.trainable().items():
            assert parameter.grad is not None
            assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


def test_demonstrations_and_their_weight_go_together() -> None:
    with pytest.raises(ConfigError, match="ptx_coefficient needs demonstrations"):
        Trainer(made(), SOURCES["rollouts"], beside=SOURCES["demonstrations"],
                objective=ObjectiveConfig(name="ppo-clip", reduction="sum"))  # fmt: skip
