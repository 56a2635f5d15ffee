"""What is wrong with a protocol, in a sentence for each field: what stands there, and what is allowed."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

LONGEST_SHOWN = 60
KINDS: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "up to {}"), ("lt", "below {}"))


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One for each mistake, in the order of the fields."""
    return list(dict.fromkeys(_sentence(detail, model) for detail in error.errors()))


def not_yaml(error: Exception, text: str) -> str:
    """Line, column and reason in one line, of what PyYAML raises; both are counted from 1."""
    if isinstance(error, yaml.reader.ReaderError):
        # Of a text it has the number of the character, and how many stand before it.
        line, column = _place(text, error.position)
        return f"line {line}, column {column}: the character U+{int(error.character):04X} may not stand there"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, begun = error.problem_mark, error.context_mark
    reason = " ".join(str(error.problem).split()).replace("'<stream end>'", "the end of the file")
    if error.context:
        where = f" that begins in line {begun.line + 1}" if begun and begun.line != mark.line else ""
        reason += f" ({' '.join(error.context.split())}{where})"
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}"


def _place(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    if detail["type"] == "invalid_key":
        return f"{_shown(detail['input'])} is no name of a field"
    path = list(detail["loc"])
    where = _dotted(path)
    if detail["type"] == "value_error":
        return (f"{where}: " if where else "") + str(detail["msg"]).removeprefix("Value error, ")
    owner, field = _owner(path, model)
    if detail["type"] == "extra_forbidden":
        return f"there is no field {where}; {_near(str(path[-1]), owner)}"
    if detail["type"] == "missing":
        return f"the field {where} is missing; it is {allowed(owner, field)}"
    if not field:
        return f"{where} is {_shown(detail['input'])}; it is made of the fields {', '.join(owner.model_fields)}"
    return f"{where} is {_shown(detail['input'])}; it is {_of(path, owner, field)}"


def allowed(model: type[BaseModel], field: str) -> str:
    """What may stand in a field, in words."""
    info = model.model_fields[field]
    words = _kind(info.annotation)
    bounds = []
    for rule in info.metadata:
        if getattr(rule, "min_length", 0):
            words += " that is not empty"
        bounds += [text.format(f"{getattr(rule, name):g}") for name, text in BOUNDS if hasattr(rule, name)]
    return " ".join([words, *bounds])


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"{', '.join(map(str, inner[:-1]))} or {inner[-1]}"
    if origin in (types.UnionType, typing.Union):
        return _kind(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return "a list of texts" if inner[0] is str else "a list of questions, each with a name and a question"
    return KINDS.get(annotation, "another one")


def _owner(path: list[int | str], model: type[BaseModel]) -> tuple[type[BaseModel], str]:
    """The model that a field is of, and the field; empty where the path ends at a whole model."""
    field = ""
    for part in path:
        if isinstance(part, int):
            inner = get_args(model.model_fields[field].annotation)[0]
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model, field = inner, ""
        else:
            field = part
    return model, field


def _of(path: list[int | str], owner: type[BaseModel], field: str) -> str:
    """What may stand in the field, or in one place of its list."""
    return "a text" if isinstance(path[-1], int) else allowed(owner, field)


def _near(name: str, owner: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, owner.model_fields, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(owner.model_fields)}"


def _dotted(path: list[int | str]) -> str:
    """``criteria[1].anchors``: places are counted from 1, as people do."""
    return "".join(_parts(path)).removeprefix(".")


def _parts(path: list[int | str]) -> Iterator[str]:
    for part in path:
        yield f"[{part + 1}]" if isinstance(part, int) else f".{part}"


def _shown(value: object) -> str:
    text = "empty" if value in (None, "") else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
