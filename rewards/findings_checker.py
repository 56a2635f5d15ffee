"""``findings-checker``: does a text say what its row says, and nothing else?

It reads any text by fixed rules (``findings_reader``) and looks at the prompt's row: the attributes, or the prompt's
text where it has none. No model is in it, and nothing is learned.

A text that says the same twice, both sides, both sizes, or that a lesion is there and is not, earns nothing by that.
Whether the text is good English is not judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from diffalign.errors import ConfigError, InputError
from diffalign.types import Modality, Prompt, Sample, Scores
from diffalign.worlds import brain_mr, findings
from rewards.everything import EVERYTHING, everything
from rewards.findings_reader import Reading, read

PARTS = (*brain_mr.FIELDS, "invented")
_BRIGHTNESS = {"T1": "dark", "T2": "bright", "FLAIR": "bright"}
_FORM = (
    ": a text gives its row as 'row: plane=...; contrast=...; lesion=...', on the next line 'task: findings' or 'task:"
    " explain'"
)
_LOBES = {"anterior": "frontal lobes", "posterior": "occipital lobes"}
"""What *the front* and *the back* of the brain are on a coronal slice, which is cut there."""


class FindingsChecker:
    """Share of right facts among those that the row asks for and those that the text gets wrong or adds.

    Asked for are level and lesion, side and size where there is a lesion, and in a report (``task`` is ``findings``)
    plane and contrast. Elsewhere a plane or contrast counts only if it is wrong, so that nothing is gained by naming
    it. Each thing that the row does not have (swelling, a second lesion, a diameter, a repeated sentence) counts as one
    more wrong fact::

        total = right / (asked + wrong though not asked + invented)
    """

    name = "findings-checker"
    modality: Modality = "text"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = True
    directions: ClassVar[Mapping[str, bool | None]] = {"invented": False}

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Accuracy ``(B,)`` over the facts; NaN for a sample without a text (an empty text is 0).

        The parts are 1 (right), 0 (wrong or missing) or NaN (not asked for and not said) for each fact; ``invented`` is
        the number of things that are not in the row, ``everything`` is 1 where nothing is wrong. InputError where a
        prompt has no complete row.
        """
        total = torch.full((len(samples),), math.nan)
        parts = {name: torch.full((len(samples),), math.nan) for name in PARTS}
        for i, sample in enumerate(samples):
            row, task = row_of(sample.prompt)
            if sample.text is None:
                continue
            facts, invented = judge(read(sample.text), row, task)
            for name, right in facts.items():
                parts[name][i] = float(right)
            parts["invented"][i] = invented
            total[i] = accuracy(facts, invented, row, task)
        return Scores(total, {**parts, EVERYTHING: everything(total)})


def accuracy(facts: Mapping[str, bool], invented: int, row: Mapping[str, str], task: str) -> float:
    """The total of one text, from what ``judge`` says of it."""
    needed = asked(row, task)
    counted = [right for name, right in facts.items() if name in needed or not right]
    return sum(counted) / (len(counted) + invented)


def asked(row: Mapping[str, str], task: str) -> set[str]:
    """The facts that a text about this row has to give."""
    return set(row) - (set() if task == "findings" else {"plane", "contrast"})


def row_of(prompt: Prompt) -> tuple[dict[str, str], str]:
    """The row of a prompt and its task (empty where it has none); InputError names the columns that are missing."""
    given: Mapping[str, object] = prompt.attributes or _read(prompt.text)
    row = {name: given[name] for name in brain_mr.FIELDS if name in given}
    needed = ["plane", "contrast", "lesion", *(["side", "size"] if row.get("lesion") == "present" else [])]
    if missing := [name for name in needed if name not in row]:
        raise InputError(
            f"findings-checker needs a row with {', '.join(brain_mr.FIELDS)}; the prompt {prompt.key[:80]!r} lacks"
            f" {', '.join(missing)}{'' if prompt.attributes else _FORM}"
        )
    try:
        return brain_mr.validate(row), str(given.get("task", ""))
    except ConfigError as error:
        raise InputError(f"the row of the prompt {prompt.key[:80]!r} cannot be checked: {error}") from None


def _read(text: str) -> Mapping[str, object]:
    """The row that a prompt's text gives, also where row and task stand on one line; empty where it gives none."""
    found = findings.parse(text)
    if found is None and "\n" not in text.strip() and text.count("task:") == 1:
        found = findings.parse(re.sub(r"[\s;,]*\btask:", "\ntask:", text))
    return found or {}


def judge(reading: Reading, row: Mapping[str, str], task: str = "") -> tuple[dict[str, bool], int]:
    """Per fact that is asked for or said whether it is right, and how many things are not in the row."""
    level, side, invented = set(reading.level), set(reading.side), set(reading.invented)
    if row["plane"] == "coronal":
        level |= {_LOBES[found] for found in side & set(_LOBES)}
        side -= set(_LOBES)
    if strange := side - set(brain_mr.SIDES[row["plane"]]):
        side -= strange
        invented.add("a side that cannot be seen")
    said = {"plane": set(reading.plane), "contrast": set(reading.contrast), "level": level}
    facts = {
        name: said[name] == {row[name]} and (name, row[name]) not in reading.denied
        for name in said
        if name in row and (said[name] or name in asked(row, task))
    }
    if "level" not in row and level:
        invented.add("a level")
    present = reading.present and not reading.absent
    if row["lesion"] == "present":
        facts["lesion"] = present
        facts["side"] = present and side == {row["side"]} and row["side"] not in reading.normal_sides
        facts["size"] = present and reading.size == {row["size"]}
        for name in ("side", "size"):
            facts[name] = facts[name] and (name, row[name]) not in reading.denied
        if reading.signal - {_BRIGHTNESS[row["contrast"]]}:
            invented.add("the wrong brightness")
    else:
        facts["lesion"] = reading.absent and not (reading.present or reading.doubtful)
        invented |= {f"a {what}" for what, found in (("side", side), ("size", reading.size)) if found}
    return facts, len(invented) + reading.repeats
