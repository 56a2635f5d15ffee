"""Trains ``embedded:findings-lm``: a small causal language model that writes a text for a row of the findings world.

``python -m pipelines.embedded.findings_lm --work build/work --out build/findings-lm``

A Llama in transformers' own format with a byte-level BPE tokenizer, trained from scratch on ``findings.example``: texts
that are flawed on purpose, as that module says. What it reads is ``<bos>``, the prompt, the text, ``<eos>``; the loss
counts the tokens of the text and ``<eos>`` only. The chat template writes the same, so a chat of one question is the
plain prompt.

Shape legend: ``B`` texts in a batch, ``T`` tokens of the longest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffalign.seeds import derive
from diffalign.worlds import findings

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CONTEXT = 256
VOCABULARY = 1000
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'].rstrip() }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""A question ends with a line break, an answer with ``<eos>``."""
IGNORED = -100
"""The label of a token that the loss does not count."""
HELD_BACK = 10**9
"""Examples from this seed on are for measuring: no training text has one of their seeds."""


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens, three of them special; any text can be written in it."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """1.1 M parameters: four layers of width 128, the embedding shared with the output."""
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(settings)


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[findings.Example]) -> list[tuple[list[int], int]]:
    """The tokens of each example, and how many of them are the prompt's."""
    questions = tokenizer([example.prompt.text for example in examples])["input_ids"]
    answers = tokenizer([example.text for example in examples], add_special_tokens=False)["input_ids"]
    eos = [tokenizer.eos_token_id]
    return [(question + answer + eos, len(question)) for question, answer in zip(questions, answers, strict=True)]


def collate(rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 ``(B, T)``, padded on the right (the mask of a causal model then needs no padding)."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
    return ids, labels


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats a token, of the labelled tokens."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != IGNORED  # the output layer is a fifth of the work: only where it counts
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), labels[:, 1:][kept])


class Trainer:
    """State, one step, and files."""

    def __init__(self, work: Path, count: int) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        examples = [findings.example(derive(0, "findings-lm", i) % HELD_BACK) for i in range(count)]
        self.tokenizer = build_tokenizer([e.prompt.text + e.text for e in examples[:8000]])
        self.rows = encode(self.tokenizer, examples)
        torch.manual_seed(0)
        self.model = build_model(len(self.tokenizer))
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
        self.steps = 0

    def step(self, batch: int, rate: float) -> float:
        """One update at learning rate ``rate``; returns the loss. Step ``n`` sees the same texts in every run."""
        self.optimiser.param_groups[0]["lr"] = rate
        loss = loss_of(self.model, *collate(self._batch(batch)))
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.steps += 1
        weight = 1 - min(0.998, 1 - 10 / (self.steps + 9))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)
        return float(loss.detach())

    def _batch(self, batch: int) -> list[tuple[list[int], int]]:
        """One of four batches that share a draw, sorted by length, so that little of a batch is padding."""
        chosen = torch.Generator().manual_seed(derive(0, "findings-lm-batch", self.steps // 4))
        drawn = torch.randint(len(self.rows), (4 * batch,), generator=chosen).tolist()
        place = int(torch.randperm(4, generator=chosen)[self.steps % 4]) * batch
        drawn.sort(key=lambda i: len(self.rows[i][0]))
        return [self.rows[i] for i in drawn[place : place + batch]]

    def checkpoint(self) -> None:
        """Writes everything that continues the training, whole or not at all."""
        path = self.work / "checkpoint-findings-lm.pt"
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self) -> None:
        """Continues from the last checkpoint, where there is one."""
        path = self.work / "checkpoint-findings-lm.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        self.average, self.steps = state["average"], state["steps"]
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self, out: Path) -> None:
        """Writes the averaged weights as a transformers folder in half precision; a README that is there stays."""
        averaged = build_model(len(self.tokenizer))
        for parameter, value in zip(averaged.parameters(), self.average, strict=True):
            parameter.data.copy_(value)
        averaged.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        averaged.to(torch.float16).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        template = out / "chat_template.jinja"
        settings = json.loads((out / "tokenizer_config.json").read_text())
        settings["chat_template"] = TEMPLATE
        template.unlink(missing_ok=True)
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        config = json.loads((out / "config.json").read_text())
        config["dtype"] = "float32"  # half precision is for the file only; transformers would compute in it
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @torch.inference_mode()
    def measure(self, count: int = 256) -> float:
        """The mean loss of the averaged weights on texts that were not trained on, in nats a token."""
        averaged = build_model(len(self.tokenizer))
        for parameter, value in zip(averaged.parameters(), self.average, strict=True):
            parameter.data.copy_(value)
        rows = encode(self.tokenizer, [findings.example(HELD_BACK + i) for i in range(count)])
        losses = [float(loss_of(averaged, *collate(rows[i : i + 32]))) for i in range(0, count, 32)]
        return sum(losses) / len(losses)


def train(trainer: Trainer, out: Path, steps: int, batch: int, rate: float) -> None:
    """Trains to so many steps: a short warm-up, then a cosine to a fiftieth of the rate."""
    losses: list[float] = []
    saved = started = time.monotonic()
    while trainer.steps < steps:
        fall = 0.5 * (1 + math.cos(math.pi * trainer.steps / steps))
        losses.append(trainer.step(batch, rate * min((trainer.steps + 1) / 100, 0.02 + 0.98 * fall)))
        if trainer.steps % 100 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {trainer.steps} minute {minutes:.1f} loss {sum(losses) / len(losses):.4f}", flush=True)
            losses.clear()
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            trainer.checkpoint()
    trainer.checkpoint()
    trainer.save(out)
    print(f"loss on other texts {trainer.measure():.4f} nats a token", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/work"))
    parser.add_argument("--steps", type=int, default=2000, help="about 200 a minute on one core")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--texts", type=int, default=60000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    job = Trainer(arguments.work, arguments.texts)
    job.resume()
    train(job, arguments.out, arguments.steps, arguments.batch, arguments.rate)
