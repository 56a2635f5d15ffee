"""Sample images of a run: ``RUN/samples/``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from diffalign import images, shares
from diffalign.evaluation import Evaluation
from diffalign.processes import Processes
from diffalign.runs import disk_errors, write_text
from diffalign.seeds import derive
from diffalign.types import Policy, Prompt, Rollout, Sample

SHOWN = 64
"""Pairs that are kept as files."""
COLUMNS = 8


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    seed: int,
    on_progress: Callable[[str, int, int], None],
    processes: Processes,
) -> list[Rollout]:
    """One image a prompt, at the first seed that the final evaluation uses; the processes share the work."""
    seeds = [derive(seed, "evaluation", prompt.key, 0) for prompt in prompts]

    def progress(done: int) -> None:
        on_progress("measuring", done, len(prompts))

    return shares.rollouts(processes, policy, prompts, seeds, progress)


def write_moment(path: Path, samples: Sequence[Sample], count: int = 32) -> None:
    """The first samples with their prompts: a grid of images (``.png``), or a list of texts (``.txt``)."""
    shown = samples[:count]
    pictures = [sample.image for sample in shown if sample.image is not None]
    with disk_errors(f"cannot write {path}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if pictures:
            prompts = [sample.prompt.text for sample in shown]
            images.save_png(images.grid(pictures, COLUMNS, prompts), path.with_name(f"{path.name}.png"))
    if not pictures:
        listed = "\n\n".join(f"{sample.prompt.text}\n{sample.text}" for sample in shown)
        write_text(path.with_name(f"{path.name}.txt"), listed + "\n")


def write_pairs(folder: Path, outcome: Evaluation) -> None:
    """Samples before and after at the same prompts and seeds, their scores, and an overview of each."""
    step = max(1, len(outcome.before) // SHOWN)
    shown = list(range(0, len(outcome.before), step))[:SHOWN]
    measure = outcome.measures[outcome.main]
    rows: list[dict[str, object]] = []
    with disk_errors(f"cannot write {folder}", folder):
        for side, all_samples in (("before", outcome.before), ("after", outcome.after)):
            picked = [all_samples[i] for i in shown]
            for number, sample in enumerate(picked):
                if sample.image is not None:
                    (folder / side).mkdir(parents=True, exist_ok=True)
                    images.save_png(sample.image, folder / side / f"{number:03d}.png")
            write_moment(folder / side, picked)
    for i in shown:
        before, after = float(measure.before[i]), float(measure.after[i])
        rows.append(
            {
                "prompt": outcome.before[i].prompt.text,
                "seed": outcome.before[i].seed,
                "before": before if math.isfinite(before) else None,
                "after": after if math.isfinite(after) else None,
            }
        )
        if outcome.before[i].text is not None:
            rows[-1] |= {"before_text": outcome.before[i].text, "after_text": outcome.after[i].text}
    write_text(folder / "prompts.json", json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
