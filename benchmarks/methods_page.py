"""The page of the comparison of methods, from its recorded results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from benchmarks.markdown import grid, paragraph, where

Results = Mapping[str, Any]


def page(results: Results) -> str:
    """The page as Markdown."""
    methods = results["methods"]
    parts = [
        "# Methods compared: one task, one budget",
        paragraph(
            "Written by `make bench-methods` on"
            f" {results['date']}; every number is in [results/methods.json](results/methods.json)."
        ),
        paragraph(
            f"**The task.** Simulated raters judge {results['judgements']} pairs of the samples of"
            f" `{results['base']['model']}` (lesions as asked for, and taste). Each method learns from those"
            " judgements, or from as many fresh ones, and never sees what the raters go by. `hidden utility` is just"
            " that: the mean of the raters' noise-free utilities. `checker` is the accuracy over what the prompt asks"
            " for, which is a part of that utility; CLIP is neither. Held-out prompts, the same prompts and seeds"
            " before and after; differences with 95 % intervals that resample prompts."
        ),
        grid(
            ("", "hidden utility", "checker", "win rate by utility", "CLIP", "diversity kept"),
            [_gains(method) for method in methods],
        ),
        paragraph(f"Before training: {_before(methods[0]['evaluation'])}."),
        grid(
            ("", "judgements", "denoiser calls", "processor", "distance (step KL)", "alarm"),
            [_price(method) for method in methods],
        ),
        paragraph(
            "*Denoiser calls* are of training, on one image each, a backward pass counted as two calls; *processor* is"
            " the whole command, with fitting, evaluation and report. The two methods on a fitted reward fit it to the"
            " same judgements first. *Alarm*: whether a measure that was not trained on got clearly worse, or"
            " diversity fell below 80 %."
        ),
        paragraph(
            "One seed, one task, one small model, and hyperparameters that were chosen on this task: read it as what"
            " the recipes do, not as a ranking of ideas."
        ),
        "## Settings",
        "\n\n".join(f"{m['name']}:\n\n```yaml\n{_yaml(m['configuration'])}```" for m in methods),
        "## Conditions",
        paragraph(where(results["machine"], results["versions"])),
    ]
    return "\n\n".join(parts) + "\n"


def _gains(method: Results) -> tuple[str, ...]:
    evaluation = method["evaluation"]
    rewards, win = evaluation["rewards"], evaluation["win_rate"]
    utility = rewards["hidden-utility"]["difference"]
    if win["by"] != "hidden-utility":
        rate = "–"
    else:
        rate = f"{win['value']:.0%} ({win['ci95'][0]:.0%} to {win['ci95'][1]:.0%})"
    before, after = (evaluation["diversity"][side] for side in ("before", "after"))
    return (
        method["name"], _difference(utility, 3), _difference(rewards["brain-mr-checker"]["difference"], 3), rate,
        _difference(rewards["clip"]["difference"], 3), f"{after / before:.0%}",
    )  # fmt: skip


def _difference(found: Results, digits: int) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _before(evaluation: Results) -> str:
    names = {"hidden-utility": "hidden utility", "brain-mr-checker": "checker", "clip": "CLIP"}
    return ", ".join(f"{label} {evaluation['rewards'][name]['before']['mean']:.3f}" for name, label in names.items())


def _price(method: Results) -> tuple[str, ...]:
    evaluation = method["evaluation"]
    return (
        method["name"], f"{method['judgements']:,}", f"{method['work']:,}",
        f"{method['seconds']['processor'] / 60:.1f} min", f"{evaluation['distance']['step_kl']:.1e}",
        "yes" if evaluation["verdict"]["alarm"] else "no",
    )  # fmt: skip


def _yaml(configuration: Results) -> str:
    text: str = yaml.safe_dump(dict(configuration), sort_keys=False, default_flow_style=None, width=100)
    return text
