"""Arguments of a reward as they are written in its name: ``clip?model=FOLDER&device=cuda``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from urllib.parse import unquote

from diffalign.errors import ConfigError


def split(spec: str) -> tuple[str, dict[str, str]]:
    """The name and the arguments, as text, of ``NAME`` or ``NAME?arg=value&…``.

    Percent escapes are read, so a value can hold ``&`` as ``%26``; a plus sign is a plus sign.
    """
    name, mark, query = spec.partition("?")
    arguments: dict[str, str] = {}
    for item in query.split("&") if mark else []:
        argument, equals, value = item.partition("=")
        if not (argument and equals):
            raise ConfigError(f"{spec!r}: {item!r} is not an argument; write {name}?arg=value&other=value")
        if argument in arguments:
            raise ConfigError(f"{spec!r} gives {argument} twice")
        arguments[argument] = unquote(value)
    return name, arguments


def typed(kind: type, arguments: Mapping[str, str], spec: str) -> dict[str, object]:
    """The arguments as the constructor of ``kind`` declares them, or a ConfigError naming what it takes."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    parameters = {
        name: parameter
        for name, parameter in _signature(kind).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for name in arguments:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1, cutoff=0.5)
            known = f"it takes {', '.join(parameters)}" if parameters else "it takes no arguments"
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{spec!r} has no argument {name!r}; {hint}{known}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ConfigError(f"{spec!r} needs the argument {name}; write {spec}{'&' if arguments else '?'}{name}=…")
    values: dict[str, object] = {}
    for name, text in arguments.items():
        wanted = parameters[name].annotation
        if wanted is inspect.Parameter.empty or isinstance(wanted, str):
            wanted = str
        try:
            values[name] = TypeAdapter[object](wanted).validate_strings(text)
        except PydanticUserError:
            raise ConfigError(f"{spec!r}: {name} cannot be written in a reward's name; set it in Python") from None
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ConfigError(f"{spec!r}: {name}={text!r} cannot be used: {why[:1].lower()}{why[1:]}") from None
    return values


def _signature(kind: type) -> inspect.Signature:
    try:
        return inspect.signature(kind, eval_str=True)
    except NameError:  # annotations that only type checkers can resolve stay strings
        return inspect.signature(kind)
