"""What the language policy saves: prompts read once, finished texts let go, adapters folded in, padding cut.

None of it may change what is sampled or how likely it is; each is compared with a policy that saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from diffalign.config import AdapterConfig, GenerationConfig
from diffalign.types import Prompt, Rollout, Sample
from pipelines import language, prefixes
from pipelines.language import LanguagePolicy
from tests.test_language_policy import NOTHING, by_hand, every, made, moved
from tests.tiny_language import tiny_language_model

ASKED = [Prompt(text) for text in ("ab", "c", "ddd dddd", "h g") for _ in range(12)]
SEEDS = range(48)


def policy(**options: Any) -> LanguagePolicy:
    """An adapted model that is sure enough of itself to end texts early and late."""
    return moved(made(scale=2.0, max_new_tokens=12, batch_size=64, **options), 0.2)


@contextmanager
def spendthrift(policy: LanguagePolicy) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "KEPT", -1.0)
        patch.setattr(language, "folded", lambda model: nullcontext(False))
        patch.setattr(prefixes, "PIECES", 1)
        patch.setattr(policy, "_shares", False)
        yield


@contextmanager
def tokens_read(policy: LanguagePolicy) -> Iterator[list[int]]:
    """The number of tokens of each pass of the model."""
    seen: list[int] = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda _, given, out: seen.append(given[0].numel())
    )
    yield seen
    hook.remove()


def test_what_is_sampled_is_the_same() -> None:
    frugal, other = policy(), policy()
    with tokens_read(frugal) as few:
        found, kept = frugal._generate(ASKED, list(SEEDS))
    with spendthrift(other), tokens_read(other) as many:
        expected, mask = other._generate(ASKED, list(SEEDS))
    assert torch.equal(found, expected) and torch.equal(kept, mask)
    lengths = mask.sum(1)
    assert lengths.min() < 6 and lengths.max() == 12  # some end early, and leave
    # 4 prompts of 8 letters, padded, in place of 48; then a token of each text at a time.
    assert (few[0], many[0]) == (4 * 8, 48 * 8)
    assert sum(many[1:]) == 48 * 11
    assert int(lengths.sum()) - 48 <= sum(few[1:]) < 0.85 * sum(many[1:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_likelihoods_kl_and_gradients_are_the_same(temperature: float) -> None:
    frugal = policy(temperature=temperature)
    rollout = frugal.rollout(ASKED, SEEDS)

    def asked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        frugal.model.zero_grad()
        answer = frugal.step_log_probs(rollout, every(rollout), kl=True)
        assert answer.kl is not None
        ((answer.log_probs + 0.5 * answer.kl) * rollout.mask).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in frugal.trainable().values() if p.grad is not None])
        return answer.log_probs.detach() * rollout.mask, answer.kl.detach() * rollout.mask, gradient

    with tokens_read(frugal) as few:
        found = asked()
    with spendthrift(frugal), tokens_read(frugal) as many:
        expected = asked()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert sum(few) < 0.6 * sum(many)
    for row in (0, 13, 47):  # and those of each text alone
        own = rollout.mask[row]
        alone = by_hand(frugal, ASKED[row].text, rollout.state["tokens"][row][own].tolist(), temperature)
        assert torch.allclose(found[0][row][own].double(), alone, atol=1e-5)


def test_pairs_read_their_prompt_once() -> None:
    frugal = policy()
    samples = [Sample(ASKED[0], text="abc"), Sample(ASKED[0], text="h"), Sample(ASKED[12], text="dd")]
    with tokens_read(frugal) as seen:
        found = frugal.log_likelihood(samples, NOTHING)
    # Two prompts of 2 letters, padded, but for their last, which is read with the 3 letters before the longest's end.
    assert seen == [2 * 1, 3 * (1 + 3)]
    with spendthrift(frugal):
        assert torch.allclose(found, frugal.log_likelihood(samples, NOTHING), atol=1e-5)


def test_values_are_the_same() -> None:
    model, tokenizer = tiny_language_model(scale=2.0)
    frugal = LanguagePolicy(
        model, tokenizer, full=True, critic=True, generation=GenerationConfig(max_new_tokens=12, batch_size=64)
    )
    assert frugal.value_head is not None
    torch.nn.init.normal_(frugal.value_head.weight, generator=torch.Generator().manual_seed(0))
    rollout = frugal.rollout(ASKED, SEEDS)
    with torch.no_grad():
        found = frugal.step_log_probs(rollout, every(rollout), values=True).values
        with spendthrift(frugal):
            expected = frugal.step_log_probs(rollout, every(rollout), values=True).values
    assert found is not None and expected is not None
    assert torch.allclose(found * rollout.mask, expected * rollout.mask, atol=1e-5)
    assert float((found * rollout.mask).abs().max()) > 0.1


def test_folded_adapters_are_taken_back_to_the_bit() -> None:
    adapted = policy()
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    tokens = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        expected = adapted.model(tokens).logits
        with prefixes.folded(adapted.model) as done, adapted.reference():
            assert done
            assert torch.allclose(adapted.model(tokens).logits, expected, atol=1e-5)
        assert torch.equal(adapted.model(tokens).logits, expected)
    after = adapted.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in adapted.trainable().values())


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_a_head_that_is_the_embedding_too_is_not_folded_into(targets: list[str]) -> None:
    """Folding would change what the model reads, not only what it says."""
    model, tokenizer = tiny_language_model(scale=2.0)
    short, adapter = GenerationConfig(max_new_tokens=4), AdapterConfig(rank=2, targets=targets)
    tied = moved(LanguagePolicy(model, tokenizer, adapter=adapter, generation=short), 0.2)
    assert tied.model.get_input_embeddings().weight is tied.model.base_model.model.lm_head.get_base_layer().weight
    with prefixes.folded(tied.model) as done:
        assert not done
    found, kept = tied._generate(ASKED, list(SEEDS))
    with spendthrift(tied):
        expected, mask = tied._generate(ASKED, list(SEEDS))
    assert torch.equal(found, expected) and torch.equal(kept, mask)


def test_weights_of_few_bits_are_not_folded_into() -> None:
    model, tokenizer = tiny_language_model()
    adapted = LanguagePolicy(model.to(torch.bfloat16), tokenizer, adapter=AdapterConfig(rank=2))
    with prefixes.folded(adapted.model) as done:
        assert not done


def test_the_reference_samples_without_the_adapter() -> None:
    adapted, base = policy(), made(scale=2.0, lora=False, max_new_tokens=12, batch_size=64)
    with adapted.reference():
        found = adapted._generate(ASKED, list(SEEDS))[0]
    assert torch.equal(found, base._generate(ASKED, list(SEEDS))[0])
    assert not torch.equal(found, adapted._generate(ASKED, list(SEEDS))[0])


def test_rows_of_one_length_are_asked_about_together() -> None:
    lengths = torch.tensor([3, 50] * 32)
    groups = prefixes.of_one_length(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(64))
    assert [sorted(set(lengths[group].tolist())) for group in groups] == [[3], [3], [50], [50]]
    assert len(prefixes.of_one_length(torch.full((64,), 7))) == 1
    assert len(prefixes.of_one_length(torch.tensor([3, 50]))) == 1


def sliding() -> LanguagePolicy:
    """A model that remembers the last few tokens only, so that what it keeps of a prompt is not the whole of it."""
    _, tokenizer = tiny_language_model()
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, sliding_window=4, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    return LanguagePolicy(model.eval(), tokenizer, generation=GenerationConfig(max_new_tokens=8, batch_size=64))


def checkpointed() -> LanguagePolicy:
    model, tokenizer = tiny_language_model(scale=2.0)
    generation = GenerationConfig(max_new_tokens=8, batch_size=64)
    found = LanguagePolicy(
        model, tokenizer, adapter=AdapterConfig(rank=2), generation=generation, gradient_checkpointing=True
    )
    return moved(found, 0.2)


@pytest.mark.parametrize("make", [sliding, checkpointed])
def test_models_that_cannot_share_are_asked_row_by_row(make: Callable[[], LanguagePolicy]) -> None:
    policy = make()
    rollout: Rollout = policy.rollout(ASKED, SEEDS)
    with tokens_read(policy) as seen, torch.no_grad():
        policy.step_log_probs(rollout, every(rollout))
    assert min(seen) >= 12 * 8  # never a prompt alone
    policy.model.eval()
    for row in (0, 13, 30, 47):
        own = rollout.mask[row]
        alone = by_hand(policy, ASKED[row].text, rollout.state["tokens"][row][own].tolist(), 1.0)
        assert torch.allclose(rollout.log_probs[row][own].double(), alone, atol=1e-5)
