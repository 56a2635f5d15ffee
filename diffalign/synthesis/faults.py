"""What pydantic finds wrong, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def made(kind: type[Model], data: Mapping[Any, Any]) -> Model:
    """A section from plain data; ValueError says in one sentence what is wrong in it."""
    try:
        return kind.model_validate({str(name): value for name, value in data.items()})
    except ValidationError as error:
        raise ValueError(first_of(error, kind)[1]) from None


def meant(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote this name may have meant: the nearest that there is, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names) or 'none'}"


def first_of(error: ValidationError, kind: type[BaseModel]) -> tuple[str, str]:
    """The dotted field that an error is about (empty for the whole), and the sentence.

    Of several errors it is the first unknown field, or else the first.
    """
    # A name that is spelt wrong is told before the one that is therefore missing.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields(path[:-1], kind)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"fields here: {', '.join(known)}"
        return ".".join(path), f"unknown field {'.'.join(path)}; {hint}"
    if first["type"] == "missing":
        return ".".join(path), f"the field {'.'.join(path)} is missing"
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {first['input']!r})"
    about = f"{'.'.join(path)}: " if path else ""
    return ".".join(path), f"{about}{reason[:1].lower()}{reason[1:]}{given}"


def _fields(path: Sequence[str], model: type[BaseModel]) -> list[str]:
    """The fields that there are where the path leads."""
    for part in path:
        if part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
