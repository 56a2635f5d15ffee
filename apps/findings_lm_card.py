"""Measures ``embedded:findings-lm`` and writes its card: ``python -m apps.findings_lm_card``.

It writes ``docs/models/findings-lm.md`` and the folder's ``README.md``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffalign.evaluation import mean_interval
from diffalign.runs import write_text
from diffalign.seeds import derive
from diffalign.types import Prompt, Sample, Scores
from diffalign.worlds import findings
from pipelines.embedded.findings_lm import HELD_BACK, collate, encode, loss_of
from rewards.registry import load as load_reward

FOLDER = Path(__file__).parent.parent / "pipelines" / "embedded" / "findings-lm"
PAGE = Path(__file__).parent.parent / "docs" / "models" / "findings-lm.md"
SHOWN = 4
TRAINED = (
    "The shipped weights are of 2000 steps in several goes; in the first 700 the learning rate fell as for 3200"
    "\nsteps. One go from nothing gives another model of its kind."
)
"""How the shipped weights differ from what the command makes."""
LONGEST = 128
"""Most tokens of a text."""


def write(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, prompts: Sequence[Prompt], seed: int) -> list[str]:
    """One text for each prompt at temperature 1; a text that does not end in ``LONGEST`` tokens is cut there."""
    torch.manual_seed(derive(seed, "findings-lm-card"))
    asked = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True)
    made = model.generate(**asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LONGEST)
    texts: list[str] = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def perplexity(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, examples: Sequence[findings.Example]) -> float:
    """Exponential of the mean negative log-likelihood of a token of the texts, ``<eos>`` included."""
    rows, nats, count = encode(tokenizer, examples), 0.0, 0
    for start in range(0, len(rows), 32):
        ids, labels = collate(rows[start : start + 32])
        kept = int((labels >= 0).sum())
        nats, count = nats + float(loss_of(model, ids, labels)) * kept, count + kept
    return float(np.exp(nats / count))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different sequences of ``n`` words by all of them, over all texts together (Li et al. 2016)."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams)


def row(label: str, scores: torch.Tensor, groups: Sequence[str], *, share: bool = True) -> str:
    """A line of the table: the mean with a bootstrap interval over prompts, and how many texts were judged."""
    values = scores.double().numpy()
    known = np.isfinite(values)
    _, index = np.unique(np.asarray(groups)[known], return_inverse=True)
    found = mean_interval(values[known], index)
    low, high = found["ci95"]
    shown = [f"{value:.1%}" if share else f"{value:.2f}" for value in (found["mean"], low, high)]
    return f"| {label} | {shown[0]} [{shown[1]}, {shown[2]}] | {int(known.sum())} |"


def table(samples: Sequence[Sample]) -> str:
    """What the texts of one task reach."""
    groups = [sample.prompt.key for sample in samples]
    checked, gold = load_reward("findings-checker")(samples), load_reward("findings-gold")(samples)
    easy: Scores = load_reward("readability")(samples)
    lines = ["| | mean, 95 % interval | texts |", "|---|---|---|", row("consistent: total", checked.total, groups)]
    lines.append(row("wholly consistent texts", (checked.total == 1).float(), groups))
    lines += [row(f"— {name}", checked.parts[name], groups) for name in findings.FIELDS]
    lines.append(row("— invented things a text", checked.parts["invented"], groups, share=False))
    lines.append(row("Flesch reading ease", easy.total, groups, share=False))
    lines.append(row("words", easy.parts["words"], groups, share=False))
    lines.append(row("`findings-gold`", gold.total, groups, share=False))
    texts = [sample.text or "" for sample in samples]
    lines += [f"| distinct-{n} | {distinct(texts, n):.3f} | {len(texts)} |" for n in (1, 2, 3)]
    return "\n".join(lines)


def card(draws: int) -> str:
    """The text of the card."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    held_out = findings.prompts("held-out", 66)
    samples = [
        Sample(prompt, text=text, seed=draw)
        for draw in range(draws)
        for prompt, text in zip(held_out, write(model, tokenizer, held_out, draw), strict=True)
    ]
    tables = {task: table([s for s in samples if s.prompt.attributes["task"] == task]) for task in findings.TASKS}
    others = [findings.example(HELD_BACK + i, held_out=True) for i in range(1024)]
    flawless = [one for one in others if not one.flaws]
    shown = "\n\n".join(
        f"```text\n{sample.prompt.text}```\n\n> {sample.text}" for sample in samples[:SHOWN]
    )  # the first, whatever they are
    size = (FOLDER / "model.safetensors").stat().st_size / 1e6
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"""# embedded:findings-lm, findings and explanations from a table row

A causal language model in transformers' own format (`LlamaForCausalLM`): {count / 1e6:.2f} M parameters in four
layers of width 128, a context of 256 tokens, and a byte-level BPE tokenizer of {len(tokenizer)} tokens with distinct
`<pad>`, `<bos>` and `<eos>`; {size:.1f} MB in half precision. `AutoModelForCausalLM` and `AutoTokenizer` load the
folder as it is. The chat template of a single question writes the plain prompt, so both ways of asking are the same.

**Trained on** 60,000 texts drawn by `diffalign.worlds.findings.example`, the loss on the texts alone, by
`make embedded-findings-lm` from scratch. The texts are **flawed on purpose**: {findings.FLAWED["once"]:.0%} get one
thing wrong, leave it out or invent it, {findings.FLAWED["twice"]:.0%} two, and length and jargon vary freely. The model
writes as it was taught. That is the room for alignment: [the world](../findings-world.md) says how much there is.
{TRAINED}

## Measured

At temperature 1 on the 66 held-out prompts, {draws} texts each, judged by [`findings-checker`](../text-rewards.md);
95 % intervals by bootstrap over prompts. Base training drew from all rows, held-out ones included: the split is for
alignment. `python -m apps.findings_lm_card` repeats it.

### `task: findings`

{tables["findings"]}

### `task: explain`

{tables["explain"]}

Perplexity a token on texts of held-out rows that training did not see: {perplexity(model, tokenizer, others):.2f} as
drawn ({len(others)} texts), {perplexity(model, tokenizer, flawless):.2f} on the flawless ones ({len(flawless)}).

## What it writes

The first {SHOWN} texts of the measurement, none left out:

{shown}

## What it cannot do

It knows 135 rows, two tasks and the few hundred words of its world; anything else gives nonsense. It is for developing
methods. It is no medical device, says nothing about any patient, and must not be shown to one.

## Licence

Apache-2.0. It contains no material of others: every text was written by this project's own grammar.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=8, help="texts for each prompt")
    text = card(parser.parse_args().draws)
    write_text(PAGE, text)
    write_text(FOLDER / "README.md", re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", text))
