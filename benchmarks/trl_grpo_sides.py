"""The two workers of the GRPO comparison: diffalign, and TRL's GRPOTrainer.

``python -m benchmarks.trl_grpo_sides SIDE KL THREADS`` answers each line on standard input with one line about one step
on standard output. A step samples ``SETUP.samples`` texts, scores them, and makes ``SETUP.updates`` updates.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.measuring import Numbers, Stopwatch, describe, peak_mb, serve

MODEL = "embedded:findings-lm"
SAVINGS = (
    "one reading of each prompt",
    "letting finished texts go",
    "adapters in the weights",
    "texts of one length together",
)
"""What our side saves, each of which a step can do without."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides are given."""

    prompts: int = 16
    group: int = 8
    max_new_tokens: int = 72
    batch: int = 64
    """Texts behind an optimiser update, all in one pass."""
    rank: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    clip_range: float = 0.2

    @property
    def samples(self) -> int:
        """Texts of a step."""
        return self.prompts * self.group

    @property
    def updates(self) -> int:
        """Optimiser updates of a step."""
        return self.samples // self.batch


SETUP = Setup()


def world() -> tuple[list[Any], Any]:
    """The prompts, in order, and the reward of both sides."""
    from diffalign import prompts
    from diffalign.config import PromptsConfig
    from rewards.registry import load

    train, _ = prompts.load(PromptsConfig(source="findings", train=192, held_out=60), 0)
    return train, load("findings-gold")


class Diffalign:
    """Our side: the public pieces of the trainer over a language policy."""

    def __init__(self, kl: float) -> None:
        from diffalign.config import AdapterConfig, CreditConfig, GenerationConfig, ObjectiveConfig, TrainerConfig
        from diffalign.experience import Rollouts
        from diffalign.trainer import Trainer
        from pipelines.language import LanguagePolicy
        from pipelines.loading import load_policy

        self.prompts, self.reward = world()
        loaded = load_policy(
            MODEL, adapter=AdapterConfig(rank=SETUP.rank, alpha=SETUP.rank, targets="all"),
            generation=GenerationConfig(max_new_tokens=SETUP.max_new_tokens, batch_size=SETUP.samples),
        )  # fmt: skip
        self.policy = cast(LanguagePolicy, loaded)
        estimator = {"kl_estimator": "k3"} if kl else {}
        self.trainer = Trainer(
            self.policy,
            Rollouts(self.reward, self.prompts),
            settings=TrainerConfig(
                samples_per_epoch=SETUP.samples, samples_per_prompt=SETUP.group, batch_size=SETUP.batch,
                micro_batch_size=SETUP.batch, learning_rate=SETUP.learning_rate, weight_decay=SETUP.weight_decay,
                max_grad_norm=SETUP.max_grad_norm,
            ),
            objective=ObjectiveConfig.model_validate(
                {
                    "name": "ppo-clip", "reduction": "sum", "aggregation": "sample-mean", "kl_coefficient": kl,
                    "clip_range": SETUP.clip_range, **estimator,
                }
            ),
            credit=CreditConfig(rule="group"),
        )  # fmt: skip
        self.model: nn.Module = self.policy.model

    def first_prompt(self) -> list[int]:
        """Tokens of the first prompt, as the model is shown it."""
        return self.policy._prompt(self.prompts[0])

    @contextmanager
    def lacking(self, saving: str | None) -> Iterator[None]:
        """Without one of ``SAVINGS``, to see what it is worth."""
        from pipelines import language, prefixes

        changes: dict[str | None, tuple[object, str, object]] = {
            SAVINGS[0]: (self.policy, "_shares", False),
            SAVINGS[1]: (language, "KEPT", -1.0),
            SAVINGS[2]: (language, "folded", lambda model: nullcontext(False)),
            SAVINGS[3]: (prefixes, "PIECES", 1),
        }
        with patch.object(*changes[saving]) if saving else nullcontext():
            yield

    def step(self, watch: Stopwatch) -> Numbers:
        """One step in timed parts. The likelihoods of what was sampled are a part of learning, on both sides."""
        from diffalign.experience import Scored

        trainer, inner, generate = self.trainer, Stopwatch(), self.policy._generate

        def timed(*given: Any) -> Any:
            with inner("generation"):
                return generate(*given)

        first = trainer.epoch * SETUP.prompts
        numbers = [(first + k) % len(self.prompts) for k in range(SETUP.prompts)]
        with watch("learning"), patch.object(self.policy, "_generate", timed):
            rollout = trainer.sample([self.prompts[i] for i in numbers for _ in range(SETUP.group)])
        with watch("reward"):
            scores = self.reward(rollout.samples)
        with watch("learning"):
            trainer.update(trainer.lesson(Scored(rollout, scores)))
        trainer.epoch += 1
        _move(inner.parts, watch, "learning")
        return {"tokens": int(rollout.mask.sum()), **_said(scores.total)}


class Trl:
    """The other side: TRL's GRPOTrainer. It runs in a thread of its own that waits after each step."""

    def __init__(self, kl: float) -> None:
        from datasets import Dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]  # only where TRL is
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found,unused-ignore]

        from pipelines.loading import load_language_model

        self.prompts, self.reward = world()
        self.by_text = {prompt.text: prompt for prompt in self.prompts}
        self.last, self.watch, self.total = torch.zeros(0), Stopwatch(), 0
        model, self.tokenizer = load_language_model(MODEL)
        config = GRPOConfig(
            output_dir="build/bench-trl-grpo/out", use_cpu=True, bf16=False, gradient_checkpointing=False,
            num_generations=SETUP.group, max_completion_length=SETUP.max_new_tokens, temperature=1.0, top_k=0,
            per_device_train_batch_size=SETUP.batch, gradient_accumulation_steps=1, steps_per_generation=SETUP.updates,
            num_iterations=1, beta=kl, epsilon=SETUP.clip_range, loss_type="grpo", scale_rewards="group",
            use_bias_correction_kl=False, shuffle_dataset=False, learning_rate=SETUP.learning_rate,
            lr_scheduler_type="constant", weight_decay=SETUP.weight_decay, max_grad_norm=SETUP.max_grad_norm,
            max_steps=10**6, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        side, self.go, self.done = self, threading.Semaphore(0), threading.Semaphore(0)

        class Waits(TrainerCallback):  # type: ignore[misc,unused-ignore]
            def on_train_begin(self, *given: Any, **named: Any) -> None:
                side.go.acquire()

            def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
                if state.global_step % SETUP.updates == 0:
                    side.done.release()
                    side.go.acquire()

        self.trainer = GRPOTrainer(
            model=model, reward_funcs=[self._score], args=config, processing_class=self.tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt.text} for prompt in self.prompts]),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=SETUP.rank, lora_alpha=SETUP.rank, target_modules="all-linear",
                init_lora_weights="gaussian",
            ),
            callbacks=[Waits()],
        )  # fmt: skip
        self.model: nn.Module = self.trainer.model
        generate, calculate = self.trainer._generate, self.trainer._calculate_rewards

        def timed_generate(*given: Any, **named: Any) -> Any:
            with self.watch("generation"):
                return generate(*given, **named)

        def timed_rewards(*given: Any, **named: Any) -> Any:
            with self.watch("reward"):
                return calculate(*given, **named)

        self.trainer._generate, self.trainer._calculate_rewards = timed_generate, timed_rewards
        self.failure: BaseException | None = None
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:  # told to whoever waits for the step
            self.failure = failure
            self.done.release()

    def _score(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        from diffalign.types import Sample

        samples = [Sample(self.by_text[p], text=c) for p, c in zip(prompts, completions, strict=True)]
        self.last = self.reward(samples).total
        self.total = sum(len(ids) for ids in columns["completion_ids"])
        return cast(list[float], self.last.tolist())

    def first_prompt(self) -> list[int]:
        """See Diffalign."""
        return cast(list[int], self.tokenizer(self.prompts[0].text).input_ids)

    def step(self, watch: Stopwatch) -> Numbers:
        """See Diffalign."""
        self.watch = Stopwatch()
        with watch("learning"):
            self.go.release()
            self.done.acquire()
        if self.failure is not None:
            raise self.failure
        _move(self.watch.parts, watch, "learning")
        return {"tokens": self.total, **_said(self.last)}


def _said(rewards: torch.Tensor) -> Numbers:
    return {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}


def _move(parts: Mapping[str, Mapping[str, float]], watch: Stopwatch, outer: str) -> None:
    """Takes parts that were timed inside of another out of it."""
    for part, seconds in parts.items():
        watch.parts[part] = dict(seconds)
        for clock, value in seconds.items():
            watch.parts[outer][clock] -= value


def build(name: str, kl: float) -> tuple[Numbers, Callable[[Numbers], Numbers]]:
    """A side: what it is, and its answer to a request."""
    torch.manual_seed(0)
    side = Diffalign(kl) if name == "diffalign" else Trl(kl)
    ready = describe(side.model) | {"first_prompt": side.first_prompt()}

    def answer(request: Numbers) -> Numbers:
        watch, saving = Stopwatch(), request.get("without")
        with side.lacking(saving) if isinstance(side, Diffalign) else nullcontext():
            said = side.step(watch)
        return {"parts": watch.parts, "peak_mb": peak_mb(), **said}

    return ready, answer


if __name__ == "__main__":
    serve(int(sys.argv[3]), lambda: build(sys.argv[1], float(sys.argv[2])))
