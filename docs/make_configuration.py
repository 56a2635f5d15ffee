"""Writes docs/configuration.md from the configuration's own fields: ``python docs/make_configuration.py``.

With ``--check`` nothing is written, and the exit status is 1 if the page is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pages import publish
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

<!-- Written by `make docs` from the fields themselves; change their docstrings, not this page. -->

A run is one YAML file. `--set trainer.epochs=40` sets any field of it from the command line, `--dry-run` shows what
comes of both, and every run keeps the whole of it in its `config.yaml`. What is misspelt is refused with the nearest
name, and what has no effect with the chosen method is refused, too.

## A model of your own

```yaml
# own.yaml: a local diffusers folder or a hub id, a function of your own, a prompt a line
model: ./my-model
rewards: ["my_reward.py:score"]
prompts: {source: prompts.txt, train: 64, held_out: 32}
adapter: {rank: 16, alpha: 16}
sampler: {steps: 20, guidance_scale: 5.0, batch_size: 8}
objective: {name: ppo-clip}
credit: {rule: group}
trainer:
  epochs: 20
  samples_per_epoch: 128
  samples_per_prompt: 8
  batch_size: 64
  micro_batch_size: 8
  gradient_checkpointing: true
evaluation: {rewards: [clip], seeds_per_prompt: 2, every: 5}
precision: bf16
```

```sh
diffalign align own.yaml --dry-run      # what it would do, and about how much memory it needs
diffalign align own.yaml --out runs/own
```

A reward that is only measured (`evaluation.rewards`) is what tells over-optimisation from improvement: name one that
the model is not trained on. [Which method](objectives/index.md), [which machine](which.md).
"""
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping"}


def sections(kind: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a configuration with its dotted name, the whole first; one that comes again is left out."""
    yield path, kind
    for name, field in kind.model_fields.items():
        for inner in inside(field.annotation):
            if not path.startswith("warm_up") and not (path == "" and name == "rewards"):
                yield from sections(inner, f"{path}.{name}".lstrip("."))
            elif path == "":
                yield f"{name}[]", inner


def inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation has in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from inside(argument)


def values(annotation: Any, bounds: str = "") -> str:
    """What can stand there, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(arguments[0], bounded(arguments[1:]))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        some = [values(argument, bounds) for argument in arguments if argument is not NoneType]
        return ", or ".join([*some, *(["null"] if NoneType in arguments else [])])
    if origin is list:
        return f"list of: {values(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return PLAIN[origin or annotation] + (f" {bounds}" if bounds else "")


def bounded(metadata: Any) -> str:
    """The bounds among what pydantic knows of a number."""
    flat = [part for one in metadata for part in getattr(one, "metadata", [one])]
    found = [text.format(f"{getattr(part, name):g}") for part in flat for name, text in BOUNDS.items()
             if isinstance(getattr(part, name, None), int | float)]  # fmt: skip
    return " and ".join(found)


def default(field: FieldInfo) -> str:
    """What a field is where it is not given."""
    value = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "**needed**"
    if isinstance(value, BaseModel):
        return "as below"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def plain(text: str) -> str:
    """A docstring in one line of Markdown."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`").replace("|", "\\|")


def table(path: str, kind: type[BaseModel]) -> str:
    """The fields of a section."""
    rows = ["| field | values | default | |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        full = f"{path}.{name}".lstrip(".")
        about = plain(field.description or "")
        if not about and list(inside(field.annotation)):
            about = f"[below](#{anchor(full)})"
        rows.append(f"| `{full}` | {values(field.annotation, bounded(field.metadata))} | {default(field)} | {about} |")
    return "\n".join(rows)


def anchor(title: str) -> str:
    """As the site makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


def objectives() -> str:
    """What each objective's own fields are where they are not given."""
    from diffalign.methods import BACKPROP, LEARNS_FROM, ObjectiveConfig

    rows = ["| `objective.name` | learns from | of images | of texts |", "|---|---|---|---|"]
    for name, sources in LEARNS_FROM.items():
        cells = []
        for reduction in ("mean", "sum"):
            try:
                found = ObjectiveConfig.model_validate({"name": name, "reduction": reduction}).model_dump()
            except ValueError:
                found = None
            if found is None or (name in BACKPROP and reduction == "sum"):
                cells.append("not for texts")
                continue
            own = [f"{field} {value}" for field, value in found.items()
                   if value is not None and field not in ("name", "reduction")]  # fmt: skip
            cells.append(", ".join(own) or "none")
        rows.append(f"| `{name}` | {', '.join(f'`{source}`' for source in sources)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    from diffalign.config import RunConfig

    parts = [HEAD]
    for path, kind in sections(RunConfig):
        title = f"`{path}`" if path else "All of it"
        about = plain((kind.__doc__ or "").split("\n\n")[0])
        if path == "rewards[]":
            about += " `--set rewards.0.weight=2` sets a field of the first, `--set 'rewards=[clip]'` all of them."
        parts.append(f"## {title}\n\n{about}\n\n{table(path, kind)}\n")
        if path == "objective":
            parts.append(f"What is null above is, for each objective:\n\n{objectives()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(publish(PAGE, page, str(__doc__)))
