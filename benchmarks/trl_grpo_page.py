"""The page of the GRPO comparison, from its recorded results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.markdown import grid, paragraph, where

Results = Mapping[str, Any]
BUSY = 1.1
"""Wall over processor seconds above which something else had the processor."""
PARTS = ("generation", "reward", "learning", "step")
ALSO = {"one reading of each prompt": ", which also keeps finished texts"}
"""What goes with a saving when it is left out."""


def clock(results: Results) -> str:
    """``wall``, or ``cpu`` where the machine was not quiet: then processor seconds say what a side costs."""
    steps = [a["parts"]["step"] for s in results["settings"] for side in s["steps"].values() for a in side]
    return "wall" if all(step["wall"] <= BUSY * step["cpu"] for step in steps) else "cpu"


def seconds(answers: Sequence[Results], part: str, by: str) -> float:
    """Median seconds of a part of a step."""
    return median(answer["parts"][part][by] for answer in answers)


def rate(answer: Results, part: str, by: str) -> float:
    """Sampled tokens per second of that part."""
    return float(answer["tokens"] / answer["parts"][part][by])


def ratio(setting: Results, part: str, by: str) -> float:
    """Our tokens per second over TRL's, in each round; the median of the rounds."""
    rounds = zip(setting["steps"]["trl"], setting["steps"]["diffalign"], strict=True)
    return median(rate(ours, part, by) / rate(trl, part, by) for trl, ours in rounds)


def table(setting: Results, by: str) -> str:
    """One setting: rates and seconds of both sides, and how much faster ours is."""
    rows = []
    for part in ("generation", "learning", "step"):
        trl, ours = (median(rate(a, part, by) for a in setting["steps"][side]) for side in ("trl", "diffalign"))
        label = "whole step" if part == "step" else part
        bold = "**" if part == "step" else ""
        factor = f"{bold}{ratio(setting, part, by):.2f}{bold}"
        rows.append((f"{label}, tokens per second", f"{trl:,.0f}", f"{ours:,.0f}", factor))
    for part in PARTS:
        trl, ours = (seconds(setting["steps"][side], part, by) for side in ("trl", "diffalign"))
        rows.append((f"{'whole step' if part == 'step' else part}, seconds", f"{trl:.2f}", f"{ours:.2f}", ""))
    trl, ours = (max(a["peak_mb"] for a in setting["steps"][side]) for side in ("trl", "diffalign"))
    rows.append(("peak memory, MB", f"{trl:,.0f}", f"{ours:,.0f}", f"{trl / ours:.2f}"))
    trl, ours = (setting["ready"][side]["loaded_mb"] for side in ("trl", "diffalign"))
    rows.append(("of it loaded before the first step, MB", f"{trl:,.0f}", f"{ours:,.0f}", ""))
    return grid(("", "TRL", "diffalign", "times better"), rows)


def worth(savings: Results, by: str) -> str:
    """What a step costs without each of our savings."""
    rows = []
    for name, answers in savings.items():
        label = "without " + name + ALSO.get(name, "") if name else "everything"
        base = seconds(savings[""], "step", by)
        found = [seconds(answers, part, by) for part in ("generation", "learning", "step")]
        rows.append((label, *(f"{value:.2f}" for value in found), f"{found[-1] / base:.2f}" if name else ""))
    return grid(("our side", "generation, s", "learning, s", "whole step, s", "times"), rows)


def page(results: Results) -> str:
    """The page as Markdown."""
    by, setup = clock(results), results["setup"]
    first, second = results["settings"]
    samples, ready = setup["prompts"] * setup["group"], first["ready"]["trl"]
    quiet = "wall seconds" if by == "wall" else "processor seconds, because other work shared the machine"
    parts = [
        "# GRPO against TRL's GRPOTrainer",
        paragraph(
            f"Written by `make bench-grpo` on {results['date']}; every number is in"
            " [results/trl_grpo.json](results/trl_grpo.json)."
        ),
        paragraph(
            f"**A whole step is {ratio(first, 'step', by):.2f} times as fast as TRL's** with a KL to the reference, and"
            f" {ratio(second, 'step', by):.2f} times without one, in {quiet}."
        ),
        paragraph(
            f"A step samples {samples} texts of `embedded:findings-lm` ({ready['parameters']:,} parameters with the"
            f" adapter, {ready['trainable']:,} of them trained), {setup['group']} of each of {setup['prompts']}"
            f" prompts, at most {setup['max_new_tokens']} tokens each; scores them with `findings-gold`; and makes"
            f" {samples // setup['batch']} updates of {setup['batch']} texts each. Both sides have the same model,"
            f" prompts in the same order, reward, LoRA (rank {setup['rank']}, all linear layers), AdamW with rate"
            f" {setup['learning_rate']:g}, gradient clipping, clip range {setup['clip_range']}, loss (GRPO: mean over a"
            " text's tokens, then over texts; rewards over the group's standard deviation), float32, and no activation"
            " checkpointing. Checkpoints and logs are off."
        ),
        f"## With a KL to the reference: coefficient {first['kl']:g}, estimator k3",
        table(first, by),
        "## Without one, which is TRL's default",
        table(second, by),
        "## Where the time goes",
        worth(first["savings"], by),
        paragraph(
            "*Generation* is the drawing of tokens. *Learning* is everything else but the reward: the likelihoods of"
            " what was drawn, asked again before the first update on both sides, those of the reference, forward,"
            " backward and optimiser. Ours reads each prompt once for all samples of its group, in sampling and in"
            " learning, with the gradient through it; lets finished texts leave the batch; samples with the adapters"
            " added into the weights; and asks about texts of like length together, so that little padding is computed."
            " All four change results by rounding only; where prompts are not shared,"
            " finished texts stay as well. TRL also computes the entropy of every token, which it logs."
        ),
        paragraph(
            "A row's ratio is that of the two sides within one round (A B, B A), and the median of the rounds. Rates"
            " count sampled tokens, because each side learns from its own samples and their lengths drift apart. Peak"
            " memory is the largest resident size of the process, libraries and all."
        ),
        "## Conditions",
        paragraph(where(results["machine"], ready["versions"])),
    ]
    return "\n\n".join(parts) + "\n"
