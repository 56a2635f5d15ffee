"""The fields of a configuration as plain data: read from YAML, changed by ``--set``, and where each of them stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import ConfigError, NotFoundError


def fields_of(path: Path, overrides: Sequence[str], example: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of a YAML file with the overrides, and where each of them stands. ``example`` is for a message."""
    if not path.is_file():
        raise NotFoundError(f"no configuration file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text, so it is no configuration file") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is of a date that does not exist
        line, problem = _found(error, text)
        where = str(path) if line is None else f"{path}:{line + 1}"
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of fields, such as '{example}'")
    origin = {field: f"{path}:{line}" for field, line in _lines(node).items()}
    for override in overrides:
        _override(data, override, origin)
    return data, origin


def standing_at(dotted: str, origin: Mapping[str, str]) -> str:
    """Where a dotted field stands, with a colon, for the start of a message; empty if that is not known."""
    while dotted and dotted not in origin:
        dotted = dotted.rpartition(".")[0]
    return f"{origin[dotted]}: " if dotted else ""


def as_mapping(value: object) -> object:
    """A reward that is given by its name alone, as its fields."""
    return {"reward": value} if isinstance(value, str) else value


def _override(data: dict[str, Any], override: str, origin: dict[str, str]) -> None:
    """Changes one field of plain data, as ``--set A.B=C`` says; ``origin`` is told where it came from."""
    field, equals, value = override.partition("=")
    if not equals or not field.strip():
        raise ConfigError(f"--set {override}: write it as field=value, such as trainer.epochs=20")
    keys = field.strip().split(".")
    target: Any = data
    for i, key in enumerate(keys[:-1]):
        if isinstance(target, list):
            index = _index(key, target, override)
            target[index] = target = as_mapping(target[index])
        else:
            inner = target.get(key)
            target[key] = inner = {} if inner is None else inner
            target = inner
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: i + 1])} is a value, it has no fields")
    parsed = _value(value, override)
    if isinstance(target, list):
        target[_index(keys[-1], target, override)] = parsed
    else:
        target[keys[-1]] = parsed
    dotted = ".".join(keys)
    stood = origin.get(dotted)
    for below in [name for name in origin if name.startswith(f"{dotted}.")]:
        del origin[below]  # what stood in the file there is gone
    origin[dotted] = f"--set {override}" + (f" (in place of {stood})" if stood else "")


def _value(text: str, override: str) -> Any:
    """A value as YAML reads it; text that is no YAML stands for itself, unless it was meant as a list or mapping."""
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        if not text.lstrip().startswith(("[", "{")):
            return text
        try:
            return yaml.safe_load(_QUESTION.sub(r'"\g<0>"', text))
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(
                f"--set {override}: not valid YAML: {_problem(error)}; quote each text, as in"
                """ --set 'rewards=["brain-mr-checker?graded=true"]'"""
            ) from None
    # YAML 1.1 reads 1e-4 as text: it wants a dot before the exponent.
    if isinstance(parsed, str):
        with suppress(ValueError):
            return float(parsed)
    return parsed


_QUESTION = re.compile(r"""(?<![^\s\[{,])[^\s\[\]{},'"?]+\?[^\s\[\]{},'"]+""")
"""An unquoted reward with arguments: inside brackets YAML takes its question mark for a sign of its own."""


def _found(error: Exception, text: str) -> tuple[int | None, str]:
    """The line, from 0, and what YAML found wrong there. A field without its colon it finds only a line later."""
    mark, problem = getattr(error, "problem_mark", None), _problem(error)
    if mark is None:
        return None, problem
    if getattr(error, "context", None) == "while scanning a simple key":
        return error.context_mark.line, problem  # type: ignore[attr-defined]
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)  # what YAML counts as ends of lines
    if problem in _AFTER_A_SLIP and ":" not in lines[mark.line][: mark.column]:
        above = [i for i, line in enumerate(lines[: mark.line]) if line.partition("#")[0].strip()]
        if above and _NO_COLON.fullmatch(lines[above[-1]].partition("#")[0]):
            return above[-1], "could not find expected ':'"
    return mark.line, problem


_AFTER_A_SLIP = ("mapping values are not allowed here", "expected <block end>, but found '<block mapping start>'")
"""What YAML says of a field after one without its colon, which it took for the begin of a text."""
_NO_COLON = re.compile(r"\s*[A-Za-z_]\w*\s+(?!.*:(\s|$)).+")


def _problem(error: Exception) -> str:
    """What YAML found wrong, in its own words."""
    return str(getattr(error, "problem", None) or error).partition("\n")[0]


def _index(key: str, items: list[Any], override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(f"--set {override}: {key!r} is not an index from 0 to {len(items) - 1}")


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """The 1-based line of every dotted field below a YAML node."""
    lines: dict[str, int] = {}
    children: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, value, key.start_mark.line) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), value, value.start_mark.line) for i, value in enumerate(node.value)]
    for key, value, line in children:
        lines[f"{prefix}{key}"] = line + 1
        lines |= _lines(value, f"{prefix}{key}.")
    return lines
