"""The findings world: texts about rows of the brain-mr world, as a report says it or as a patient is told.

A prompt is a row as text and a task::

    row: plane=axial; contrast=T2; level=ventricles; lesion=present; side=left; size=large
    task: findings

``findings`` asks for a sentence or two of a report, which name plane, contrast, level, and the lesion with its side and
size, or that there is none. ``explain`` asks for an explanation that a patient understands; plane and contrast need not
be in it. The attributes of a prompt are the row's and the ``task``.

The rows, and which of them are held out, are those of ``diffalign.worlds.brain_mr``: 135 rows, 270 prompts.

``example`` draws what the base model is trained on. It is imperfect on purpose, so that there is something to align:
``FLAWED`` of the texts get a fact wrong, leave one out or invent one, and length and jargon vary from text to text,
whatever the row and the task. What is consistent and easy to read can therefore be learned without getting longer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from diffalign.errors import ConfigError
from diffalign.seeds import derive
from diffalign.types import Prompt
from diffalign.worlds import brain_mr, findings_grammar

Task = Literal["findings", "explain"]
Attributes = Mapping[str, object]

TASKS: tuple[Task, ...] = ("findings", "explain")
FIELDS = brain_mr.FIELDS
FLAWED = {"once": 0.35, "twice": 0.10}
"""Shares of the training texts with one flaw and with two."""
KINDS: tuple[str, ...] = ("wrong", "missing", "invented")
KIND_SHARES = (0.5, 0.25, 0.25)
"""How often a flaw is of each kind."""
REFERENCE_DRAWS = 32


@dataclass(frozen=True)
class Style:
    """How a text is written, whatever it says."""

    jargon: float = 0.5
    """Probability, in [0, 1], that a word is a radiologist's rather than a plain one."""
    verbosity: float = 0.5
    """Inclination, in [0, 1], to say more than is asked for."""

    def __post_init__(self) -> None:
        for name in ("jargon", "verbosity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is in [0, 1]")


@dataclass(frozen=True)
class Flaw:
    """One thing that is not as the row has it."""

    kind: str
    """``wrong``, ``missing`` or ``invented``."""
    field: str = ""
    """Which fact: one of ``FIELDS``, or ``signal`` (the brightness of the lesion); empty for ``invented``."""


@dataclass(frozen=True)
class Example:
    """A prompt and a text that answers it, more or less."""

    prompt: Prompt
    text: str
    flaws: tuple[Flaw, ...]
    style: Style


def prompts(
    split: Literal["train", "held-out"], n: int, seed: int = 0, *, task: Literal["all", "findings", "explain"] = "all"
) -> list[Prompt]:
    """``n`` distinct prompts of one side of the split, in an order drawn from ``seed``.

    The first prompts of a longer list are those of a shorter one.
    """
    if split not in ("train", "held-out"):
        raise ConfigError(f"unknown split {split!r}; there are 'train' and 'held-out'")
    if task not in ("all", *TASKS):
        raise ConfigError(f"unknown task {task!r}; there are 'all', {', '.join(map(repr, TASKS))}")
    rows = [row for row in brain_mr.combinations() if brain_mr.is_held_out(row) == (split == "held-out")]
    pool = [(row, one) for row in rows for one in TASKS if task in ("all", one)]
    if not 0 <= n <= len(pool):
        raise ConfigError(f"{n} distinct prompts asked for; split {split!r} of task {task!r} has {len(pool)}")
    order = np.random.default_rng(derive(seed, "findings-prompts", split, task)).permutation(len(pool))
    return [prompt(*pool[i]) for i in order[:n].tolist()]


def prompt(row: Attributes, task: Task) -> Prompt:
    """The prompt for a row and a task."""
    facts = validate({**row, "task": task})
    shown = "; ".join(f"{name}={value}" for name, value in facts.items() if name != "task")
    name = brain_mr.slug(_row(facts)).replace("brain-mr", task, 1)
    return Prompt(f"row: {shown}\ntask: {task}\n", name, facts)


def parse(text: str) -> dict[str, str] | None:
    """The attributes of a prompt's text, or None where it is not one; spacing does not matter."""
    found = re.fullmatch(r"\s*row:([^\n]*)\n\s*task:\s*(\w+)\s*", text)
    if not found:
        return None
    cells = [cell.partition("=") for cell in found[1].split(";")]
    names = [name.strip() for name, _, _ in cells]
    if len(set(names)) < len(names):
        return None
    try:
        return validate({**dict(zip(names, (value.strip() for _, _, value in cells), strict=True)), "task": found[2]})
    except ConfigError:
        return None


def validate(attributes: Attributes) -> dict[str, str]:
    """Row and task in canonical order, or a ConfigError that says what is wrong with them. The level may be missing."""
    task = attributes.get("task")
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; there are {', '.join(TASKS)}")
    return {**brain_mr.validate(_row(attributes)), "task": str(task)}


def is_held_out(attributes: Attributes) -> bool:
    """Whether the row belongs to the held-out quarter, whatever the task."""
    return brain_mr.is_held_out(_row(attributes))


def realise(attributes: Attributes, seed: int, style: Style | None = None, flaws: Sequence[Flaw] = ()) -> str:
    """A text for these attributes, the same for the same seed; without ``flaws`` all that it says is right."""
    facts, style = validate(attributes), style or Style()
    rng = np.random.default_rng(derive(seed, "findings-text"))
    said = _said(facts, flaws, np.random.default_rng(derive(seed, "findings-flaws")))
    voice = findings_grammar.Voice(rng, style.jargon, style.verbosity)
    return findings_grammar.WRITERS[facts["task"]](said, voice)


def example(seed: int, *, held_out: bool | None = None) -> Example:
    """A random training text, the same for the same seed.

    ``held_out=None`` draws from all rows (training the base model), False and True from one side of the split. Every
    row has a lesion with the probability ``brain_mr.LESION_SHARE``.
    """
    rng = np.random.default_rng(derive(seed, "findings-example"))
    row = _draw(rng)
    while held_out is not None and brain_mr.is_held_out(row) != held_out:
        row = _draw(rng)
    task = TASKS[int(rng.integers(len(TASKS)))]
    style = Style(float(rng.random()), float(rng.random()))
    flaws = draw_flaws({**row, "task": task}, rng)
    asked = prompt(row, task)
    return Example(asked, realise(asked.attributes, derive(seed, "text"), style, flaws), flaws, style)


def draw_flaws(attributes: Attributes, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """No flaw, one or two, as often as ``FLAWED`` says; two are never of the same fact."""
    facts = validate(attributes)
    chance = rng.random()
    count = 2 if chance < FLAWED["twice"] else 1 if chance < FLAWED["twice"] + FLAWED["once"] else 0
    fields = [name for name in FIELDS if name in facts]
    if facts["task"] == "explain":  # the plane and the contrast need not be there
        fields = [name for name in fields if name not in ("plane", "contrast")]
    found: list[Flaw] = []
    while len(found) < count:
        kind = KINDS[int(rng.choice(len(KINDS), p=KIND_SHARES))]
        names = [*fields, "signal"] if kind == "wrong" and facts["lesion"] == "present" else fields
        flaw = Flaw(kind, "" if kind == "invented" else names[int(rng.integers(len(names)))])
        if flaw.field not in {other.field for other in found}:
            found.append(flaw)
    return tuple(found)


def reference_words(attributes: Attributes) -> float:
    """The mean number of words of flawless texts of this row and task, over all styles: the length not to exceed."""
    return _reference_words(tuple(validate(attributes).items()))


@cache
def _reference_words(items: tuple[tuple[str, str], ...]) -> float:
    facts, counts = dict(items), []
    for draw in range(REFERENCE_DRAWS):
        jargon, verbosity = np.random.default_rng(derive(draw, "findings-reference", *facts.values())).random(2)
        text = realise(facts, derive(draw, "findings-reference"), Style(float(jargon), float(verbosity)))
        counts.append(len(text.split()))
    return float(np.mean(counts))


def _said(facts: Mapping[str, str], flaws: Sequence[Flaw], rng: np.random.Generator) -> findings_grammar.Said:
    """The facts as the flaws leave them."""
    said = {name: value for name, value in facts.items() if name != "task"}
    signal = findings_grammar.BRIGHTNESS[facts["contrast"]]
    invented = False
    for flaw in flaws:
        if flaw.kind == "invented":
            invented = True
        elif flaw.kind == "missing":
            said.pop(flaw.field)
        elif flaw.field == "signal":
            signal = "dark" if signal == "bright" else "bright"
        elif flaw.field == "lesion":
            said |= _other_lesion(facts, rng)
        else:
            others = [value for value in _values(facts["plane"])[flaw.field] if value != facts[flaw.field]]
            said[flaw.field] = others[int(rng.integers(len(others)))]
    if said.get("lesion") != "present":
        said = {name: value for name, value in said.items() if name not in ("side", "size")}
    stressed = signal != findings_grammar.BRIGHTNESS[facts["contrast"]]
    return findings_grammar.Said(said, signal, stressed, invented)


def _other_lesion(facts: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    if facts["lesion"] == "present":
        return {"lesion": "none"}
    sides = brain_mr.SIDES[facts["plane"]]
    drawn = {"side": sides[int(rng.integers(2))], "size": brain_mr.SIZES[int(rng.integers(2))]}
    return {"lesion": "present", **drawn}


def _values(plane: str) -> dict[str, tuple[str, ...]]:
    return {
        "plane": brain_mr.PLANES,
        "contrast": brain_mr.CONTRASTS,
        "level": brain_mr.LEVELS[plane],
        "side": brain_mr.SIDES[plane],
        "size": brain_mr.SIZES,
    }


def _draw(rng: np.random.Generator) -> dict[str, str]:
    """A row, with a lesion as often as in ``brain_mr.scene``."""
    present = bool(rng.random() < brain_mr.LESION_SHARE)
    pool = [row for row in brain_mr.combinations() if (row["lesion"] == "present") == present]
    return pool[int(rng.integers(len(pool)))]


def _row(attributes: Attributes) -> dict[str, object]:
    return {name: value for name, value in attributes.items() if name != "task"}
