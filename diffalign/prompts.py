"""Where prompts come from: a world or list that ships with diffalign, or a file of one's own.

Training and held-out prompts never overlap: no text and no id is on both sides.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffalign.config import PromptsConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.seeds import derive
from diffalign.types import Prompt

log = logging.getLogger(__name__)

_ASSETS = Path(__file__).parent / "worlds" / "assets"
LISTS = {name: _ASSETS / f"{name}.txt" for name in ("animals", "explanations", "stories")}
"""Plain lists that ship with diffalign: common animals, as in the prompts of the DDPO paper; questions that take a
short explanation; first sentences of stories for children.
"""
WORLDS = {
    "emoji": "diffalign.worlds.emoji",
    "brain-mr": "diffalign.worlds.brain_mr",
    "findings": "diffalign.worlds.findings",
}


def load(config: PromptsConfig, seed: int, *, training: bool = True) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts. Where nobody asks for the former (``training``), fewer are enough, and none, too.

    Raises ConfigError for a file that has not so many, NotFoundError and InputError as ``read``.
    """
    if config.source in WORLDS:
        world = import_module(WORLDS[config.source])
        options = {} if config.task == "all" else {"task": config.task}
        return (
            world.prompts("train", config.train, seed, **options),
            world.prompts("held-out", config.held_out, seed, **options),
        )
    prompts = read(LISTS[config.source] if config.source in LISTS else Path(config.source).expanduser())
    if config.task != "all":
        raise ConfigError(f"prompts.task {config.task!r} is for worlds; a file of prompts has no tasks")
    needed = config.held_out + (config.train if training else 0)
    if needed > len(prompts):
        asked = f"prompts.train {config.train} and " if training else ""
        raise ConfigError(
            f"{config.source} has {len(prompts)} different prompts, but {asked}prompts.held_out {config.held_out}"
            f" {f'ask for {needed}' if training else 'asks for more'}"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(derive(seed, "split")))
    return _sides([prompts[i] for i in order.tolist()], config, config.train if training else 0)


def _sides(shuffled: Sequence[Prompt], config: PromptsConfig, least: int) -> tuple[list[Prompt], list[Prompt]]:
    """The first prompts are held out, and with them every other prompt of their cases."""
    held_out = list(shuffled[: config.held_out])
    cases = {prompt.attributes.get("case") for prompt in held_out} - {None}
    rest = [p for p in shuffled[config.held_out :] if p.attributes.get("case") not in cases]
    if len(rest) < least:
        raise ConfigError(
            f"{config.source}: {len(rest)} prompts are of no held-out case, and prompts.train asks for {config.train}"
        )
    return rest[: config.train], held_out


def read(path: Path) -> list[Prompt]:
    """The different prompts of a ``.txt`` file (one a line), a ``.jsonl`` file, or preferences (``.parquet``).

    A JSONL row has ``prompt``, and may have ``negative_prompt``, ``id`` and ``attributes``. Of rows with the same text
    (but for spaces and capitals) the first is taken, whatever their ids. Raises NotFoundError, or InputError with the
    line that is wrong; one id for two texts is.
    """
    if not path.is_file():
        known = ", ".join([*WORLDS, *LISTS])
        raise NotFoundError(
            f"no prompt file {path}; prompts.source is one of {known}, or a .txt, .jsonl or .parquet file"
        )
    texts: dict[str, Prompt] = {}
    lines: dict[str, tuple[int, str]] = {}
    for number, prompt in _numbered(path):
        same = plain(prompt.text)
        before, text = lines.setdefault(prompt.key, (number, same))
        if text != same:
            raise InputError(f"{path}:{number}: id {prompt.key!r} stands for another text in line {before}")
        first = texts.setdefault(same, prompt)
        if first is not prompt and (first.attributes, first.negative) != (prompt.attributes, prompt.negative):
            log.warning(f"{path}:{number}: left out, for the text is that of an earlier row with other attributes")
    if not texts:
        raise InputError(f"{path} has no prompt in it")
    return list(texts.values())


def _numbered(path: Path) -> Iterator[tuple[int, Prompt]]:
    """The prompts of a file with the line or row that each stands in."""
    if path.suffix == ".parquet":
        from diffalign.preferences import Table

        yield from enumerate(Table(path).prompts())
        return
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, _row(f"{path}:{number}", line) if path.suffix == ".jsonl" else Prompt(line.strip())


def of_images(folder: Path) -> dict[str, Prompt]:
    """The prompts of the images of a folder, by file name, from its ``prompts.jsonl`` or ``prompts.csv``.

    A row has ``file`` and ``prompt``, and in JSONL may have ``attributes``. Empty where there is neither file.
    """
    found = {}
    for path in (folder / "prompts.jsonl", folder / "prompts.csv"):
        lines = io.StringIO(_text(path) if path.is_file() else "")
        rows: Iterable[Any] = map(_object, lines) if path.suffix == ".jsonl" else csv.DictReader(lines)
        for number, row in enumerate(rows, 1 if path.suffix == ".jsonl" else 2):
            where = f"{path}:{number}"
            if not row or not isinstance(row.get("file"), str) or not isinstance(row.get("prompt"), str):
                raise InputError(f'{where}: a row needs "file" and "prompt"')
            attributes = _attributes(where, row) if path.suffix == ".jsonl" else {}
            found[row["file"]] = Prompt(row["prompt"], attributes=attributes)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def plain(text: str) -> str:
    """The text as it is compared: without the spaces and capitals that an encoder hardly sees."""
    return " ".join(text.split()).casefold()


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _row(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg}") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: a row needs a text under "prompt"')
    name, negative = row.get("id"), row.get("negative_prompt")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise InputError(f'{where}: "id" is a text or a whole number; got {name!r}')
    if negative is not None and not isinstance(negative, str):
        raise InputError(f'{where}: "negative_prompt" is a text; got {negative!r}')
    return Prompt(text, "" if name is None else str(name), _attributes(where, row), negative or "")


def _attributes(where: str, row: Mapping[str, Any]) -> dict[str, object]:
    found = row.get("attributes")
    if found is not None and not isinstance(found, dict):
        raise InputError(f'{where}: "attributes" is a mapping, such as {{"colour": "red"}}; got {found!r}')
    return found or {}
