"""A policy over a causal language model: samples texts token by token, and says how likely each token was.

Shape legend: ``B`` samples, ``S`` the most tokens a sample can have, ``T <= S`` the most that these samples have, ``K``
steps asked about, ``V`` vocabulary. A step is a token of the completion; its end (EOS) is one, padding is not.

Prompts are padded on the left and completions on the right, so that every completion begins at the same place; the
padding is masked and positions are counted without it. Samples of one prompt share one reading of it, where the model
keeps plain keys and values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import pad

from diffalign.config import AdapterConfig, GenerationConfig
from diffalign.errors import ConfigError, InputError
from diffalign.runs import new_folder
from diffalign.types import Capability, Draw, Modality, Prompt, Rollout, Sample, StepLikelihood
from pipelines.diffusion import DTYPES
from pipelines.prefixes import Beginnings, can_be_shared, folded, of_one_length, picked
from pipelines.tokens import at, chosen, cooled, inverted, kl_of, padded

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "out_proj")
"""Names of attention layers in the families of transformers."""
KEPT = 0.875
"""Once no more than this share of a batch of samples is unfinished, the others leave it."""


class LanguagePolicy:
    """A causal language model that can be aligned."""

    modality: Modality = "text"
    capabilities: frozenset[Capability] = frozenset({"step_log_probs", "step_kl", "log_likelihood", "reference"})
    steps_at_once: int | None = None
    reduction: Literal["mean", "sum"] = "sum"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "language model",
        adapter: AdapterConfig | None = None,
        full: bool = False,
        critic: bool = False,
        generation: GenerationConfig | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        """Takes a transformers causal LM and its tokenizer. Trains a LoRA (``adapter``), every weight (``full``), or
        nothing (sampling only); ``critic`` adds a value head, which is trained beside it and is no part of what is
        saved. Raises ConfigError for a model that texts cannot be sampled from.
        """
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.generation = generation or GenerationConfig()
        self.device = torch.device(device)
        self.batch_size = self.generation.batch_size
        self.precision = DTYPES[precision]
        self.adapter = adapter
        self.gradient_checkpointing = gradient_checkpointing
        self._frozen: nn.Module | None = None
        self._bare = False  # inside reference(), with adapters off
        self._shares = True  # until the model turns out to keep something else than keys and values
        self.value_head: nn.Linear | None = None
        self.end = self._end_token()
        self.chat = self._uses_chat()
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
        model.requires_grad_(False).eval().to(self.device)
        if adapter:
            self._add_adapter(adapter, seed)
        elif full:
            self._frozen = copy.deepcopy(model)
            model.requires_grad_(True)
        if critic:
            self._add_value_head()
        if gradient_checkpointing:
            self._checkpoint_activations()

    def _add_value_head(self) -> None:
        """A linear head on the last hidden state. It starts at 0: before it has learned, it expects nothing."""
        width = self.model.get_input_embeddings().embedding_dim
        hidden = getattr(self.model.config, "hidden_size", width)
        self.value_head = nn.utils.skip_init(nn.Linear, hidden, 1).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.capabilities = self.capabilities | {"values"}

    def _end_token(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                f"{self.name} has no end-of-text token (its tokenizer's eos_token is not set), so its texts never end;"
                " set it in the model's tokenizer_config.json"
            )
        if len(self.tokenizer) > self.model.get_input_embeddings().num_embeddings:
            raise ConfigError(
                f"the tokenizer of {self.name} has {len(self.tokenizer)} tokens, and the model knows"
                f" {self.model.get_input_embeddings().num_embeddings}: they do not belong together"
            )
        return int(end)

    def _uses_chat(self) -> bool:
        has = bool(getattr(self.tokenizer, "chat_template", None))
        if self.generation.chat == "always" and not has:
            raise ConfigError(f"generation.chat is always, but {self.name} has no chat template")
        return has and self.generation.chat != "never"

    def _add_adapter(self, adapter: AdapterConfig, seed: int) -> None:
        targets: str | list[str]
        if adapter.targets == "all":
            targets = "all-linear"
        elif adapter.targets == "attention":
            leaves = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
            targets = [name for name in ATTENTION if name in leaves]
            if not targets:
                raise ConfigError(
                    f"adapter.targets attention: no known attention layer in {self.name}; name the layers, or take all"
                )
        else:
            targets = list(adapter.targets)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian",
            target_modules=targets,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that PEFT uses
                    self.model = get_peft_model(self.model, config).eval()
            except ValueError as error:
                raise ConfigError(f"adapter.targets {adapter.targets}: {error}") from None
        # What the adapter belongs to goes by its name, not by where it lies on this machine.
        self.model.peft_config["default"].base_model_name_or_path = self.name
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()

    def _checkpoint_activations(self) -> None:
        if any(isinstance(module, nn.Dropout) and module.p for module in self.model.modules()):
            raise ConfigError(
                f"trainer.gradient_checkpointing works in training mode, where the dropout of {self.name} would make"
                " every replay another; turn it off"
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    # -- prompts ----------------------------------------------------------------------------------------------------

    def _prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt; a completion must fit behind it into the model's context."""
        if self.chat:
            turns = [{"role": "user", "content": prompt.text}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            tokens = self.tokenizer(prompt.text).input_ids
            if tokens and tokens[-1] == self.end and self.end != self.tokenizer.bos_token_id:
                tokens = tokens[:-1]  # some tokenizers close every text
        tokens = list(tokens) or [self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]
        if len(tokens) + self.generation.max_new_tokens > self.context:
            raise InputError(
                f"prompt {prompt.key[:60]!r} has {len(tokens)} tokens; with generation.max_new_tokens"
                f" {self.generation.max_new_tokens} that is more than the {self.context} that {self.name} can read"
            )
        return tokens

    def _beginnings(self, prompts: Sequence[Prompt]) -> Beginnings:
        known = {prompt.text: prompt for prompt in prompts}
        tokens, real = padded([self._prompt(prompt) for prompt in known.values()], self.end, left=True)
        numbers = {text: i for i, text in enumerate(known)}
        own = torch.tensor([numbers[prompt.text] for prompt in prompts])
        return Beginnings(tokens.to(self.device), real.to(self.device), own.to(self.device))

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        """See Policy. The log-probabilities are those of a replay, so that a replay finds exactly them: those of
        sampling, which adds token after token to what it knows, differ in their last bits.
        """
        tokens, mask = self._generate(prompts, seeds)
        samples = tuple(
            self._sample(prompt, own[kept].tolist(), seed)
            for prompt, own, kept, seed in zip(prompts, tokens.cpu(), mask.cpu(), seeds, strict=True)
        )
        rollout = Rollout(samples, torch.zeros(mask.shape), mask, {"tokens": tokens})
        every = torch.arange(mask.shape[1]).expand(len(prompts), -1)
        return replace(rollout, log_probs=self.step_log_probs(rollout, every).log_probs)

    def _sample(self, prompt: Prompt, tokens: list[int], seed: int) -> Sample:
        finished = tokens[-1:] == [self.end]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Sample(prompt, text=text, seed=seed, evidence={"finished": finished, "tokens": len(tokens)})

    def _generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens int64 and which of them belong to the completion, bool, both ``(B, S)``.

        Token ``s`` of a sample inverts the distribution at a number that belongs to the sample's seed and ``s`` alone.
        """
        most, count = self.generation.max_new_tokens, len(prompts)
        chances = [torch.rand(most, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        chance = torch.stack(chances).to(self.device)
        found = torch.full((count, most), self.end, device=self.device)
        mask = torch.zeros((count, most), dtype=torch.bool, device=self.device)
        with self._remembering(), self._folded():
            logits, real, cache = self._first(self._beginnings(prompts))
            rows = torch.arange(count, device=self.device)  # the samples that the batch still has
            running = torch.ones(count, dtype=torch.bool, device=self.device)
            for step in range(most):
                token = inverted(cooled(logits, self.generation.temperature), chance[rows, step])
                token = torch.where(running, token, self.end)
                found[rows, step], mask[rows, step] = token, running
                grown = torch.cat([real, running[:, None]], 1)
                running = running & (token != self.end)
                left = int(running.sum())
                if left == 0 or step == most - 1:
                    break
                if self._shares and left <= KEPT * len(rows):
                    still = running.nonzero()[:, 0]
                    cache.batch_select_indices(still)
                    rows, token, grown, running = rows[still], token[still], grown[still], running[still]
                real = grown
                logits, cache = self._next(token[:, None], real, cache)
        return found, mask

    def _first(self, asked: Beginnings) -> tuple[Tensor, Tensor, Any]:
        """Logits ``(B, V)`` after the prompts, which tokens are real, and the model's memory, all in ``B`` rows."""
        if self._shares and asked.repeats():
            logits, cache = self._next(asked.tokens, asked.real, None)
            if can_be_shared(cache):
                return logits[asked.own], asked.real[asked.own], picked(cache, asked.own)
        logits, cache = self._next(asked.tokens[asked.own], asked.real[asked.own], None)
        self._shares = self._shares and can_be_shared(cache)
        return logits, asked.real[asked.own], cache

    def _next(self, tokens: Tensor, real: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last token, and the memory; ``real`` covers what the memory has and ``tokens``."""
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self._precise():
            answer = self.model(
                input_ids=tokens, attention_mask=real.long(), position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        return answer.logits[:, -1], answer.past_key_values

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Where activations are recomputed in training, nothing is remembered, so texts are sampled in evaluation."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """Samples come from the adapted model with its adapters in the weights; likelihoods never do."""
        if not self.adapter or self._bare:
            yield
            return
        with folded(self.model) as done, self._adapters_off() if done else nullcontext():
            yield

    @contextmanager
    def _precise(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            yield

    # -- likelihood -------------------------------------------------------------------------------------------------

    def step_log_probs(
        self, rollout: Rollout, steps: Tensor, *, kl: bool = False, values: bool = False
    ) -> StepLikelihood:
        """See CriticPolicy. One pass answers for all tokens. The KL is exact: over the whole vocabulary."""
        tokens, mask = rollout.state["tokens"].to(self.device), rollout.mask.to(self.device)
        prompts, heat = [sample.prompt for sample in rollout.samples], self.generation.temperature
        answers = self._answers(prompts, tokens, mask, temperature=heat, kl=kl, values=values)
        steps = steps.to(self.device)
        found, drift, worth = (None if each is None else at(each, steps) for each in answers)
        assert found is not None
        return StepLikelihood(found, drift, worth)

    def _answers(
        self,
        prompts: Sequence[Prompt],
        tokens: Tensor,
        mask: Tensor,
        *,
        temperature: float,
        kl: bool = False,
        values: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of each token its log-probability, the KL to the reference there, and what the critic expected before it:
        float32 ``(B, T)`` each, anything where the mask is off.
        """
        asked = self._beginnings(prompts)
        memory, frozen = self._memory(asked), None
        if kl:
            with torch.no_grad(), self.reference():
                frozen = self._memory(asked)
        lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=self.device)).amax(1).clamp(min=1)
        groups, longest, parts = of_one_length(lengths), int(lengths.max()), list[list[Tensor]]()
        for rows in groups:
            width = int(lengths[rows].max())
            some, here = tokens[rows, :width], mask[rows, :width]
            logits, expected = self._asked(asked, rows, some, here, memory, values=values)
            logits = cooled(logits, temperature)
            part = [chosen(logits, some)]
            if kl:
                with torch.no_grad(), self.reference():
                    reference, _ = self._asked(asked, rows, some, here, frozen)
                part.append(kl_of(logits.log_softmax(-1), cooled(reference, temperature).log_softmax(-1)))
            if expected is not None:
                part.append(expected)
            parts.append([pad(each, (0, longest - width)) for each in part])
        back = torch.cat(groups).argsort()
        joined = [torch.cat(each)[back] for each in zip(*parts, strict=True)]
        return joined[0], joined[1] if kl else None, joined[-1] if values else None

    def log_likelihood(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """See Policy: the sum of the log-probabilities of a text's tokens and of its end, at temperature 1.

        It is exact, so the draw plays no part. A text that was cut off while it was sampled has no end.
        """
        tokens, mask = padded([self._completion(sample) for sample in samples], self.end)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        found, _, _ = self._answers([sample.prompt for sample in samples], tokens, mask, temperature=1)
        return torch.where(mask, found, 0.0).sum(1)

    def length(self, sample: Sample) -> int:
        """Tokens of a sample's text, its end among them."""
        return len(self._tokens(sample))

    def _tokens(self, sample: Sample) -> list[int]:
        if sample.text is None:
            raise InputError("a sample has no text, so a language model cannot say how likely it is")
        # A text in which "</s>" is written has these letters: its end is not there.
        tokens = list(self.tokenizer(sample.text, add_special_tokens=False, split_special_tokens=True).input_ids)
        return [*tokens, self.end] if sample.evidence.get("finished", True) else tokens

    def _completion(self, sample: Sample) -> list[int]:
        tokens = self._tokens(sample)
        if not tokens:
            raise InputError(f"the completion of prompt {sample.prompt.key[:60]!r} is empty")
        if len(tokens) > self.context - 1:
            raise InputError(
                f"a completion of {len(tokens)} tokens does not fit into the {self.context} that {self.name} can read"
            )
        return tokens

    def _memory(self, asked: Beginnings) -> Any:
        """What the model keeps of the prompts, all but their last token; None where every row reads its own in full."""
        checkpointing = self.model.training  # recomputes what it did not keep
        if checkpointing or not (self._shares and asked.repeats() and asked.tokens.shape[1] > 1):
            return None
        _, memory = self._next(asked.tokens[:, :-1], asked.real[:, :-1], None)
        self._shares = can_be_shared(memory)
        return memory if self._shares else None

    def _asked(
        self, asked: Beginnings, rows: Tensor, tokens: Tensor, mask: Tensor, memory: Any, *, values: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """What the model expected in the place of each token of the rows' completions, ``(B, T, V)``, and with
        ``values`` what its critic expected of the text before that token, float32 ``(B, T)``.
        """
        own, count = asked.own[rows], tokens.shape[1]
        text = torch.cat([asked.tokens[own], tokens[:, :-1]], 1)  # nobody asks what follows the last token
        attended = torch.cat([asked.real[own], mask[:, :-1]], 1)
        if (longest := int((asked.real[own].sum(1) + mask.sum(1)).max())) > self.context:
            raise InputError(
                f"prompt and completion have {longest} tokens together; {self.name} can read {self.context}"
            )
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        start = 0 if memory is None else asked.tokens.shape[1] - 1
        with self._precise():
            answer = self.model(
                input_ids=text[:, start:], attention_mask=attended.long(), position_ids=positions[:, start:],
                past_key_values=None if memory is None else picked(memory, own), use_cache=memory is not None,
                logits_to_keep=count, output_hidden_states=values,
            )  # fmt: skip
        if not values:
            return answer.logits, None
        assert self.value_head is not None
        return answer.logits, self.value_head(answer.hidden_states[-1][:, -count:].float())[..., 0]

    def reference(self) -> AbstractContextManager[None]:
        """See Policy: adapters off, or the frozen copy when every weight is trained."""
        if self.adapter:
            return self._adapters_off()
        return self._swapped() if self._frozen is not None else nullcontext()

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        assert isinstance(self.model, PeftModel)
        before, self._bare = self._bare, True
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self._bare = before

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        trained = self.model
        self.model = self._frozen
        try:
            yield
        finally:
            self.model = trained

    # -- what is trained --------------------------------------------------------------------------------------------

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """See Policy."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.value_head is not None:
            found |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return found

    def save(self, run: Path) -> Path:
        """See Policy. The adapter loads with PEFT, the full model with ``AutoModelForCausalLM``."""
        place = run / ("adapter" if self.adapter else "model")
        with new_folder(place) as folder:
            if self.adapter:
                # Otherwise PEFT asks the hub whether the vocabulary has grown.
                self.model.save_pretrained(folder, save_embedding_layers=False)
            else:
                self.model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        return place
