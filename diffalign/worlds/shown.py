"""What a world shows of its own prompts: demonstrations, where nobody made any."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffalign.types import Prompt, Sample
from diffalign.worlds import brain_mr, emoji, findings

CAREFUL = findings.Style(jargon=0.3, verbosity=0.3)
"""How a writer is thought to write who shows how it is done: all that is said is right, and fairly plain."""


def _findings(prompt: Prompt, seed: int) -> Sample:
    return Sample(prompt, text=findings.realise(prompt.attributes, seed, CAREFUL), seed=seed)


def _emoji(prompt: Prompt, seed: int) -> Sample:
    return Sample(prompt, image=emoji.render(prompt.attributes, seed).image, seed=seed)


def _brain_mr(prompt: Prompt, seed: int) -> Sample:
    return Sample(prompt, image=brain_mr.render(prompt.attributes, seed).image, seed=seed)


DEMONSTRATIONS: Mapping[str, Callable[[Prompt, int], Sample]] = {
    "findings": _findings, "emoji": _emoji, "brain-mr": _brain_mr,
}  # fmt: skip
"""By the name of a world: a prompt of it as it should be answered, the same for the same seed. ConfigError for a prompt
of another world."""
